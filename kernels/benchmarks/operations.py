"""The operations as they are measured: their inputs at a model's shape, their FP64 definition, their bytes and FLOPs.

Work is what the operation cannot do without, whoever does it: what an implementation moves or computes beyond it (a
second pass, recomputation) is its overhead, and lowers its rate. Tensors in caches are counted as if they were not, so
a rate may pass the floor where rows are read again soon.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megaspeech.kernels import load_kernels
from megaspeech.kernels.benchmarks.shapes import ModelShape
from megaspeech.kernels.stream_embedding.reference import delayed_codes

SAMPLE_FRAMES = 4096
"""A sample's longest; more frames make a batch of samples."""
TEXT_PADDING = 0.65
"""Share of text tokens that are padding, one and the same, in English conversation (Moshi: Defossez et al. 2024). So
the table's rows are not asked for evenly: one row's gradient sums most of the frames."""


@dataclass(frozen=True)
class Inputs:
    """What an operation is called with: differentiable `leaves`, `constants`, and the gradient of its output."""

    leaves: dict[str, Tensor]
    constants: dict[str, Any]
    grad_output: Tensor

    def in_fp64(self) -> Inputs:
        """The same numbers in FP64."""
        leaves = {name: leaf.double() for name, leaf in self.leaves.items()}
        return Inputs(leaves, self.constants, self.grad_output.double())

    @property
    def num_bytes(self) -> int:
        """Of the inputs, the output and every gradient: what any implementation holds (output as its gradient)."""
        constants = [constant for constant in self.constants.values() if isinstance(constant, Tensor)]
        tensors = [*2 * [*self.leaves.values(), self.grad_output], *constants]
        return sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True)
class Operation:
    """One operation. Work is in bytes where `unit` is "GB/s", in FLOPs where it is "TFLOP/s"."""

    name: str
    unit: str
    draw: Callable[..., Inputs]
    """(shape, num_frames, dtype, device, masked): random inputs, a share `masked` of the tokens being -1."""
    exact: Callable[..., Tensor]
    """The output, differentiable, of the leaves in FP64 and the constants."""
    forward_work: Callable[[Inputs], int]
    backward_work: Callable[[Inputs], int]

    def work(self, inputs: Inputs) -> dict[str, int]:
        """By direction."""
        return {"forward": self.forward_work(inputs), "backward": self.backward_work(inputs)}


def _tokens(cardinality: int, size: tuple[int, ...], *, masked: float, device: str) -> Tensor:
    tokens = torch.randint(cardinality, size, device=device)
    return tokens.masked_fill(torch.rand(size, device=device) < masked, -1)


