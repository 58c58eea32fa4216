"""Faults that no section sees by itself: layout against world size, heads against tensor parallel, and the like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

EMBEDDING_ROWS_MULTIPLE = 128
"""Rows of the stream embedding table are padded to this, whatever the layout, so that every layout saves one shape."""


def cross_section_faults(sections: Mapping[str, Any], *, world_size: int | None = None) -> list[str]:
    """Faults between the given sections, one line each; a check whose sections are absent is left out.

    Args:
        sections: validated sections by name; those that did not validate are missing.
        world_size: number of ranks, or None when the config is read outside a launch.
    """
    faults: list[str] = []
    for check in (_layout, _heads, _layers, _vocabulary, _batch, _streams):
        try:
            faults.extend(check(sections, world_size))
        except KeyError:  # a section this check reads has faults of its own, reported already
            continue
    return faults


def _layout(sections: Mapping[str, Any], world_size: int | None) -> Iterator[str]:
    parallel = sections["parallel"]
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if world_size is not None and world_size % (tp * pp):
        yield (
            f"parallel: a layout of tensor {tp} x pipeline {pp} = {tp * pp} ranks does not divide the {world_size} "
            f"launched; launch a multiple of {tp * pp} with --nproc-per-node, or change parallel.*_parallel_size"
        )
    if parallel.sequence_parallel and tp == 1:
        yield "parallel.sequence_parallel: true needs tensor_model_parallel_size of 2 or more; set it false"


def _heads(sections: Mapping[str, Any], _: int | None) -> Iterator[str]:
    tp = sections["parallel"].tensor_model_parallel_size
    for name in ("temporal", "depth"):
        shape = sections[name]
        if shape.hidden_size % shape.num_attention_heads:
            yield (
                f"{name}.hidden_size: {shape.hidden_size} is not divisible by num_attention_heads = "
                f"{shape.num_attention_heads}; choose a multiple"
            )
        if shape.num_attention_heads % shape.num_query_groups:
            yield (
                f"{name}.num_query_groups: {shape.num_query_groups} does not divide num_attention_heads = "
                f"{shape.num_attention_heads}"
            )
    temporal = sections["temporal"]
    width, remainder = divmod(temporal.hidden_size, temporal.num_attention_heads)
    if not remainder and width % 2:
        yield (
            f"temporal.hidden_size: {temporal.hidden_size} gives each of the num_attention_heads = "
            f"{temporal.num_attention_heads} a width of {width}, which must be even, because RoPE rotates pairs; "
            f"choose a multiple of {2 * temporal.num_attention_heads}"
        )
    # The depth transformer is not listed: tensor parallel ranks share its frames, not its heads.
    for key in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        if getattr(temporal, key) % tp:
            yield (
                f"temporal.{key}: {getattr(temporal, key)} is not divisible by "
                f"parallel.tensor_model_parallel_size = {tp}; choose a multiple, or a smaller layout"
            )


def _layers(sections: Mapping[str, Any], _: int | None) -> Iterator[str]:
    layers, pp = sections["temporal"].num_layers, sections["parallel"].pipeline_model_parallel_size
    if layers % pp:
        yield (
            f"temporal.num_layers: {layers} is not divisible by parallel.pipeline_model_parallel_size = {pp}; "
            f"choose a multiple, or a smaller layout"
        )


def _vocabulary(sections: Mapping[str, Any], _: int | None) -> Iterator[str]:
    streams, tp = sections["streams"], sections["parallel"].tensor_model_parallel_size
    if streams.text_cardinality % tp:
        yield (
            f"streams.text_cardinality: {streams.text_cardinality} is not divisible by "
            f"parallel.tensor_model_parallel_size = {tp}; train the tokenizer with a multiple"
        )
    if EMBEDDING_ROWS_MULTIPLE % tp:
        yield f"parallel.tensor_model_parallel_size: {tp} must be a power of two up to {EMBEDDING_ROWS_MULTIPLE}"


def _batch(sections: Mapping[str, Any], world_size: int | None) -> Iterator[str]:
    training, parallel = sections["training"], sections["parallel"]
    ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    dp = max(1, (world_size or ranks) // ranks)
    if training.global_batch_size % (training.micro_batch_size * dp):
        yield (
            f"training.global_batch_size: {training.global_batch_size} is not divisible by micro_batch_size "
            f"{training.micro_batch_size} x data parallel {dp}; choose a multiple of {training.micro_batch_size * dp}"
        )
    warmup = sections["optimizer"].lr_warmup_steps
    if warmup >= training.train_steps:
        yield f"optimizer.lr_warmup_steps: {warmup} leaves nothing of training.train_steps = {training.train_steps}"


def _streams(sections: Mapping[str, Any], _: int | None) -> Iterator[str]:
    streams = sections["streams"]
    if len(streams.delays) != streams.num_streams:
        yield (
            f"streams.delays: {len(streams.delays)} entries, but there are {streams.num_streams} streams "
            f"(text, {streams.num_codebooks} predicted, {streams.num_given_codebooks} given)"
        )
    for key in ("text_pad_id", "text_end_pad_id"):
        if getattr(streams, key) >= streams.text_cardinality:
            yield f"streams.{key}: {getattr(streams, key)} is not below text_cardinality = {streams.text_cardinality}"
