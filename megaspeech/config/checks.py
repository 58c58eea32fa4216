"""Faults that no section sees by itself: layout against world size, heads against tensor parallel, and the like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megaspeech.config.computation import expand_layout
from megaspeech.config.preparation import augmentation_faults

EMBEDDING_ROWS_MULTIPLE = 128
"""Rows of the stream embedding table are padded to this, whatever the layout, so that every layout saves one shape."""


def cross_section_faults(sections: Mapping[str, Any], *, world_size: int | None = None) -> list[str]:
    """Faults between the given sections, one line each; a check whose sections are absent is left out.

    Args:
        sections: validated sections by name; those that did not validate are missing.
        world_size: number of ranks, or None when the config is read outside a launch.
    """
    faults: list[str] = []
    for check in CHECKS:
        try:
            faults.extend(check(sections, world_size))
        except KeyError:  # a section this check reads has faults of its own, reported already
            continue
    return faults


def _kernels(sections: Mapping[str, Any], _: int | None) -> Iterator[str]:
    model = sections["model"]
    if model.embedding_gradient == "atomic" and model.kernels != "triton":
        yield f'model.embedding_gradient: "atomic" is for kernels = "triton", not "{model.kernels}"; use "sorted"'


def _profile(sections: Mapping[str, Any], _: int | None) -> Iterator[str]:
    first, last = sections["logging"].profile_step_start, sections["logging"].profile_step_end
    if (first or last) and not 0 < first <= last:
        yield (
            f"logging.profile_step_end: {last} does not follow profile_step_start = {first}; profile from step 1 or "
            f"later to the same step or a later one"
        )


def _precision(sections: Mapping[str, Any], _: int | None) -> Iterator[str]:
    precision, stages = sections["precision"], sections["parallel"].pipeline_model_parallel_size
    if precision.fp8_param_gather and (precision.fp8_recipe is None or not _is_distributed(sections["parallel"])):
        yield (
            "precision.fp8_param_gather: needs an FP8 recipe and parallel.use_distributed_optimizer with data_parallel "
            '= "ddp"; set it false'
        )
    if precision.fp8_param_gather and precision.recipe == "mxfp8" and sections["parallel"].overlap_param_gather:
        # Through the memory of the gradients, zeroed before the forward pass gathers (megatron-core, optimizer.py:579).
        yield 'parallel.overlap_param_gather: cannot gather FP8 weights of "mxfp8"; set it, or fp8_param_gather, false'
    if precision.fp8_recipe is None:
        if precision.shadow_interval:
            yield (
                f'precision.shadow_interval: {precision.shadow_interval}, but "{precision.recipe}" has no FP8 to '
                "compare with BF16; set it to 0"
            )
        return
    if sections["model"].transformer_impl == "local":
        yield (
            f'precision.recipe: "{precision.recipe}" is TransformerEngine\'s; set model.transformer_impl = "auto", or '
            'use "bf16"'
        )
    for end in ("start", "end"):
        key = f"num_layers_at_{end}_in_bf16"
        count, most = getattr(precision, key), sections["temporal"].num_layers // stages
        if count and precision.fp8_recipe == "delayed":
            yield f'precision.{key}: {count}, but "fp8-delayed" takes every layer; set it to 0, or use "fp8-tensorwise"'
        elif count > most:
            yield f"precision.{key}: {count} is more than the {most} layers of a pipeline stage; lower it"


def _user_buffers(sections: Mapping[str, Any], _: int | None) -> Iterator[str]:
    parallel, data = sections["parallel"], sections["data"]
    if not parallel.tp_comm_overlap:
        return
    if not parallel.sequence_parallel:
        yield "parallel.tp_comm_overlap: is for sequence_parallel; set that true, or this false"
    if data.length_multiple % data.num_frames:
        yield (
            f"data.length_multiple: {data.length_multiple}, but parallel.tp_comm_overlap has buffers of one length; "
            f"set it to data.num_frames = {data.num_frames}"
        )
    if sections["model"].transformer_impl == "local":
        yield 'parallel.tp_comm_overlap: is TransformerEngine\'s; set model.transformer_impl = "auto", or this false'


def _graphs(sections: Mapping[str, Any], _: int | None) -> Iterator[str]:
    parallel = sections["parallel"]
    against = {
        "overlap_param_gather": parallel.overlap_param_gather,
        "recompute_granularity": parallel.recompute_granularity == "full",
        "data_parallel": parallel.data_parallel != "ddp",
    }
    if sections["model"].depth_graph_multiple and any(against.values()):
        named = ", ".join(f"parallel.{key} = {getattr(parallel, key)}" for key, value in against.items() if value)
        yield f"model.depth_graph_multiple: a graph cannot hold what {named} does between layers; set it to 0"


def _is_distributed(parallel: Any) -> bool:
    """Whether the optimizer is megatron-core's distributed one."""
    return parallel.data_parallel == "ddp" and parallel.use_distributed_optimizer


