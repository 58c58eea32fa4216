"""The tools as a user runs them: what is wrong is said in one line that names it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).resolve().parents[2]
LINE = {
    "audio_filepath": "missing.wav",
    "duration": 1.0,
    "taskname": "asr",
    "source_lang": "en",
    "target_lang": "en",
    "text": "one two",
    "words": [{"word": "one", "start": 0.1, "end": 0.4}, {"word": "two", "start": 0.5, "end": 0.9}],
}


def run_tool(name: str, *arguments: object) -> subprocess.CompletedProcess:
    """`python tools/NAME ARGUMENTS`."""
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=180)


def only_line(finished: subprocess.CompletedProcess) -> str:
    """The one line on standard error of a tool that failed; progress bars rewrite theirs and do not count."""
    assert finished.returncode == 1, finished.stdout + finished.stderr
    lines = [line for line in finished.stderr.replace("\r", "\n").splitlines() if line.strip() and "it/s" not in line]
    lines = [line for line in lines if not line.startswith(("decoded by DALI", "train:", "valid:"))]
    assert len(lines) == 1, finished.stderr
    return lines[0]


@pytest.fixture
def project(tmp_path: Path) -> tuple[Path, Path]:
    """(config, manifest) of a run whose only recording is missing."""
    config = tmp_path / "config.toml"
    config.write_text(
        f'[codec]\npath = "{tmp_path}/codec"\n'
        f'[data]\ndirectory = "{tmp_path}/shards"\ntokenizer = "{tmp_path}/tokenizer.model"\n'
    )
    manifest = tmp_path / "train.jsonl"
    manifest.write_text(json.dumps(LINE) + "\n")
    return config, manifest


def test_an_empty_manifest(project: tuple[Path, Path], tmp_path: Path) -> None:
    config, manifest = project
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    line = only_line(run_tool("prepare_data.py", config, manifest, empty))
    assert "empty.jsonl" in line and "empty" in line


def test_a_missing_manifest(project: tuple[Path, Path], tmp_path: Path) -> None:
    config, manifest = project
    assert "nowhere.jsonl" in only_line(run_tool("prepare_data.py", config, manifest, tmp_path / "nowhere.jsonl"))


def test_no_recording_can_be_read(project: tuple[Path, Path]) -> None:
    config, manifest = project
    assert "missing.wav" in only_line(run_tool("prepare_data.py", config, manifest, manifest))


def test_a_missing_recording_among_good_ones(project: tuple[Path, Path], tmp_path: Path) -> None:
    config, manifest = project
    generator, lines = np.random.default_rng(0), [LINE]
    for index in range(40):  # enough frames for codebooks of 256
        sound = generator.standard_normal(16000 * 2) * np.hanning(16000 * 2) * 0.2
        soundfile.write(tmp_path / f"{index}.wav", sound, 16000)
        lines.append({**LINE, "audio_filepath": f"{index}.wav", "duration": 2.0})
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    finished = run_tool("prepare_data.py", config, manifest, manifest)
    assert finished.returncode == 0, finished.stderr
    assert "1 left out, see" in finished.stdout
    (rejected,) = (tmp_path / "shards/train/rejected.jsonl").read_text().splitlines()
    assert "missing.wav" in rejected
    assert json.loads((tmp_path / "shards/train/asr-en/000000.json").read_text())["num_samples"] == 40


def test_a_config_typo(project: tuple[Path, Path]) -> None:
    config, manifest = project
    finished = run_tool("prepare_data.py", config, manifest, manifest, "data.num_frame=9")
    assert finished.returncode == 1 and "did you mean 'num_frames'?" in finished.stderr


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    assert "there is no checkpoint at" in only_line(run_tool("export_moshi.py", tmp_path / "step_0", tmp_path / "out"))
