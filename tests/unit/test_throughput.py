"""Training steps taken apart, the moshi peer, and the figures and verdicts made of what is measured."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from moshi_folders import moshi_state
from torch import Tensor

from megaspeech.benchmarks.aims import AIMS, judge
from megaspeech.benchmarks.apart import _status, call_apart
from megaspeech.benchmarks.case import MOSHI, OURS, Case
from megaspeech.benchmarks.chart import draw
from megaspeech.benchmarks.figures import BF16_PRODUCT, FP8_PRODUCT, Row, extrapolated, row_of
from megaspeech.benchmarks.parts import DEPTH, EMBEDDING, HEADS, OPTIMIZER, OTHER, PARTS, TEMPORAL, TEXT, PartTimes
from megaspeech.benchmarks.peer import MoshiPeer
from megaspeech.benchmarks.step import Measured, training
from megaspeech.config import Config
from megaspeech.config.presets import PRESETS
from megaspeech.data.batch import Batch
from megaspeech.kernels.benchmarks.shapes import MODELS
from megaspeech.model.counting import count_flops
from megaspeech.planning.gpus import find_gpu
from megaspeech.training.trainer import Trainer

RECOMPUTED = ("parallel.recompute_granularity=full",)
CASE = Case(OURS, "tiny", None, "fp32", 64, sample_frames=16, micro_batch_size=2, overrides=RECOMPUTED, steps=1)
FORWARD = [EMBEDDING, TEMPORAL, TEXT, DEPTH, HEADS]
H200 = find_gpu("NVIDIA H200")
FLOORS = {BF16_PRODUCT: 800.0, FP8_PRODUCT: 1500.0}

needs_moshi = pytest.mark.skipif(find_spec("moshi") is None, reason="moshi is not installed")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    """Of `CASE`: two microbatches of two samples, whose layers run again in the backward pass and must mark nothing."""
    with training(CASE.prepare(tmp_path_factory.mktemp("throughput"))) as trainer:
        yield trainer


def marks(parts: PartTimes) -> list[str]:
    return [part for part, _ in parts._marks]


def test_all_samples_are_as_long_as_asked_for(trainer: Trainer) -> None:
    batches = trainer.batches(0)
    assert [batch.codes_BST.shape for batch in batches] == [(2, 9, 16)] * 2
    assert all((batch.codes_BST[:, 0] >= 0).all() for batch in batches)


def test_parts_follow_each_other_and_sum_to_the_step(trainer: Trainer) -> None:
    start = time.perf_counter()
    with PartTimes(trainer.wrapped) as parts:
        trainer.train_step(trainer.batches(0))
    whole = 1e3 * (time.perf_counter() - start)
    microbatch = [*FORWARD, *reversed(FORWARD), OTHER]
    assert marks(parts) == [OTHER, *2 * microbatch, OPTIMIZER, OTHER]
    spent = parts.milliseconds()
    assert list(spent) == list(PARTS) and min(spent.values()) > 0
    assert 0.9 * whole < sum(spent.values()) <= whole


def test_no_hook_stays(trainer: Trainer) -> None:
    with PartTimes(trainer.wrapped) as parts:
        pass
    trainer.train_step(trainer.batches(0))
    assert marks(parts) == [OTHER, OTHER]


@pytest.mark.parametrize(
    "part, name", [(DEPTH, "depth.layers.0"), (TEMPORAL, "temporal.block.layers.1"), (TEXT, "text_head")]
)
def test_time_goes_to_the_part_that_takes_it(part: str, name: str, trainer: Trainer) -> None:
    """Forward and backward: a module that sleeps in both passes of both microbatches."""

    def sleep(*_: object) -> None:
        time.sleep(0.1)

    def hook(module: torch.nn.Module, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        sleep()
        tensor = output[0] if isinstance(output, tuple) else output
        if tensor.requires_grad:  # not where it will be computed again
            tensor.register_hook(sleep)

    handle = trainer.wrapped.models[0].get_submodule(name).register_forward_hook(hook)
    try:
        with PartTimes(trainer.wrapped) as parts:
            trainer.train_step(trainer.batches(0))
    finally:
        handle.remove()
    spent = parts.milliseconds()
    assert spent.pop(part) > 400 and max(spent.values()) < 200


@needs_moshi
def test_the_peer_has_our_loss_and_gradient(trainer: Trainer) -> None:
    """The same weights, the same codes, the same numbers: it does the same work."""
    (model,), config = trainer.wrapped.models, trainer.config
    batch = as_moshi_weighs(trainer.batches(0)[0], config)
    peer = MoshiPeer(config, device=torch.device("cpu"))
    peer.model.load_state_dict(moshi_state(model.state_dict(), config=config))
    losses = model(batch.codes_BST, batch.weights_BPT, batch.depth_frames_BT)
    text, audio = batch.weights_BPT[:, 0].sum(), batch.weights_BPT[:, 1:].sum()
    ours = losses.weighted[0] / text + losses.weighted[1] / audio
    theirs, _ = peer.loss(batch.codes_BST)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    trainer.wrapped.chunks[0].zero_grad_buffer()
    ours.backward()
    theirs.backward()
    gradients = [parameter.main_grad for parameter in model.parameters()]
    assert norm(gradients) == pytest.approx(norm([parameter.grad for parameter in peer.parameters]), rel=1e-4)


def norm(gradients: list[Tensor]) -> float:
    return float(sum(gradient.double().square().sum() for gradient in gradients).sqrt())


def as_moshi_weighs(batch: Batch, config: Config) -> Batch:
    """No prompt is left out; what a delay moves past the end is."""
    codes, streams = batch.codes_BST, config.streams
    weights = (codes[:, : 1 + streams.num_codebooks] >= 0).float()
    weights[:, 0] *= torch.where(
        (codes[:, 0] == streams.text_pad_id) | (codes[:, 0] == streams.text_end_pad_id), 0.5, 1.0
    )
    weights[:, 1] *= 100
    for stream, delay in enumerate(streams.delays[: 1 + streams.num_codebooks]):
        if delay:
            weights[:, stream, -delay:] = 0
    return replace(batch, weights_BPT=weights, depth_frames_BT=None)


@needs_moshi
def test_the_peer_learns_in_bf16_and_keeps_fp32(trainer: Trainer) -> None:
    config = trainer.config
    bf16 = config.model_copy(update={"precision": config.precision.model_copy(update={"recipe": "bf16"})})
    peer, batches = MoshiPeer(bf16, device=torch.device("cpu")), trainer.batches(0)
    losses = [peer.step(batches) for _ in range(12)]
    assert losses[-1] < 0.9 * losses[0]
    assert peer.model.transformer.checkpointing and peer.model.training
    for parameter, main in zip(peer.parameters, peer.main, strict=True):
        assert parameter.dtype is torch.bfloat16 and main.dtype is torch.float32
        assert torch.equal(parameter, main.bfloat16()) and not torch.equal(parameter.float(), main)


@needs_moshi
def test_the_peer_averages_over_microbatches(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megaspeech.benchmarks.peer.MAX_NORM", 1e9)  # clipped, all gradients look alike
    batch, seen = trainer.batches(0)[0], []
    for microbatches in ([batch], [batch, batch]):
        peer = MoshiPeer(trainer.config, device=torch.device("cpu"))
        peer.optimizer.register_step_pre_hook(
            lambda *_, peer=peer: seen.append(norm([main.grad for main in peer.main]))
        )
        peer.step(microbatches)
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)


PART_MS = dict(zip(PARTS, (5.0, 70.0, 5.0, 15.0, 5.0, 7.0, 3.0), strict=True))


def row(recipe: str, seconds: float, *, provider: str = OURS, layers: int = 4, directory: Path) -> Row:
    """Of the preset 8b, as if it had been measured."""
    case = Case(provider, "8b", layers, recipe, frames=16384, sample_frames=2048, micro_batch_size=1)
    measured = Measured(
        1, [2 * seconds, seconds, seconds / 2], [PART_MS, PART_MS] if provider == OURS else [], [3.0], 7
    )
    return row_of(case, case.config(directory), measured, floors=FLOORS, gpu=H200)


def test_the_figures_of_a_row(tmp_path: Path) -> None:
    config = Case(OURS, "8b", 4, "bf16", frames=16384, sample_frames=2048, micro_batch_size=1).config(tmp_path)
    flops = count_flops(config, num_frames=2048)
    found = row("bf16", 2.0, directory=tmp_path)
    assert (found.status, found.num_layers, found.step_ms, found.quartiles_ms) == ("measured", 4, 2000, (1500, 3000))
    assert (found.frames_per_second, found.x_real_time) == (8192, 8192 / 12.5)
    assert found.tflops == pytest.approx(3 * sum(flops.values()) * 16384 / 2.0 / 1e12)
    assert found.mfu == pytest.approx(found.tflops / 989.4) and found.share_of_product == pytest.approx(
        found.tflops / 800
    )
    assert found.parts_ms == PART_MS and found.depth_share_of_time == pytest.approx(20 / 100)
    assert found.depth_share_of_flops == pytest.approx(flops["depth"] / sum(flops.values()))
    fp8 = row("fp8-tensorwise", 2.0, directory=tmp_path)
    assert fp8.mfu == pytest.approx(fp8.tflops / 1978.9) and fp8.share_of_product == pytest.approx(fp8.tflops / 1500)
    assert row("fp32", 2.0, directory=tmp_path).share_of_product is None


def test_what_is_for_fp8_is_left_out_of_bf16(tmp_path: Path) -> None:
    case = replace(CASE, overrides=("precision.fp8_param_gather=true", "precision.num_layers_at_end_in_bf16=1"))
    for recipe, gathers in (("bf16", False), ("fp8-tensorwise", True), ("mxfp8", True)):
        precision = replace(case, recipe=recipe).config(tmp_path).precision
        assert (precision.fp8_param_gather, precision.num_layers_at_end_in_bf16) == (gathers, 1)


def test_a_peer_that_does_not_fit_is_told_from_fewer_layers(tmp_path: Path) -> None:
    known = [
        row("bf16", seconds, provider=MOSHI, layers=layers, directory=tmp_path) for layers, seconds in ((4, 2), (12, 6))
    ]
    config = Case(MOSHI, "8b", None, "bf16", frames=16384, sample_frames=2048, micro_batch_size=1).config(tmp_path)
    found = extrapolated(known, config, floors=FLOORS, gpu=H200)
    assert (found.num_layers, found.step_ms, found.frames_per_second) == (32, pytest.approx(16000), pytest.approx(1024))
    assert found.status == "extrapolated from 4 and 12 layers" and found.quartiles_ms is None
    assert extrapolated(known[:1], config, floors=FLOORS, gpu=H200) is None
    assert extrapolated([*known, replace(known[0], num_layers=32)], config, floors=FLOORS, gpu=H200) is None


@pytest.mark.parametrize(
    "seconds, verdicts",
    [
        ({"bf16": 0.5, "fp8": 0.3, "peer": 1.2}, ["pass", "pass", "pass", "pass"]),
        ({"bf16": 2.0, "fp8": 1.5, "peer": 3.0}, ["fail", "fail", "fail", "fail"]),
        ({"bf16": 0.5}, ["pass", *3 * ["not measured"]]),
    ],
)
def test_aims(seconds: dict[str, float], verdicts: list[str], tmp_path: Path) -> None:
    names = {"bf16": ("bf16", OURS), "fp8": ("fp8-delayed", OURS), "peer": ("bf16", MOSHI)}
    rows = [row(names[key][0], each, provider=names[key][1], directory=tmp_path) for key, each in seconds.items()]
    judged = judge(rows, is_gpu=True)
    assert [each.verdict for each in judged[:4]] == verdicts
    assert judged[4].verdict == "pass"  # a fifth of the time is less than the FLOPs' half at four layers
    assert {each.verdict for each in judge(rows, is_gpu=False)} == {"not measured"} and len(judged) == len(AIMS)


def test_the_worst_depth_counts(tmp_path: Path) -> None:
    slow = replace(row("bf16", 2.0, layers=12, directory=tmp_path), depth_share_of_time=0.9)
    rows = [row("bf16", 0.5, directory=tmp_path), slow]
    judged = judge(rows, is_gpu=True)
    assert (judged[0].num_layers, judged[0].verdict, judged[4].num_layers, judged[4].verdict) == (
        12,
        "fail",
        12,
        "fail",
    )


def test_a_chart_of_rows_with_and_without_figures(tmp_path: Path) -> None:
    failed = replace(row("bf16", 2.0, directory=tmp_path), status="out of memory", frames_per_second=None, parts_ms={})
    rows = [row("bf16", 2.0, directory=tmp_path), row("bf16", 4.0, provider=MOSHI, directory=tmp_path), failed]
    draw(rows, tmp_path / "chart.png", title="rows")
    assert (tmp_path / "chart.png").read_bytes()[:4] == b"\x89PNG"


def dies(*, say: object) -> None:
    """What the kernel's out-of-memory killer makes of a process."""
    say("before")
    os._exit(9)


