"""Triton kernels of `stream_embedding`: the gather and sum, and its transpose, sorted or atomic.

An entry is one (frame, sample, stream); entries are numbered e = (t * B + b) * S + s.
"""

from __future__ import annotations

from megaspeech.kernels.arithmetic import rounded
from megaspeech.kernels.launching import tl, triton


@triton.jit
def table_rows(
    codes,
    delays,
    initial,
    offsets,
    frames,
    starts,
    t,
    b,
    s,
    inside,
    first_row,
    num_rows,
    stride_b,
    stride_s,
    stride_t,
    DELAYED: tl.constexpr,
    SOME_FRAMES: tl.constexpr,
    PACKED: tl.constexpr,
):
    """(row of this rank's table, whether there is one) of streams `s` at frames `t` of samples `b`."""
    if SOME_FRAMES:
        t = tl.load(frames + t, mask=inside, other=0)
    known = inside
    if DELAYED:
        start = tl.load(starts + t, mask=inside, other=0) if PACKED else 0
        t = t - 1 - tl.load(delays + s, mask=inside, other=0)
        known = inside & (t >= start)
    place = b.to(tl.int64) * stride_b + s * stride_s + t * stride_t
    token = tl.load(codes + place, mask=known, other=-1).to(tl.int64)
    if DELAYED:
        token = tl.where(known, token, tl.load(initial + s, mask=inside, other=-1).to(tl.int64))
    row = token + tl.load(offsets + s, mask=inside, other=0) - first_row
    return row, inside & (token >= 0) & (row >= 0) & (row < num_rows)


