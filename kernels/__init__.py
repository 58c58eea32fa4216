"""The three operations of a codec-stream model that are worth a kernel, imported as `megaspeech.kernels`.

Each has a folder: `reference.py`, the plain torch that defines it; `kernel.py`, Triton; `function.py`, the same
interface over the Triton kernel, with its gradient. `load_kernels` picks one by the config's `model.kernels`,
explicitly: nothing falls back silently. No collectives and no modules here: an operation takes this rank's rows and
returns this rank's part.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

IMPLEMENTATIONS = {"reference": "reference", "triton": "function"}
"""Module of each kernel's folder that holds an implementation."""


@dataclass(frozen=True)
class Kernels:
    """One implementation of every operation; each member is a module with a function of its own name."""

    stream_embedding: ModuleType
    depth_attention: ModuleType
    codebook_cross_entropy: ModuleType


def load_kernels(name: str) -> Kernels:
    """The implementation called `name`: "reference" or "triton".

    Raises:
        ValueError: "triton" where Triton is not installed, or cannot run.
    """
    module = IMPLEMENTATIONS[name]
    if name == "triton":
        import_module("megaspeech.kernels.launching").require_device()
    return Kernels(
        **{each: import_module(f"megaspeech.kernels.{each}.{module}") for each in Kernels.__dataclass_fields__}
    )
