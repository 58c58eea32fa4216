"""Checkpoints of real runs on two ranks: in the background, killed half way, on a rank that cannot write, refused."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from launching import STEPS, TIMEOUT, command, curve, environment, train, write_tiny_run
from test_tools import run_tool

from megaspeech.checkpoint.checksums import find_damage

SAVE_INTERVAL = 5
TENSOR_PARALLEL = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
"""Both ranks have weights of their own to write."""
IN_BACKGROUND = "checkpoint.async_save=true"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `config.toml` and shards."""
    directory = tmp_path_factory.mktemp("checkpoints")
    write_tiny_run(directory, save_interval=SAVE_INTERVAL)
    return directory


@pytest.fixture(scope="module")
def reference(home: Path) -> Path:
    """The run directory of 20 uninterrupted steps."""
    finished = train(*_arguments(home, "reference"), *TENSOR_PARALLEL, "checkpoint.keep_every=10", ranks=2)
    assert finished.returncode == 0, finished.stderr
    return home / "reference"


def _arguments(home: Path, run: str) -> tuple:
    return home / "config.toml", f"data.directory={home}/shards", f"run.directory={home}/{run}"


def _names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def _course(run: Path) -> list[tuple]:
    keys = ("step", "loss", "text_loss", "audio_loss", "grad_norm", "loss/codebook_3")
    return [tuple(record[key] for key in keys) for record in curve(run)]


def test_saves_in_the_background_and_goes_on_bit_for_bit(home: Path, reference: Path) -> None:
    arguments, run = (*_arguments(home, "background"), *TENSOR_PARALLEL, IN_BACKGROUND), home / "background"
    first = train(*arguments, "training.exit_step=11", ranks=2)
    assert first.returncode == 0, first.stderr
    assert [first.stdout.count(f"saved {run}/checkpoints/step_000000{step}") for step in ("05", "10", "11")] == [
        1,
        1,
        1,
    ]
    assert _names(run) == ["latest", "step_00000010", "step_00000011"]
    second = train(*arguments, ranks=2)
    assert second.returncode == 0, second.stderr
    assert "going on at step 11 from" in second.stdout
    assert _names(run) == ["latest", "step_00000015", "step_00000020"]
    assert _course(run) == _course(reference)


def _stop_while_saving(process: subprocess.Popen, run: Path) -> tuple[list[psutil.Process], str]:
    """Freeze the run in the middle of a save after the first; (its processes, what is being written)."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be stopped"
        parts = list((run / "checkpoints").glob("step_*.part"))
        if parts and (run / "checkpoints" / "latest").is_file():
            family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
            _each(family, "suspend")
            if parts[0].is_dir():  # else it was finished meanwhile
                return family, parts[0].stem
            _each(family, "resume")
        time.sleep(0.001)
    raise AssertionError("no save was seen under way")


def _each(family: list[psutil.Process], action: str) -> None:
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            getattr(member, action)()


def test_data_parallel_ranks_write_a_share_each(home: Path, reference: Path) -> None:
    """Of the optimizer's state, which is most of it; and one rank goes on from what two have written."""
    arguments = [*_arguments(home, "shared"), "training.exit_step=5"]
    assert train(*arguments, ranks=2).returncode == 0
    (folder,) = (home / "shared/checkpoints").glob("step_*")
    sizes = [sum(path.stat().st_size for path in folder.glob(f"__{rank}_*.distcp")) for rank in range(2)]
    assert min(sizes) > 0.3 * sum(sizes)
    assert train(*arguments[:-1]).returncode == 0
    expected, found = _course(reference), _course(home / "shared")
    assert all(ours == pytest.approx(theirs, rel=1e-5) for ours, theirs in zip(expected, found, strict=True))


def test_killed_while_a_save_is_in_flight(home: Path, reference: Path) -> None:
    run = home / "killed"
    arguments = [*_arguments(home, "killed"), *TENSOR_PARALLEL, IN_BACKGROUND, "checkpoint.keep_last=9"]
    with subprocess.Popen(command(*arguments, ranks=2), env=environment(), stdout=-3, stderr=-3) as process:
        family, unfinished = _stop_while_saving(process, run)
        named = (run / "checkpoints" / "latest").read_text().strip()
        _each(family, "kill")
        process.wait()
        psutil.wait_procs(family)
    assert named < unfinished and find_damage(run / "checkpoints" / named) is None
    assert f"{unfinished}.part" in _names(run) and unfinished not in _names(run)
    finished = train(*arguments, ranks=2)
    assert finished.returncode == 0, finished.stderr
    assert f"going on at step {int(named[5:])} from" in finished.stdout
    assert _names(run) == ["latest", *(f"step_{step:08d}" for step in range(SAVE_INTERVAL, STEPS + 1, SAVE_INTERVAL))]
    assert _course(run) == _course(reference)


