"""`stream_embedding` by Triton: the interface of `reference.py`, with a deterministic gradient (or an atomic one).

A lookup is (codes, delays, initial, offsets, frames, starts, first_row): what names the row of every frame, sample and
stream.
Axes: B microbatch, S streams, T frames (of which t are wanted), H hidden, R rows of the table this rank holds.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaspeech.kernels.launching import launch, require_device, triton
from megaspeech.kernels.stream_embedding import kernel

CHUNK = 512
"""Sorted entries that one program sums at most. A row that every frame uses (padding, silence) is cut into such."""
BLOCK_H = 512
"""Columns of a program: 64 threads of 8, so that a BF16 load has 128 bits."""
ENTRIES = 16
"""Entries loaded at once, to have enough bytes under way."""


class Lookup(NamedTuple):
    """What `reference.stream_embedding` is given, delays and initial tokens None where nothing is shifted."""

    codes_BST: Tensor
    delays: Tensor | None
    initial: Tensor | None
    offsets: Tensor
    frames: Tensor | None
    starts: Tensor | None
    first_row: int

    @property
    def num_frames(self) -> int:
        """Frames that are wanted."""
        return self.codes_BST.shape[2] if self.frames is None else self.frames.shape[0]

    @property
    def num_tokens(self) -> int:
        """Frames wanted, times samples."""
        return self.num_frames * self.codes_BST.shape[0]

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        """The tensors beside the codes; where one is None, another that the kernel will not read."""
        given = (self.delays, self.initial, self.offsets, self.frames, self.starts)
        return tuple(self.offsets if x is None else x for x in given)

    @property
    def constants(self) -> dict[str, Any]:
        """What the kernels are compiled for."""
        return {
            "NUM_STREAMS": self.codes_BST.shape[1],
            "DELAYED": self.delays is not None,
            "SOME_FRAMES": self.frames is not None,
            "PACKED": self.starts is not None,
        }


def launch_forward(lookup: Lookup, table_RH: Tensor, *, batch_first: bool) -> Tensor:
    """The sum over streams `[t, B, H]`, or `[B, t, H]`."""
    batch, width = lookup.codes_BST.shape[0], table_RH.shape[1]
    out = _empty_output(lookup, table_RH, batch_first=batch_first)
    launch(
        kernel.gather_kernel,
        # Tokens are the fast axis, so that what runs at one time reads few columns of the table: a narrow strip of the
        # audio rows, which recur, stays in the L2 cache.
        (lookup.num_tokens, triton.cdiv(width, BLOCK_H)),
        lookup.codes_BST,
        table_RH,
        out,
        *lookup.pointers,
        lookup.first_row,
        table_RH.shape[0],
        batch,
        width,
        *lookup.codes_BST.stride(),
        table_RH.stride(0),
        *_token_strides(out, batch_first=batch_first),
        **lookup.constants,
        BLOCK_S=min(8, triton.next_power_of_2(lookup.codes_BST.shape[1])),
        BLOCK_H=BLOCK_H,
        num_warps=2,
    )
    return out


def launch_backward(
    lookup: Lookup, grad: Tensor, target_RH: Tensor, *, batch_first: bool, add: bool, atomic: bool
) -> None:
    """Put the table's gradient into `target_RH`, which is contiguous; rows that nobody looked up stay as they are.

    Args:
        lookup: the forward pass's.
        grad: of its output.
        target_RH: FP32 if `add` or `atomic`.
        batch_first: the forward pass's.
        add: to what is there, rather than over it.
        atomic: add in no fixed order, without sorting.
    """
    rows = _rows(lookup, num_rows=target_RH.shape[0])
    if grad.stride(2) != 1:
        grad = grad.contiguous()
    scatter = _scatter_atomically if atomic else _scatter_sorted
    options = {} if atomic else {"add": add}
    scatter(grad, rows, target_RH, lookup=lookup, strides=_token_strides(grad, batch_first=batch_first), **options)


def _empty_output(lookup: Lookup, table_RH: Tensor, *, batch_first: bool) -> Tensor:
    batch, frames = lookup.codes_BST.shape[0], lookup.num_frames
    return table_RH.new_empty(*((batch, frames) if batch_first else (frames, batch)), table_RH.shape[1])


def _token_strides(x: Tensor, *, batch_first: bool) -> tuple[int, int]:
    """(stride of a frame, of a sample)."""
    return (x.stride(1), x.stride(0)) if batch_first else (x.stride(0), x.stride(1))


def _rows(lookup: Lookup, *, num_rows: int) -> Tensor:
    """The row of every entry `[t * B * S]` int32, R where this rank has none."""
    entries = lookup.num_tokens * lookup.codes_BST.shape[1]
    rows = lookup.codes_BST.new_empty(entries, dtype=torch.int32)
    launch(
        kernel.rows_kernel,
        (triton.cdiv(entries, 1024),),
        lookup.codes_BST,
        rows,
        *lookup.pointers,
        lookup.first_row,
        num_rows,
        lookup.codes_BST.shape[0],
        entries,
        *lookup.codes_BST.stride(),
        **lookup.constants,
        BLOCK=1024,
        num_warps=4,
    )
    return rows


def _scatter_sorted(
    grad: Tensor, rows: Tensor, target_RH: Tensor, *, lookup: Lookup, strides: tuple[int, int], add: bool
) -> None:
    """Sort the entries by row, sum each row's, in the order of the frames: the same bits every time.

    No size depends on the data, so nothing waits for the GPU: the number of chunks is bounded, and those not needed
    return at once.
    """
    (num_rows, width), entries = target_RH.shape, rows.shape[0]
    blocks, strips = triton.cdiv(entries, CHUNK), triton.cdiv(width, BLOCK_H)
    sorted_rows, order = torch.sort(rows, stable=True)
    begins = torch.ones_like(sorted_rows, dtype=torch.bool)
    torch.ne(sorted_rows[1:], sorted_rows[:-1], out=begins[1:])
    begins[::CHUNK] = True
    bound = min(entries, num_rows + 1) + blocks
    starts = torch.nonzero_static(begins, size=bound + 1, fill_value=entries).squeeze(1).to(torch.int32)
    partials = torch.empty(2 * blocks, width, dtype=torch.float32, device=grad.device)
    constants = {"CHUNK": CHUNK, "ADD": add, "BLOCK_H": BLOCK_H, "num_warps": 2}
    launch(
        kernel.chunk_kernel,
        (bound, strips),
        grad,
        sorted_rows,
        order,
        starts,
        target_RH,
        partials,
        entries,
        num_rows,
        lookup.codes_BST.shape[0],
        width,
        *strides,
        NUM_STREAMS=lookup.codes_BST.shape[1],
        BLOCK_E=ENTRIES,
        **constants,
    )
    launch(
        kernel.merge_kernel,
        (blocks, strips),
        sorted_rows,
        target_RH,
        partials,
        entries,
        num_rows,
        width,
        BLOCK_C=ENTRIES,
        **constants,
    )


def _scatter_atomically(
    grad: Tensor, rows: Tensor, target_RH: Tensor, *, lookup: Lookup, strides: tuple[int, int]
) -> None:
    num_rows, width = target_RH.shape
    launch(
        kernel.atomic_kernel,
        (lookup.num_tokens, triton.cdiv(width, BLOCK_H)),
        grad,
        rows,
        target_RH,
        num_rows,
        lookup.codes_BST.shape[0],
        width,
        *strides,
        NUM_STREAMS=lookup.codes_BST.shape[1],
        BLOCK_S=4,
        BLOCK_H=BLOCK_H,
        num_warps=2,
    )


_LOOKUP = "Tensor codes, Tensor? delays, Tensor? initial, Tensor offsets, Tensor? frames, Tensor? starts, int first_row"


@torch.library.custom_op(
    "megaspeech::stream_embedding",
    mutates_args=(),
    schema=f"({_LOOKUP}, Tensor table, bool batch_first, bool atomic) -> Tensor",
)
def _embed(codes, delays, initial, offsets, frames, starts, first_row, table, batch_first, atomic):
    return launch_forward(
        Lookup(codes, delays, initial, offsets, frames, starts, first_row), table, batch_first=batch_first
    )


@_embed.register_fake
def _(codes, delays, initial, offsets, frames, starts, first_row, table, batch_first, atomic):
    return _empty_output(
        Lookup(codes, delays, initial, offsets, frames, starts, first_row), table, batch_first=batch_first
    )


@torch.library.custom_op(
    "megaspeech::stream_embedding_gradient",
    mutates_args=(),
    schema=f"({_LOOKUP}, Tensor grad, int num_rows, bool batch_first, bool atomic) -> Tensor",
)
def _gradient(codes, delays, initial, offsets, frames, starts, first_row, grad, num_rows, batch_first, atomic):
    lookup = Lookup(codes, delays, initial, offsets, frames, starts, first_row)
    dtype = torch.float32 if atomic else grad.dtype
    target = torch.zeros(num_rows, grad.shape[2], dtype=dtype, device=grad.device)
    launch_backward(lookup, grad, target, batch_first=batch_first, add=False, atomic=atomic)
    return target.to(grad.dtype)


@_gradient.register_fake
def _(codes, delays, initial, offsets, frames, starts, first_row, grad, num_rows, batch_first, atomic):
    return grad.new_empty(num_rows, grad.shape[2])


@torch.library.custom_op(
    "megaspeech::stream_embedding_add_gradient",
    mutates_args=("target",),
    schema=f"({_LOOKUP}, Tensor grad, Tensor(a!) target, bool batch_first, bool atomic) -> ()",
)
def _add_gradient(codes, delays, initial, offsets, frames, starts, first_row, grad, target, batch_first, atomic):
    lookup = Lookup(codes, delays, initial, offsets, frames, starts, first_row)
    launch_backward(lookup, grad, target, batch_first=batch_first, add=True, atomic=atomic)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *lookup, table, batch_first, atomic = inputs
    ctx.lookup, ctx.table, ctx.options = lookup, table, (batch_first, atomic)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    table_gradient = None
    if ctx.needs_input_grad[7]:
        main_gradient = _main_gradient(ctx.table)
        if main_gradient is None:
            table_gradient = _gradient(*ctx.lookup, grad, ctx.table.shape[0], *ctx.options)
        else:
            _add_gradient(*ctx.lookup, grad, main_gradient, *ctx.options)
            ctx.table.grad_added_to_main_grad = True
            table_gradient = torch.empty_like(ctx.table)
    return (None,) * 7 + (table_gradient, None, None)


_embed.register_autograd(_backward, setup_context=_save)


def _main_gradient(table: Tensor) -> Tensor | None:
    """The FP32 buffer in which megatron-core's DistributedDataParallel gathers the table's gradient, where it does.

    As for its own linear layers (`tensor_parallel/layers.py`, gradient accumulation fusion) the gradient is added there
    in the backward pass, the parameter is marked, and what autograd is given is memory that nobody reads. Its FSDP
    allocates such buffers on demand and is left to add by itself.
    """
    buffer = getattr(table, "main_grad", None)
    if buffer is None or buffer.dtype != torch.float32 or hasattr(table, "get_main_grad"):
        return None
    return buffer


def stream_embedding(
    codes_BST: Tensor,
    table_RH: Tensor,
    *,
    delays: Tensor,
    initial: Tensor,
    offsets: Tensor,
    first_row: int = 0,
    frames: Tensor | None = None,
    starts: Tensor | None = None,
    atomic: bool = False,
) -> Tensor:
    """The partial sum over streams of the rows that this rank holds; arguments are `reference.stream_embedding`'s.

    `atomic`: add up the table's gradient in no fixed order. It is not the same from run to run.
    """
    require_device(codes_BST)
    return _embed(codes_BST, delays, initial, offsets, frames, starts, first_row, table_RH, False, atomic)


def packed_embedding(tokens_BST: Tensor, table_RH: Tensor, *, offsets: Tensor, first_row: int = 0) -> Tensor:
    """Sum over streams of `table[offsets[s] + tokens[..., s, t]]` `[B, T, H]`; -1 and foreign rows add nothing."""
    require_device(tokens_BST)
    return _embed(tokens_BST, None, None, offsets, None, None, first_row, table_RH, True, False)
