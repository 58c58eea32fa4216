"""TransformerEngine's user buffers: tensor parallel communication hidden behind the matrix products beside it."""

from __future__ import annotations

from megaspeech.config import Config
from megaspeech.data.batch import frame_multiple


def initialise_user_buffers(config: Config) -> None:
    """Make the buffers that `parallel.tp_comm_overlap` asks for, once for a process; all ranks call this.

    They hold a microbatch's frames in all, which must be as many in every one: `config.checks` sees to that.

    Raises:
        ValueError: these GPUs cannot do it.
    """
    if not config.parallel.tp_comm_overlap:
        return
    from transformer_engine.pytorch.module import base

    parallel, precision = config.parallel, config.precision
    modes = base.UserBufferQuantizationMode
    wanted = [modes.FP8] if precision.fp8_recipe else [modes.NONE]
    if precision.fp8_recipe and (precision.num_layers_at_start_in_bf16 or precision.num_layers_at_end_in_bf16):
        wanted.append(modes.NONE)
    try:
        base.initialize_ub(
            shape=[buffered_frames(config), config.temporal.hidden_size],
            tp_size=parallel.tensor_model_parallel_size,
            quantization_modes=wanted,
            bootstrap_backend="nccl",
        )
    except RuntimeError as error:
        raise ValueError(f"parallel.tp_comm_overlap: {error}; set it false") from error


def destroy_user_buffers(config: Config) -> None:
    """Give back what `initialise_user_buffers` made."""
    if config.parallel.tp_comm_overlap:
        from transformer_engine.pytorch.module import base

        base.destroy_ub()


def buffered_frames(config: Config) -> int:
    """Frames of a microbatch on a context parallel rank, all samples and tensor parallel ranks together."""
    multiple, length = frame_multiple(config), config.data.num_frames
    padded = length + -length % multiple
    return config.training.micro_batch_size * padded // config.parallel.context_parallel_size
