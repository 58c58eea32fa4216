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


LOCAL, TE = "model.transformer_impl=local", "model.transformer_impl=transformer_engine"
BF16 = (TE, "precision.recipe=bf16")
FEW_BITS = (*BF16, "optimizer.use_precision_aware_optimizer=true", "optimizer.exp_avg_dtype=bf16")


@pytest.mark.parametrize(
    "name, overrides, tolerance",
    [
        ("local", (LOCAL,), 1e-3),
        ("triton", (LOCAL, "model.kernels=triton"), 1e-3),
        ("graphs", (LOCAL, "model.depth_graph_multiple=32"), 1e-3),
        ("transformer-engine", (TE,), 5e-3),  # whose FP32 products are TF32's, rounded to 2^-11
        ("bf16", BF16, 5e-2),
        ("few-bits", (*FEW_BITS, "optimizer.exp_avg_sq_dtype=bf16"), 5e-2),
        ("fp8-weights", (TE, "precision.recipe=fp8-tensorwise", "precision.fp8_param_gather=true"), 1e-1),
        ("whole-main-weights", (*FEW_BITS, "optimizer.store_param_remainders=false"), 5e-2),
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


@pytest.mark.parametrize(
    "overrides",
    [
        (*FEW_BITS, "optimizer.store_param_remainders=true"),
        (*FEW_BITS, "optimizer.store_param_remainders=false"),
        (TE, "precision.recipe=fp8-delayed"),
        (TE, "precision.recipe=fp8-tensorwise", "precision.fp8_param_gather=true"),
    ],
    ids=["remainders", "whole main weights", "delayed scales", "FP8 weights"],
)
def test_a_run_goes_on_as_if_nothing_had_happened(
    overrides: tuple[str, ...], on_cpu: tuple[Path, Path], tmp_path: Path
) -> None:
    """20 steps in one go, and 10 and 10: what it keeps in few bits is whole in the checkpoint between."""
    config, directory = on_cpu
    for name, *exits in (("whole", 0), ("halves", 10, 0)):
        for step in exits:
            places = (f"data.directory={directory}/shards", f"run.directory={tmp_path}/{name}")
            finished = train(config, *overrides, *places, f"training.exit_step={step}")
            assert finished.returncode == 0, finished.stderr
    pairs = zip(curve(tmp_path / "whole"), curve(tmp_path / "halves"), strict=True)
    assert all(halves["loss"] == pytest.approx(whole["loss"], rel=1e-4) for whole, halves in pairs)
