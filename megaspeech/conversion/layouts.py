"""Layouts that several formats share: what a rule may do with its tensors. See `rules`.

Axes: S sets of weights or streams, I and O width in and out, R rows of a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaspeech.config.schema import TransformerSection
from megaspeech.conversion.rules import Layout
from megaspeech.model.counting import padded_rows, used_rows

Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Same:
    """Any number of tensors as they are."""

    def to_foreign(self, native: Tensors) -> Tensors:
        """The same."""
        return native

    def to_native(self, foreign: Tensors) -> Tensors:
        """The same."""
        return foreign


@dataclass(frozen=True)
class Viewed:
    """One tensor in another shape, the numbers in the same order."""

    native: tuple[int, ...]
    foreign: tuple[int, ...]

    def to_foreign(self, native: Tensors) -> Tensors:
        """In the foreign shape."""
        return [native[0].view(self.foreign)]

    def to_native(self, foreign: Tensors) -> Tensors:
        """In the native shape."""
        return [foreign[0].view(self.native)]


@dataclass(frozen=True)
class Stacked:
    """One native `[S * I, O]` and S foreign `[O, I]`, as torch's Linear holds them."""

    num_sets: int

    def to_foreign(self, native: Tensors) -> Tensors:
        """S tensors."""
        return [weight_IO.T.contiguous() for weight_IO in native[0].unflatten(0, (self.num_sets, -1))]

    def to_native(self, foreign: Tensors) -> Tensors:
        """One tensor."""
        return [torch.cat([weight_OI.T for weight_OI in foreign])]


@dataclass(frozen=True)
class Unbound:
    """One native tensor and the foreign ones that its first axis counts."""

    def to_foreign(self, native: Tensors) -> Tensors:
        """Its slices."""
        return native[0].unbind(0)

    def to_native(self, foreign: Tensors) -> Tensors:
        """Stacked."""
        return [torch.stack(list(foreign))]


@dataclass(frozen=True)
class Joined:
    """Native tensors of so many rows each, and one foreign tensor of all rows."""

    rows: tuple[int, ...]

    def to_foreign(self, native: Tensors) -> Tensors:
        """One after the other."""
        return [torch.cat(list(native))]

    def to_native(self, foreign: Tensors) -> Tensors:
        """Cut."""
        return foreign[0].split(list(self.rows))


@dataclass(frozen=True)
class Cut:
    """One native tensor, and so many foreign ones of as many rows each."""

    num_parts: int

    def to_foreign(self, native: Tensors) -> Tensors:
        """The parts."""
        return native[0].chunk(self.num_parts)

    def to_native(self, foreign: Tensors) -> Tensors:
        """One after the other."""
        return [torch.cat(list(foreign))]


@dataclass(frozen=True)
class Table:
    """The packed table of several streams' embeddings, and one table a stream, its initial token's row the last.

    Rows that pad the packed table are nobody's: they are left out, and zero in the native table, as in a new model.
    """

    cardinalities: tuple[int, ...]

    def to_foreign(self, native: Tensors) -> Tensors:
        """A table a stream."""
        rows = [cardinality + 1 for cardinality in self.cardinalities]
        return native[0][: sum(rows)].split(rows)

    def to_native(self, foreign: Tensors) -> Tensors:
        """The packed one. Raises ValueError where a table has not the rows of its stream."""
        for table_RH, cardinality in zip(foreign, self.cardinalities, strict=True):
            if table_RH.shape[0] != cardinality + 1:
                raise ValueError(
                    f"a cardinality of {cardinality} needs {cardinality + 1} rows, not {table_RH.shape[0]}"
                )
        padding = padded_rows(self.cardinalities) - used_rows(self.cardinalities)
        return [torch.cat([*foreign, foreign[0].new_zeros(padding, foreign[0].shape[1])])]


@dataclass(frozen=True)
class GroupedQueries:
    """megatron-core's `linear_qkv`, by group its queries, its key, its value, and three tensors: queries, keys, values.

    `half_split`: the foreign side rotates the halves of a head against each other, as Llama does, not neighbours, so
    its rows of queries and keys are in another order.
    """

    num_attention_heads: int
    num_query_groups: int
    half_split: bool = False

    @classmethod
    def of(cls, shape: TransformerSection, *, half_split: bool = False) -> GroupedQueries:
        """Those of a transformer."""
        return cls(shape.num_attention_heads, shape.num_query_groups, half_split)

    def to_foreign(self, native: Tensors) -> Tensors:
        """Queries, keys, values; matrices or biases."""
        per_group = self.num_attention_heads // self.num_query_groups
        grouped = native[0].unflatten(0, (self.num_query_groups, per_group + 2, -1))
        query, key, value = (part.flatten(0, 1) for part in grouped.split([per_group, 1, 1], dim=1))
        if self.half_split:
            query, key = halves_of_pairs(query), halves_of_pairs(key)
        return [part.flatten(0, 1) for part in (query, key, value)]

    def to_native(self, foreign: Tensors) -> Tensors:
        """One tensor."""
        per_group = self.num_attention_heads // self.num_query_groups
        heads = (self.num_attention_heads, self.num_query_groups, self.num_query_groups)
        query, key, value = (part.unflatten(0, (count, -1)) for part, count in zip(foreign, heads, strict=True))
        if self.half_split:
            query, key = pairs_of_halves(query), pairs_of_halves(key)
        sizes = (per_group, 1, 1)
        grouped = [part.unflatten(0, (-1, size)) for part, size in zip((query, key, value), sizes, strict=True)]
        return [torch.cat(grouped, dim=1).flatten(0, 2)]


def halves_of_pairs(x: Tensor) -> Tensor:
    """`[heads, width, ...]` with RoPE's pairs side by side to one half of each pair after the other."""
    return x.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)


def pairs_of_halves(x: Tensor) -> Tensor:
    """The inverse of `halves_of_pairs`."""
    return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


class Chain:
    """Layouts one after the other, from the native side to the foreign one."""

    def __init__(self, *layouts: Layout) -> None:
        self.layouts = layouts

    def to_foreign(self, native: Tensors) -> Tensors:
        """Through all of them."""
        for layout in self.layouts:
            native = layout.to_foreign(native)
        return native

    def to_native(self, foreign: Tensors) -> Tensors:
        """Back through all of them."""
        for layout in reversed(self.layouts):
            foreign = layout.to_native(foreign)
        return foreign