def _draw_stream_embedding(
    shape: ModelShape, num_frames: int, *, dtype: torch.dtype, device: str, masked: float = 0.0
) -> Inputs:
    """Codes `[B, S, T]` with B * T = `num_frames`, and the whole table."""
    batch = math.ceil(num_frames / SAMPLE_FRAMES)
    size = (batch, num_frames // batch)
    text, *codebooks = (_tokens(each, size, masked=masked, device=device) for each in shape.cardinalities)
    text = text.masked_fill(torch.rand(size, device=device) < TEXT_PADDING, shape.text_cardinality - 1)
    constants = {
        "codes_BST": torch.stack([text, *codebooks], dim=1),
        "delays": torch.tensor(shape.delays, device=device),
        "initial": torch.tensor(shape.cardinalities, device=device),
        "offsets": torch.tensor(shape.offsets, device=device),
    }
    table_RH = torch.randn(shape.num_rows, shape.hidden_size, dtype=dtype, device=device)
    grad_TBH = torch.randn(*size[::-1], shape.hidden_size, dtype=dtype, device=device)
    return Inputs({"table_RH": table_RH}, constants, grad_TBH)


def _stream_embedding_forward(inputs: Inputs) -> int:
    """Bytes: S rows read and one written a frame, (S + 1) N H; tokens are neglected."""
    return (inputs.constants["codes_BST"].shape[1] + 1) * inputs.grad_output.nbytes


def _stream_embedding_backward(inputs: Inputs) -> int:
    """Bytes: a row of the output's gradient read for every token, S N H, and every row that a token named written once.

    That is what summing by rows moves, in a fixed order and without atomics. Zeros in rows nobody named are overhead.
    """
    codes_BST, delays, initial, offsets = (
        inputs.constants[name] for name in ("codes_BST", "delays", "initial", "offsets")
    )
    tokens_BST = delayed_codes(codes_BST, shifts=delays + 1, fill=initial)
    touched = (tokens_BST + offsets[:, None])[tokens_BST >= 0].unique().numel()
    table_RH = inputs.leaves["table_RH"]
    return codes_BST.shape[1] * inputs.grad_output.nbytes + touched * table_RH[0].nbytes


def _draw_depth_attention(
    shape: ModelShape, num_frames: int, *, dtype: torch.dtype, device: str, masked: float = 0.0
) -> Inputs:
    """Queries, keys and values of all heads `[Q, N, 3 A, E]`; there are no tokens to mask."""
    size = (shape.num_codebooks, num_frames)
    width = shape.depth_hidden_size // shape.depth_heads
    qkv_QNCE = torch.randn(*size, 3 * shape.depth_heads, width, dtype=dtype, device=device)
    grad_QND = torch.randn(*size, shape.depth_hidden_size, dtype=dtype, device=device)
    return Inputs({"qkv_QNCE": qkv_QNCE}, {"num_query_groups": shape.depth_heads}, grad_QND)


def _depth_attention_forward(inputs: Inputs) -> int:
    """Bytes: queries, keys and values read, the output written."""
    return inputs.leaves["qkv_QNCE"].nbytes + inputs.grad_output.nbytes


def _depth_attention_backward(inputs: Inputs) -> int:
    """Bytes: queries, keys, values and the output's gradient read, the gradients of the three written."""
    return 2 * inputs.leaves["qkv_QNCE"].nbytes + inputs.grad_output.nbytes


def _draw_codebook_cross_entropy(
    shape: ModelShape, num_frames: int, *, dtype: torch.dtype, device: str, masked: float = 0.0
) -> Inputs:
    """Hidden `[Q, N, D]` as after a norm, heads `[Q, D, V]` as at initialisation; weights of the losses, FP32."""
    codebooks, width = shape.num_codebooks, shape.depth_hidden_size
    hidden_QND = torch.randn(codebooks, num_frames, width, dtype=dtype, device=device)
    heads_QDV = torch.randn(codebooks, width, shape.cardinality, dtype=dtype, device=device) / math.sqrt(width)
    targets_QN = _tokens(shape.cardinality, (codebooks, num_frames), masked=masked, device=device)
    grad_QN = torch.rand(codebooks, num_frames, device=device)
    return Inputs({"hidden_QND": hidden_QND, "heads_QDV": heads_QDV}, {"targets_QN": targets_QN}, grad_QN)


def _codebook_cross_entropy_forward(inputs: Inputs) -> int:
    """FLOPs: the logits, 2 Q N D V."""
    return 2 * inputs.leaves["hidden_QND"].numel() * inputs.leaves["heads_QDV"].shape[2]


def _codebook_cross_entropy_backward(inputs: Inputs) -> int:
    """FLOPs: the two products of the logits' gradient, 4 Q N D V; computing the logits again is overhead."""
    return 2 * _codebook_cross_entropy_forward(inputs)


def _exact_cross_entropy(hidden_QND: Tensor, heads_QDV: Tensor, targets_QN: Tensor) -> Tensor:
    """The reference without its cast to FP32."""
    logits_QVN = torch.bmm(hidden_QND, heads_QDV).transpose(1, 2)
    return F.cross_entropy(logits_QVN, targets_QN, ignore_index=-1, reduction="none")


_REFERENCE = load_kernels("reference")

OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation(
            "stream_embedding",
            "GB/s",
            _draw_stream_embedding,
            _REFERENCE.stream_embedding.stream_embedding,
            _stream_embedding_forward,
            _stream_embedding_backward,
        ),
        Operation(
            "depth_attention",
            "GB/s",
            _draw_depth_attention,
            _REFERENCE.depth_attention.depth_attention,
            _depth_attention_forward,
            _depth_attention_backward,
        ),
        Operation(
            "codebook_cross_entropy",
            "TFLOP/s",
            _draw_codebook_cross_entropy,
            _exact_cross_entropy,
            _codebook_cross_entropy_forward,
            _codebook_cross_entropy_backward,
        ),
    )
}
"""By name."""
