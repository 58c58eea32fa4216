"""The benchmarks of the kernels, on a CPU: their arithmetic, what a fault does, the whole program on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megaspeech.kernels.benchmarks import report, rows
from megaspeech.kernels.benchmarks.aims import AIMS, judge
from megaspeech.kernels.benchmarks.checks import compare, results
from megaspeech.kernels.benchmarks.measuring import rate
from megaspeech.kernels.benchmarks.operations import OPERATIONS, Inputs
from megaspeech.kernels.benchmarks.providers import PROVIDERS, Prepared, Provider
from megaspeech.kernels.benchmarks.rows import Report, Row, by_case, with_speedups
from megaspeech.kernels.benchmarks.run import TINY
from megaspeech.kernels.benchmarks.running import Plan, attempt, run
from megaspeech.kernels.benchmarks.shapes import MODELS, NUM_FRAMES

ROOT = Path(__file__).parents[2]


def provider(operation: str, name: str) -> Provider:
    return next(each for each in PROVIDERS[operation] if each.name == name)


def tiny_run(*providers: Provider, memory: float = 1e9, minutes: float = 5.0) -> Report:
    """Of depth_attention."""
    sizes = {"shapes": (TINY,), "frames": (8,), "memory": memory}
    plan = Plan({"depth_attention": providers}, device="cpu", milliseconds=1, minutes=minutes, **sizes)
    steps: list[str] = []
    found = run(plan, machine={"device": "cpu"}, advance=steps.append)
    assert len(steps) == plan.num_steps
    return found


def statuses(found: Report) -> dict[str, str]:
    return {row.provider: row.status for row in found.rows}


def test_the_whole_program_on_a_cpu(tmp_path: Path) -> None:
    """But for torch.compile, which takes seconds a case."""
    names = sorted({each.name for providers in PROVIDERS.values() for each in providers if "compile" not in each.name})
    command = [sys.executable, str(ROOT / "kernels/benchmarks/run.py"), "--device", "cpu", "--tiny", "--frames", "6"]
    command += ["--output", str(tmp_path), "--providers", *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "kernels_cpu.json").read_text())
    assert {row["operation"] for row in found["rows"]} == set(OPERATIONS)
    assert {row["provider"] for row in found["rows"]} == set(names)
    for row in found["rows"]:
        assert row["status"] == "measured" or row["status"].startswith("not installed") and row["provider"] == "liger"
    assert all(check["passed"] for check in found["checks"])
    assert {check["dtype"] for check in found["checks"]} == {"float32", "bfloat16"}
    assert found["machine"]["torch"] == torch.__version__ and set(found["floors"]) == {"GB/s", "TFLOP/s"}
    assert len(found["aims"]) == len(AIMS)
    assert "| tiny | 6 | triton |" in (tmp_path / "kernels_cpu.md").read_text()
    assert (tmp_path / "kernels_cpu.png").stat().st_size > 10_000


def test_what_there_is_no_gpu_for_is_said() -> None:
    if torch.cuda.is_available():
        pytest.skip("here is a GPU")
    command = [sys.executable, "-m", "megaspeech.kernels.benchmarks.run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "--device cpu --tiny" in done.stderr and "Traceback" not in done.stderr


def draw(name: str, *, masked: float = 0.0) -> Inputs:
    torch.manual_seed(0)
    return OPERATIONS[name].draw(TINY, 6, dtype=torch.bfloat16, device="cpu", masked=masked)


def test_work_is_that_of_the_formulas() -> None:
    streams, hidden, frames, size = len(TINY.cardinalities), TINY.hidden_size, 6, 2
    inputs = draw("stream_embedding", masked=0.2)
    table_RH = inputs.leaves["table_RH"].requires_grad_()
    OPERATIONS["stream_embedding"].exact(table_RH=table_RH, **inputs.constants).sum().backward()
    touched = int(table_RH.grad.any(1).sum())
    assert 0 < touched < streams * frames
    work = OPERATIONS["stream_embedding"].work(inputs)
    assert work["forward"] == (streams + 1) * frames * hidden * size
    assert work["backward"] == (streams * frames + touched) * hidden * size

    out = TINY.num_codebooks * frames * TINY.depth_hidden_size * size
    work = OPERATIONS["depth_attention"].work(draw("depth_attention"))
    assert work == {"forward": (3 + 1) * out, "backward": (3 + 1 + 3) * out}

    products = TINY.num_codebooks * frames * TINY.depth_hidden_size * TINY.cardinality
    work = OPERATIONS["codebook_cross_entropy"].work(draw("codebook_cross_entropy"))
    assert work == {"forward": 2 * products, "backward": 4 * products}
    assert rate(3 * 10**9, 1.5, unit="GB/s") == pytest.approx(2000)
    assert rate(3 * 10**12, 1.5, unit="TFLOP/s") == pytest.approx(2000)


@pytest.mark.parametrize("name", OPERATIONS)
def test_inputs_are_what_production_has(name: str) -> None:
    """And every production case fits 80 GB."""
    for shape in MODELS:
        for frames in NUM_FRAMES:
            inputs = OPERATIONS[name].draw(shape, frames, dtype=torch.bfloat16, device="meta")
            assert 0 < inputs.num_bytes < 80e9
            output = OPERATIONS[name].exact(**inputs.in_fp64().leaves, **inputs.constants)
            assert output.shape == inputs.grad_output.shape
    masked = draw(name, masked=0.5)
    tokens = [x for key, x in masked.constants.items() if key in ("codes_BST", "targets_QN")]
    assert all(0.2 < (x == -1).float().mean() < 0.8 for x in tokens)


def bent(name: str, change: Any, *, operation: str = "depth_attention") -> Provider:
    """The reference, its output or its gradients changed."""

    def prepare(inputs: Inputs) -> Prepared:
        prepared = provider(operation, "reference").prepare(inputs)
        return replace(prepared, forward=lambda: change(prepared.forward()))

    return Provider(name, "", prepare)


def only_gradient(factor: float) -> Any:
    """The same output, its gradient multiplied."""
    return lambda out: out.detach() + factor * (out - out.detach())


def test_what_is_wrong_is_red_and_has_no_time() -> None:
    right, wrong = bent("triton", lambda out: out), bent("triton-atomic", lambda out: 1.05 * out)
    not_finite = bent("liger", lambda out: out * float("nan"))
    badly_differentiated = bent("compile", only_gradient(1.05))
    cast = bent("embeddings", lambda out: out.double())
    found = tiny_run(right, wrong, not_finite, badly_differentiated, cast)
    failed = statuses(found)
    assert failed.pop("triton") == "measured"
    assert failed.pop("embeddings").startswith("failed: AssertionError")
    assert set(failed.values()) == {"check failed"}
    for row in found.rows:
        assert (row.median_ms is None) == (row.provider != "triton") == (row.rate is None) == row.is_fault
    red = [check for check in found.checks if not check["passed"]]
    assert {check["provider"] for check in red} == {"triton-atomic", "liger", "compile"}
    assert judge(found.rows)[5].verdict == "not measured"  # nothing to compare with


def test_torch_in_bf16_is_held_to_its_formula_only() -> None:
    """A provider that is torch may round as it likes; what is wrong in FP32 is wrong."""
    coarse = replace(bent("reference", lambda out: out + 0.1 * (out.dtype == torch.bfloat16)), is_torch=True)
    assert statuses(tiny_run(coarse)) == {"reference": "measured"}
    wrong = replace(bent("reference", lambda out: out + 1e-3), is_torch=True)
    assert statuses(tiny_run(wrong)) == {"reference": "check failed"}
    blank = bent("reference", lambda out: out * (float("nan") if out.dtype == torch.bfloat16 else 1.0))
    assert statuses(tiny_run(replace(blank, is_torch=True))) == {"reference": "check failed"}


def test_a_fault_ends_no_run() -> None:
    def starve(out: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def break_down(out: Tensor) -> Tensor:
        raise RuntimeError("first | line\nsecond line")

    absent = replace(bent("liger", lambda out: out), package="no_such_package")
    found = tiny_run(
        bent("triton", starve), bent("triton-atomic", break_down), absent, provider("depth_attention", "reference")
    )
    assert statuses(found) == {
        "triton": "out of memory",
        "triton-atomic": "failed: RuntimeError: first | line",
        "liger": "not installed: no_such_package",
        "reference": "measured",
    }
    assert [row.provider for row in found.rows if row.is_fault] == 2 * ["triton"] + 2 * ["triton-atomic"]
    assert judge(found.rows)[5].verdict == "fail"
    assert attempt(lambda: 3) == (3, "")


def test_what_cannot_fit_is_skipped_and_says_so() -> None:
    found = tiny_run(bent("triton", lambda out: out), memory=1000.0)
    assert statuses(found)["triton"].startswith("skipped: 0 GB of tensors") and not found.rows[0].is_fault
    assert judge(found.rows)[5].verdict == "not measured"


def test_what_has_no_time_left_is_skipped_and_says_so() -> None:
    absent = replace(bent("liger", lambda out: out), package="no_such_package")
    found = tiny_run(bent("triton", lambda out: out), absent, minutes=0.0)
    assert set(statuses(found).values()) == {"skipped: the 0 minutes were up"} and not found.checks


def made_up(operation: str, milliseconds: dict[str, tuple[float | None, float | None]], **figures: Any) -> list[Row]:
    """Rows of one case; no time is out of memory."""
    made = []
    for name, times in milliseconds.items():
        for direction, time in zip(rows.DIRECTIONS, times, strict=True):
            status = "measured" if time else "out of memory"
            row = Row(operation, "8b", 4096, "bfloat16", name, direction, status, OPERATIONS[operation].unit)
            if time:
                row = replace(
                    row, median_ms=time, quartiles_ms=(time, time), rate=1e3 / time, share_of_floor=0.9 / time
                )
                row = replace(row, **{key: values[name] for key, values in figures.items()})
            made.append(row)
    return made


def test_speedups_are_over_the_fastest() -> None:
    times = {"triton": (1.0, 2.0), "reference": (3.0, 8.0), "sdpa-contiguous": (2.0, 9.0), "compile": (5.0, None)}
    found = {(row.provider, row.direction): row.speedup for row in with_speedups(made_up("depth_attention", times))}
    assert found["triton", "forward"] == {"eager": 2.0, "compile": 5.0}
    assert found["triton", "backward"] == {"eager": 4.0}
    assert found["sdpa-contiguous", "forward"]["eager"] == 1.0
    assert found["compile", "backward"] == {}


def test_aims_are_judged_by_the_worst_case() -> None:
    good = made_up("stream_embedding", {"triton": (1.0, 1.0), "embeddings": (9.0, 3.0), "compile": (2.0, 2.0)})
    verdicts = {(judged.operation, judged.text): judged for judged in judge(good)}
    assert [judged.verdict for judged in judge(good)] == 5 * ["pass"] + 4 * ["not measured"]
    slow = made_up("stream_embedding", {"triton": (1.2, 1.0), "embeddings": (9.0, 2.9), "compile": (2.0, 2.0)})
    slow = [replace(row, model="40b") for row in slow]
    judged = judge(good + slow)
    assert [each.verdict for each in judged[:5]] == ["fail", "pass", "pass", "pass", "fail"]
    assert judged[0].worst == pytest.approx(0.75) and judged[0].worst_case == "40b, 4,096 frames"
    assert judged[1].worst == pytest.approx(7.5) and (judged[1].cases, judged[1].all_cases) == (2, 2)
    assert len(verdicts) == len(AIMS)


def test_cross_entropy_is_judged_by_both_directions_and_its_memory() -> None:
    times = {"triton": (1.5, 2.0), "reference": (1.0, 3.0)}
    faster, smaller = judge(made_up("codebook_cross_entropy", times, peak_bytes={"triton": 1000, "reference": 8000}))[
        -2:
    ]
    assert (faster.verdict, smaller.verdict) == ("pass", "pass")
    assert faster.worst == pytest.approx(4 / 3.5) and smaller.worst == pytest.approx(1 / 8)
    larger = judge(made_up("codebook_cross_entropy", times, peak_bytes={"triton": 1001, "reference": 8000}))[-1]
    assert larger.verdict == "fail"
    starved = judge(
        made_up("codebook_cross_entropy", {**times, "reference": (1.0, None)}, peak_bytes=dict.fromkeys(times))
    )
    assert [each.verdict for each in starved[-2:]] == ["not measured", "not measured"]


def test_errors_are_measured_by_torchs_own() -> None:
    exact = torch.tensor([4.0, 1.0], dtype=torch.float64)
    torchs = torch.tensor([4.0, 1.01])
    assert compare(torch.tensor([4.02, 1.0]), torchs, exact).holds
    assert not compare(torch.tensor([4.021, 1.0]), torchs, exact).holds
    assert not compare(torch.tensor([4.0, float("nan")]), torchs, exact).holds


def test_prepared_providers_do_the_same_in_their_own_layout() -> None:
    for operation, providers in PROVIDERS.items():
        inputs = OPERATIONS[operation].draw(TINY, 6, dtype=torch.float32, device="cpu", masked=0.2)
        wanted = results(provider(operation, "reference").prepare(inputs))
        for each in providers:
            if each.name in ("embeddings", "sdpa-contiguous"):
                for name, result in results(each.prepare(inputs)).items():
                    torch.testing.assert_close(result, wanted[name], msg=f"{each.name}, {name}")


def test_production_tables_are_shown(tmp_path: Path) -> None:
    """Every operation at all of its cases, one provider out of memory."""
    found = []
    for operation, providers in PROVIDERS.items():
        for shape in MODELS:
            for frames in NUM_FRAMES:
                times = {each.name: (None, None) if each.name == "liger" else (1.0, 2.0) for each in providers}
                found += [replace(row, model=shape.name, frames=frames) for row in made_up(operation, times)]
    made = Report({"device": "NVIDIA X1"}, {"GB/s": 1000.0, "TFLOP/s": 1000.0}, [], with_speedups(found))
    path = report.write(made, tmp_path)
    assert path.name == "kernels_nvidia_x1.json"
    text = path.with_suffix(".md").read_text()
    assert (
        text.count("| 40b | 65,536 |") == sum(map(len, PROVIDERS.values())) and "| liger | out of memory | - |" in text
    )
    assert len(by_case(found)) == len(PROVIDERS) * len(MODELS) * len(NUM_FRAMES)
