"""Process groups: from torchrun's environment to megatron-core's rank grid, and back to one process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megaspeech.config.schema import ParallelSection
from megaspeech.parallel import host
from megaspeech.parallel.rendezvous import store_of_this_start


@dataclass(frozen=True)
class Grid:
    """This rank's place."""

    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    is_first_stage: bool
    is_last_stage: bool
    is_main: bool
    """True on the one rank that speaks for all: the last stage's first, which knows the losses."""


def world_size_from_environment() -> int:
    """Ranks that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def initialise(parallel: ParallelSection, *, seed: int, timeout: float = 600.0) -> Grid:
    """Join the process group and build megatron-core's grid; on a machine without GPU, on CPU ranks over gloo.

    Args:
        parallel: the layout; the world size was checked against it (`config.checks`).
        seed: of parameter initialisation and dropout.
        timeout: seconds after which a collective that waits for a lost rank gives up.
    """
    if torch.cuda.is_available():
        if parallel.tensor_model_parallel_size > 1:
            # megatron-core orders its overlapped communication by it, on GPUs before Blackwell.
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "nccl"
    else:
        host.enable()
        backend = "gloo"
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)  # without torchrun: one rank
    limit = timedelta(seconds=timeout)
    store, rank, world_size = store_of_this_start(timeout=limit)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    parallel_state.initialize_model_parallel(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    model_parallel_cuda_manual_seed(seed)
    return current_grid()


def current_grid() -> Grid:
    """The grid that `initialise` built."""
    is_last = parallel_state.is_pipeline_last_stage()
    tp_rank, dp_rank = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_data_parallel_rank()
    return Grid(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        dp_rank=dp_rank,
        dp_size=parallel_state.get_data_parallel_world_size(),
        is_first_stage=parallel_state.is_pipeline_first_stage(),
        is_last_stage=is_last,
        is_main=is_last and tp_rank == 0 and dp_rank == 0,
    )


def shut_down() -> None:
    """Leave the process group and put the host back as it was."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    host.disable()
