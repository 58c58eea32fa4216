"""Where the time of a step goes, without making the host wait for the device.

At every boundary between two parts an event is put into the device's queue: in hooks of the modules on the way
forward, in hooks of the gradients of what passes the boundary on the way back. The time from one event to the next
belongs to the part that began there, so the parts sum to the step. An idle device counts for the part that it waits in.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from megaspeech.parallel.optimizer import optimizer_parts
from megaspeech.parallel.wrap import Wrapped

EMBEDDING, TEMPORAL, TEXT = "embedding", "temporal", "text head and loss"
DEPTH, HEADS, OPTIMIZER, OTHER = "depth", "codebook heads and loss", "optimizer", "other"
PARTS = (EMBEDDING, TEMPORAL, TEXT, DEPTH, HEADS, OPTIMIZER, OTHER)
"""`OPTIMIZER` is from its update to the end of the step; `OTHER` is what lies between the passes and before the update:
gradients zeroed, reduced and measured, and the host."""


class _HostEvent:
    """What a CPU has for `torch.Event`: its work is done when the call returns."""

    def record(self) -> None:
        self.seconds = perf_counter()

    def elapsed_time(self, later: _HostEvent) -> float:
        return 1e3 * (later.seconds - self.seconds)


class PartTimes:
    """Takes the time of the parts of what runs inside a `with` block: whole steps, on one rank that holds all layers.

    Args:
        wrapped: the model and its optimizer.
    """

    def __init__(self, wrapped: Wrapped) -> None:
        (self.model,), self.device = wrapped.models, wrapped.device
        self.optimizers = [part.optimizer for part in optimizer_parts(wrapped.optimizer)]
        self._marks: list[tuple[str, Any]] = []

    def __enter__(self) -> PartTimes:
        model, depth = self.model, self.model.depth
        last = TEXT if depth is None else HEADS
        self._hooks = [
            model.embedding.register_forward_pre_hook(self._marking(EMBEDDING)),
            model.temporal.register_forward_pre_hook(self._entering(TEMPORAL, back_into=EMBEDDING)),
            model.temporal.register_forward_hook(self._leaving_temporal),
            model.register_forward_hook(lambda module, arguments, losses: self._hook(losses.weighted, last)),
            model.embedding.weight.register_post_accumulate_grad_hook(self._marking(OTHER)),
            *(optimizer.register_step_pre_hook(self._marking(OPTIMIZER)) for optimizer in self.optimizers),
        ]
        if depth is not None:
            self._hooks += [
                depth.register_forward_pre_hook(self._entering(DEPTH, back_into=TEXT)),
                depth.heads.register_forward_pre_hook(self._entering(HEADS, back_into=DEPTH)),
            ]
        self._mark(OTHER)
        return self

    def __exit__(self, *_: object) -> None:
        self._mark(OTHER)
        for hook in self._hooks:
            hook.remove()

    def milliseconds(self) -> dict[str, float]:
        """By part, after the block; waits for the device."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        spent = dict.fromkeys(PARTS, 0.0)
        for (part, event), (_, following) in zip(self._marks[:-1], self._marks[1:], strict=True):
            spent[part] += event.elapsed_time(following)
        return spent

    def _mark(self, part: str) -> None:
        event = _HostEvent() if self.device.type == "cpu" else torch.Event(self.device, enable_timing=True)
        event.record()
        self._marks.append((part, event))

    def _marking(self, part: str) -> Callable[..., None]:
        """A hook of any kind: `part` begins."""
        return lambda *_: self._mark(part)

    def _hook(self, tensor: Tensor, part: str) -> None:
        """The backward pass comes to `part` with the gradient of `tensor`."""
        tensor.register_hook(self._marking(part))

    def _entering(self, part: str, *, back_into: str) -> Callable[..., None]:
        """A hook before a module: forward, `part` begins; backward, it ends there and `back_into` begins."""

        def hook(module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
            self._mark(part)
            self._hook(arguments[0], back_into)

        return hook

    def _leaving_temporal(self, module: torch.nn.Module, arguments: tuple, hidden_TBH: Tensor) -> None:
        self._mark(TEXT)
        self._hook(hidden_TBH, TEMPORAL)
