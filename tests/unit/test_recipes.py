"""Runs in several recipes, compared: by the command as a user starts it, and by hand-made curves."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from launching import curve, environment, write_tiny_run

from megaspeech.config import read_config
from megaspeech.config.computation import ParallelSection
from megaspeech.parallel import groups
from megaspeech.parallel.precision import forget_recipes
from megaspeech.training.recipes import CONTROL, Trained, exit_status, judge, smooth, train_recipes

TOOL = Path(__file__).resolve().parents[2] / "tools" / "compare_recipes.py"
TIMEOUT = 300  # seconds


def compare(directory: Path, *options: str, ranks: int = 0) -> subprocess.CompletedProcess:
    """`tools/compare_recipes.py` on a tiny run in `directory`, under torchrun where `ranks` are given."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    command = [sys.executable, *launch, str(TOOL), str(directory / "config.toml"), "--output", str(directory / "out")]
    command += [f"data.directory={directory}/shards", *options]
    variables = {**environment(), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=TIMEOUT)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    """(folder, what the command said) of recipes on one rank, of which the first cannot run."""
    directory = tmp_path_factory.mktemp("recipes")
    write_tiny_run(directory)
    recipes = "fp8-tensorwise,fp32,control,bf16"
    return directory, compare(directory, "--recipes", recipes, "--steps", "20", "--band", "0.02")


def test_what_runs_is_compared_and_what_cannot_is_said(compared: tuple[Path, subprocess.CompletedProcess]) -> None:
    directory, finished = compared
    assert finished.returncode == 0, finished.stderr
    found = json.loads((directory / "out/recipes.json").read_text())
    impossible, fp32, control, bf16 = found["verdicts"]
    assert not impossible["holds"] and impossible["finals"] == {}
    assert impossible["fault"].startswith('precision.recipe: "fp8-tensorwise" needs a GPU, and here is none')
    assert impossible["fault"] in finished.stdout and "not run" in finished.stdout
    assert fp32["holds"] and set(fp32["differences"].values()) == {0.0}
    assert control["holds"] and 0 < max(map(abs, control["differences"].values())) < 1e-4
    assert bf16["holds"] and bf16["reference"] == "fp32" and bf16["band"] == 0.02
    assert {"loss", "text_loss", "audio_loss", "loss/text", "loss/codebook_3"} <= bf16["differences"].keys()
    assert 1e-4 < max(map(abs, bf16["differences"].values())) < 0.02  # another precision, and the same model
    assert (directory / "out/recipes.png").read_bytes().startswith(b"\x89PNG")


def test_both_start_from_one_seed_and_meet_the_same_batches(
    compared: tuple[Path, subprocess.CompletedProcess],
) -> None:
    directory, _ = compared
    fp32, bf16 = (curve(directory / "out" / recipe) for recipe in ("fp32", "bf16"))
    assert [record["step"] for record in fp32] == [record["step"] for record in bf16] == list(range(1, 21))
    started = read_config(directory / "out/bf16/config.toml").checkpoint
    assert started.seed_checkpoint == f"{directory}/out/fp32/checkpoints/step_00000000" and not started.save_seed
    assert bf16[0]["loss"] == pytest.approx(fp32[0]["loss"], rel=1e-3)
    final = sum(record["text_loss"] for record in bf16[-2:]) / 2
    figures = json.loads((directory / "out/recipes.json").read_text())
    assert figures["verdicts"][3]["finals"]["text_loss"] == pytest.approx(final)
    assert len(figures["curves"]["bf16"]["audio_loss"]) == 20


def test_under_torchrun_anew_and_out_of_the_band(compared: tuple[Path, subprocess.CompletedProcess]) -> None:
    """On two ranks; what an earlier comparison left behind is not gone on with."""
    directory, _ = compared
    figures = directory / "figures.json"
    options = ("--recipes", "fp32,control,bf16", "--steps", "10", "--band", "1e-9", "--json", str(figures))
    overrides = ("parallel.tensor_model_parallel_size=2", "training.micro_batch_size=1")
    finished = compare(directory, *options, *overrides, ranks=2)
    assert finished.returncode != 0 and "NO" in finished.stdout
    reference, control, other = json.loads(figures.read_text())["verdicts"]
    assert reference["holds"] and not other["holds"] and not other["fault"]
    assert control["fault"].startswith("training.micro_batch_size: 1 has no half for the control")
    assert len(curve(directory / "out" / "bf16")) == 10


