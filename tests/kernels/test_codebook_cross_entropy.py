"""The Triton codebook cross entropy in the interpreter, against the reference in FP64 and in its own precision."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exactness import assert_as_exact_as_torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megaspeech.kernels.benchmarks.shapes import MODELS
from megaspeech.kernels.codebook_cross_entropy import function
from megaspeech.kernels.codebook_cross_entropy.function import codebook_cross_entropy
from megaspeech.kernels.codebook_cross_entropy.reference import codebook_cross_entropy as reference
from megaspeech.kernels.launching import compiled_only

PRECISIONS = [torch.float32, torch.bfloat16]
Inputs = tuple[Tensor, Tensor, Tensor]


def make(codebooks: int, frames: int, width: int, cardinality: int, *, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Logits of about +-3; a third of the targets likely, one masked in eight."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(codebooks, frames, width, generator=generator).to(dtype)
    heads = (torch.randn(codebooks, width, cardinality, generator=generator) * (3 / width**0.5)).to(dtype)
    targets = torch.randint(cardinality, (codebooks, frames), generator=generator)
    likely = (hidden.double() @ heads.double()).argmax(-1)
    targets = targets.where(torch.rand(targets.shape, generator=generator) < 0.7, likely)
    return hidden, heads, targets.where(torch.rand(targets.shape, generator=generator) < 0.875, -1)


def run(call: Callable[..., Any], hidden: Tensor, heads: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """(loss, correct, gradient of hidden, gradient of heads) of a weighted sum of losses."""
    hidden, heads = hidden.detach().requires_grad_(), heads.detach().requires_grad_()
    loss, correct = call(hidden, heads, targets)
    weight = torch.linspace(-1, 2, loss.numel(), dtype=torch.float64).view(loss.shape)
    (loss * weight.to(loss.dtype)).sum().backward()
    return loss.detach(), correct, hidden.grad, heads.grad


def exact_of(hidden: Tensor, heads: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """The same in FP64 (the reference itself ends in FP32)."""

    def fp64(hidden: Tensor, heads: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = hidden @ heads
        loss = torch.nn.functional.cross_entropy(logits.mT, targets, ignore_index=-1, reduction="none")
        return loss, logits.argmax(-1) == targets

    return run(fp64, hidden.double(), heads.double(), targets)


def check(hidden: Tensor, heads: Tensor, targets: Tensor) -> None:
    """Loss and gradients are as exact as torch's; a BF16 model's loss is as exact as torch's in FP32."""
    exact = exact_of(hidden, heads, targets)
    torchs = run(reference, hidden, heads, targets)
    ours = run(codebook_cross_entropy, hidden, heads, targets)
    for mine, theirs, right in zip(ours[2:], torchs[2:], exact[2:], strict=True):
        assert mine.stride() == theirs.stride()
        assert_as_exact_as_torch(mine, theirs, right)
    in_fp32, _ = reference(hidden.float(), heads.float(), targets)
    assert_as_exact_as_torch(ours[0], in_fp32, exact[0])
    assert ours[1].dtype is torch.bool and torch.equal(ours[1], exact[1])
    masked = targets == -1
    assert not ours[0][masked].any() and not ours[1][masked].any() and not ours[2][masked].any()


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("shape", [(2, 150, 96, 600), (3, 128, 64, 256), (1, 1, 33, 7), (2, 65, 70, 257)])
def test_is_as_exact_as_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = make(*shape, dtype=dtype)
    check(*inputs)
    if shape[1] > 1:
        correct = codebook_cross_entropy(*inputs)[1]
        assert 0.1 < correct.float().mean() < 0.6 and (inputs[2] == -1).any()


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(0, 140), st.integers(1, 70), st.integers(1, 270)),
    dtype=st.sampled_from(PRECISIONS),
    seed=st.integers(0, 99),
)
def test_any_shape_is_as_exact_as_torch(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    check(*make(*shape, dtype=dtype, seed=seed))


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_chunks_and_groups_of_tiles_change_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(3, 150, 20, 260, dtype=dtype)
    whole = run(codebook_cross_entropy, *inputs)
    monkeypatch.setattr(function, "GROUP", 3)
    monkeypatch.setattr(function, "chunk_sizes", lambda *sizes: (2, 70))
    check(*inputs)
    for one, many in zip(whole, run(codebook_cross_entropy, *inputs), strict=True):
        torch.testing.assert_close(one, many, rtol=2e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "sizes", [(8, 65536, 2048), (8, 4096, 2048), (32, 65536, 256), (1, 65536, 65536), (3, 4097, 600)]
)
def test_chunks_are_large_but_not_too_large(sizes: tuple[int, int, int]) -> None:
    codebooks, frames, cardinality = sizes
    at_once, length = function.chunk_sizes(*sizes)
    assert 1 <= at_once <= codebooks and 1024 <= length <= 4096 and length % 128 == 0
    assert at_once * length * cardinality <= max(2**24, 1024 * cardinality)
    assert at_once == codebooks or 2 * at_once * length * cardinality >= 2**24


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_takes_any_strides(dtype: torch.dtype) -> None:
    """As the model passes them (a view of the parameter), and as it does not."""
    hidden, heads, targets = make(2, 40, 24, 80, dtype=dtype)
    parameter = heads.flatten(0, 1)
    check(hidden, parameter.unflatten(0, (2, 24)), targets)
    check(hidden.transpose(0, 1).contiguous().transpose(0, 1), heads, targets.mT.contiguous().mT)
    check(hidden.mT.contiguous().mT, heads.mT.contiguous().mT, targets)
    wide = torch.nn.functional.pad(hidden, (0, 3))
    loss = codebook_cross_entropy(wide[..., :24].requires_grad_(), heads, targets)[0]
    loss.sum().backward()  # a gradient of strides 0
    assert torch.equal(loss, codebook_cross_entropy(hidden, heads, targets)[0])


@pytest.mark.parametrize("of_hidden, of_heads", [(True, False), (False, True)])
def test_only_the_gradient_asked_for(of_hidden: bool, of_heads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, heads, targets = make(2, 20, 24, 80, dtype=torch.float32)
    both = run(codebook_cross_entropy, hidden, heads, targets)
    skipped = {"bmm": of_hidden, "_add_product": of_heads}
    for name in (name for name, wanted in skipped.items() if not wanted):
        monkeypatch.setattr(torch if name == "bmm" else function, name, None)
    hidden.requires_grad_(of_hidden), heads.requires_grad_(of_heads)
    loss, _ = codebook_cross_entropy(hidden, heads, targets)
    (loss * torch.linspace(-1, 2, loss.numel(), dtype=torch.float64).view(loss.shape).float()).sum().backward()
    for x, wanted, gradient in ((hidden, of_hidden, both[2]), (heads, of_heads, both[3])):
        assert torch.equal(x.grad, gradient) if wanted else x.grad is None


def test_without_gradients_none_are_kept() -> None:
    loss, correct = codebook_cross_entropy(*make(1, 3, 4, 5, dtype=torch.float32))
    assert not loss.requires_grad and not correct.requires_grad


def test_ties_go_to_the_first_token() -> None:
    hidden, heads, _ = make(1, 4, 8, 600, dtype=torch.float32)
    heads[..., [70, 310, 599]] = 9.0  # in three tiles
    heads[..., 311] = 9.0
    hidden = hidden.abs()
    targets = torch.tensor([[70, 310, 311, 599]])
    assert codebook_cross_entropy(hidden, heads, targets)[1].tolist() == [[True, False, False, False]]
    assert torch.equal(codebook_cross_entropy(hidden, 0 * heads, 0 * targets)[1], torch.ones(1, 4, dtype=torch.bool))


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_logits_of_thousands(dtype: torch.dtype) -> None:
    hidden, heads, targets = make(2, 30, 16, 90, dtype=dtype)
    heads = (heads * 4000).to(dtype)
    assert (hidden @ heads).abs().max() > 2e4
    check(hidden, heads, targets)
    check(hidden, torch.cat([heads, heads[..., :50]], -1), targets)  # two of the largest: gradients that do not vanish


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_small_losses_of_large_logits(dtype: torch.dtype) -> None:
    """Sums of whole numbers are exact, so the losses are: log of how many logits are the largest."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(-3, 4, (2, 30, 16), generator=generator).to(dtype)
    heads = (64 * torch.randint(-40, 41, (2, 16, 90), generator=generator)).repeat(1, 1, 2).to(dtype)
    likely = (hidden.double() @ heads.double()).argmax(-1)
    losses, correct = codebook_cross_entropy(hidden, heads, likely)
    torch.testing.assert_close(losses, exact_of(hidden, heads, likely)[0].float(), rtol=1e-6, atol=0)
    assert correct.all() and not codebook_cross_entropy(hidden, heads, likely + 90)[1].any()


def test_nan_stays_in_its_row() -> None:
    hidden, heads, targets = make(2, 70, 16, 90, dtype=torch.bfloat16)
    clean = run(codebook_cross_entropy, hidden, heads, targets)
    targets[1, 5], targets[1, 6], hidden[1, 5:7, 3] = 0, -1, float("nan")
    loss, correct, gradient, _ = run(codebook_cross_entropy, hidden, heads, targets)
    heads_with_nan = heads.clone()
    heads_with_nan[0, :, 40] = float("nan")
    everywhere, correct_anywhere = codebook_cross_entropy(hidden, heads_with_nan, targets)
    assert everywhere[0][targets[0] >= 0].isnan().all() and not correct_anywhere[0].any() and clean[1][0].any()
    others = torch.ones(2, 70, dtype=torch.bool)
    others[1, 5:7] = False
    assert loss[1, 5].isnan() and gradient[1, 5].isnan().all() and not correct[1, 5] and loss[1, 6] == 0
    for before, after in zip(clean[:3], (loss, correct, gradient), strict=True):
        assert torch.equal(before[others], after[others])


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_infinite_logits_are_as_torchs() -> None:
    heads = torch.zeros(1, 1, 600)
    heads[..., :300] = 1.0  # whole tiles of -inf in both precisions' sizes
    hidden = torch.tensor([[[1.0], [2.0], [3.0], [float("-inf")]]])
    targets = torch.tensor([[0, 299, 599, 0]])
    heads[..., 300:] = float("-inf")
    ours, torchs = (call(hidden, heads, targets)[0] for call in (codebook_cross_entropy, reference))
    torch.testing.assert_close(ours, torchs, equal_nan=True)
    assert ours[0, :2].isfinite().all() and ours[0, 2] == float("inf") and ours[0, 3].isnan()


@pytest.mark.parametrize("target", [80, 90, 128, -2, 2**62, -(2**63), 2**32 + 3])
def test_a_target_that_is_no_token_gives_nan_in_its_row(target: int) -> None:
    hidden, heads, targets = make(1, 9, 8, 80, dtype=torch.float32)
    targets[0, 4] = target
    loss, correct, gradient, _ = run(codebook_cross_entropy, hidden, heads, targets)
    assert loss.isnan().nonzero().tolist() == [[0, 4]] and not correct[0, 4]
    assert gradient.isnan().any(-1).nonzero().tolist() == [[0, 4]]


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_ops_are_what_torch_asks_of_them(dtype: torch.dtype) -> None:
    hidden, heads, targets = make(2, 10, 8, 20, dtype=dtype)
    torch.library.opcheck(function._forward, (hidden.requires_grad_(), heads.requires_grad_(), targets))
    hidden, heads = hidden.detach(), heads.detach()
    loss, _, *saved = function._forward(hidden, heads, targets)
    for wanted in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(function._backward, (loss, hidden, heads, targets, *saved, *wanted))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda h, w, t: (h.half(), w.half(), t), "torch.float16.*give both in BF16, or in FP32"),
        (lambda h, w, t: (h, w.bfloat16(), t), "hidden is torch.float32 and heads torch.bfloat16"),
        (lambda h, w, t: (h, w, t.int()), "torch.int32; give them as int64"),
        (lambda h, w, t: (h, w[:, :7], t), r"\[2, 10, 8\], \[2, 7, 20\] and \[2, 10\]"),
        (lambda h, w, t: (h, w, t[:, :9]), r"\[2, 8, 20\] and \[2, 9\]"),
        (lambda h, w, t: (h, w[..., :0], t), "at least one token"),
    ],
)
def test_what_it_does_not_take(change: Callable[..., Inputs], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        codebook_cross_entropy(*change(*make(2, 10, 8, 20, dtype=torch.float32)))


class Allocations(TorchDispatchMode):
    """Bytes of all storages that were alive at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("frames", [4096, 65536])
def test_the_logits_never_exist(model: Any, frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, where sizes are all there is; eager torch has 12 bytes a logit in its backward."""
    monkeypatch.setattr(function, "_add_product", lambda *_: None)  # cuBLAS sums in place; elsewhere torch copies
    codebooks, width, cardinality = model.num_codebooks, model.depth_hidden_size, model.cardinality
    with compiled_only(), Allocations() as allocations, torch.device("meta"):
        hidden = torch.empty(codebooks, frames, width, dtype=torch.bfloat16)
        heads = torch.empty(codebooks, width, cardinality, dtype=torch.bfloat16)
        targets = torch.empty(codebooks, frames, dtype=torch.int64)
        loss, _, *saved = function.launch_forward(hidden, heads, targets)
        gradients = function.launch_backward(loss, hidden, heads, targets, *saved)
    assert [x.shape for x in gradients] == [hidden.shape, heads.shape]
    given = sum(x.nbytes for x in (hidden, heads, targets, *gradients))
    assert allocations.peak - given <= 12 * codebooks * frames * cardinality / 15