def _optimizer(sections: Mapping[str, Any], _: int | None) -> Iterator[str]:
    optimizer, parallel = sections["optimizer"], sections["parallel"]
    aware, distributed = optimizer.use_precision_aware_optimizer, _is_distributed(parallel)
    if aware and not distributed:
        yield (
            "optimizer.use_precision_aware_optimizer: needs parallel.use_distributed_optimizer with data_parallel = "
            '"ddp"; set it false'
        )
    for key in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        if getattr(optimizer, key) != "fp32" and not aware:
            yield f'optimizer.{key}: "{getattr(optimizer, key)}" needs use_precision_aware_optimizer; set that true'
    if not parallel.grad_reduce_in_fp32 and not aware:
        yield "parallel.grad_reduce_in_fp32: false needs optimizer.use_precision_aware_optimizer; set either one true"
    if parallel.overlap_param_gather and not (distributed and parallel.overlap_grad_reduce):
        yield (
            "parallel.overlap_param_gather: needs overlap_grad_reduce and use_distributed_optimizer with data_parallel "
            '= "ddp"; set it false'
        )


def _layout(sections: Mapping[str, Any], world_size: int | None) -> Iterator[str]:
    parallel = sections["parallel"]
    tp, pp, cp = _sizes(parallel)
    if world_size is not None and world_size % (tp * pp * cp):
        context = f" x context {cp}" if cp > 1 else ""
        yield (
            f"parallel: a layout of tensor {tp} x pipeline {pp}{context} = {tp * pp * cp} ranks does not divide the "
            f"{world_size} launched; launch a multiple of {tp * pp * cp} with --nproc-per-node, or change "
            f"parallel.*_parallel_size"
        )
    if parallel.data_parallel == "megatron_fsdp" and pp > 1:
        yield 'parallel.data_parallel: "megatron_fsdp" knows no pipeline; set its size to 1, or use "fsdp2"'
    if parallel.data_parallel != "ddp" and parallel.overlap_grad_reduce:
        yield (
            'parallel.overlap_grad_reduce: is for data_parallel = "ddp"; set it false, for '
            f'"{parallel.data_parallel}" overlaps by itself'
        )
    if parallel.sequence_parallel and tp == 1:
        yield "parallel.sequence_parallel: true needs tensor_model_parallel_size of 2 or more; set it false"


def _sizes(parallel: Any) -> tuple[int, int, int]:
    """Tensor, pipeline and context parallel size."""
    return (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )


