"""What a machine that trains needs no more of: packages of extras are imported where they are used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megaspeech.config.reading import tomllib

ROOT = Path(__file__).parents[2]
MODULES = {"nvidia-dali-cuda130": "nvidia.dali", "faiss-cpu": "faiss", "pyopenjtalk-plus": "pyopenjtalk"}
"""Import names that are not the packages' own."""
OTHERS = ("moshi", "sphn")
"""Installed without being named as dependencies."""
BLOCK = """
import importlib, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name in {blocked!r}:
            raise ModuleNotFoundError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
importlib.import_module({module!r})
"""


def optional_modules() -> set[str]:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = {package for extra in extras if extra not in ("gpu", "dev") for package in extras[extra]}
    return {MODULES.get(package, package.replace("-", "_")) for package in packages} | set(OTHERS)


@pytest.mark.parametrize(
    "module",
    ["megaspeech.train", "megaspeech.training.trainer", "megaspeech.training.recipes", "megaspeech.benchmarks.run"],
)
def test_training_imports_without_extras(module: str) -> None:
    blocked = optional_modules()
    assert {"faiss", "nvidia.dali", "transformers", "lhotse", "boto3", "espeakng_loader", "moshi"} <= blocked
    command = [sys.executable, "-W", "ignore", "-c", BLOCK.format(blocked=blocked, module=module)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
