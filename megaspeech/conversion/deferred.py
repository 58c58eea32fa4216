"""Tensors of a checkpoint that are known by name, shape and precision, and read one at a time.

A model of any size fits a small machine as long as nobody holds more of it than a tensor or two. So whatever looks at
a checkpoint hands out `Weights`: nothing of it is read before it is asked for, and nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

IN_FP16 = "numbers in FP16 are kept in FP32, which holds them all; --dtype bf16 rounds and halves them"
"""For the user, of what `Deferred.held` does."""


@dataclass(frozen=True)
class Deferred:
    """A tensor that `read` makes whenever it is called, with this shape and precision, on the host."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> Deferred:
        """A tensor that is there already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def held(self) -> Deferred:
        """The same as a native model keeps it: FP16, which none has, in FP32, which holds all its numbers."""
        return self.to(torch.float32) if self.dtype is torch.float16 else self

    def to(self, dtype: torch.dtype) -> Deferred:
        """The same in another precision."""
        return self if dtype is self.dtype else Deferred(self.shape, dtype, lambda: self.read().to(dtype))


Weights: TypeAlias = Mapping[str, Deferred]
"""A model's tensors by name, in the order in which they are best read: neighbours are made of the same ones."""
