"""A model with more audio streams than it was trained with: one-way to duplex, 8 to 16 codebooks; and with fewer.

What a new stream starts from:

- a new codebook of the model's own: the last own codebook; its embedding, its weights in the depth transformer, its
  head, its delay. Where a schedule shares the depth transformer's weights, it goes on with the last set.
- a new given codebook: the last given one; in a model that heard nothing, the own codebook of the same number, because
  what a code means does not depend on who says it.
- the initial token of a new stream: rows of zeros.

So at first nothing changes: as long as the new streams hold zero tokens, the logits of the old ones are what they were.
With fewer streams the first ones of each side stay as they are, and the model no longer reads the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from megaspeech.config import Config, changed
from megaspeech.config.schema import StreamsSection
from megaspeech.conversion.deferred import Deferred
from megaspeech.conversion.layouts import Table
from megaspeech.conversion.stored import StoredModel


def grow_streams(
    model: StoredModel, *, num_codebooks: int | None = None, num_given_codebooks: int | None = None
) -> StoredModel:
    """The model with so many own and given codebooks, by the rules above; None leaves a number as it is.

    Raises:
        ValueError: there is nothing that new streams could start from, or no own codebook would be left.
    """
    old = model.config.streams
    own = old.num_codebooks if num_codebooks is None else num_codebooks
    given = old.num_given_codebooks if num_given_codebooks is None else num_given_codebooks
    if (own, given) == (old.num_codebooks, old.num_given_codebooks):
        return model
    _check(old, own=own, given=given)
    origins = _origins(old, own=own, given=given)
    config = _config(model.config, own=own, given=given, delays=[old.delays[origin] for origin, _ in origins])
    weights = dict(model.weights)
    table = partial(_table, old=old, new=config.streams, origins=origins)
    weights["embedding.weight"] = _moved(weights["embedding.weight"], table)
    for name in [name for name in weights if name.startswith("depth.")]:
        weights[name] = _moved(weights[name], _in_depth(name, model.config, config))
    return replace(model, config=config, weights=weights, notes=(*model.notes, _note(old, own=own, given=given)))


def _note(old: StreamsSection, *, own: int, given: int) -> str:
    """What became of the streams, in words."""
    counts = f"{old.num_codebooks} own and {old.num_given_codebooks} given codebooks became {own} and {given}"
    starts = []
    if own > old.num_codebooks:
        starts.append("new own ones start from the last own one")
    if given > old.num_given_codebooks:
        origin = "the last given one" if old.num_given_codebooks else "the own ones of their number"
        starts.append(f"new given ones start from {origin}")
    return "; ".join([f"streams: {counts}", *starts])


def _check(old: StreamsSection, *, own: int, given: int) -> None:
    if own > old.num_codebooks and old.num_codebooks < 2:
        raise ValueError(
            f"streams.num_codebooks: {old.num_codebooks} cannot become {own}, because the depth transformer has no "
            f"embedding of a codebook that new ones could start from; start from a model of 2 or more"
        )
    if own < min(1, old.num_codebooks) or given < 0:
        raise ValueError(f"streams: {own} own and {given} given codebooks; keep at least one of the model's own")
    if given > old.num_given_codebooks and not (old.num_given_codebooks or old.num_codebooks):
        raise ValueError(f"streams.num_given_codebooks: 0 cannot become {given} in a model without any codebook")


def _origins(old: StreamsSection, *, own: int, given: int) -> list[tuple[int, bool]]:
    """(the old stream that it starts from, whether it is new) for every new stream `[S]`."""
    last, first_given, heard = old.num_codebooks - 1, 1 + old.num_codebooks, old.num_given_codebooks
    own_ones = [(1 + min(codebook, last), codebook > last) for codebook in range(own)]
    if heard:
        given_ones = [(first_given + min(codebook, heard - 1), codebook >= heard) for codebook in range(given)]
    else:
        given_ones = [(1 + min(codebook, last), True) for codebook in range(given)]
    return [(0, False), *own_ones, *given_ones]


def _config(config: Config, *, own: int, given: int, delays: list[int]) -> Config:
    tables = {"streams": {"num_codebooks": own, "num_given_codebooks": given, "delays": delays}}
    schedule = config.depth.weights_per_step_schedule
    if schedule:
        tables["depth"] = {"weights_per_step_schedule": [schedule[min(q, len(schedule) - 1)] for q in range(own)]}
    return changed(config, tables, source="the grown model")


def _moved(source: Deferred, move: Callable[[Tensor], Tensor]) -> Deferred:
    shape = move(torch.empty(source.shape, dtype=source.dtype, device="meta")).shape
    return Deferred(tuple(shape), source.dtype, lambda: move(source.read()))


def _table(table_RH: Tensor, *, old: StreamsSection, new: StreamsSection, origins: list[tuple[int, bool]]) -> Tensor:
    """The temporal transformer's packed table of the new streams."""
    tables = Table(old.cardinalities).to_foreign([table_RH])
    rows = [_without_initial(tables[origin]) if is_new else tables[origin] for origin, is_new in origins]
    return Table(new.cardinalities).to_native(rows)[0]


def _without_initial(table_VH: Tensor) -> Tensor:
    return torch.cat([table_VH[:-1], torch.zeros_like(table_VH[-1:])])


def _in_depth(name: str, old: Config, new: Config) -> Callable[[Tensor], Tensor]:
    """What becomes of a tensor of the depth transformer."""
    kind = name.split(".")[-2]
    if name == "depth.embedding":
        return partial(_depth_table, old=old.streams, new=new.streams)
    if kind.endswith("norm"):
        return lambda weight: weight
    if kind == "input":
        sizes = old.num_input_sets, new.num_input_sets
    elif kind in ("heads", "low_rank"):
        sizes = old.streams.num_codebooks, new.streams.num_codebooks
    else:
        sizes = old.num_weight_sets, new.num_weight_sets
    return partial(_sets, sizes=sizes)


def _depth_table(table_RD: Tensor, *, old: StreamsSection, new: StreamsSection) -> Tensor:
    """Of the streams that the codebooks read: text, then every own codebook but the last."""
    tables = Table(old.cardinalities[: old.num_codebooks]).to_foreign([table_RD])
    read = [tables[min(stream, old.num_codebooks - 1)] for stream in range(new.num_codebooks)]
    return Table(new.cardinalities[: new.num_codebooks]).to_native(read)[0]


def _sets(weight: Tensor, *, sizes: tuple[int, int]) -> Tensor:
    """`[S * I, O]` for another number of sets S."""
    old, new = sizes
    sets_SIO = weight.unflatten(0, (old, -1))
    return torch.cat([sets_SIO[min(index, old - 1)] for index in range(new)])
