"""Bytes that a rank keeps from step to step, of the whole model or of its pipeline stage, and at the worst moment."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megaspeech.config import Config
from megaspeech.model.counting import count_depth_layer, count_parameters, count_rank_parameters
from megaspeech.planning.activations import saved_bytes, working_bytes
from megaspeech.planning.stages import Stage, num_microbatches, stages_of

RESERVED_GB = 4.0
"""Of the context, NCCL's buffers, libraries' workspaces and what the allocator cannot use. Assumed, not measured yet:
PyTorch's context and cuBLAS's workspaces are about 1 GB on an H100, and NCCL takes tens of MB a communicator."""

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


def state_bytes(config: Config) -> dict[str, int]:
    """Bytes by kind on a single rank, padding of the tables not counted.

    In BF16 megatron-core keeps FP32 gradients, FP32 main weights and two FP32 moments, 18 bytes a parameter in all
    (ZeRO, arXiv 1910.02054, section 3.1, has 16 with BF16 gradients), less where the config says so; in FP32 the main
    weights are the weights themselves. With FP8, TransformerEngine keeps the temporal matrices in FP8 by rows and by
    columns, as Hopper's products want them, beside the BF16 ones or (`precision.fp8_param_gather`) instead of them.
    """
    parts, precision, optimizer = count_parameters(config), config.precision, config.optimizer
    parameters = sum(parts.values())
    in_fp8 = parts["temporal"] if precision.fp8_recipe else 0
    in_bf16 = parameters - (in_fp8 if precision.fp8_param_gather else 0)
    sizes = {
        "weights": BYTES[precision.params_dtype] * in_bf16,
        "FP8 weights": 2 * in_fp8,
        "gradients": (4 if config.parallel.grad_reduce_in_fp32 else 2) * parameters,
        "main weights": _main_bytes(config) * parameters,
        "moments": (BYTES[optimizer.exp_avg_dtype] + BYTES[optimizer.exp_avg_sq_dtype]) * parameters,
    }
    return {kind: size for kind, size in sizes.items() if size}


def _main_bytes(config: Config) -> int:
    """Of a main weight: the 16 bits that a BF16 weight lacks, where remainders are kept (`optimizer`'s docstrings)."""
    if config.precision.params_dtype == "fp32":
        return 0
    optimizer = config.optimizer
    keeps = optimizer.use_precision_aware_optimizer and optimizer.store_param_remainders
    return 2 if keeps and config.precision.fp8_recipe in (None, "delayed") else 4


@dataclass(frozen=True)
class StageMemory:
    """Bytes on the fullest rank of a stage.

    `state` by kind, kept from step to step; `activations` of the microbatches in flight; `working` what comes on top at
    the worst moment of a backward pass.
    """

    stage: Stage
    parameters: dict[str, int]
    state: dict[str, int]
    activations: int
    working: int

    @property
    def allocated(self) -> int:
        """Bytes of tensors at the worst moment: what `torch.cuda.max_memory_allocated` is to say."""
        return sum(self.state.values()) + self.activations + self.working

    @property
    def total_gb(self) -> float:
        """In GB of 10^9 bytes, with what is reserved for others."""
        return self.allocated / 1e9 + RESERVED_GB


def stage_memory(config: Config, *, data_parallel_size: int, layer_kind: str) -> list[StageMemory]:
    """Memory of every stage, first to last.

    Args:
        config: the run, with its layout, microbatch and recomputation.
        data_parallel_size: replicas; context parallel ranks share state as these do.
        layer_kind: whose layers, see `activations.saved_bytes`.
    """
    found = []
    microbatches = num_microbatches(config, replicas=data_parallel_size)
    shards = data_parallel_size * config.parallel.context_parallel_size
    for stage in stages_of(config):
        chunks = [_chunk_parameters(config, stage, chunk) for chunk in range(len(stage.chunks))]
        saved = [
            sum(saved_bytes(config, num_layers=layers, **_ends(stage, chunk), layer_kind=layer_kind).values())
            for chunk, layers in enumerate(stage.chunks)
        ]
        held = [size * stage.in_flight(chunk, num_microbatches=microbatches) for chunk, size in enumerate(saved)]
        working = working_bytes(config, is_last=stage.is_last, layer_kind=layer_kind)
        # The gradient of the embedding's table comes when nothing else is left of its microbatch.
        weight = BYTES[config.precision.params_dtype]
        a_number = weight if config.parallel.data_parallel == "ddp" else 2 * weight + 4  # gathered, reduced in FP32
        table = a_number * chunks[0].get("embedding", 0)
        working = max(working, table - saved[0])
        state = rank_state_bytes(config, chunks, num_shards=shards)
        parameters = {part: sum(chunk.get(part, 0) for chunk in chunks) for part in chunks[0] | chunks[-1]}
        found.append(StageMemory(stage, parameters, state, sum(held), working))
    return found


def _ends(stage: Stage, chunk: int) -> dict[str, bool]:
    last = len(stage.chunks) - 1
    return {"is_first": stage.is_first and chunk == 0, "is_last": stage.is_last and chunk == last}


def _chunk_parameters(config: Config, stage: Stage, chunk: int) -> dict[str, int]:
    return count_rank_parameters(config, num_layers=stage.chunks[chunk], **_ends(stage, chunk))


def rank_state_bytes(config: Config, chunks: list[dict[str, int]], *, num_shards: int) -> dict[str, int]:
    """Bytes by kind on the fullest rank.

    megatron-core lays a chunk's parameters out in one buffer, padded to a multiple of 128 and of the ranks that share
    the optimizer (`param_and_grad_buffer.py`); with `overlap_grad_reduce` each of its buckets is, which is not counted.
    Experts that are spread over ranks have buffers of their own, which fewer ranks share.
    FSDP shards all, and gathers one layer while it computes with another; its gradients are whole for a layer.

    Args:
        chunks: parameters by part of each chunk of the stage (`count_rank_parameters`).
        num_shards: ranks that share optimizer state, or under FSDP everything.
    """
    parallel, precision, optimizer = config.parallel, config.precision, config.optimizer
    if parallel.data_parallel != "ddp":
        return _fully_sharded_bytes(config, chunks, num_shards=num_shards)
    spread = parallel.expert_model_parallel_size * parallel.expert_tensor_size
    expert_shards = max(1, num_shards * parallel.tensor_model_parallel_size // spread)
    held = own = 0
    for chunk in chunks:
        experts = chunk.get("experts", 0)
        for total, shards in ((sum(chunk.values()) - experts, num_shards), (experts, expert_shards)):
            shares = shards if parallel.use_distributed_optimizer else 1
            padded = total + (-total % math.lcm(shares, 128) if parallel.use_distributed_optimizer else 0)
            held, own = held + padded, own + padded // shares
    in_fp8 = sum(map(multiplied, chunks)) if precision.fp8_recipe else 0
    in_bf16 = held - (in_fp8 if precision.fp8_param_gather else 0)
    sizes = {
        "weights": BYTES[precision.params_dtype] * in_bf16,
        "FP8 weights": 2 * in_fp8,
        "gradients": (4 if parallel.grad_reduce_in_fp32 else 2) * held,
        "main weights": _main_bytes(config) * own,
        "moments": (BYTES[optimizer.exp_avg_dtype] + BYTES[optimizer.exp_avg_sq_dtype]) * own,
    }
    return {kind: size for kind, size in sizes.items() if size}


def multiplied(parameters: dict[str, int]) -> int:
    """Numbers of the temporal matrices, which FP8 recipes keep in FP8 too, of parameters by part."""
    return parameters["temporal"] + parameters.get("experts", 0)


def _fully_sharded_bytes(config: Config, chunks: list[dict[str, int]], *, num_shards: int) -> dict[str, int]:
    """Of FSDP: FP32 weights, gradients and moments in shards ("megatron_fsdp" has BF16 weights beside them).

    Gathered are two layers: weights, and gradients in BF16 and FP32; and for the whole step the root
    (the heads and what of the depth transformer is no layer), which torch does not shard again after its forward pass
    (`_fsdp_state.py`), with gradients that wait for its last. FP8 weights are not sharded: TransformerEngine makes them
    of the first microbatch's gathered weights, and keeps them for the others.
    """
    total = sum(sum(chunk.values()) for chunk in chunks)
    own, weight = -(-total // num_shards), BYTES[config.precision.params_dtype]
    layers = max(1, config.temporal.num_layers // (config.parallel.pipeline_model_parallel_size))
    matrices = sum(map(multiplied, chunks))
    depth, depth_layer = chunks[-1].get("depth", 0), count_depth_layer(config)
    largest = max(matrices // layers, min(depth, depth_layer))
    root = chunks[-1].get("text_head", 0) + max(0, depth - config.depth.num_layers * depth_layer)
    sizes = {
        "weights": weight * own if config.parallel.data_parallel == "megatron_fsdp" else 0,
        "FP8 weights": 2 * matrices if config.precision.fp8_recipe else 0,
        "gradients": 4 * own,
        "main weights": 4 * own,
        "moments": 8 * own,
        "gathered": (2 * weight + weight + 4) * largest + 2 * weight * root,
    }
    return {kind: size for kind, size in sizes.items() if size}
