"""An image's last build step: everything is of the version that was asked for, and imports. It needs no GPU.

    docker run --rm --gpus all megaspeech python docker/smoke.py
    docker run --rm megaspeech-cpu python docker/smoke.py --cpu

Of the GPU image it also multiplies once by TransformerEngine and once by Apex, where there is a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

VERSIONS = Path(__file__).with_name("versions.env")
PACKAGES = {
    "TORCH": "torch",
    "MEGATRON_CORE": "megatron-core",
    "DALI": "nvidia-dali-cuda130",
    "MOSHI": "moshi",
}
"""Variables of versions.env and the packages whose versions they are."""
GPU_PACKAGES = {"TRANSFORMER_ENGINE": "transformer-engine"}
"""Likewise, of the GPU image alone."""
MODULES = (
    *("torch", "megatron.core", "nvidia.dali", "moshi.models", "triton", "pyopenjtalk", "pocketsphinx"),
    *("megaspeech.train", "megaspeech.training.trainer", "megaspeech.kernels"),
)
"""What the images are for."""
GPU_MODULES = (
    *("torch", "transformer_engine.pytorch", "fused_weight_gradient_mlp_cuda", "amp_C", "apex.optimizers"),
    *MODULES,
)
"""Those of the GPU image. torch comes first: it brings in the CUDA libraries that the others link to."""


def read_versions(path: Path = VERSIONS) -> dict[str, str]:
    """The variables of versions.env."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def version_faults(packages: Mapping[str, str], *, versions: Mapping[str, str]) -> list[str]:
    """Packages that are missing or of another version, a line each; a local part as in 1.0+cu130 does not count."""
    faults = []
    for variable, package in packages.items():
        try:
            found = metadata.version(package).partition("+")[0]
        except metadata.PackageNotFoundError:
            found = "not installed"
        print(f"{package} {found}")
        if found != versions[variable]:
            faults.append(f"{package}: {found}, versions.env asks for {variable}={versions[variable]}")
    return faults


def import_faults(modules: Iterable[str]) -> list[str]:
    """Modules that do not import, a line each."""
    faults = []
    for name in modules:
        try:
            importlib.import_module(name)
            print(f"import {name}")
        except (ImportError, OSError) as error:  # OSError: a library that is not found
            faults.append(f"import {name}: {error}")
    return faults


def multiply() -> None:
    """One product of TransformerEngine's and one of Apex's on the GPU; raises what they raise."""
    import fused_weight_gradient_mlp_cuda
    import torch
    import transformer_engine.pytorch as te

    x = torch.ones(16, 32, dtype=torch.bfloat16, device="cuda")
    te.Linear(32, 16, params_dtype=torch.bfloat16)(x).sum().backward()
    summed = torch.ones(32, 32, dtype=torch.float32, device="cuda")
    fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(x, x, summed)
    assert torch.all(summed == 17)
    print(f"products of TransformerEngine and Apex on {torch.cuda.get_device_name()}")


def main(arguments: list[str]) -> int:
    """Check; returns 1 where something is amiss."""
    parser = argparse.ArgumentParser(description="Whether an image has what it is for.")
    parser.add_argument("--cpu", action="store_true", help="the image is the CPU one")
    cpu = parser.parse_args(arguments).cpu
    packages, modules = (PACKAGES, MODULES) if cpu else (PACKAGES | GPU_PACKAGES, GPU_MODULES)
    faults = version_faults(packages, versions=read_versions()) + import_faults(modules)
    if not cpu and not faults:
        import torch

        if torch.cuda.is_available():
            multiply()
        else:
            print("skipped, there is no GPU: products of TransformerEngine and Apex")
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