def test_one_rank_that_cannot_write(home: Path, reference: Path) -> None:
    """Its files may not grow over a megabyte; the other rank's may."""
    run = home / "limited"
    shutil.copytree(reference, run)
    shutil.rmtree(run / "checkpoints" / "step_00000020")
    shutil.rmtree(run / "checkpoints" / "step_00000015")
    (run / "checkpoints" / "latest").write_text("step_00000010\n")
    arguments = [*_arguments(home, run.name), *TENSOR_PARALLEL, IN_BACKGROUND]
    launch = command(*arguments, ranks=2)
    place = launch.index("-m", launch.index("--nproc-per-node"))
    limited = 'if [ "$RANK" = 1 ]; then ulimit -f 1000; fi; exec "$@"'
    launch[place:place] = ["--no-python", "bash", "-c", limited, "bash", launch[0]]
    finished = subprocess.run(launch, env=environment(), capture_output=True, text=True, timeout=TIMEOUT)
    assert finished.returncode != 0
    why = "could not be written: rank 1: File too large; step_00000010, saved before, is untouched"
    assert f"NOT SAVED: checkpoint {run}/checkpoints/step_00000015 {why}" in finished.stdout
    assert f"checkpoint {run}/checkpoints/step_00000020 {why}" in finished.stderr
    assert finished.stderr.count("megaspeech.train: ") == 1 and 'File "' + str(home) not in finished.stderr
    assert _course(run) == _course(reference)  # training went on
    assert _names(run) == ["latest", "step_00000010"]
    assert (run / "checkpoints" / "latest").read_text() == "step_00000010\n"
    assert find_damage(run / "checkpoints" / "step_00000010") is None


def test_shards_of_another_codec_than_the_checkpoint(home: Path, reference: Path) -> None:
    shutil.copytree(home / "shards", home / "foreign")
    for header in home.glob("foreign/**/*.json"):
        header.write_text(header.read_text().replace('"codec_fingerprint": "none"', '"codec_fingerprint": "f00d"'))
    config, _, run = _arguments(home, "reference")
    finished = train(config, f"data.directory={home}/foreign", run)
    assert finished.returncode != 0 and finished.stderr.count("megaspeech.train: ") == 1
    words = (
        "step_00000020: codec_fingerprint is none there and f00d in this run; train on shards that were prepared with"
    )
    assert words in finished.stderr


def test_a_converted_checkpoint_is_what_two_ranks_saved_and_a_seed(home: Path, reference: Path) -> None:
    """Through moshi and back, on other ranks: the weights are read of two ranks' pieces, and trained on."""
    source, moshi, seed = reference / "checkpoints/step_00000020", home / "moshi", home / "seed" / "step_00000000"
    for *formats, before, after in (("native", "moshi", source, moshi), ("moshi", "native", moshi, seed)):
        done = run_tool("convert_checkpoint.py", "--from", formats[0], "--to", formats[1], before, after)
        assert done.returncode == 0, done.stderr
    starts = []
    for run, path in (("from_two", source), ("from_seed", seed)):
        options = [f"checkpoint.seed_checkpoint={path}", "training.exit_step=2", "logging.log_interval=1"]
        finished = train(*_arguments(home, run), *options)
        assert finished.returncode == 0, finished.stderr
        starts.append(_course(home / run))
    assert starts[0] == starts[1] and len(starts[0]) == 2


def test_the_inspection_tool(home: Path, reference: Path) -> None:
    shown = run_tool("inspect_checkpoint.py", reference)
    assert shown.returncode == 0, shown.stderr
    for words in (
        "step_00000020 (latest)",
        "tensor 2 x data 1, sequence parallel; 2 ranks",
        "tiny: 325,504 parameters",
        "synthetic, fingerprint none",
        "depth.layers.*.fc1.weight",
    ):
        assert words in shown.stdout
    listed = run_tool("inspect_checkpoint.py", reference / "checkpoints" / "step_00000010", "--json", "--no-verify")
    assert listed.returncode == 0, listed.stderr
    values = json.loads(listed.stdout)
    (folder,), contents = values["checkpoints"], values["contents"]
    assert not folder["verified"] and contents["step"] == 10 and contents["num_ranks"] == 2
    tensors = {tensor["name"]: tensor for tensor in contents["tensors"]}
    assert tensors["depth.layers.1.fc2.weight"]["shape"] == [4 * 88, 32]
    assert contents["sizes"]["optimizer"] > 2 * contents["sizes"]["model"]


def test_the_inspection_tool_finds_damage(home: Path, reference: Path) -> None:
    run = home / "harmed"
    shutil.copytree(reference, run)
    (run / "checkpoints" / "step_00000030.part").mkdir()
    with (run / "checkpoints" / "step_00000015" / "__1_0.distcp").open("r+b") as file:
        file.write(b"?")
    shown = run_tool("inspect_checkpoint.py", run, "--tensors")
    assert shown.returncode == 1
    assert "DAMAGED: __1_0.distcp is corrupt" in shown.stdout and "half-written" in shown.stdout
    assert "depth.layers.1.fc2.weight" in shown.stdout  # the newest is whole, and shown
    missing = run_tool("inspect_checkpoint.py", home / "nowhere")
    assert missing.returncode == 1 and "there is no checkpoint at" in missing.stderr
