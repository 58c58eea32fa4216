"""What megatron-core's schedule calls for every microbatch: the model, and the loss of its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megaspeech.data.batch import Batch
from megaspeech.model.losses import Losses


def make_forward_step(
    *, weight_sums: Tensor, num_microbatches: int, dp_size: int, tensor_parallel_size: int
) -> Callable[[Iterator[Batch], torch.nn.Module], tuple[Any, Callable]]:
    """The forward step of one optimizer step.

    The loss is a weighted mean over the *global* batch, so that every layout minimises the same number. megatron-core
    averages over microbatches and data parallel ranks; the sums of this microbatch are scaled up against that.

    Args:
        weight_sums: sums of the text and of the audio weights over the global batch `[2]`.
        num_microbatches: of this data parallel rank.
        dp_size: data parallel ranks.
        tensor_parallel_size: ranks on which the text's sum is the same, and to be reported once.
    """
    scale = num_microbatches * dp_size / torch.where(weight_sums > 0, weight_sums, 1.0).float()
    share = torch.ones_like(scale)
    share[0] /= tensor_parallel_size

    def loss_function(losses: Losses) -> tuple[Tensor, dict[str, Tensor]]:
        weighted, statistics = losses
        # Not a view of what is returned first: the schedule divides that in place.
        return (weighted * scale).sum(), {"weighted": weighted.detach() * share, "statistics": statistics}

    def forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Any, Callable]:
        batch = next(batches)
        # By name: of what comes by position, megatron-core's Float16Module would round the weights to BF16.
        frames = {"depth_frames_BT": batch.depth_frames_BT, "bounds_D": batch.bounds_D}
        return model(batch.codes_BST, weights_BPT=batch.weights_BPT, **frames), loss_function

    return forward_step


def forward_logits(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Any, None]:
    """The forward step that asks for logits: without a loss function the schedule hands the output through."""
    batch = next(batches)
    return model(batch.codes_BST, bounds_D=batch.bounds_D), None
