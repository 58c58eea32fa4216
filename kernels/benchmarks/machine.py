"""What measured figures depend on: the device, versions, the commit."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def describe_machine(device: str, *, packages: Sequence[str]) -> dict[str, Any]:
    """Device, driver, versions of torch, CUDA and `packages`, and commit; None where it cannot be found out."""
    versions = {package.metadata["Name"]: package.version for package in metadata.distributions()}
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "driver": _said(driver) if device == "cuda" else None,
        **{name: versions.get(name) for name in ("torch", *packages)},
        "cuda": torch.version.cuda,
        "commit": _said(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]),
    }


def _said(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
