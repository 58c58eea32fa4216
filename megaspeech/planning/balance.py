"""Layers dealt out to pipeline stages so that the last one, which has the depth transformer, is no slower."""

from __future__ import annotations

from typing import Any


def balanced_pipeline(num_layers: int, *, num_stages: int, num_chunks: int, last_load: float) -> dict[str, Any] | None:
    """Keys of `parallel` for the fastest pipeline of these stages; None where a chunk would be without a layer.

    Args:
        num_layers: temporal layers in all.
        num_stages: of the pipeline.
        num_chunks: of every stage.
        last_load: what the last stage does beside its layers, in layers' time.
    """
    if num_stages == 1:
        return {} if num_chunks == 1 else None
    on_last = _layers_on_last(num_layers, num_stages=num_stages, num_chunks=num_chunks, last_load=last_load)
    each, more = divmod(num_layers - on_last, num_stages - 1)
    if each < num_chunks or on_last < num_chunks:
        return None
    # The stages in the middle take the rest: the first has the embedding, and most microbatches in flight.
    order = [*range(1, num_stages - 1), 0]
    stages = [each + (order.index(stage) < more) for stage in range(num_stages - 1)] + [on_last]
    keys: dict[str, Any] = {"pipeline_model_parallel_size": num_stages}
    even_before = not more and not each % num_chunks and not on_last % num_chunks
    if even_before:
        keys |= {"virtual_pipeline_model_parallel_size": num_chunks} if num_chunks > 1 else {}
        return keys | ({"num_layers_in_last_pipeline_stage": on_last} if on_last != each else {})
    return keys | {"pipeline_model_parallel_layout": _drawn(stages, num_chunks=num_chunks)}


def _layers_on_last(num_layers: int, *, num_stages: int, num_chunks: int, last_load: float) -> int:
    """Those that make the slowest stage fastest; of equals the fewest, for the last stage is the fullest too."""

    def slowest(on_last: int) -> float:
        return max(-(-(num_layers - on_last) // (num_stages - 1)), on_last + last_load)

    return min(range(num_chunks, max(num_chunks, num_layers // num_stages) + 1), key=slowest)


def _drawn(stages: list[int], *, num_chunks: int) -> str:
    """megatron-core's letters, chunk after chunk of all stages; a stage's later chunks are the smaller ones."""
    chunks = []
    for chunk in range(num_chunks):
        for layers in stages:
            count = layers // num_chunks + (chunk < layers % num_chunks)
            chunks.append(f"t*{count}" if count > 1 else "t" * count)
    return "E" + "|".join(chunks) + "L"
