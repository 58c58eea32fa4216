"""Who can do each operation: these kernels, torch eagerly and compiled, and other libraries.

Each gets its inputs in the layout that suits it best, made before the clock starts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megaspeech.kernels import load_kernels
from megaspeech.kernels.benchmarks.operations import Inputs
from megaspeech.kernels.stream_embedding.reference import delayed_codes


@dataclass(frozen=True)
class Prepared:
    """A provider with its inputs. `restore` makes the reference's layout of an output and the leaves' gradients:
    "output" and each leaf of `Inputs` by name."""

    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    grad_output: Tensor
    restore: Callable[[Tensor, tuple[Tensor, ...]], dict[str, Tensor]]


@dataclass(frozen=True)
class Provider:
    """`is_torch`: plain torch, whose error in BF16 is torch's own, by definition. `package`: must be installed."""

    name: str
    what: str
    prepare: Callable[[Inputs], Prepared]
    is_torch: bool = False
    package: str | None = None

    @property
    def is_installed(self) -> bool:
        """Whether it can be tried here."""
        return self.package is None or importlib.util.find_spec(self.package) is not None


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().requires_grad_()


def _kernel(inputs: Inputs, *, operation: str, implementation: str, **options: Any) -> Prepared:
    """The operation as one of our implementations."""
    function = getattr(getattr(load_kernels(implementation), operation), operation)
    leaves = {name: _leaf(leaf) for name, leaf in inputs.leaves.items()}

    def forward() -> Tensor:
        out = function(**leaves, **inputs.constants, **options)
        return out[0] if isinstance(out, tuple) else out

    def restore(output: Tensor, gradients: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {"output": output, **dict(zip(leaves, gradients, strict=True))}

    return Prepared(forward, list(leaves.values()), inputs.grad_output, restore)


def _compiled(inputs: Inputs, *, prepare: Callable[[Inputs], Prepared]) -> Prepared:
    """What `prepare` prepares, compiled for these very shapes."""
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # else a backward pass cannot be timed twice over one forward
    prepared = prepare(inputs)
    return replace(prepared, forward=torch.compile(prepared.forward, dynamic=False))


def _embeddings(inputs: Inputs) -> Prepared:
    """One table a stream, looked up one after another and added: what is done where there is no kernel.

    The last row of each table, always zero, is for the token -1.
    """
    constants = inputs.constants
    sizes = [size + 1 for size in constants["initial"].tolist()]
    starts = constants["offsets"].tolist()
    ranges = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    tables = [_leaf(F.pad(inputs.leaves["table_RH"][rows], (0, 0, 0, 1))) for rows in ranges]
    nothing_S11 = torch.tensor(sizes, device=tables[0].device)[:, None, None]

    def forward() -> Tensor:
        shifts, fill = constants["delays"] + 1, constants["initial"]
        tokens_STB = delayed_codes(constants["codes_BST"], shifts=shifts, fill=fill).permute(1, 2, 0)
        tokens_STB = tokens_STB.where(tokens_STB >= 0, nothing_S11)
        out_TBH = F.embedding(tokens_STB[0], tables[0], padding_idx=sizes[0])
        for tokens_TB, table, size in zip(tokens_STB[1:], tables[1:], sizes[1:], strict=True):
            out_TBH = out_TBH + F.embedding(tokens_TB, table, padding_idx=size)
        return out_TBH

    def restore(output: Tensor, gradients: tuple[Tensor, ...]) -> dict[str, Tensor]:
        table_RH = torch.zeros_like(inputs.leaves["table_RH"])
        for rows, gradient in zip(ranges, gradients, strict=True):
            table_RH[rows] = gradient[:-1]
        return {"output": output, "table_RH": table_RH}

    return Prepared(forward, tables, inputs.grad_output, restore)


def _attention_of_contiguous(inputs: Inputs) -> Prepared:
    """SDPA of contiguous `[N, A, Q, E]`, the layout it likes best, which no projection writes."""
    qkv_QNCE, groups = inputs.leaves["qkv_QNCE"], inputs.constants["num_query_groups"]
    sizes = [qkv_QNCE.shape[2] - 2 * groups, groups, groups]
    leaves = [_leaf(part.permute(1, 2, 0, 3)) for part in qkv_QNCE.split(sizes, dim=2)]
    grad_NAQE = inputs.grad_output.unflatten(2, (sizes[0], -1)).permute(1, 2, 0, 3).contiguous()

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=sizes[0] != groups)

    def restore(output: Tensor, gradients: tuple[Tensor, ...]) -> dict[str, Tensor]:
        output, *gradients = (tensor.permute(2, 0, 1, 3) for tensor in (output, *gradients))
        return {"output": output.flatten(2), "qkv_QNCE": torch.cat(gradients, dim=2)}

    return Prepared(forward, leaves, grad_NAQE, restore)


