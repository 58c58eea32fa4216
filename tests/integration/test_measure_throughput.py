"""tools/measure_throughput.py as a user runs it, on a CPU, where its figures mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools/measure_throughput.py"


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


@pytest.mark.skipif(find_spec("moshi") is None, reason="moshi is not installed")
def test_a_run_with_a_peer_and_a_recipe_that_cannot_run(tmp_path: Path) -> None:
    path = tmp_path / "figures/tiny.json"
    sizes = ("--frames", 32, "--sample-frames", 16, "--steps", 1, "temporal.context=8")
    done = run("--model", "tiny", "--recipe", "bf16,fp8-delayed", "--peer", "moshi", "--json", path, *sizes)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    ours, fp8, peer = found["rows"]
    assert [(row["provider"], row["recipe"], row["num_layers"]) for row in found["rows"]] == [
        ("megaspeech", "bf16", 4),
        ("megaspeech", "fp8-delayed", 4),
        ("moshi", "bf16", 4),
    ]
    assert fp8["status"].startswith('skipped: precision.recipe: "fp8-delayed" needs a GPU, and here is none')
    assert fp8["frames_per_second"] is None
    for row in (ours, peer):
        assert row["status"] == "measured" and row["frames_per_second"] > 0 and row["share_of_product"] > 0
        assert 5 < row["last_loss"] < 15
    assert len(ours["parts_ms"]) == 7 and min(ours["parts_ms"].values()) > 0 and peer["parts_ms"] == {}
    assert sum(ours["parts_ms"].values()) == pytest.approx(ours["step_by_part_ms"])
    assert found["machine"]["device"] == "cpu" and found["floors"]["TFLOP/s"] > 0
    assert {aim["verdict"] for aim in found["aims"]} == {"not measured"} and len(found["aims"]) == 5
    assert "| 4 | moshi bf16 |" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_a_dry_run_counts_without_a_gpu() -> None:
    done = run("--model", "8b", "--dry-run", "parallel.recompute_granularity=full")
    assert done.returncode == 0, done.stderr
    assert "9,055,801,344" in done.stdout and "863.1 TFLOP a step of 16,384 frames" in done.stdout
    assert "163 in all" in done.stdout and "H200 SXM: does not fit, 22 too many" in done.stdout


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--layers", "four"), "argument --layers: invalid"),
        (("model.kernel=triton",), "model.kernel: no such key; did you mean 'kernels'?"),
        (("--frames", 1000), "--frames: 1000 is not divisible by --sample-frames = 2048; choose a multiple"),
    ],
)
def test_faults_of_the_arguments(arguments: tuple, words: str) -> None:
    done = run("--dry-run", *arguments)
    assert done.returncode == 2 and words in done.stderr
