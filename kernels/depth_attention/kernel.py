"""Triton of `depth_attention`. A program takes one key-value group of a few frames, one after the other; see README.

Axes: Q codebooks, E head width, both padded to powers of two of at least 16, which is what a matrix product takes.
Padding is read as 0 and not written. Padded queries come after all others, so that causality alone keeps the padded
keys from every query that counts. `HEADS` is A / G, the query heads of a group. Offsets are INT64.
"""

from __future__ import annotations

from megaspeech.kernels.arithmetic import dot, rounded
from megaspeech.kernels.launching import tl, triton


@triton.jit
def tile_exists(NUM_CODEBOOKS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_E: tl.constexpr):
    """Which elements of a head's tile are not padding `[Q, E]`."""
    return (tl.arange(0, BLOCK_Q)[:, None] < NUM_CODEBOOKS) & (tl.arange(0, BLOCK_E)[None, :] < WIDTH)


@triton.jit
def tile_offsets(stride_codebook, BLOCK_Q: tl.constexpr, BLOCK_E: tl.constexpr):
    """Offsets of a tile's elements from its first `[Q, E]`."""
    return tl.arange(0, BLOCK_Q)[:, None].to(tl.int64) * stride_codebook + tl.arange(0, BLOCK_E)[None, :]


@triton.jit
def product(a, b):
    """`a @ b` in FP32."""
    return dot(a, b, tl.zeros((a.shape[0], b.shape[1]), tl.float32))


@triton.jit
def attention_weights(query, key, SCALE: tl.constexpr):
    """Causal softmax(q k^T * SCALE) `[Q, Q]` in FP32."""
    queries, keys = tl.arange(0, query.shape[0])[:, None], tl.arange(0, key.shape[0])[None, :]
    scores = tl.where(queries >= keys, product(query, tl.trans(key)) * SCALE, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def forward_kernel(
    qkv,
    out,
    num_frames,
    stride_codebook,
    stride_frame,
    SCALE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    NUM_CODEBOOKS: tl.constexpr,
    WIDTH: tl.constexpr,
    FRAMES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """`out[Q, N, A * E]`, contiguous, of `qkv[Q, N, C, E]`."""
    group, first_frame = tl.program_id(0) % NUM_GROUPS, tl.program_id(0) // NUM_GROUPS * FRAMES
    key_head = NUM_GROUPS * HEADS + group
    out_row: tl.constexpr = NUM_GROUPS * HEADS * WIDTH
    exists = tile_exists(NUM_CODEBOOKS, WIDTH, BLOCK_Q, BLOCK_E)
    qkv += tile_offsets(stride_codebook, BLOCK_Q, BLOCK_E)
    out += tile_offsets(tl.cast(num_frames, tl.int64) * out_row, BLOCK_Q, BLOCK_E)
    for frame_32 in range(first_frame, tl.minimum(first_frame + FRAMES, num_frames)):
        frame = tl.cast(frame_32, tl.int64)
        heads = qkv + frame * stride_frame
        key = tl.load(heads + key_head * WIDTH, mask=exists, other=0.0)
        value = tl.load(heads + (key_head + NUM_GROUPS) * WIDTH, mask=exists, other=0.0)
        for member in range(HEADS):
            head = group * HEADS + member
            query = tl.load(heads + head * WIDTH, mask=exists, other=0.0)
            weights = rounded(attention_weights(query, key, SCALE), value.dtype)
            tl.store(out + frame * out_row + head * WIDTH, rounded(product(weights, value), value.dtype), mask=exists)


@triton.jit
def backward_kernel(
    qkv,
    grad_out,
    grad_qkv,
    num_frames,
    stride_codebook,
    stride_frame,
    SCALE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    NUM_CODEBOOKS: tl.constexpr,
    WIDTH: tl.constexpr,
    FRAMES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """`grad_qkv[Q, N, C, E]` of `qkv[Q, N, C, E]` and `grad_out[Q, N, A * E]`; the gradients are contiguous."""
    group, first_frame = tl.program_id(0) % NUM_GROUPS, tl.program_id(0) // NUM_GROUPS * FRAMES
    key_head = NUM_GROUPS * HEADS + group
    out_row: tl.constexpr = NUM_GROUPS * HEADS * WIDTH
    qkv_row: tl.constexpr = NUM_GROUPS * (HEADS + 2) * WIDTH
    exists = tile_exists(NUM_CODEBOOKS, WIDTH, BLOCK_Q, BLOCK_E)
    qkv += tile_offsets(stride_codebook, BLOCK_Q, BLOCK_E)
    grad_out += tile_offsets(tl.cast(num_frames, tl.int64) * out_row, BLOCK_Q, BLOCK_E)
    grad_qkv += tile_offsets(tl.cast(num_frames, tl.int64) * qkv_row, BLOCK_Q, BLOCK_E)
    for frame_32 in range(first_frame, tl.minimum(first_frame + FRAMES, num_frames)):
        frame = tl.cast(frame_32, tl.int64)
        heads, grad_heads = qkv + frame * stride_frame, grad_qkv + frame * qkv_row
        key = tl.load(heads + key_head * WIDTH, mask=exists, other=0.0)
        value = tl.load(heads + (key_head + NUM_GROUPS) * WIDTH, mask=exists, other=0.0)
        grad_key = tl.zeros((BLOCK_Q, BLOCK_E), tl.float32)
        grad_value = tl.zeros((BLOCK_Q, BLOCK_E), tl.float32)
        for member in range(HEADS):
            head = group * HEADS + member
            query = tl.load(heads + head * WIDTH, mask=exists, other=0.0)
            grad = tl.load(grad_out + frame * out_row + head * WIDTH, mask=exists, other=0.0)
            weights = attention_weights(query, key, SCALE)
            grad_value = dot(tl.trans(rounded(weights, key.dtype)), grad, grad_value)
            grad_weights = product(grad, tl.trans(value))
            mean = tl.sum(weights * grad_weights, 1)[:, None]
            grad_scores = rounded(weights * (grad_weights - mean) * SCALE, key.dtype)
            grad_key = dot(tl.trans(grad_scores), query, grad_key)
            tl.store(grad_heads + head * WIDTH, rounded(product(grad_scores, key), key.dtype), mask=exists)
        tl.store(grad_heads + key_head * WIDTH, rounded(grad_key, key.dtype), mask=exists)
        tl.store(grad_heads + (key_head + NUM_GROUPS) * WIDTH, rounded(grad_value, key.dtype), mask=exists)
