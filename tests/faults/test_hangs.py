"""A rank that hangs is named, with where it hangs, within the timeout; all ranks end and ask to be started again."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import TIMEOUT, curve, start_as_srun, train, wait_until

from megaspeech.parallel.stacks import Answer, Place, describe_hang

REQUEUE = 75
INJECTING = (str(Path(__file__).parent / "injecting.py"),)
HANG_TIMEOUT, SLACK = 8, 8  # seconds


def test_rank_that_hangs_in_its_forward_step(arguments: Callable, run_directory: Callable) -> None:
    faults = [{"what": "sleep", "step": 6, "rank": 1}]
    finished = train(
        *arguments("hang"),
        f"training.hang_timeout={HANG_TIMEOUT}",
        ranks=2,
        variables={"INJECT": json.dumps(faults)},
        entry=INJECTING,
    )
    assert finished.returncode != 0 and finished.stderr.count("megaspeech.train: ") == 1
    report = finished.stderr.split("megaspeech.train: ")[1]
    assert report.startswith(f"the run hangs: no progress for {HANG_TIMEOUT} s (training.hang_timeout)\n")
    seconds = re.search(r"\nrank 1 on \S+, pid \d+ hangs in step 6, microbatch 1 for (\d+) s, at ", report)
    assert HANG_TIMEOUT - 1 <= int(seconds[1]) <= HANG_TIMEOUT + SLACK
    assert re.search(r"injecting.py:\d+ faulty: time.sleep\(3600\)", report)
    assert re.search(r"\nrank 0 waits in step 6, microbatch 2 at megaspeech/\S+:\d+ ", report)
    assert re.search(r"\n +torch/distributed/\S+:\d+ ", report)
    assert "the run hangs" in finished.stderr.split("Root Cause")[1]  # torchrun's last block
    assert f"exitcode  : {REQUEUE}" in finished.stderr
    assert "rank 1 on" in (run_directory("hang") / "hang.txt").read_text()


@pytest.mark.parametrize("stopped", [0, 1])
def test_rank_that_is_stopped(arguments: Callable, run_directory: Callable, tmp_path: Path, stopped: int) -> None:
    """By SIGSTOP. Without torchrun rank 0 keeps the store that the others would ask for it."""
    run, log = run_directory(f"halted-{stopped}"), tmp_path / "log"
    overrides = f"training.hang_timeout={HANG_TIMEOUT}"
    processes = start_as_srun(*arguments(f"halted-{stopped}"), overrides, ranks=2, log=log)
    metrics = run / "metrics.jsonl"
    wait_until(lambda: metrics.is_file() and len(curve(run)) >= 3, process=processes[0])
    processes[stopped].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    try:
        assert processes[1 - stopped].wait(TIMEOUT) == REQUEUE, log.read_text()
    finally:
        os.kill(processes[stopped].pid, signal.SIGKILL)
        processes[stopped].wait()
    assert HANG_TIMEOUT <= time.monotonic() - began <= HANG_TIMEOUT + 2 * SLACK
    report = log.read_text().split("megaspeech.train: ")[1]
    assert re.search(rf"\nrank {stopped}\b.* does not answer: stopped, ", report)
    if stopped:
        # Its last word, which may be some steps old: it leaves one every tenth of the timeout.
        seen = re.search(
            rf"last seen at (start|loading|step (\d+)\b.*) \(rank 1 on \S+, pid {processes[1].pid}\)", report
        )
        assert seen, report
        assert int(seen[2] or 0) <= len(curve(run)) + 1
        assert "rank 0 waits" in report
    assert re.search(r"\n +torch/distributed/\S+:\d+ ", report)
    assert report.strip() in (run / "hang.txt").read_text()


def _answer(rank: int, *, waits: bool, reports: int = 9) -> Answer:
    place = Place(site="site", ours=f"ours {waits}", stack="stack", waits=waits)
    return Answer(f"rank {rank} on node", "step 3", reports, 10.0, place)


def test_who_is_named() -> None:
    waiting = {rank: _answer(rank, waits=True) for rank in range(4)}
    assert describe_hang(waiting, {}).startswith("no rank stands out")
    report = describe_hang({**waiting, 2: _answer(2, waits=False)}, {})
    assert report.startswith("rank 2 on node hangs in step 3 for 10 s, at ours False\n    stack\n")
    assert "rank 0, 1, 3 waits in step 3 at ours True" in report
    # All wait, as for a GPU: the one that others are ahead of.
    assert describe_hang({**waiting, 1: _answer(1, waits=True, reports=8)}, {}).startswith("rank 1 on node hangs")
    # One that does not answer is the cause, whatever the others are doing.
    del waiting[3]
    report = describe_hang({**waiting, 2: _answer(2, waits=False)}, {3: "step 2 (rank 3 on node)"})
    assert report.startswith("rank 3 does not answer") and "hangs" not in report
