"""`depth_attention` over the Triton kernel; interface and axes of `reference`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaspeech.kernels.depth_attention.kernel import backward_kernel, forward_kernel
from megaspeech.kernels.launching import launch, require_device, triton

MOST_CODEBOOKS, WIDEST_HEAD = 32, 256
FRAMES = 4
"""Frames of a program, one after the other: they spare the GPU three of four starts of a program."""
TILE_OF_WARP = 1024
"""Elements of a head's tile per warp, 32 a thread: registers suffice for the backward's two FP32 sums and a product."""


def depth_attention(qkv_QNCE: Tensor, *, num_query_groups: int) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over codebooks up to and including the query's.

    Args:
        qkv_QNCE: the heads are A of queries, then G of keys, then G of values; query head a reads group a // (A / G).
            BF16 or FP32; the last two axes contiguous, at most 32 codebooks and a width of at most 256.
        num_query_groups: G.

    Returns:
        `[Q, N, A * E]`, contiguous.

    Raises:
        ValueError: what the kernel does not support.
    """
    require_device(qkv_QNCE)
    _check(qkv_QNCE, num_query_groups)
    return _forward(qkv_QNCE, num_query_groups)


def _check(qkv_QNCE: Tensor, num_query_groups: int) -> None:
    codebooks, _, heads, width = qkv_QNCE.shape
    query_heads = heads - 2 * num_query_groups
    remedy = 'take model.kernels: "reference"'
    if codebooks > MOST_CODEBOOKS:
        raise ValueError(f"depth_attention: {codebooks} codebooks, of at most {MOST_CODEBOOKS}; {remedy}")
    if width > WIDEST_HEAD:
        raise ValueError(f"depth_attention: heads {width} wide, of at most {WIDEST_HEAD}; {remedy}")
    if qkv_QNCE.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"depth_attention: {qkv_QNCE.dtype}, neither BF16 nor FP32; {remedy}")
    if num_query_groups < 1 or query_heads < 1 or query_heads % num_query_groups:
        raise ValueError(
            f"depth_attention: num_query_groups = {num_query_groups} does not divide the {query_heads} query heads "
            f"that it leaves of {heads}"
        )
    if not qkv_QNCE[:1, :1].is_contiguous():
        raise ValueError(
            f"depth_attention: the heads of qkv have strides {qkv_QNCE.stride()[2:]}, not {width, 1}; "
            "make them contiguous"
        )


def launch_forward(qkv_QNCE: Tensor, num_query_groups: int) -> Tensor:
    """The output `[Q, N, A * E]`."""
    codebooks, frames, heads, width = qkv_QNCE.shape
    out_QND = qkv_QNCE.new_empty(codebooks, frames, (heads - 2 * num_query_groups) * width)
    _launch(forward_kernel, qkv_QNCE, out_QND, num_query_groups=num_query_groups)
    return out_QND


def launch_backward(grad_QND: Tensor, qkv_QNCE: Tensor, num_query_groups: int) -> Tensor:
    """The gradient of `qkv_QNCE`, contiguous, of that of the output."""
    grad_qkv_QNCE = qkv_QNCE.new_empty(qkv_QNCE.shape)
    _launch(backward_kernel, qkv_QNCE, grad_QND.contiguous(), grad_qkv_QNCE, num_query_groups=num_query_groups)
    return grad_qkv_QNCE


def _launch(kernel: Any, qkv_QNCE: Tensor, *others: Tensor, num_query_groups: int) -> None:
    codebooks, num_frames, heads, width = qkv_QNCE.shape
    block_q, block_e = (max(16, triton.next_power_of_2(size)) for size in (codebooks, width))
    launch(
        kernel,
        (triton.cdiv(num_frames, FRAMES) * num_query_groups,),
        qkv_QNCE,
        *others,
        num_frames,
        *qkv_QNCE.stride()[:2],
        SCALE=width**-0.5,
        NUM_GROUPS=num_query_groups,
        HEADS=heads // num_query_groups - 2,
        NUM_CODEBOOKS=codebooks,
        WIDTH=width,
        FRAMES=FRAMES,
        BLOCK_Q=block_q,
        BLOCK_E=block_e,
        num_warps=max(1, block_q * block_e // TILE_OF_WARP),
        num_stages=1,  # programs of a multiprocessor overlap each other's loads; a pipeline spilled registers
    )


_forward = torch.library.custom_op("megaspeech::depth_attention", launch_forward, mutates_args=())
_backward = torch.library.custom_op("megaspeech::depth_attention_backward", launch_backward, mutates_args=())


@_forward.register_fake
def _(qkv_QNCE: Tensor, num_query_groups: int) -> Tensor:
    codebooks, frames, heads, width = qkv_QNCE.shape
    return qkv_QNCE.new_empty(codebooks, frames, (heads - 2 * num_query_groups) * width)


@_backward.register_fake
def _(grad_QND: Tensor, qkv_QNCE: Tensor, num_query_groups: int) -> Tensor:
    return qkv_QNCE.new_empty(qkv_QNCE.shape)


def _save(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    qkv_QNCE, ctx.num_query_groups = inputs
    ctx.save_for_backward(qkv_QNCE)


def _gradient(ctx: Any, grad_QND: Tensor) -> tuple[Tensor, None]:
    return _backward(grad_QND, *ctx.saved_tensors, ctx.num_query_groups), None


_forward.register_autograd(_gradient, setup_context=_save)