def _heads(sections: Mapping[str, Any], _: int | None) -> Iterator[str]:
    tp = sections["parallel"].tensor_model_parallel_size
    for name in ("temporal", "depth"):
        shape = sections[name]
        if shape.head_width * shape.num_attention_heads != shape.hidden_size and not _has_own_width(shape):
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
    width = temporal.head_width
    if width % 2 and _has_own_width(temporal):
        yield f"temporal.kv_channels: {width} must be even, because RoPE rotates pairs; choose {width + 1}"
    elif width % 2 and width * temporal.num_attention_heads == temporal.hidden_size:
        yield (
            f"temporal.hidden_size: {temporal.hidden_size} gives each of the num_attention_heads = "
            f"{temporal.num_attention_heads} a width of {width}, which must be even, because RoPE rotates pairs; "
            f"choose a multiple of {2 * temporal.num_attention_heads}"
        )
    # The depth transformer is not listed: tensor parallel ranks share its frames, not its heads.
    if temporal.num_query_groups % tp and tp % temporal.num_query_groups:
        yield (
            f"temporal.num_query_groups: {temporal.num_query_groups} and parallel.tensor_model_parallel_size = {tp}: "
            f"one must divide the other; choose a multiple, or a smaller layout"
        )
    for key in ("num_attention_heads", "ffn_hidden_size"):
        if getattr(temporal, key) % tp:
            yield (
                f"temporal.{key}: {getattr(temporal, key)} is not divisible by "
                f"parallel.tensor_model_parallel_size = {tp}; choose a multiple, or a smaller layout"
            )


def _has_own_width(shape: Any) -> bool:
    """Whether the width of a transformer's heads is given, and not a share of its own."""
    return getattr(shape, "kv_channels", None) is not None


def _layers(sections: Mapping[str, Any], _: int | None) -> Iterator[str]:
    layers, parallel = sections["temporal"].num_layers, sections["parallel"]
    if parallel.pipeline_model_parallel_layout is not None:
        yield from _drawn_layout(layers, parallel)
        return
    pp, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    if chunks > 1 and pp == 1:
        yield "parallel.virtual_pipeline_model_parallel_size: needs a pipeline of 2 stages or more; leave it out"
    ends = {
        key: getattr(parallel, key)
        for key in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
        if getattr(parallel, key) is not None
    }
    for key, value in ends.items():
        if value % chunks:
            yield f"parallel.{key}: {value} is not divisible by virtual_pipeline_model_parallel_size = {chunks}"
    rest, stages = layers - sum(ends.values()), pp - len(ends)
    if rest < 0 or (stages == 0 and rest) or stages < 0 or (stages and rest % (stages * chunks)):
        named = ", ".join(["virtual_pipeline_model_parallel_size"] * (chunks > 1) + list(ends))
        yield (
            f"temporal.num_layers: {layers} is not divisible by parallel.pipeline_model_parallel_size = {pp}"
            + (f" with {named}: {rest} layers are left for {stages} stages of {chunks} chunks" if named else "")
            + "; choose a multiple, a smaller layout, or draw one with pipeline_model_parallel_layout"
        )


def _drawn_layout(layers: int, parallel: Any) -> Iterator[str]:
    key, text = "parallel.pipeline_model_parallel_layout", parallel.pipeline_model_parallel_layout
    pp, stages = parallel.pipeline_model_parallel_size, expand_layout(text)
    drawn = "".join(stages)
    if set(drawn) - set("EtL"):
        yield f"{key}: {text!r} may hold E, t, L, |, (, ), * and numbers alone"
    elif drawn.count("t") != layers:
        yield f"{key}: {text!r} holds {drawn.count('t')} layers (t), temporal.num_layers is {layers}; make them equal"
    elif not (drawn.startswith("E") and drawn.endswith("L") and drawn.count("E") == drawn.count("L") == 1):
        yield f"{key}: {text!r} must start with the embedding E, end with the loss L, and hold one of each"
    if len(stages) % pp:
        yield f"{key}: {text!r} has {len(stages)} stages, not a multiple of pipeline_model_parallel_size = {pp}"
    for other in (
        "virtual_pipeline_model_parallel_size",
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
    ):
        if getattr(parallel, other) is not None:
            yield f"parallel.{other}: {key.partition('.')[2]} says it already; leave one of them out"


