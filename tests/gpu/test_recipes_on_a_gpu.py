"""TransformerEngine computes the model that the local layers compute, in FP32 and BF16, and in FP8 as far as FP8 goes.

Skipped where there is no GPU; `make gpu` runs it. tests/unit/test_spec_agreement.py tries the measure on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from one_rank import make_config, one_rank  # noqa: F401
from spec_agreement import (
    Batch,
    assert_as_exact,
    build,
    draw_batch,
    forward_backward,
    outcome,
    relative_error,
    tensor_float_32,
)

from megaspeech.config import Config
from megaspeech.parallel.precision import forget_recipes
from megaspeech.parallel.requirements import require_machine
from megaspeech.parallel.wrap import Wrapped

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.usefixtures("one_rank"),
]

TE = "transformer_engine"
SAMPLES = 2
# The depth transformer and the tables are the same code in both specs: little of them is enough.
WIDE = ("model.preset=moshi-7b", "temporal.num_layers=2", "depth.num_layers=1", "streams.text_cardinality=4096")
SHAPES = {
    "tiny: a window of 12 in 64 frames, grouped queries": (64, ("temporal.num_layers=2",)),
    "7B: a window longer than the sample": (512, WIDE),
    "7B: a window of 200 in 512 frames, grouped queries": (
        512,
        (*WIDE, "temporal.context=200", "temporal.num_query_groups=8"),
    ),
}
FP8 = ("fp8-delayed", "fp8-tensorwise", "fp8-blockwise", "mxfp8")
COARSER = {"logits": 16, "gradient": 32}
"""How much coarser FP8 rounds than BF16, by 2^-4 (E4M3) and, for the gradients of some recipes, 2^-3 (E5M2) in place of
2^-8. No other rounding differs, so errors may be larger by as much: with FP8 emulated on a CPU, two layers of width
1,024, they were 9 times as large for logits and at most 12 times for gradients."""


class Spec:
    """A shape, its batch, and what FP32 says of it."""

    def __init__(self, name: str, directory: Path) -> None:
        self.frames, self.overrides = SHAPES[name]
        self.directory = directory
        config = self.config("fp32", impl="local")
        self.exact: Wrapped = build(config)
        self.batch: Batch = draw_batch(config, samples=SAMPLES, frames=self.frames, device=self.exact.device)
        self.truth = outcome(self.exact, self.batch)

    def config(self, recipe: str, *, impl: str) -> Config:
        """In a precision, by a layer spec."""
        own = (f"precision.recipe={recipe}", f"model.transformer_impl={impl}")
        return make_config(self.directory, *self.overrides, *own)

    def outcome(self, recipe: str, *, impl: str, warm_ups: int = 0) -> dict[str, torch.Tensor]:
        """Logits and gradients in a precision, by a layer spec, with the weights that the truth has."""
        model = build(self.config(recipe, impl=impl), like=self.exact)
        try:
            return outcome(model, self.batch, warm_ups=warm_ups)
        finally:  # one after the other they would fill the GPU
            model.release()
            forget_recipes()


@pytest.fixture(scope="module", params=SHAPES)
def spec(
    request: pytest.FixtureRequest,
    one_rank: None,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Spec]:
    spec = Spec(request.param, tmp_path_factory.mktemp("spec"))
    yield spec
    spec.exact.release()
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def bf16(spec: Spec) -> dict[str, torch.Tensor]:
    """What the local layers make of it in BF16."""
    return spec.outcome("bf16", impl="local")


def test_fp32(spec: Spec) -> None:
    """The truth is in full FP32; TransformerEngine multiplies in TF32, and so do the local layers here."""
    with tensor_float_32():
        local, te = (spec.outcome("fp32", impl=impl) for impl in ("local", TE))
    assert_as_exact(te, local, spec.truth, slack=2**-11)


def test_bf16(spec: Spec, bf16: dict[str, torch.Tensor]) -> None:
    assert_as_exact(spec.outcome("bf16", impl=TE), bf16, spec.truth, slack=2**-8)


def skip_unless_it_runs(config: Config) -> None:
    try:
        require_machine(config)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("recipe", FP8)
def test_fp8_is_as_coarse_as_its_numbers(recipe: str, spec: Spec, bf16: dict[str, torch.Tensor]) -> None:
    config = spec.config(recipe, impl=TE)
    if config.temporal.hidden_size % 128:
        pytest.skip("layers narrower than FP8's blocks")
    skip_unless_it_runs(config)
    # Delayed scaling knows no scales before it has seen a forward and a backward pass.
    found = spec.outcome(recipe, impl=TE, warm_ups=2)
    for name in spec.truth:
        error, own = relative_error(found[name], spec.truth[name]), relative_error(bf16[name], spec.truth[name])
        allowed = COARSER["gradient" if name.startswith("gradient") else "logits"] * own
        assert error <= allowed, f"{name}: off by {error:.2e}, {allowed:.2e} allowed"
    assert relative_error(found["text logits"], bf16["text logits"]) > 2 * relative_error(
        bf16["text logits"], spec.truth["text logits"]
    ), "FP8 is not on"


@pytest.mark.parametrize("recipe, impl", [("bf16", "local"), ("bf16", TE), *((recipe, TE) for recipe in FP8)])
def test_a_microbatch_never_waits_for_the_gpu(recipe: str, impl: str, tmp_path: Path) -> None:
    """The host runs ahead of the GPU: nothing between the start of the forward pass and the end of the backward one
    asks for a number that the GPU has yet to compute."""
    config = make_config(tmp_path, *WIDE, f"precision.recipe={recipe}", f"model.transformer_impl={impl}")
    skip_unless_it_runs(config)
    model = build(config)
    batch = draw_batch(config, samples=SAMPLES, frames=512, device=model.device)
    for _ in range(2):  # the first passes choose kernels and allocate workspaces
        forward_backward(model, batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_backward(model, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        model.release()
        forget_recipes()