def test_a_process_that_dies_is_a_status() -> None:
    heard: list[str] = []
    assert call_apart(dies, hear=heard.append) == (None, "failed: its process ended with status 9")
    assert heard == ["before"]


@pytest.mark.parametrize(
    "error, status",
    [
        (ValueError("a: 1 fault\n  use b"), "skipped: a: 1 fault use b"),
        (torch.OutOfMemoryError("of 3 GB"), "out of memory"),
        (RuntimeError("first\nsecond"), "failed: RuntimeError: first"),
    ],
)
def test_what_an_error_is_called(error: Exception, status: str) -> None:
    assert _status(error) == status


@pytest.mark.parametrize("shape", MODELS, ids=lambda shape: shape.name)
def test_kernels_are_measured_at_the_shapes_of_the_presets(shape: object) -> None:
    streams, temporal, depth = (PRESETS[shape.name][section] for section in ("streams", "temporal", "depth"))
    own, given = streams["num_codebooks"], streams["num_given_codebooks"]
    assert (shape.num_codebooks, shape.num_given, shape.delays) == (own, given, tuple(streams["delays"]))
    assert (shape.text_cardinality, shape.cardinality) == (streams["text_cardinality"], streams["cardinality"])
    assert shape.hidden_size == temporal["hidden_size"]
    assert (shape.depth_hidden_size, shape.depth_heads) == (depth["hidden_size"], depth["num_attention_heads"])
