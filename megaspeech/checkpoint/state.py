"""A run's state as one sharded dict that loads on any layout: model, optimizer, schedule, and the step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from megaspeech.checkpoint.store import CONFIG, check_whole, load
from megaspeech.config import Config, read_config
from megaspeech.config.schema import ParallelSection
from megaspeech.model.speech_text_model import SpeechTextModel
from megaspeech.parallel import groups
from megaspeech.parallel.wrap import Wrapped

SHARDING = "fully_reshardable"
"""The optimizer's state by parameter, not by rank: loads on any layout. megatron-core's default does not."""


def metadata(*, distributed_optimizer: bool) -> dict[str, Any]:
    """What megatron-core's `sharded_state_dict` methods want to know about the format."""
    values = {
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    if distributed_optimizer:
        values["distrib_optim_sharding_type"] = SHARDING
    return values


def model_state(wrapped: Wrapped, *, distributed_optimizer: bool) -> dict[str, Any]:
    """The model alone, as a seed checkpoint holds it."""
    meta = metadata(distributed_optimizer=distributed_optimizer)
    return {"model": wrapped.model.sharded_state_dict(metadata=meta)}


def run_state(wrapped: Wrapped, *, step: int, distributed_optimizer: bool, is_loading: bool) -> dict[str, Any]:
    """Everything that goes on. The data position is the step: batches are a function of it (`data.mixture`)."""
    meta = metadata(distributed_optimizer=distributed_optimizer)
    state = model_state(wrapped, distributed_optimizer=distributed_optimizer)
    return {
        **state,
        "optimizer": wrapped.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=meta),
        "scheduler": wrapped.scheduler.state_dict(),
        "step": step,
    }


def load_model_state(wrapped: Wrapped, state: dict[str, Any]) -> None:
    """Put a loaded model into place, and let the optimizer copy it where it keeps copies."""
    wrapped.model.load_state_dict(state["model"])
    wrapped.optimizer.reload_model_params()


def load_run_state(wrapped: Wrapped, state: dict[str, Any]) -> int:
    """Put a loaded run into place; returns the step to go on with."""
    wrapped.model.load_state_dict(state["model"])
    wrapped.optimizer.load_state_dict(state["optimizer"])
    wrapped.scheduler.load_state_dict(state["scheduler"])
    return state["step"]


def load_whole_model(path: str | Path) -> tuple[SpeechTextModel, Config]:
    """The model of a checkpoint of any layout, whole, in this process, and its config.

    Brings up a process group of one rank where there is none; `parallel.groups.shut_down` takes it down.
    """
    check_whole(path)
    config = read_config(Path(path) / CONFIG)
    single = ParallelSection(use_distributed_optimizer=config.parallel.use_distributed_optimizer)
    config = config.model_copy(update={"parallel": single})
    if not dist.is_initialized():
        groups.initialise(single, seed=config.run.seed)
    model = SpeechTextModel(config, pre_process=True, post_process=True)
    meta = metadata(distributed_optimizer=single.use_distributed_optimizer)
    model.load_state_dict(load(path, {"model": model.sharded_state_dict(metadata=meta)}, config=config)["model"])
    return model, config
