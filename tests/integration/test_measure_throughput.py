"""tools/measure_throughput.py as a user runs it, on a CPU, where its figures mean nothing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[2] / "tools/measure_throughput.py"


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


@pytest.mark.skipif(importlib.util.find_spec("moshi") is None, reason="moshi is not installed")
def test_a_run_with_a_peer_and_a_recipe_that_cannot_run(tmp_path: Path) -> None:
    path = tmp_path / "figures/tiny.json"
    sizes = ["--frames", 32, "--sample-frames", 16, "--steps", 1, "temporal.context=8"]
    command = [
        sys.executable,
        TOOL,
        "--model",
        "tiny",
        "--recipe",
        "bf16,fp8-delayed",
        "--peer",
        "moshi",
        "--json",
        path,
    ]
    done = subprocess.run([*map(str, command + sizes)], capture_output=True, text=True, timeout=600)
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
    assert {aim["verdict"] for aim in found["aims"]} == {"not measured"} and len(found["aims"]) == 7
    assert "| 4 | moshi bf16 |" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_a_model_that_writes_text_alone(tmp_path: Path) -> None:
    shape = ("streams.num_codebooks=0", "streams.delays=[0,0,1,1,1]", "--frames", 32, "--sample-frames", 16)
    done = run("--model", "tiny", "--recipe", "fp32", "--steps", 1, "--json", tmp_path / "text.json", *shape)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "text.json").read_text())["rows"]
    assert {part for part, spent in row["parts_ms"].items() if not spent} == {"depth", "codebook heads and loss"}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """The tool in this process, which spares importing everything once a test."""
    spec = importlib.util.spec_from_file_location("measure_throughput", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_dry_run_counts_without_a_gpu(tool: ModuleType, capsys: pytest.CaptureFixture) -> None:
    assert tool.main(["--model", "8b", "--dry-run", "parallel.recompute_granularity=full"]) == 0
    said = capsys.readouterr().out
    assert "9,055,801,344" in said and "863.1 TFLOP a step of 16,384 frames" in said
    assert "163 in all" in said and "H200 SXM: does not fit, 22 too many" in said


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["model.kernel=triton"], "model.kernel: no such key; did you mean 'kernels'?"),
        (["--frames", "1000"], "--frames: 1000 is not divisible by --sample-frames = 2048; choose a multiple"),
    ],
)
def test_faults_of_the_arguments(
    arguments: list[str], words: str, tool: ModuleType, capsys: pytest.CaptureFixture
) -> None:
    assert tool.main(["--dry-run", *arguments]) == 2
    assert words in capsys.readouterr().err
