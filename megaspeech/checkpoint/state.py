"""A run's state as one sharded dict that loads on any layout: model, optimizer, schedule, and the step.

The random state is not part of it: nothing in a step is drawn, and the data's draws follow from the step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase

from megaspeech.checkpoint.optimizer_state import load_optimizer_state, optimizer_state, with_data
from megaspeech.checkpoint.store import CONFIG, check_whole, load
from megaspeech.config import Config, read_config
from megaspeech.config.computation import ParallelSection
from megaspeech.model.speech_text_model import SpeechTextModel
from megaspeech.parallel import groups
from megaspeech.parallel.fsdp2 import FullyShardedChunk
from megaspeech.parallel.megatron_fsdp import MegatronShardedChunk
from megaspeech.parallel.precision import unpickling_scales
from megaspeech.parallel.wrap import Wrapped

FULLY_SHARDED = (FullyShardedChunk, MegatronShardedChunk)
SCALES = "._extra_state"
"""In the names of what TransformerEngine keeps beside weights."""


def metadata() -> dict[str, Any]:
    """What megatron-core's `sharded_state_dict` methods want to know about the format."""
    return {
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def model_state(wrapped: Wrapped) -> dict[str, Any]:
    """The model alone, as a seed checkpoint holds it."""
    state, _ = _model_and_places(wrapped)
    return {"model": {name: _weights(chunk) for name, chunk in _in_precision_of(wrapped, state).items()}}


def run_state(wrapped: Wrapped, *, step: int, is_loading: bool = False) -> dict[str, Any]:
    """Everything that goes on. The data position is the step: batches are a function of it (`data.mixture`)."""
    state, places = _model_and_places(wrapped)
    if is_loading and not _goes_on_with_scales(wrapped):
        state = {name: _weights(chunk) for name, chunk in state.items()}
    return {
        "model": _in_precision_of(wrapped, state),
        "optimizer": optimizer_state(wrapped.optimizer, places=places, is_loading=is_loading),
        "scheduler": wrapped.scheduler.state_dict(),
        "step": step,
    }


def load_model_state(wrapped: Wrapped, state: dict[str, Any]) -> None:
    """Put a loaded model into place, and let the optimizer copy it where it keeps copies."""
    _load_models(wrapped, state["model"], with_scales=False)
    wrapped.optimizer.reload_model_params()
    _install(wrapped)


def load_run_state(wrapped: Wrapped, state: dict[str, Any]) -> int:
    """Put a loaded run into place; returns the step to go on with."""
    _load_models(wrapped, state["model"], with_scales=_goes_on_with_scales(wrapped))
    load_optimizer_state(wrapped.optimizer, state["optimizer"])
    _install(wrapped)
    wrapped.scheduler.load_state_dict(state["scheduler"])
    return state["step"]


def _goes_on_with_scales(wrapped: Wrapped) -> bool:
    """Whether the recipe keeps any from step to step."""
    return wrapped.config.precision.recipe == "fp8-delayed"


def _weights(state: dict[str, Any]) -> dict[str, Any]:
    """A model's sharded state without what layers keep beside their weights: which of them do is TransformerEngine's
    business (its norms and experts too), and checkpoints of local layers and converted ones have not all of it."""
    return {key: place for key, place in state.items() if SCALES not in key}


def _model_and_places(wrapped: Wrapped) -> tuple[dict[str, Any], dict[int, ShardedBase]]:
    """(sharded state of each chunk; each parameter's place in it, by `id`)."""
    wrapped.gather_parameters()
    state, places = {}, {}
    for index, (model, chunk) in enumerate(zip(wrapped.models, wrapped.chunks, strict=True)):
        if isinstance(chunk, FULLY_SHARDED):
            state[f"chunk{index}"], own = chunk.sharded_state_dict(metadata=metadata())
        else:
            state[f"chunk{index}"] = model.sharded_state_dict(metadata=metadata())
            own = {id(x.data): x for x in nested_values(state[f"chunk{index}"]) if isinstance(x, ShardedBase)}
        places.update(own)
    return state, places


def _in_precision_of(wrapped: Wrapped, state: dict[str, Any]) -> dict[str, Any]:
    """Weights in the run's precision, which fully sharded ones are gathered in and not kept in."""
    dtype = wrapped.models[0].config.params_dtype

    def cast(place: Any) -> Any:
        if not isinstance(place, ShardedBase) or not isinstance(place.data, torch.nn.Parameter):
            return place
        if place.data.dtype is dtype:
            return place
        return with_data(place, key=place.key, data=place.data.detach().to(dtype))

    return dict_list_map_outplace(cast, state)


def _load_models(wrapped: Wrapped, state: dict[str, Any], *, with_scales: bool) -> None:
    for index, (model, chunk) in enumerate(zip(wrapped.models, wrapped.chunks, strict=True)):
        if isinstance(chunk, FULLY_SHARDED):
            chunk.load(state[f"chunk{index}"])
        else:
            load_model(model, state[f"chunk{index}"], with_scales=with_scales)


def load_model(model: torch.nn.Module, state: dict[str, Any], *, with_scales: bool) -> None:
    """Put loaded values into a model: weights, and the scales of "fp8-delayed" where the same run goes on.

    Another recipe has no use for them, and what others have trained need not be trusted with them
    (`parallel.precision`): a few microbatches find new ones.
    """
    if with_scales:
        with unpickling_scales():
            model.load_state_dict(state)
        return
    nothing = {key: None for key in model.state_dict() if key.endswith(SCALES)}
    model.load_state_dict({**_weights(state), **nothing})


def _install(wrapped: Wrapped) -> None:
    for chunk in wrapped.chunks:
        if isinstance(chunk, MegatronShardedChunk):
            chunk.install()


def load_whole_model(path: str | Path) -> tuple[SpeechTextModel, Config]:
    """The model of a checkpoint of any layout, whole, in this process, and its config.

    Brings up a process group of one rank where there is none; `parallel.groups.shut_down` takes it down.
    """
    check_whole(path)
    config = read_config(Path(path) / CONFIG)
    config = config.model_copy(update={"parallel": ParallelSection()})
    if not dist.is_initialized():
        groups.initialise(config.parallel, seed=config.run.seed)
    model = SpeechTextModel(config, pre_process=True, post_process=True)
    wanted = {"model": {"chunk0": _weights(model.sharded_state_dict(metadata=metadata()))}}
    load_model(model, load(path, wanted, config=config)["model"]["chunk0"], with_scales=False)
    return model, config