@triton.jit
def gather_kernel(
    codes,
    table,
    out,
    delays,
    initial,
    offsets,
    frames,
    starts,
    first_row,
    num_rows,
    batch,
    width,
    stride_b,
    stride_s,
    stride_t,
    table_stride,
    out_stride_t,
    out_stride_b,
    NUM_STREAMS: tl.constexpr,
    DELAYED: tl.constexpr,
    SOME_FRAMES: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """out[t, b] = sum_s table[row(t, b, s)], one program a token and block of columns."""
    t, b = tl.program_id(0) // batch, tl.program_id(0) % batch
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for first in range(0, NUM_STREAMS, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        row, mine = table_rows(
            codes,
            delays,
            initial,
            offsets,
            frames,
            starts,
            t + tl.zeros_like(s),
            b + tl.zeros_like(s),
            s,
            s < NUM_STREAMS,
            first_row,
            num_rows,
            stride_b,
            stride_s,
            stride_t,
            DELAYED,
            SOME_FRAMES,
            PACKED,
        )
        mask = mine[:, None] & (column < width)[None, :]
        values = tl.load(table + row[:, None] * table_stride + column[None, :], mask=mask, other=0.0)
        total += tl.sum(values.to(tl.float32), 0)
    place = out + t.to(tl.int64) * out_stride_t + b.to(tl.int64) * out_stride_b + column
    tl.store(place, rounded(total, out.dtype.element_ty), mask=column < width)


@triton.jit
def rows_kernel(
    codes,
    rows,
    delays,
    initial,
    offsets,
    frames,
    starts,
    first_row,
    num_rows,
    batch,
    num_entries,
    stride_b,
    stride_s,
    stride_t,
    NUM_STREAMS: tl.constexpr,
    DELAYED: tl.constexpr,
    SOME_FRAMES: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The row of every entry; `num_rows`, which sorts last, where this rank has none."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = entry // NUM_STREAMS
    row, mine = table_rows(
        codes,
        delays,
        initial,
        offsets,
        frames,
        starts,
        token // batch,
        token % batch,
        entry % NUM_STREAMS,
        entry < num_entries,
        first_row,
        num_rows,
        stride_b,
        stride_s,
        stride_t,
        DELAYED,
        SOME_FRAMES,
        PACKED,
    )
    tl.store(rows + entry, tl.where(mine, row, num_rows).to(tl.int32), mask=entry < num_entries)


@triton.jit
def token_gradients(grad, token, column, mask, batch, stride_t, stride_b):
    """`grad[t, b, column]` of tokens t * B + b, FP32 `[tokens, columns]`."""
    place = (token // batch).to(tl.int64) * stride_t + (token % batch).to(tl.int64) * stride_b
    return tl.load(grad + place[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def put(target, row, column, total, width, ADD: tl.constexpr):
    """Write, or add, a finished row."""
    place = target + row.to(tl.int64) * width + column
    if ADD:
        total += tl.load(place, mask=column < width, other=0.0).to(tl.float32)
    tl.store(place, rounded(total, target.dtype.element_ty), mask=column < width)


@triton.jit
def chunk_kernel(
    grad,
    sorted_rows,
    order,
    starts,
    target,
    partials,
    num_entries,
    num_rows,
    batch,
    width,
    grad_stride_t,
    grad_stride_b,
    NUM_STREAMS: tl.constexpr,
    CHUNK: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Sums the gradients of one chunk: entries of one row, within one block of CHUNK sorted entries.

    A row that lies within a block is finished here. One that crosses blocks leaves partial sums: a block's slot 0 holds
    the chunk that continues from the block before, slot 1 the one that begins here and goes on.
    """
    start, end = tl.load(starts + tl.program_id(0)), tl.load(starts + tl.program_id(0) + 1)
    if start >= num_entries:
        return
    row = tl.load(sorted_rows + start)
    if row >= num_rows:
        return
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for first in range(start, end, BLOCK_E):
        entry = first + tl.arange(0, BLOCK_E)
        token = tl.load(order + entry, mask=entry < end, other=0).to(tl.int32) // NUM_STREAMS
        mask = (entry < end)[:, None] & (column < width)[None, :]
        total += tl.sum(token_gradients(grad, token, column, mask, batch, grad_stride_t, grad_stride_b), 0)
    continues = tl.load(sorted_rows + start - 1, mask=start > 0, other=-1) == row
    goes_on = tl.load(sorted_rows + end, mask=end < num_entries, other=-1) == row
    if continues | goes_on:
        slot = 2 * (start // CHUNK) + tl.where(continues, 0, 1)
        tl.store(partials + slot.to(tl.int64) * width + column, total, mask=column < width)
    else:
        put(target, row, column, total, width, ADD)


@triton.jit
def merge_kernel(
    sorted_rows,
    target,
    partials,
    num_entries,
    num_rows,
    width,
    CHUNK: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Finishes the row that begins in this block of sorted entries and goes on in the next."""
    block = tl.program_id(0)
    after = (block + 1) * CHUNK
    if after >= num_entries:
        return
    row = tl.load(sorted_rows + after)
    if (row >= num_rows) | (tl.load(sorted_rows + after - 1) != row):
        return
    if tl.load(sorted_rows + block * CHUNK - 1, mask=block > 0, other=-1) == row:
        return  # it began in an earlier block
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = column < width
    total = tl.load(partials + (2 * block + 1).to(tl.int64) * width + column, mask=inside, other=0.0)
    first, more = block + 1, True
    while more:
        then = first + tl.arange(0, BLOCK_C)
        same = tl.load(sorted_rows + then * CHUNK, mask=then * CHUNK < num_entries, other=-1) == row
        place = partials + (2 * then).to(tl.int64)[:, None] * width + column[None, :]
        total += tl.sum(tl.load(place, mask=same[:, None] & inside[None, :], other=0.0), 0)
        first += BLOCK_C
        more = tl.sum(same.to(tl.int32), 0) == BLOCK_C
    put(target, row, column, total, width, ADD)


@triton.jit
def atomic_kernel(
    grad,
    rows,
    target,
    num_rows,
    batch,
    width,
    grad_stride_t,
    grad_stride_b,
    NUM_STREAMS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Adds each token's gradient to its streams' rows, in whatever order programs come."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    tokens = token + tl.zeros((1,), tl.int32)
    mask = (column < width)[None, :]
    values = token_gradients(grad, tokens, column, mask, batch, grad_stride_t, grad_stride_b)
    for first in range(0, NUM_STREAMS, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        entry = token.to(tl.int64) * NUM_STREAMS + s
        row = tl.load(rows + entry, mask=s < NUM_STREAMS, other=num_rows).to(tl.int64)
        place = target + row[:, None] * width + column[None, :]
        added = tl.broadcast_to(values, (BLOCK_S, BLOCK_H))
        tl.atomic_add(place, added, mask=(row < num_rows)[:, None] & mask, sem="relaxed")
