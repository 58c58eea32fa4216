"""CUDA graphs of layers made of many small kernels: launched as one, and the host does not fall behind."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class GraphedLayers:
    """Layers over `[Q, N, D]`, one after the other, as CUDA graphs of their forward and their backward pass.

    A graph has one length and memory of its own, so there is one for every number of frames that comes up, rounded up;
    it is captured when it first does. What a graph gives out it overwrites the next time: the backward pass must follow
    before the next forward one of the same length, as it does on the last pipeline stage.

    Args:
        layers: without hooks that talk to other ranks; they go on being trained where they are.
        multiple: frames are filled up with zeros to it.
    """

    def __init__(self, layers: torch.nn.ModuleList, *, multiple: int) -> None:
        self.layers, self.multiple = layers, multiple
        self.graphs: dict[tuple[int, ...], torch.nn.Module] = {}

    def __call__(self, x_QND: Tensor) -> Tensor:
        """What the layers make of `x_QND`; without gradients they are called as they are."""
        if not torch.is_grad_enabled():
            return torch.nn.Sequential(*self.layers)(x_QND)
        frames = x_QND.shape[1]
        x_QND = F.pad(x_QND, (0, 0, 0, -frames % self.multiple))
        if x_QND.shape not in self.graphs:
            self.graphs[x_QND.shape] = self._capture(x_QND)
        return self.graphs[x_QND.shape](x_QND)[:, :frames]

    def _capture(self, x_QND: Tensor) -> torch.nn.Module:
        sample = torch.zeros_like(x_QND).requires_grad_()
        with torch.enable_grad():
            return torch.cuda.make_graphed_callables(torch.nn.Sequential(*self.layers), (sample,))


def install_graphs(model: torch.nn.Module, *, multiple: int) -> None:
    """Run the layers of the chunk's depth transformer so, where it has one."""
    if depth := getattr(model, "depth", None):
        depth.run_layers = GraphedLayers(depth.layers, multiple=multiple)
