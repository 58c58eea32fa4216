"""From the host to the device that computes."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A host's tensor on the device, from memory that it copies from by itself: nobody waits for what it does."""
    if x.device.type == "cpu" and torch.accelerator.is_available():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
