"""Today's planner against every step that a GPU was timed at: the JSON of `docs/measurements/`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megaspeech.benchmarks.case import OURS, Case, config_of
from megaspeech.benchmarks.figures import BF16_PRODUCT, FP8_PRODUCT, row_of
from megaspeech.benchmarks.planned import MEMORY_WITHIN, TIME_WITHIN, deviations, planned_figures
from megaspeech.benchmarks.run import Report
from megaspeech.benchmarks.step import Measured
from megaspeech.planning.gpus import find_gpu

MEASUREMENTS = sorted((Path(__file__).parents[2] / "docs/measurements").glob("throughput_*.json"))
H200 = find_gpu("NVIDIA H200")


@pytest.mark.skipif(not MEASUREMENTS, reason="no step has been timed on a GPU yet (docs/measurements/README.md, 4)")
@pytest.mark.parametrize("path", MEASUREMENTS, ids=lambda path: path.stem)
def test_the_planner_says_what_was_measured(path: Path) -> None:
    report = json.loads(path.read_text(encoding="utf-8"))
    found = deviations(report)
    assert found
    too_far = {name: each for name, each in found.items() if each[0] > TIME_WITHIN or each[1] > MEMORY_WITHIN}
    assert not too_far, f"(of time, of memory): {too_far}; fit planning/efficiency.py, mend planning/activations.py"


def test_a_report_is_read_back_and_held_against_the_planner() -> None:
    """A step that took 8/7 of what was planned, in twice the memory; the FP32 row and the failed one are left out."""
    case = Case(OURS, "8b", 4, "bf16", 16384, sample_frames=2048, micro_batch_size=1, overrides=("loss.semantic=7",))
    config, fp32 = config_of(case), replace(case, recipe="fp32")
    planned = planned_figures(config, gpu=H200)
    assert 10 < planned["planned_bytes"] / 1e9 < 141
    measured = Measured(1, [planned["planned_ms"] / 1e3 * 8 / 7], [], [3.0], 2 * planned["planned_bytes"])
    floors = {BF16_PRODUCT: 800.0, FP8_PRODUCT: 1500.0}
    rows = [
        row_of(case, config, measured, floors=floors, gpu=H200),
        row_of(fp32, config_of(fp32), measured, floors=floors, gpu=H200),
        row_of(replace(case, micro_batch_size=2), config, "out of memory", floors=floors, gpu=H200),
    ]
    report = json.loads(json.dumps(asdict(Report({"device": "NVIDIA H200"}, floors, rows, []))))
    ((name, (of_time, of_memory)),) = deviations(report).items()
    assert name == case.name and of_time == pytest.approx(1 / 8) and of_memory == pytest.approx(1 / 2)
