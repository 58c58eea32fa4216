"""The three operations of a codec-stream model that are worth a kernel, imported as `megaspeech.kernels`.

Each has a folder: `reference.py`, the plain torch that defines it; `kernel.py`, Triton; `function.py`, the same
interface over the Triton kernel, with its gradient. `load_kernels` picks one by the config's `model.kernels`,
explicitly: nothing falls back silently. No collectives and no modules here: an operation takes this rank's rows and
returns this rank's part.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType


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
    return {"reference": _reference, "triton": _triton}[name]()


def _reference() -> Kernels:
    from megaspeech.kernels.codebook_cross_entropy import reference as codebook_cross_entropy
    from megaspeech.kernels.depth_attention import reference as depth_attention
    from megaspeech.kernels.stream_embedding import reference as stream_embedding

    return Kernels(stream_embedding, depth_attention, codebook_cross_entropy)


def _triton() -> Kernels:
    """Imported on demand, because Triton is optional."""
    from megaspeech.kernels.launching import require_device

    require_device()
    from megaspeech.kernels.codebook_cross_entropy import function as codebook_cross_entropy
    from megaspeech.kernels.depth_attention import function as depth_attention
    from megaspeech.kernels.stream_embedding import function as stream_embedding

    return Kernels(stream_embedding, depth_attention, codebook_cross_entropy)
