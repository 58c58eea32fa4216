"""The three operations of a codec-stream model that are worth a kernel, imported as `megaspeech.kernels`.

Each has a folder with `reference.py`, the plain torch it is defined by. `KERNELS` picks an implementation by the
config's `model.kernels`, explicitly: nothing falls back silently. No collectives and no modules here: an operation
takes this rank's rows and returns this rank's part.
"""

from dataclasses import dataclass
from types import ModuleType

from megaspeech.kernels.codebook_cross_entropy import reference as cross_entropy_reference
from megaspeech.kernels.depth_attention import reference as attention_reference
from megaspeech.kernels.stream_embedding import reference as embedding_reference


@dataclass(frozen=True)
class Kernels:
    """One implementation of every operation; each member is a module with a function of its own name."""

    stream_embedding: ModuleType
    depth_attention: ModuleType
    codebook_cross_entropy: ModuleType


KERNELS = {
    "reference": Kernels(
        stream_embedding=embedding_reference,
        depth_attention=attention_reference,
        codebook_cross_entropy=cross_entropy_reference,
    )
}
