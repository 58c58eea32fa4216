"""How a failed run ends: one rank speaks, and torchrun's last block says the same in words."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from launching import environment, train

from megaspeech.training.record_file import RecordFile

INJECTING = (str(Path(__file__).parent / "injecting.py"),)


def test_exception_on_one_rank(arguments: Callable) -> None:
    """The other one only loses its connection, and has nothing to say about it."""
    faults = [{"what": "raise", "step": 3, "rank": 1}]
    finished = train(*arguments("crashed"), ranks=2, variables={"INJECT": json.dumps(faults)}, entry=INJECTING)
    assert finished.returncode == 1
    said, torchrun = finished.stderr.split("megaspeech.train: ")[1:][0], finished.stderr.split("Failures:")[1]
    assert finished.stderr.count("megaspeech.train: ") == 1 and said.startswith("rank 1: Traceback")
    others, cause = torchrun.split("Root Cause")
    assert re.search(r"rank +: 1 ", cause) and "RuntimeError: injected: a matrix fell over" in cause
    assert cause.rstrip().splitlines()[-1].startswith("====")
    assert "gloo" not in finished.stderr and "closed by peer" not in finished.stderr
    assert "File " not in others  # at most: rank 1: RuntimeError('injected: a matrix fell over')


def test_a_failed_rank_leaves_nobody_waiting(arguments: Callable) -> None:
    """NCCL's groups are left when all that was sent has arrived: never, where others wait for the rank that fails."""
    faults = [{"what": "raise", "step": 2}, {"what": "stay", "step": 99}]
    variables = {"INJECT": json.dumps(faults)}
    finished = train(*arguments("stayed"), ranks=1, variables=variables, entry=INJECTING)
    assert finished.returncode == 1 and "injected: a matrix fell over" in finished.stderr


def test_wrong_key_is_named_last(arguments: Callable) -> None:
    finished = train(*arguments("typo"), "training.train_step=5", ranks=2)
    cause = finished.stderr.split("Root Cause")[1]
    assert "training.train_step: no such key; did you mean 'train_steps'?" in cause
    assert re.search(r"rank +: 0 ", cause) and "exitcode  : 2 " in cause


def test_records_on_a_full_disk(tmp_path: Path) -> None:
    """Said once; the file holds whole lines only, and goes on when there is room again."""
    said: list[str] = []
    full = tmp_path / "full.jsonl"
    full.symlink_to("/dev/full")
    records = RecordFile(full, step=0, complain=said.append)
    records.add({"step": 1})
    records.add({"step": 2})
    assert len(said) == 1 and "No space left on device" in said[0] and "training goes on" in said[0]


LIMITED = """
import resource, signal, sys
from pathlib import Path
from megaspeech.training.record_file import RecordFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40, resource.RLIM_INFINITY))
records = RecordFile(Path(sys.argv[1]), step=9, complain=print)
for step in (1, 2, 3):
    records.add({"step": step, "text": "x" * 10})
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
records.add({"step": 4})
"""


def test_record_that_is_cut_short_leaves_no_half_line(tmp_path: Path) -> None:
    """A file that may grow to 40 bytes has no room for half of the second record."""
    path = tmp_path / "metrics.jsonl"
    shown = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, check=True)
    assert shown.stdout.count("cannot be written") == 1
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 4]


def test_later_records_and_half_lines_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2}\n{"step": 3}\n{"st')
    RecordFile(path, step=2, complain=print)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2}\n'
    path.write_text('{"step": 1}\n{"st')
    RecordFile(path, step=2, complain=print)
    assert path.read_text() == '{"step": 1}\n'


WITHOUT_TENSORBOARD = """
import resource, signal, sys
from pathlib import Path
from megaspeech.config import read_config
from megaspeech.training.journal import Journal
from megaspeech.training.metrics import StreamMetrics
config = read_config(sys.argv[1], [f"run.directory={sys.argv[2]}", "logging.tensorboard=true"])
Path(sys.argv[2]).mkdir()
journal = Journal(config, is_main=True, frame_rate=12.5)
journal.resume(0)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
for step in range(1, 200):
    metrics = StreamMetrics(1.0, 1.0, 1.0, {}, {}, num_frames=8, padding=0.0)
    journal.step(step, metrics, grad_norm=1.0, learning_rate=1.0, seconds=1.0)
journal.close()
print("trained")
"""


def test_journal_goes_on_without_its_files(arguments: Callable, tmp_path: Path) -> None:
    config, *_ = arguments("full")
    code = [sys.executable, "-c", WITHOUT_TENSORBOARD, str(config), str(tmp_path / "run")]
    shown = subprocess.run(code, capture_output=True, text=True, env=environment(), timeout=120)
    assert shown.returncode == 0 and shown.stdout.endswith("trained\n"), shown.stderr
    assert shown.stdout.count("TensorBoard's events cannot be written") == 1
    assert shown.stdout.count("metrics.jsonl cannot be written") == 1
