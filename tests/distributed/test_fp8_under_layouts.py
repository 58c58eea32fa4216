"""FP8's health is the same figures on every layout; a drift from BF16 is found through a pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import train, write_tiny_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

FAKE_FP8 = (str(Path(__file__).parent / "fake_fp8.py"),)
BROKEN_FROM = 9
"""The step at which the fake's scales go wrong."""
NUM_OPERANDS = 4 * 4 * 3
"""Of four layers of four matrices."""


def records(run: Path, kind: str) -> list[dict]:
    """Those of one kind."""
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in found if record["kind"] == kind]


def run_of(directory: Path, name: str, *overrides: str, **options: object) -> Path:
    """Train what `write_tiny_run` wrote, to its end; the run's directory."""
    places = (f"data.directory={directory}/shards", f"run.directory={directory}/{name}")
    finished = train(directory / "config.toml", *places, *overrides, **options)
    assert finished.returncode == 0, finished.stderr
    (directory / name / "stdout").write_text(finished.stdout)
    return directory / name


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all runs here."""
    place = tmp_path_factory.mktemp("fp8")
    write_tiny_run(place)
    return place


def test_health_is_that_of_one_rank(directory: Path) -> None:
    """Tensor 2 with sequence parallelism, in FP32."""
    common = ("logging.fp8_health_interval=2", "training.exit_step=2")
    alone = run_of(directory, "alone", *common)
    layout = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
    spread = run_of(directory, "spread", *common, *layout, ranks=2)

    (expected,), (found,) = records(alone, "fp8"), records(spread, "fp8")
    assert len(found["operands"]) == len(expected["operands"]) == NUM_OPERANDS
    for ours, theirs in zip(found["operands"], expected["operands"], strict=True):
        names = ("layer", "matrix", "name", "scale_wanted")
        assert [ours[name] for name in names] == [theirs[name] for name in names]
        for figure in ("amax", "scale"):
            assert ours[figure] == pytest.approx(theirs[figure], rel=1e-4)
        # Gradients that cancel out leave a rounding error or none, as the order of the sum will have it.
        few = 1e-3 if ours["name"] == "gradient" else 1e-9
        for figure in ("underflow", "overflow"):
            assert ours[figure] == pytest.approx(theirs[figure], abs=few)
    assert sum(row["underflow"] > 0 for row in expected["operands"]) > 4


def test_a_drift_is_flagged(directory: Path) -> None:
    """An interleaved pipeline, whose schedule takes two microbatches at a time."""
    overrides = ("precision.recipe=fp8-delayed", "model.transformer_impl=transformer_engine", "training.exit_step=11")
    layout = ("parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2")
    looks = ("precision.shadow_interval=2", "logging.fp8_health_interval=9", "logging.tensorboard=true")
    variables = {"BROKEN_FROM": str(BROKEN_FROM)}
    run = run_of(directory, "drift", *overrides, *layout, *looks, ranks=2, entry=FAKE_FP8, variables=variables)

    drifts = {record["step"]: record["text_drift"] for record in records(run, "fp8/shadow")}
    assert sorted(drifts) == [2, 4, 6, 8, 10]
    assert all(0 < abs(drift) < 0.05 for step, drift in drifts.items() if step < BROKEN_FROM)
    assert drifts[10] > 0.1

    (health,) = records(run, "fp8")
    assert len(health["operands"]) == NUM_OPERANDS
    read = [row for row in health["operands"] if (row["layer"], row["matrix"]) == (3, "linear_fc1")]
    assert [row["underflow"] > 0.99 for row in read] == [True, False, False]
    assert read[0]["scale"] == 2**-12 < read[0]["scale_wanted"] and read[2]["scale_wanted"] is None

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("fp8/shadow/text_drift")] == sorted(drifts)
    (event,) = events.Scalars("fp8/layer_03/input/amax")
    inputs = [row["amax"] for row in health["operands"] if (row["layer"], row["name"]) == (3, "input")]
    assert event.value == pytest.approx(max(inputs))

    (line,) = [line for line in (run / "stdout").read_text().splitlines() if "FP8 drifts" in line]
    assert line.startswith("step     10  FP8 drifts from BF16") and "100% of its numbers at step 9" in line
