"""The quickstart as a user runs it, small: killed in the middle and started again, it ends with every result.

How well the full one does is in the README; here a model of a few steps is only asked for all of its outputs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 50
SMALL_CORPUS = (
    "heard=40",
    "own=20",
    "pairs=20",
    "valid=4",
    "test_heard=3",
    "test_own_en=3",
    "test_own_ja=2",
    "test_pairs=3",
)
KEYS = {
    *("asr_en_wer", "asr_ja_wer", "st_ja_en_wer", "st_en_ja_wer", "tts_en_wer", "codec_en_wer", "s2st_ja_en_wer"),
    *("latency_ms", "train_seconds", "total_seconds", "parameters", "layout", "losses"),
}


def quickstart(directory: Path) -> list[str]:
    """The command, small, all of its output below `directory`."""
    overrides = [
        f"run.directory={directory}/train",
        f"codec.path={directory}/codec",
        f"data.directory={directory}/shards",
        f"data.tokenizer={directory}/tokenizer.model",
        f"training.train_steps={STEPS}",
        "optimizer.lr_warmup_steps=10",
        "training.eval_interval=25",
        "checkpoint.save_interval=10",
        "logging.sample_interval=40",
        *(f"corpus.{setting}" for setting in SMALL_CORPUS),
    ]
    return [sys.executable, str(ROOT / "examples/quickstart/run.py"), *overrides]


def steps_done(directory: Path) -> int:
    """Training steps that have been logged."""
    path = directory / "train" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def kill_in_training(command: list[str], directory: Path, *, after: int) -> None:
    """Start the quickstart and kill its first process, and no other, once `after` steps are logged."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while steps_done(directory) < after:
            assert process.poll() is None, "the quickstart ended before it was killed"
            assert time.monotonic() < deadline, "no progress"
            time.sleep(0.2)
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 10
    while left := _processes_of(directory):
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.1)


def _processes_of(directory: Path) -> list[int]:
    """Processes that were told to work in `directory`."""
    command_lines = {process.pid: process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])}
    return [pid for pid, words in command_lines.items() if any(f"run.directory={directory}/" in word for word in words)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(directory, output) of a quickstart that was killed once on the way."""
    directory = tmp_path_factory.mktemp("quickstart")
    command = quickstart(directory)
    kill_in_training(command, directory, after=14)
    saved = (directory / "train/checkpoints/latest").read_text().strip()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"going on at step {int(saved.removeprefix('step_'))} from" in done.stdout
    return directory, done.stdout


def test_goes_on_where_it_was(finished: tuple[Path, str]) -> None:
    directory, output = finished
    assert "corpus: spoken digits, synthesised: already there" in output
    assert output.count("going on at step") == 2  # after the kill, and on the second layout
    steps = [json.loads(line)["step"] for line in (directory / "train/metrics.jsonl").read_text().splitlines()]
    assert max(steps) == STEPS and set(range(1, STEPS + 1)) <= set(steps)


def test_results(finished: tuple[Path, str]) -> None:
    directory, output = finished
    results = json.loads((directory / "results.json").read_text())
    assert results.keys() >= KEYS
    assert results["parameters"] == 4_952_064
    assert "tensor 2 x pipeline 2" in results["layout"] and "data 2" in results["layout"]
    assert set(results["losses"]) == {"text", *(f"codebook_{index}" for index in range(8))}
    assert all(first > last for first, last in results["losses"].values())
    assert {"asr_en", "asr_ja", "st_en_ja", "st_ja_en", "tts_en", "tts_ja", "s2st_ja_en"} == results[
        "latency_ms"
    ].keys()
    assert 0 <= results["codec_en_wer"] < 0.3
    assert "Word error rate" in output and "Response latency" in output


def test_sound_picture_and_model(finished: tuple[Path, str]) -> None:
    directory, _ = finished
    assert len(list((directory / "spoken").glob("*.wav"))) >= 6
    assert (directory / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert {"config.json", "model.safetensors"} <= {path.name for path in (directory / "moshi").iterdir()}
    assert list((directory / "train/tensorboard").glob("events*"))


def test_losses_are_drawn_by_task(finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    directory, _ = finished
    monkeypatch.syspath_prepend(ROOT / "examples/quickstart")
    from picture import draw_losses, plt

    figure, (text_axes, audio_axes) = plt.subplots(1, 2)
    draw_losses(directory / "train" / "metrics.jsonl", text_axes, audio_axes)
    speaking = {"tts-en", "tts-ja", "s2st-ja-en"}
    assert {line.get_label() for line in audio_axes.get_lines()} == speaking
    assert {line.get_label() for line in text_axes.get_lines()} > speaking
    plt.close(figure)


def test_again_does_nothing_but_show(finished: tuple[Path, str]) -> None:
    directory, _ = finished
    before = (directory / "answers.json").stat().st_mtime_ns
    again = subprocess.run(quickstart(directory), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr[-2000:]
    assert (directory / "answers.json").stat().st_mtime_ns == before
    assert "Word error rate" in again.stdout
