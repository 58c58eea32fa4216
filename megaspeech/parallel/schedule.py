"""One step's microbatches through megatron-core's pipeline schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func


def run_microbatches(
    forward_step: Callable[[Iterator[Any], torch.nn.Module], tuple[Any, Callable]],
    *,
    chunks: Sequence[torch.nn.Module],
    microbatches: Sequence[Any],
    num_frames: int,
    micro_batch_size: int,
    forward_only: bool,
) -> list[dict[str, Any]]:
    """Forward, and backward unless `forward_only`, of all microbatches of this data parallel rank.

    Args:
        forward_step: megatron-core's.
        chunks: of the model, of this stage.
        microbatches: what `forward_step` takes from its iterator; every chunk reads all of them.
        num_frames: length of the longest, of all of them with a pipeline.
        micro_batch_size: samples in each.
        forward_only: whether nothing is learned from them.

    Returns:
        On the last stage what the loss function reported of each microbatch; elsewhere nothing.
    """
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(microbatches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(microbatches),
        seq_length=num_frames,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