def _experts(sections: Mapping[str, Any], world_size: int | None) -> Iterator[str]:
    temporal, parallel = sections["temporal"], sections["parallel"]
    tp, pp, _ = _sizes(parallel)
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_size
    experts = temporal.num_moe_experts
    if experts is None:
        if ep > 1:
            yield f"parallel.expert_model_parallel_size: {ep}, but the model has no experts; set num_moe_experts"
        return
    if ep == 1 and etp != tp:
        yield (
            f"parallel.expert_tensor_parallel_size: {etp}, but experts that are not spread over ranks are shared by "
            f"all {tp} tensor parallel ones; leave it out"
        )
    if experts % ep:
        yield f"temporal.num_moe_experts: {experts} is not divisible by parallel.expert_model_parallel_size = {ep}"
    if temporal.moe_router_topk > experts:
        yield f"temporal.moe_router_topk: {temporal.moe_router_topk} of {experts} experts; choose fewer"
    if tp > 1 and not parallel.sequence_parallel:
        yield "parallel.sequence_parallel: experts under tensor parallelism need it; set it true"
    if world_size is not None and world_size % (ep * etp * pp):
        yield (
            f"parallel.expert_model_parallel_size: experts {ep} x {etp} tensor x pipeline {pp} do not divide the "
            f"{world_size} ranks launched"
        )
    if ep > 1 and parallel.data_parallel != "ddp":
        yield f'parallel.data_parallel: "{parallel.data_parallel}" cannot spread experts over ranks; use "ddp"'


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
    tp, pp, cp = _sizes(parallel)
    dp = max(1, (world_size or 1) // (tp * pp * cp))
    warmup = sections["optimizer"].lr_warmup_steps
    if warmup >= training.train_steps:
        steps = training.train_steps
        yield f"optimizer.lr_warmup_steps: {warmup} leaves nothing of training.train_steps = {steps}; set it lower"
    if sections["data"].pack:  # rows are made to fit the layout
        return
    if training.global_batch_size % (training.micro_batch_size * dp):
        yield (
            f"training.global_batch_size: {training.global_batch_size} is not divisible by micro_batch_size "
            f"{training.micro_batch_size} x data parallel {dp}; choose a multiple of {training.micro_batch_size * dp}"
        )
    microbatches = training.global_batch_size // (training.micro_batch_size * dp)
    if parallel.num_chunks > 1 and microbatches % pp:
        yield (
            f"training.global_batch_size: {microbatches} microbatches on each data parallel rank, which an interleaved "
            f"pipeline of {pp} stages does not divide; choose a multiple of {training.micro_batch_size * dp * pp}"
        )


def _packing(sections: Mapping[str, Any], _: int | None) -> Iterator[str]:
    if not sections["data"].pack:
        return
    if sections["training"].micro_batch_size != 1:
        yield (
            f"training.micro_batch_size: {sections['training'].micro_batch_size}, but with data.pack a microbatch is "
            "one row; set it to 1 and data.num_frames to the length of the row"
        )
    if sections["parallel"].context_parallel_size != 1:
        yield (
            "parallel.context_parallel_size: cuts long samples, where data.pack joins short ones; set one of them to "
            "1 or false"
        )


def _streams(sections: Mapping[str, Any], _: int | None) -> Iterator[str]:
    streams = sections["streams"]
    if len(streams.delays) != streams.num_streams:
        yield (
            f"streams.delays: {len(streams.delays)} entries, but there are {streams.num_streams} streams "
            f"(text, {streams.num_codebooks} predicted, {streams.num_given_codebooks} given)"
        )
    schedule = sections["depth"].weights_per_step_schedule
    if schedule is not None and len(schedule) != streams.num_codebooks:
        yield (
            f"depth.weights_per_step_schedule: {len(schedule)} entries for streams.num_codebooks = "
            f"{streams.num_codebooks}; give one for each codebook"
        )
    for key in ("text_pad_id", "text_end_pad_id"):
        if getattr(streams, key) >= streams.text_cardinality:
            yield f"streams.{key}: {getattr(streams, key)} is not below text_cardinality = {streams.text_cardinality}"


CHECKS = (
    *(_kernels, _graphs, _profile, _precision, _optimizer, _user_buffers, _layout),
    *(_heads, _layers, _experts, _vocabulary, _batch, _packing, _streams, augmentation_faults),
)
"""Each takes the sections and the world size, and yields the faults it finds."""
