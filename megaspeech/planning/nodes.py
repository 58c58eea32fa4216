"""Machines: how many GPUs a node has, how they reach each other and the rest; and how fast a group of ranks is."""

from __future__ import annotations

from dataclasses import dataclass

from megaspeech.planning.efficiency import NETWORK, NVLINK
from megaspeech.planning.gpus import Gpu


@dataclass(frozen=True)
class Node:
    """`network` is GB/s in each direction for every GPU, each having an adapter of its own."""

    name: str
    num_gpus: int
    network: float
    source: str


NODES = (
    Node(
        "8 GPUs, 400 Gb/s each", 8, 50.0, "NVIDIA DGX H100 data sheet, 2023: 8 ConnectX-7 of 400 Gb/s; DGX B200 alike"
    ),
    Node("TSUBAME4.0: 4 GPUs, NDR200 each", 4, 25.0, "TSUBAME4.0 hardware: 4 x InfiniBand NDR200"),
)


def find_node(num_gpus: int) -> Node:
    """The node of so many GPUs. Raises ValueError where the table has none."""
    for node in NODES:
        if node.num_gpus == num_gpus:
            return node
    known = ", ".join(f"{node.num_gpus} ({node.name})" for node in NODES)
    raise ValueError(f"--gpus-per-node: no node of {num_gpus} GPUs is known; choose {known}")


def group_rate(gpu: Gpu, node: Node, *, size: int, stride: int) -> float:
    """Bytes a second that each rank of a group sends and receives in a collective.

    Args:
        gpu, node: the machine.
        size: ranks of the group.
        stride: distance of one from the next, in GPUs; the groups between run at the same time.
    """
    inside = gpu.nvlink * NVLINK * 1e9
    if size * stride <= node.num_gpus:
        return inside
    # Ranks of the group in one node pass its data on over as many adapters (NCCL's rings, one an adapter).
    together = max(1, min(size, node.num_gpus // stride))
    return min(inside, together * node.network * NETWORK * 1e9)
