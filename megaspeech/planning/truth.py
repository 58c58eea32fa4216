"""What a stage really takes: its real modules, built as a fake rank, and what their forward pass keeps.

The planner's counts are held against it (`docs/measurements/planning.md`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megaspeech.config import Config
from megaspeech.model.speech_text_model import SpeechTextModel
from megaspeech.parallel.fake_ranks import fake_rank, rank_of_stage
from megaspeech.parallel.optimizer import optimizer_parts
from megaspeech.parallel.wrap import Wrapped, wrap


@dataclass(frozen=True)
class StageTruth:
    """Of one rank of a stage: parameters, bytes of its buffers, and of what one microbatch keeps."""

    parameters: int
    weights: int
    gradients: int
    main_weights: int
    activations: int


def measure_stage(config: Config, *, stage: int, world_size: int) -> StageTruth:
    """Build the first rank of a stage, all its chunks, and send one microbatch forward through each.

    Takes seconds and no memory to speak of, whatever the model's size.
    """
    rank = rank_of_stage(config, stage=stage, world_size=world_size)
    with fake_rank(config, rank=rank, world_size=world_size) as grid:

        def build(vp_stage: int | None) -> SpeechTextModel:
            return SpeechTextModel(config, **chunk_ends(vp_stage), vp_stage=vp_stage)

        wrapped = wrap(config, num_chunks=grid.num_chunks, build=build, initialise=lambda model: None)
        found = StageTruth(
            parameters=sum(parameter.numel() for model in wrapped.models for parameter in model.parameters()),
            **_buffers(wrapped),
            activations=sum(_saved_by(model, config) for model in wrapped.models),
        )
        wrapped.release()
    return found


def chunk_ends(vp_stage: int | None) -> dict[str, bool]:
    """Whether a chunk of this rank's stage is the first and the last of the model."""
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    return {"pre_process": first, "post_process": last}


def _buffers(wrapped: Wrapped) -> dict[str, int]:
    """Bytes of DDP's buffers and of the optimizer's own weights."""
    buffers = [buffer for chunk in wrapped.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    parameters = {parameter.untyped_storage() for chunk in wrapped.chunks for parameter in chunk.parameters()}
    main = [
        parameter
        for part in optimizer_parts(wrapped.optimizer)
        for group in part.optimizer.param_groups
        for parameter in group["params"]
    ]
    return {
        "weights": sum({storage._cdata: storage.nbytes() for storage in parameters}.values()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "main_weights": sum(parameter.nbytes for parameter in main),
    }


def sample_batch(config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `[B, S, T]`, weights `[B, P, T]` and depth frames `[B, T]` of a microbatch in which all weighs."""
    streams, rows, frames = config.streams, config.training.micro_batch_size, config.data.num_frames
    codes = torch.zeros(rows, streams.num_streams, frames, dtype=torch.long)
    return codes, torch.ones(rows, 1 + streams.num_codebooks, frames), torch.ones(rows, frames, dtype=torch.bool)


def stage_input(config: Config) -> Tensor:
    """What the stage before sends: this rank's frames `[T, B, H]` of a microbatch."""
    parallel, shape = config.parallel, config.temporal.hidden_size
    cut = parallel.context_parallel_size * (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)
    dtype = torch.bfloat16 if config.precision.params_dtype == "bf16" else torch.float32
    size = (config.data.num_frames // cut, config.training.micro_batch_size, shape)
    return torch.zeros(size, dtype=dtype, requires_grad=True)


def _saved_by(model: SpeechTextModel, config: Config) -> int:
    """Bytes of all storages that the graph of one microbatch holds, parameters apart."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage()._cdata) not in own:
            kept.setdefault(storage, tensor)
        return tensor

    if not model.pre_process:
        model.set_input_tensor(stage_input(config))
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(*sample_batch(config))
    del out
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
