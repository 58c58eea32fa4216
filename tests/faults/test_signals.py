"""Signals that ask a run to stop: a checkpoint, an exit status that requeues, and the run goes on as if nothing was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import STEPS, course
from launching import TIMEOUT, command, curve, environment, start_as_srun, wait_until

REQUEUE = 75
ROOT = Path(__file__).parents[2]
INJECTING = (str(Path(__file__).parent / "injecting.py"),)


def _records(run: Path) -> int:
    return len(curve(run)) if (run / "metrics.jsonl").is_file() else 0


def _latest(run: Path) -> int:
    return int((run / "checkpoints" / "latest").read_text().strip().removeprefix("step_"))


def _end(processes: list[subprocess.Popen]) -> list[int]:
    return [process.wait(TIMEOUT) for process in processes]


def test_run_that_is_stopped_in_every_way_goes_on(
    arguments: Callable, run_directory: Callable, reference: list[tuple], tmp_path: Path
) -> None:
    run, log = run_directory("stopped"), tmp_path / "log"
    every_rank = start_as_srun(*arguments("stopped"), ranks=2, log=log)
    wait_until(lambda: _records(run) >= 3, process=every_rank[0])
    for process in every_rank:
        process.send_signal(signal.SIGUSR1)
    assert _end(every_rank) == [REQUEUE, REQUEUE], log.read_text()
    assert _latest(run) == _records(run) < STEPS and "stopped by a signal" in log.read_text()

    before = _records(run)
    one_rank = start_as_srun(*arguments("stopped"), ranks=2, log=log)
    wait_until(lambda: _records(run) >= before + 3, process=one_rank[0])
    one_rank[1].send_signal(signal.SIGUSR1)
    assert _end(one_rank) == [REQUEUE, REQUEUE], log.read_text()
    assert before + 3 <= _latest(run) == _records(run) < STEPS

    before = _records(run)
    with subprocess.Popen(command(*arguments("stopped"), ranks=2), env=environment(), stdout=-3, stderr=-3) as torchrun:
        wait_until(lambda: _records(run) >= before + 3, process=torchrun)
        torchrun.terminate()
        torchrun.wait(30)  # torchrun's own patience with its ranks
    assert before + 3 <= _latest(run) == _records(run) < STEPS
    assert not list((run / "checkpoints").glob("*.part"))

    last = start_as_srun(*arguments("stopped"), ranks=2, log=log)
    assert _end(last) == [0, 0], log.read_text()
    assert course(run) == reference


@pytest.mark.parametrize("moment", ["evaluate", "save"])
def test_signal_while_the_loop_is_busy_otherwise(
    arguments: Callable, run_directory: Callable, tmp_path: Path, moment: str
) -> None:
    """In the middle of a validation or of a save, and another while the save that it asked for runs."""
    run, log = run_directory(moment), tmp_path / "log"
    os.environ["INJECT"] = json.dumps([{"what": "signal", "during": moment}, {"what": "signal", "during": "save"}])
    try:
        overrides = ("training.eval_interval=5", "checkpoint.save_interval=5")
        (process,) = start_as_srun(*arguments(moment), *overrides, ranks=1, log=log, entry=INJECTING)
    finally:
        del os.environ["INJECT"]
    assert process.wait(TIMEOUT) == REQUEUE, log.read_text()
    assert _latest(run) == _records(run) == 5
    assert log.read_text().count("saved ") == 1


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signal_before_the_first_step(arguments: Callable, tmp_path: Path, number: signal.Signals) -> None:
    (process,) = start_as_srun(*arguments("early"), ranks=1, log=tmp_path / "log")
    wait_until(lambda: _catches(process.pid, number), process=process)
    process.send_signal(number)
    assert process.wait(5) == REQUEUE


def _catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler of its own for the signal (proc(5): SigCgt)."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(fields["SigCgt"], 16) >> (number - 1) & 1)


def test_signal_after_the_end(arguments: Callable) -> None:
    """While Python ends it would kill, and a run that is done would seem to have failed."""
    code = (
        "import signal, sys; from megaspeech.train import main; status = main(sys.argv[1:]); "
        "print(status, *(signal.getsignal(each).name for each in (signal.SIGUSR1, signal.SIGTERM)))"
    )
    config, *overrides = map(str, arguments("ended"))
    ended = [sys.executable, "-c", code, config, *overrides, "training.exit_step=1"]
    shown = subprocess.run(ended, env=environment(), capture_output=True, text=True, timeout=TIMEOUT)
    assert shown.stdout.splitlines()[-1] == "0 SIG_IGN SIG_IGN", shown.stderr


@pytest.mark.parametrize(
    "variables, rank",
    [
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "MASTER_ADDR": "node1"}, "3 8 1"),
        ({"SLURM_PROCID": "3", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "MASTER_ADDR": "node1"}, "5 8 0"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, "None None None"),  # the batch script itself
    ],
)
def test_ranks_read_slurm_where_torchrun_is_missing(variables: dict[str, str], rank: str) -> None:
    code = (
        "import os; from megaspeech.parallel.launch import take_variables_from_slurm as take; take(); "
        "print(*map(os.environ.get, ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')))"
    )
    shown = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == rank
