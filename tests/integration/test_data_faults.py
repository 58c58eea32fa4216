"""Faults of data under torchrun: a worker that is killed, a flipped bit, files cut short or gone wrong as a whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import STEPS, TIMEOUT, curve, environment, train, write_tiny_run

KILLED_AT = 7

# Training as it is, but for one worker of rank 1, which is killed when it first loads a step.
TRAIN_WITH_A_KILL = f"""
import os, signal, sys
from pathlib import Path
from megaspeech.data.mixture import TrainBatches
from megaspeech.train import main

load, rank = TrainBatches.__call__, os.getpid()

def load_or_die(self, step):
    mark = Path(os.environ["MARK"])
    if self.dp_rank == 1 and step == {KILLED_AT} and os.getpid() != rank and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return load(self, step)

if __name__ == "__main__":
    TrainBatches.__call__ = load_or_die
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `config.toml` and shards."""
    directory = tmp_path_factory.mktemp("data_faults")
    write_tiny_run(directory)
    return directory


@pytest.fixture(scope="module")
def straight(home: Path) -> list[dict]:
    """The course of two data parallel ranks that load their batches in the step itself."""
    finished = train(*_arguments(home, run="straight"), "data.num_workers=0", ranks=2)
    assert finished.returncode == 0, finished.stderr
    return _course(home / "straight")


def _arguments(home: Path, *, run: str, shards: str = "shards") -> tuple:
    return home / "config.toml", f"data.directory={home}/{shards}", f"run.directory={home}/{run}"


def _course(run: Path) -> list[dict]:
    """Losses and gradient norms, without what depends on the clock."""
    clock = ("time", "frames_per_second", "x_real_time")
    return [{key: value for key, value in record.items() if key not in clock} for record in curve(run)]


def _copy_of_shards(home: Path, *, name: str) -> Path:
    shutil.copytree(home / "shards", home / name)
    return home / name


def test_killed_worker_costs_nothing(home: Path, straight: list[dict]) -> None:
    """Nothing lost or repeated: the course is bit for bit that of a run without workers."""
    script = home / "train_with_a_kill.py"
    script.write_text(TRAIN_WITH_A_KILL)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    finished = subprocess.run(
        [*torchrun, *map(str, _arguments(home, run="killed")), "data.num_workers=2"],
        env={**environment(), "MARK": str(home / "died")},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert finished.returncode == 0, finished.stderr
    named = rf"^rank 1: data worker 1 of 2 \(pid \d+\) was killed by SIGKILL while it loaded step {KILLED_AT};"
    assert len(re.findall(named, finished.stdout, re.MULTILINE)) == 1 == finished.stdout.count("data worker")
    assert _course(home / "killed") == straight and len(straight) == STEPS


def test_flipped_bit_costs_one_sample(home: Path) -> None:
    """On two ranks that read the same batches: said once, though both find it, and at every epoch again; and one of
    those that are validated on."""
    shards = _copy_of_shards(home, name="flipped")
    for split in ("train", "valid"):
        path = shards / split / "tts-en" / "000000.bin"
        content = bytearray(path.read_bytes())
        content[0] ^= 1
        path.write_bytes(content)
    layout = "parallel.tensor_model_parallel_size=2"
    finished = train(*_arguments(home, run="flipped_run", shards="flipped"), "data.num_workers=1", layout, ranks=2)
    assert finished.returncode == 0, finished.stderr
    assert [record["step"] for record in curve(home / "flipped_run")] == list(range(1, STEPS + 1))
    lines = (home / "flipped_run" / "rejected_samples.jsonl").read_text().splitlines()
    for line, split in zip(lines, ("train", "valid"), strict=True):
        record = json.loads(line)
        reason = f"sample 0 of shard {home}/flipped/{split}/tts-en/000000: its checksum is not the one written"
        assert record == {"step": record["step"], "sample": "tts-en/000000:0", "reason": reason}
        assert finished.stdout.count(f"left out tts-en/000000:0: {reason}") == 1
    assert finished.stdout.count("left out") == 2


def test_truncated_shard_is_refused_at_the_start(home: Path) -> None:
    path = _copy_of_shards(home, name="short") / "train" / "asr-en" / "000000.bin"
    size = path.stat().st_size
    os.truncate(path, size // 2)
    finished = train(*_arguments(home, run="short_run", shards="short"), ranks=2)
    assert finished.returncode != 0
    message = f"{path} has {size // 2:,} bytes instead of the {size:,} that were written; copy the shard again"
    assert message in finished.stderr and not re.search(r'File ".*megaspeech', finished.stderr), finished.stderr
    assert not (home / "short_run" / "metrics.jsonl").exists()


def test_shard_gone_wrong_as_a_whole_ends_the_run(home: Path) -> None:
    path = _copy_of_shards(home, name="zeros") / "train" / "asr-en" / "000000.bin"
    path.write_bytes(bytes(path.stat().st_size))
    finished = train(*_arguments(home, run="zeros_run", shards="zeros"), "data.num_workers=2")
    assert finished.returncode != 0
    assert re.search(r"11 of the \d+ samples read on this rank are damaged, more than 1%", finished.stderr)
    assert "prepare them again" in finished.stderr and not re.search(r'File ".*megaspeech', finished.stderr)
    assert len((home / "zeros_run" / "rejected_samples.jsonl").read_text().splitlines()) >= 11
