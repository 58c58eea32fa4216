"""A run of many ranks rehearsed on one machine: each rank of a replica, one after the other, as a fake rank.

Each builds its stage, wraps it, and runs a step's forward and backward passes through megatron-core's schedule. Then
what the ranks found is held together: a stage must send what the next one waits for, and the ranks' parts must make up
the checkpoint of one model.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories
from megatron.core.pipeline_parallel import p2p_communication
from torch.distributed.tensor import DTensor

from megaspeech.checkpoint.state import model_state
from megaspeech.config import Config
from megaspeech.config.computation import ParallelSection
from megaspeech.data.batch import frame_multiple
from megaspeech.model.counting import count_rank_parameters
from megaspeech.model.speech_text_model import SpeechTextModel
from megaspeech.parallel.fake_ranks import fake_rank
from megaspeech.parallel.schedule import run_microbatches
from megaspeech.parallel.wrap import Wrapped, wrap
from megaspeech.planning.live_bytes import LiveBytes
from megaspeech.planning.stages import num_microbatches
from megaspeech.planning.truth import chunk_ends, sample_batch


@dataclass
class RankVerdict:
    """What one rank did. `sent` and `received` are shapes by "next" and "prev"; `parts` the (offset, shape) of each
    tensor of the checkpoint that it holds, by (key, global shape). `fault` is empty where all went well."""

    rank: int
    stage: int
    tensor_rank: int
    parameters: int = 0
    state_gb: float = 0.0
    peak_gb: float = 0.0
    sent: dict[str, set[tuple[int, ...]]] = field(default_factory=lambda: {"next": set(), "prev": set()})
    received: dict[str, set[tuple[int, ...]]] = field(default_factory=lambda: {"next": set(), "prev": set()})
    parts: dict[tuple[str, tuple[int, ...]], set] = field(default_factory=dict)
    fault: str = ""


def without_gpu(config: Config) -> tuple[Config, list[str]]:
    """(the config with what needs a GPU put as plainly as can be, what was changed, in words): layers, kernels and
    precision change neither shapes of parameters, nor who sends what."""
    changes: dict[str, dict[str, Any]] = {
        "model": {"transformer_impl": "local", "kernels": "reference", "embedding_gradient": "sorted"},
        "parallel": {"tp_comm_overlap": False, "grad_reduce_in_fp32": True},
        "optimizer": {"use_precision_aware_optimizer": False, "exp_avg_dtype": "fp32", "exp_avg_sq_dtype": "fp32"},
        "precision": {"fp8_param_gather": False, "shadow_interval": 0},
    }
    changes["model"]["depth_graph_multiple"] = 0
    if config.precision.fp8_recipe:
        changes["precision"] |= {"recipe": "bf16", "num_layers_at_start_in_bf16": 0, "num_layers_at_end_in_bf16": 0}
    if config.data.pack:
        changes["data"] = {"pack": False}
    updated, words = {}, []
    for section, keys in changes.items():
        before = getattr(config, section)
        updated[section] = before.model_copy(update=keys)
        differs = [key for key, value in keys.items() if getattr(before, key) != value]
        words += [f"{section}.{key} = {getattr(before, key)} is rehearsed as {keys[key]}" for key in differs]
    length = config.data.num_frames + -config.data.num_frames % frame_multiple(config)
    if length != config.data.num_frames:
        words.append(f"data.num_frames = {config.data.num_frames} is padded to {length} for the layout and the recipe")
    updated["data"] = updated.get("data", config.data).model_copy(update={"num_frames": length})
    return config.model_copy(update=updated), words


def ranks_of_a_replica(config: Config, *, world_size: int) -> list[int]:
    """The ranks that differ: of every stage those of its first tensor parallel group (context and data parallel ranks
    hold and do the same as one of these)."""
    parallel = config.parallel
    a_stage = world_size // parallel.pipeline_model_parallel_size
    stages, tensor = parallel.pipeline_model_parallel_size, parallel.tensor_model_parallel_size
    return [stage * a_stage + rank for stage in range(stages) for rank in range(tensor)]


def rehearse(config: Config, *, world_size: int, rank: int) -> RankVerdict:
    """One rank's step; what it raises becomes the verdict's fault.

    Args:
        config: from `without_gpu`.
        world_size: ranks of the run.
        rank: which of them to be.
    """
    parallel = config.parallel
    a_stage = world_size // parallel.pipeline_model_parallel_size
    verdict = RankVerdict(rank, rank // a_stage, rank % parallel.tensor_model_parallel_size)
    try:
        with fake_rank(config, rank=rank, world_size=world_size) as grid:
            wrapped = wrap(config, num_chunks=grid.num_chunks, build=_builder(config), initialise=lambda model: None)
            verdict.parameters = sum(_local(each).numel() for model in wrapped.models for each in model.parameters())
            verdict.parts = _parts(wrapped)
            _run_step(wrapped, verdict, replicas=grid.dp_size)
            wrapped.release()
    except Exception as error:  # of whatever kind: that it happens is what the user asks
        verdict.fault = f"{type(error).__name__}: {error}"
    gc.collect()
    return verdict


def _builder(config: Config) -> Any:
    def build(vp_stage: int | None) -> SpeechTextModel:
        return SpeechTextModel(config, **chunk_ends(vp_stage), vp_stage=vp_stage)

    return build


def _run_step(wrapped: Wrapped, verdict: RankVerdict, *, replicas: int) -> None:
    """At most two rounds of the pipeline: after that a step repeats itself."""
    config = wrapped.config
    training, stages = config.training, config.parallel.pipeline_model_parallel_size
    number = min(num_microbatches(config, replicas=replicas), 2 * stages)
    known = [_local(parameter) for chunk in wrapped.chunks for parameter in chunk.parameters()]
    if config.parallel.data_parallel == "ddp":
        known += [buffer.grad_data for chunk in wrapped.chunks for buffer in chunk.buffers]
    verdict.state_gb = sum({id(x): x.nbytes for x in known}.values()) / 1e9
    with _listening(verdict), LiveBytes(known) as live:
        run_microbatches(
            _forward_step,
            chunks=wrapped.chunks,
            microbatches=[sample_batch(config)] * number,
            num_frames=config.data.num_frames,
            micro_batch_size=training.micro_batch_size,
            forward_only=False,
        )
    verdict.peak_gb = live.peak / 1e9


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _forward_step(batches: Iterator[Any], model: torch.nn.Module) -> tuple[Any, Any]:
    def loss(losses: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return losses[0].sum(), {}

    return model(*next(batches)), loss


def _listening(verdict: RankVerdict) -> Any:
    """Notes the shapes that the pipeline sends and receives."""

    def noting(original: Any) -> Any:
        def send(**tensors: Any) -> Any:
            for name, tensor in tensors.items():
                if isinstance(tensor, torch.Tensor):
                    _, what, where = name.split("_")
                    (verdict.sent if what == "send" else verdict.received)[where].add(tuple(tensor.shape))
            return original(**tensors)

        return send

    functions = {name: noting(getattr(p2p_communication, name)) for name in ("_batched_p2p_ops", "_p2p_ops")}
    return mock.patch.multiple(p2p_communication, **functions)


def _parts(wrapped: Wrapped) -> dict[tuple[str, tuple[int, ...]], set]:
    state = model_state(wrapped)
    apply_factories(state)
    found: dict[tuple[str, tuple[int, ...]], set] = {}
    for leaf in nested_values(state):
        assert not isinstance(leaf, ShardedTensorFactory)
        if isinstance(leaf, ShardedTensor):
            place = (leaf.key, tuple(leaf.global_shape))
            found.setdefault(place, set()).add((tuple(leaf.global_offset), tuple(leaf.local_shape)))
    return found


def faults_between(verdicts: Sequence[RankVerdict], *, config: Config, world_size: int) -> list[str]:
    """What does not fit together, one line each, of a whole replica's ranks that ran."""
    parallel = config.parallel
    model_size = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    shards = 1 if parallel.data_parallel == "ddp" else world_size // model_size  # FSDP's, all alike
    sends = _faults_of_sends(verdicts, chunks=parallel.num_chunks)
    return [*sends, *_faults_of_parts(verdicts, config, shards=shards)]


