"""The tools as a user runs them: what is wrong is said in one line that names it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from megaspeech.preparation.job_array import share_of

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


def run_tool(name: str, *arguments: object, variables: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """`python tools/NAME ARGUMENTS`."""
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    environment = {**os.environ, **(variables or {})}
    return subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)


def only_line(finished: subprocess.CompletedProcess) -> str:
    """The one line on standard error of a tool that failed; progress bars rewrite theirs and do not count."""
    assert finished.returncode == 1, finished.stdout + finished.stderr
    lines = [line for line in finished.stderr.replace("\r", "\n").splitlines() if line.strip() and "it/s" not in line]
    lines = [line for line in lines if not line.startswith("audio prepared")]
    assert len(lines) == 1, finished.stderr
    return lines[0]


@pytest.fixture
def project(tmp_path: Path) -> tuple[Path, Path]:
    """(config, manifest) of a run whose only recording is missing."""
    config = tmp_path / "config.toml"
    config.write_text(
        f'[codec]\npath = "{tmp_path}/codec"\n'
        f'[data]\ndirectory = "{tmp_path}/shards"\ntokenizer = "{tmp_path}/tokenizer.model"\n'
        f'[[sources]]\nname = "a"\ntrain = "{tmp_path}/train.jsonl"\n'
    )
    manifest = tmp_path / "train.jsonl"
    manifest.write_text(json.dumps(LINE) + "\n")
    return config, manifest


def speech(folder: Path, count: int) -> list[dict]:
    """Lines of recordings with frames enough for codebooks of 256."""
    generator, lines = np.random.default_rng(0), []
    for index in range(count):
        sound = generator.standard_normal(16000 * 2) * np.hanning(16000 * 2) * 0.2
        soundfile.write(folder / f"{index}.wav", sound, 16000)
        lines.append({**LINE, "audio_filepath": f"{index}.wav", "duration": 2.0})
    return lines


def test_an_empty_manifest(project: tuple[Path, Path], tmp_path: Path) -> None:
    config, _ = project
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    line = only_line(run_tool("prepare_data.py", config, f"sources.a.valid={empty}"))
    assert "empty.jsonl" in line and "sources.a.valid" in line


def test_a_missing_manifest(project: tuple[Path, Path], tmp_path: Path) -> None:
    config, _ = project
    assert "nowhere.jsonl" in only_line(
        run_tool("prepare_data.py", config, f"sources.a.valid={tmp_path}/nowhere.jsonl")
    )


def test_no_sources(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")
    assert "there are no [[sources]]" in only_line(run_tool("prepare_data.py", tmp_path / "config.toml"))


def test_no_recording_can_be_read(project: tuple[Path, Path]) -> None:
    config, _ = project
    assert "missing.wav" in only_line(run_tool("prepare_data.py", config))


def test_a_job_array(project: tuple[Path, Path], tmp_path: Path) -> None:
    """From nothing: what to do first, then two tasks, of which the second finds all done."""
    config, manifest = project
    manifest.write_text("".join(json.dumps(line) + "\n" for line in [LINE, *speech(tmp_path, 40)]))
    units = "preparation.lines_per_shard=25"
    line = only_line(run_tool("prepare_data.py", config, units, "--array", "0/2"))
    assert line.startswith("prepare_data: codec.path: ") and "--fit once" in line
    fitted = run_tool("prepare_data.py", config, units, "--fit")
    assert fitted.returncode == 0 and "spectral codec fitted" in fitted.stdout, fitted.stderr
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["manifests"]
    first = run_tool("prepare_data.py", config, units, "--array", "1/2")
    assert first.returncode == 0 and "1 units are left for other tasks" in first.stdout, first.stderr
    variables = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "2"}
    last = run_tool("prepare_data.py", config, units, "--timeline", tmp_path / "t.json", variables=variables)
    assert last.returncode == 0 and "all 2 units are done" in last.stdout, last.stderr
    assert "missing" in last.stdout and "waited for the decoder" in last.stdout
    (rejected,) = (tmp_path / "shards/rejected.jsonl").read_text().splitlines()
    assert "missing.wav" in rejected and (tmp_path / "t.json").is_file()
    catalogue = json.loads((tmp_path / "shards/train/a/asr-en/catalogue.json").read_text())
    assert catalogue["shards"]["num_samples"] == [24, 16]


def test_shares_of_an_array() -> None:
    slurm = {"SLURM_ARRAY_TASK_ID": "8", "SLURM_ARRAY_TASK_COUNT": "8"}
    assert share_of(None, {}) == (0, 1) and share_of("2/5", {}) == (2, 5)
    assert share_of(None, slurm) == (0, 8) and share_of("2/5", slurm) == (2, 5)  # what is written wins
    strided = {**slurm, "SLURM_ARRAY_TASK_MIN": "2", "SLURM_ARRAY_TASK_STEP": "3"}  # --array=2-23:3
    tasks = [share_of(None, {**strided, "SLURM_ARRAY_TASK_ID": str(task)}) for task in range(2, 24, 3)]
    assert tasks == [(task, 8) for task in range(8)]
    whole = {**strided, "SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MAX": "23"}
    assert share_of(None, whole) == (1, 8)
    gaps = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "7"}  # --array=3,7
    for task in ("3", "7"):
        with pytest.raises(ValueError, match=r"SLURM_ARRAY_TASK_COUNT = 2: of tasks numbered 3 to 7 .* --array 0-1"):
            share_of(None, {**gaps, "SLURM_ARRAY_TASK_ID": task})
    for wrong in ("2/2", "x/2", "1", "0/0", "-1/2"):
        with pytest.raises(ValueError, match=f"--array {wrong}: is not I/N"):
            share_of(wrong, {})


def test_a_dry_run_makes_nothing(project: tuple[Path, Path], tmp_path: Path) -> None:
    config, manifest = project
    manifest.write_text(
        "".join(json.dumps({**LINE, "audio_filepath": f"{i}.wav", "duration": 3.6}) + "\n" for i in range(1000))
    )
    before = set(tmp_path.iterdir())
    shown = run_tool("prepare_data.py", config, "--dry-run")
    assert shown.returncode == 0 and "1,000" in shown.stdout and "GPU-hours" in shown.stdout, shown.stderr
    assert set(tmp_path.iterdir()) == before


def test_a_config_typo(project: tuple[Path, Path]) -> None:
    finished = run_tool("prepare_data.py", project[0], "data.num_frame=9")
    assert finished.returncode == 1 and "did you mean 'num_frames'?" in finished.stderr