def _liger(inputs: Inputs) -> Prepared:
    """Liger's fused linear cross entropy takes one head, so codebooks are looped over.

    Losses apart, because each has a weight of its own, and the sum in FP32 that the others have.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    targets_QN = inputs.constants["targets_QN"]
    hidden = [_leaf(hidden_ND) for hidden_ND in inputs.leaves["hidden_QND"]]
    heads = [_leaf(heads_DV.T) for heads_DV in inputs.leaves["heads_QDV"]]
    options = {"reduction": "none", "accum_dtype": torch.float32, "return_predicted_tokens": True}

    def forward() -> Tensor:
        losses = []
        for hidden_ND, heads_VD, targets_N in zip(hidden, heads, targets_QN, strict=True):
            out = liger_fused_linear_cross_entropy(hidden_ND, heads_VD, targets_N, ignore_index=-1, **options)
            _ = out.predicted_tokens == targets_N  # as the others, it says which were right
            losses.append(out.loss)
        return torch.stack(losses)

    def restore(output: Tensor, gradients: tuple[Tensor, ...]) -> dict[str, Tensor]:
        hidden_QND, heads_QVD = (torch.stack(part) for part in (gradients[: len(hidden)], gradients[len(hidden) :]))
        return {"output": output, "hidden_QND": hidden_QND, "heads_QDV": heads_QVD.transpose(1, 2)}

    return Prepared(forward, hidden + heads, inputs.grad_output, restore)


def _of_every_operation(operation: str, *, eager: str) -> tuple[Provider, ...]:
    kernel = partial(_kernel, operation=operation, implementation="triton")
    reference = partial(_kernel, operation=operation, implementation="reference")
    return (
        Provider("triton", "megaspeech.kernels", kernel),
        Provider("reference", eager, reference, is_torch=True),
        Provider("compile", "torch.compile of the reference", partial(_compiled, prepare=reference), is_torch=True),
    )


PROVIDERS = {
    "stream_embedding": (
        *_of_every_operation("stream_embedding", eager="torch: one embedding_bag over all streams"),
        Provider(
            "triton-atomic",
            "megaspeech.kernels, gradient summed by atomics",
            partial(_kernel, operation="stream_embedding", implementation="triton", atomic=True),
        ),
        Provider("embeddings", "torch: an embedding a stream, added up", _embeddings, is_torch=True),
        Provider(
            "compile-embeddings",
            "torch.compile of the embeddings",
            partial(_compiled, prepare=_embeddings),
            is_torch=True,
        ),
    ),
    "depth_attention": (
        *_of_every_operation("depth_attention", eager="torch: SDPA of the projection's output as it lies"),
        Provider(
            "sdpa-contiguous",
            "torch: SDPA of contiguous inputs, made before the clock starts",
            _attention_of_contiguous,
            is_torch=True,
        ),
    ),
    "codebook_cross_entropy": (
        *_of_every_operation("codebook_cross_entropy", eager="torch: bmm, then cross_entropy of FP32 logits"),
        Provider(
            "liger", "liger-kernel's fused linear cross entropy, a codebook at a time", _liger, package="liger_kernel"
        ),
    ),
}
"""By operation; the first is ours."""

EAGER = {
    "stream_embedding": ("embeddings",),
    "depth_attention": ("reference", "sdpa-contiguous"),
    "codebook_cross_entropy": ("reference",),
}
COMPILED = {
    "stream_embedding": ("compile", "compile-embeddings"),
    "depth_attention": ("compile",),
    "codebook_cross_entropy": ("compile",),
}
"""Whom a speedup is over: the fastest of them."""