def test_what_is_wrong_with_the_run_itself(tmp_path: Path) -> None:
    write_tiny_run(tmp_path)
    finished = compare(tmp_path, "--recipes", "fp32", "data.directory=nowhere")
    assert finished.returncode == 1 and "Traceback" not in finished.stderr
    assert "fp32: data.mixture: there is no set of shards nowhere/train/asr-en" in finished.stdout


def test_what_is_wrong_with_the_recipes(tmp_path: Path) -> None:
    settings = {"config_path": tmp_path / "config.toml", "overrides": (), "directory": tmp_path, "train_steps": 1}
    with pytest.raises(ValueError, match="recipes: fp32, fp32 names one twice"):
        next(train_recipes(["fp32", "fp32"], **settings))
    (alone,) = train_recipes([CONTROL], **settings)
    assert alone.fault == "recipes: control repeats a recipe that has run; name one before it" and not alone.has_run


def trained(recipe: str, *, text: list[float], fault: str = "", codebook: float = 1.0) -> Trained:
    return Trained(recipe, {"text_loss": text, "loss/text": text, "loss/codebook_0": [codebook]}, fault=fault)


def test_smoothing_is_a_mean_over_the_last_tenth() -> None:
    assert smooth([float(value) for value in range(40)])[-1] == (36 + 37 + 38 + 39) / 4
    assert smooth([3.0, 1.0]) == [3.0, 1.0]
    assert smooth([4.0, 2.0, 0.0], share=2 / 3) == [4.0, 3.0, 1.0]


def test_verdicts() -> None:
    """One within, one without, one that is no number, one that stopped half-way, one that never ran."""
    runs = [
        Trained("mxfp8", {}, fault="needs Blackwell"),
        trained("bf16", text=[2.0, 1.0]),
        trained("near", text=[2.0, 1.009]),
        trained("near but for a stream", text=[2.0, 1.0], codebook=1.5),
        trained("far", text=[2.0, 0.98]),
        trained("diverged", text=[2.0, math.nan]),
        trained("stopped", text=[2.0, 1.0], fault="5 steps in a row had to be skipped"),
    ]
    verdicts = {verdict.recipe: verdict for verdict in judge(runs, band=0.01)}
    assert {verdict.reference for verdict in verdicts.values()} == {"bf16"}
    assert [recipe for recipe, verdict in verdicts.items() if verdict.holds] == [
        "bf16",
        "near",
        "near but for a stream",
    ]
    assert verdicts["near"].differences["text_loss"] == pytest.approx(0.009)
    worst = {recipe: verdicts[recipe].worst_stream for recipe in ("near", "near but for a stream", "diverged")}
    assert worst == {"near": "loss/text", "near but for a stream": "loss/codebook_0", "diverged": "loss/text"}


@pytest.mark.parametrize(
    "runs, status",
    [
        ([trained("bf16", text=[1.0]), Trained("fp8-delayed", {}, fault="no GPU")], 0),
        ([trained("bf16", text=[1.0]), trained("fp8-delayed", text=[1.1])], 1),
        ([Trained("bf16", {}, fault="no shards"), Trained("fp8-delayed", {}, fault="no GPU")], 1),
        ([trained("bf16", text=[1.0], fault="it stopped"), Trained("fp8-delayed", {}, fault="no GPU")], 1),
    ],
    ids=["unrunnable ones do not fail", "out of the band", "none runs", "none runs to its end"],
)
def test_exit_status(runs: list[Trained], status: int) -> None:
    assert exit_status(judge(runs, band=0.01)) == status


def test_transformer_engine_forgets_between_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is loaded; else nothing is imported."""
    name, calls = "transformer_engine.pytorch.quantization", []
    monkeypatch.delitem(sys.modules, name, raising=False)
    forget_recipes()
    assert name not in sys.modules
    module = ModuleType(name)
    module.FP8GlobalStateManager = type("Manager", (), {"reset": staticmethod(lambda: calls.append(1))})
    monkeypatch.setitem(sys.modules, name, module)
    groups.initialise(ParallelSection(), seed=1)
    try:
        assert not calls
        groups.remove_grid()
    finally:
        groups.shut_down()
    assert calls == [1]