def _faults_of_sends(verdicts: Sequence[RankVerdict], *, chunks: int) -> Iterator[str]:
    stages = max(verdict.stage for verdict in verdicts) + 1
    by_place = {(verdict.stage, verdict.tensor_rank): verdict for verdict in verdicts}
    for (stage, rank), verdict in by_place.items():
        if stage == stages - 1 and chunks == 1:
            continue
        after = by_place[(stage + 1) % stages, rank]
        for words, ours, theirs in (
            ("sends, the next waits for", verdict.sent["next"], after.received["prev"]),
            ("waits back for, the next sends back", verdict.received["next"], after.sent["prev"]),
        ):
            if ours != theirs:
                yield f"stage {stage}, rank {verdict.rank} {words}: {sorted(ours)}, {sorted(theirs)}"


def _faults_of_parts(verdicts: Sequence[RankVerdict], config: Config, *, shards: int) -> Iterator[str]:
    """Parts of a tensor must be as many numbers as it has, and all tensors the model's parameters."""
    together: dict[tuple[str, tuple[int, ...]], set] = {}
    for verdict in verdicts:
        for place, parts in verdict.parts.items():
            together.setdefault(place, set()).update(parts)
    for (key, shape), parts in together.items():
        held = shards * sum(math.prod(local) for _, local in parts)
        if held != math.prod(shape):
            yield f"checkpoint: {key} of {shape} has {math.prod(shape):,} numbers, the ranks hold {held:,}"
    alone = config.model_copy(update={"parallel": ParallelSection()})
    layers = config.temporal.num_layers
    counted = sum(count_rank_parameters(alone, num_layers=layers, is_first=True, is_last=True).values())
    whole = sum(math.prod(shape) for _, shape in together)
    if whole != counted:
        yield f"checkpoint: {whole:,} numbers in all, the model has {counted:,}"
