"""Process groups: from torchrun's environment to megatron-core's rank grid, and back to one process."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megaspeech.config.computation import ParallelSection
from megaspeech.parallel import host
from megaspeech.parallel.precision import forget_recipes
from megaspeech.parallel.rendezvous import store_of_this_start

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""What a launcher would tell one rank."""


@dataclass(frozen=True)
class Grid:
    """This rank's place."""

    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    is_first_stage: bool
    is_last_stage: bool
    num_chunks: int
    """Chunks of the model that this stage holds: 1, or more under an interleaved pipeline."""
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
    join(parallel, timeout=timeout)
    return build_grid(parallel, seed=seed, timeout=timeout)


def join(parallel: ParallelSection, *, timeout: float = 600.0) -> None:
    """Take this process's device and join the process group of all ranks."""
    if torch.cuda.is_available():
        # megatron-core orders overlapped tensor parallel communication by it, on GPUs before Blackwell; FSDP's
        # gathers must overlap and forbid it.
        if parallel.tensor_model_parallel_size > 1 and parallel.data_parallel == "ddp":
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        # One alone is seen by each task of `srun --gpus-per-task 1`.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "nccl"
    else:
        host.enable()
        backend = "gloo"
    limit = timedelta(seconds=timeout)
    missing = ALONE.keys() - os.environ.keys()
    os.environ.update({name: ALONE[name] for name in missing})
    store, rank, world_size = store_of_this_start(timeout=limit)
    for name in missing:  # or processes that this one starts would take themselves for its only rank
        del os.environ[name]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)


def build_grid(parallel: ParallelSection, *, seed: int, timeout: float = 600.0) -> Grid:
    """megatron-core's groups of a layout, and its random states; after `remove_grid` another layout's.

    `timeout` as for `initialise`: each group has its own, which megatron-core sets to 30 minutes.
    """
    parallel_state.initialize_model_parallel(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.num_chunks if parallel.num_chunks > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_size,
        distributed_timeout_minutes=timeout / 60,
        create_gloo_process_groups=False,  # for megatron-core's own gathering of the optimizer's state
    )
    # Every stage draws its own layers, as megatron's training does; the ranks of a stage share the host's draws.
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return current_grid(parallel)


def current_grid(parallel: ParallelSection) -> Grid:
    """The grid that `build_grid` built."""
    is_last = parallel_state.is_pipeline_last_stage()
    tp_rank, dp_rank = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_data_parallel_rank()
    return Grid(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        dp_rank=dp_rank,
        dp_size=parallel_state.get_data_parallel_world_size(),
        is_first_stage=parallel_state.is_pipeline_first_stage(),
        is_last_stage=is_last,
        num_chunks=parallel.num_chunks,
        is_main=is_last and tp_rank == dp_rank == parallel_state.get_context_parallel_rank() == 0,
    )


def remove_grid() -> None:
    """Take the groups of a layout down again, ready for another layout's; all ranks call this.

    The process group of all ranks is made anew too: what torch remembers of the old groups by name goes with it.
    """
    dist.barrier()
    store, backend = dist.distributed_c10d._get_default_store(), dist.get_backend()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    forget_recipes()
    gc.collect()  # modules hold groups, and groups hold threads
    store = dist.PrefixStore("next", store)  # the keys of the old one are used up
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def shut_down() -> None:
    """Leave the process group and put the host back as it was."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    host.disable()
