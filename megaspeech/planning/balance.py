"""Layers dealt out to pipeline stages so that the last one, which has the depth transformer, is no slower."""

from __future__ import annotations

from typing import Any


def balanced_pipelines(num_layers: int, *, num_stages: int, num_chunks: int, last_load: float) -> list[dict[str, Any]]:
    """Keys of `parallel` for pipelines worth a try: stages as even as can be, and under interleaving chunks, too.

    A pipeline in which some chunk had no layer is left out.

    Args:
        num_layers: temporal layers in all.
        num_stages: of the pipeline.
        num_chunks: of every stage.
        last_load: what the last chunk does beside its layers, in layers' time.
    """
    if num_stages == 1:
        return [{}] if num_chunks == 1 else []
    found = [_by_stage(num_layers, num_stages=num_stages, num_chunks=num_chunks, last_load=last_load)]
    if num_chunks > 1:
        places = _dealt(num_layers, num_places=num_stages * num_chunks, last_load=last_load)
        found.append([places[stage::num_stages] for stage in range(num_stages)])
    return [_keys(stages) for stages in found if min(map(min, stages)) > 0]


def _dealt(num_layers: int, *, num_places: int, last_load: float) -> list[int]:
    """Layers of each place of a pipeline, the last one's chosen so that the slowest place is fastest; of equals the
    fewest, for it is the fullest too. The places in the middle take what does not come out even: the first has the
    embedding, and most microbatches in flight."""

    def slowest(on_last: int) -> float:
        return max(-(-(num_layers - on_last) // (num_places - 1)), on_last + last_load)

    on_last = min(range(1, max(1, num_layers // num_places) + 1), key=slowest)
    each, more = divmod(num_layers - on_last, num_places - 1)
    order = [*range(1, num_places - 1), 0]
    return [each + (order.index(place) < more) for place in range(num_places - 1)] + [on_last]


def _by_stage(num_layers: int, *, num_stages: int, num_chunks: int, last_load: float) -> list[list[int]]:
    """Layers of each chunk of each stage, whole stages balanced; a stage's later chunks are the smaller ones."""
    stages = _dealt(num_layers, num_places=num_stages, last_load=last_load)
    return [[layers // num_chunks + (chunk < layers % num_chunks) for chunk in range(num_chunks)] for layers in stages]


def _keys(stages: list[list[int]]) -> dict[str, Any]:
    """As numbers where megatron-core can be told so, else drawn."""
    keys: dict[str, Any] = {"pipeline_model_parallel_size": len(stages)}
    if all(len(set(chunks)) == 1 for chunks in stages) and len({sum(chunks) for chunks in stages[:-1]}) == 1:
        keys |= {"virtual_pipeline_model_parallel_size": len(stages[0])} if len(stages[0]) > 1 else {}
        uneven = sum(stages[-1]) != sum(stages[0])
        return keys | ({"num_layers_in_last_pipeline_stage": sum(stages[-1])} if uneven else {})
    drawn = [chunks[place] for place in range(len(stages[0])) for chunks in stages]
    letters = [f"t*{count}" if count > 1 else "t" for count in drawn]
    return keys | {"pipeline_model_parallel_layout": "E" + "|".join(letters) + "L"}
