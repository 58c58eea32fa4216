"""The shapes that kernels are compiled, checked and timed at: of Moshi 7B, of the 8B reference run, of a 40B model."""

from __future__ import annotations

from dataclasses import dataclass

NUM_FRAMES = (4096, 16384, 65536)
"""Frames a GPU works on at once: microbatch times length."""


@dataclass(frozen=True)
class ModelShape:
    """What of a model the kernels see. `num_given` codebooks are heard, `num_codebooks` predicted."""

    name: str
    text_cardinality: int
    num_codebooks: int
    num_given: int
    cardinality: int
    hidden_size: int
    depth_hidden_size: int
    depth_heads: int

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """Tokens of each stream `[S]`."""
        return (self.text_cardinality,) + (self.cardinality,) * (self.num_codebooks + self.num_given)

    @property
    def delays(self) -> tuple[int, ...]:
        """Text and each speaker's first codebook undelayed, the others a frame late `[S]`."""
        own, given = ((0,) + (1,) * (count - 1) for count in (self.num_codebooks, self.num_given))
        return (0, *own, *given)

    @property
    def offsets(self) -> tuple[int, ...]:
        """First row of each stream in the packed table `[S]`."""
        return tuple(sum(self.cardinalities[:s]) + s for s in range(len(self.cardinalities)))

    @property
    def num_rows(self) -> int:
        """Rows of the packed table, padded to a multiple of 128 as the model pads them."""
        rows = sum(self.cardinalities) + len(self.cardinalities)
        return rows + -rows % 128


MODELS = (
    ModelShape("moshi-7b", 32000, 8, 8, 2048, 4096, 1024, 16),
    ModelShape("8b", 48000, 16, 16, 2048, 4096, 1024, 16),
    ModelShape("40b", 48000, 16, 16, 2048, 8192, 2048, 16),
)
