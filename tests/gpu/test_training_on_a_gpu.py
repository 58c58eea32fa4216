"""A GPU rank trains what a CPU rank trains. Skipped where there is no GPU; `make gpu` runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import curve, train, write_tiny_run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(config, directory) of 20 steps on a CPU rank, seed checkpoint saved."""
    directory = tmp_path_factory.mktemp("gpu")
    config = write_tiny_run(directory)
    finished = train(
        config,
        f"data.directory={directory}/shards",
        f"run.directory={directory}/cpu",
        "checkpoint.save_seed=true",
        variables={"CUDA_VISIBLE_DEVICES": ""},
    )
    assert finished.returncode == 0, finished.stderr
    return config, directory


@pytest.mark.parametrize(
    "name, overrides, tolerance",
    [
        ("local", (), 1e-3),
        ("triton", ("model.kernels=triton",), 1e-3),
        ("transformer-engine", ("model.transformer_impl=transformer_engine",), 1e-3),
        ("bf16", ("model.transformer_impl=transformer_engine", "precision.recipe=bf16"), 5e-2),
    ],
)
def test_losses_equal_a_cpu_ranks(
    name: str, overrides: tuple[str, ...], tolerance: float, on_cpu: tuple[Path, Path]
) -> None:
    config, directory = on_cpu
    finished = train(
        config,
        f"data.directory={directory}/shards",
        f"run.directory={directory}/{name}",
        f"checkpoint.seed_checkpoint={directory}/cpu/checkpoints/step_00000000",
        "data.num_workers=2",  # forked from a process that uses the GPU, into pinned memory
        *overrides,
    )
    assert finished.returncode == 0, finished.stderr
    pairs = zip(curve(directory / "cpu"), curve(directory / name), strict=True)
    assert all(gpu["loss"] == pytest.approx(cpu["loss"], rel=tolerance) for cpu, gpu in pairs)
