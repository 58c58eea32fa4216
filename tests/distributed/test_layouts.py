"""Every layout trains the same model: losses and gradient norms of 20 steps from one seed checkpoint.

Run as a user runs it, by torchrun, on CPU ranks over gloo; FP32, relative difference at most 1e-5.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import STEPS, curve, train, write_tiny_run

TOLERANCE = 1e-5
LAYOUTS = {
    "tp2": (2, ["parallel.tensor_model_parallel_size=2"]),
    "pp2": (2, ["parallel.pipeline_model_parallel_size=2"]),
    "tp2-pp2-sp": (
        4,
        [
            "parallel.tensor_model_parallel_size=2",
            "parallel.pipeline_model_parallel_size=2",
            "parallel.sequence_parallel=true",
        ],
    ),
    "dp2": (2, []),
    "dp2-plain-optimizer": (2, ["parallel.use_distributed_optimizer=false"]),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(config, directory) of 20 steps on one rank, seed checkpoint saved."""
    directory = tmp_path_factory.mktemp("layouts")
    config = write_tiny_run(directory)
    finished = train(
        config,
        f"data.directory={directory}/shards",
        f"run.directory={directory}/single",
        "checkpoint.save_seed=true",
    )
    assert finished.returncode == 0, finished.stderr
    return config, directory


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_rank(name: str, reference: tuple[Path, Path]) -> None:
    config, directory = reference
    ranks, overrides = LAYOUTS[name]
    finished = train(
        config,
        f"data.directory={directory}/shards",
        f"run.directory={directory}/{name}",
        f"checkpoint.seed_checkpoint={directory}/single/checkpoints/step_00000000",
        *overrides,
        ranks=ranks,
    )
    assert finished.returncode == 0, finished.stderr
    expected, actual = curve(directory / "single"), curve(directory / name)
    assert len(expected) == len(actual) == STEPS
    keys = ["loss", "text_loss", "audio_loss", "grad_norm", *(key for key in expected[0] if key.startswith("loss/"))]
    assert len(keys) == 4 + 5  # text and four codebooks
    for one, other in zip(expected, actual, strict=True):
        for key in keys:
            assert other[key] == pytest.approx(one[key], rel=TOLERANCE), f"step {one['step']}, {key}"
        accuracies = [key for key in one if key.startswith("accuracy/")]
        assert [other[key] for key in accuracies] == pytest.approx([one[key] for key in accuracies], abs=0.02)
    assert expected[-1]["loss"] < expected[0]["loss"]
