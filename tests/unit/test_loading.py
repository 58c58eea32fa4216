"""Batches loaded ahead by real worker processes: the same ones, in order, whatever happens to the workers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest
import torch
from one_rank import make_config

from megaspeech.data.batch import Batch
from megaspeech.data.loading import Load, StepBatches
from megaspeech.data.mixture import TrainBatches
from megaspeech.data.synthetic import write_synthetic_shards

DEADLINE = 20.0  # seconds
LARGE = 40_000  # tokens: more than a pipe holds, so that a worker waits with its batch


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "the deadline has passed"
        time.sleep(0.01)


def numbered(step: int) -> list[Batch]:
    """Two microbatches, different at every step, with a rejected sample in one."""
    codes = torch.arange(LARGE).reshape(1, 1, -1) + step
    return [Batch(codes, codes.float()), Batch(codes + 1, codes.float(), ((f"x:{step}", "torn"),))]


def dies_at(*steps: int, home: Path, by: int = signal.SIGKILL, times: int = 1) -> Load:
    """`numbered`, in a worker that is killed when it loads one of `steps`, each so many times."""

    def load(step: int) -> list[Batch]:
        for turn in range(times if step in steps else 0):
            mark = home / f"died_{step}_{turn}"
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), by)
        return numbered(step)

    return load


def assert_all_in_order(batches: list[list[Batch]], steps: range) -> None:
    assert len(batches) == len(steps)
    for step, got in zip(steps, batches, strict=True):
        for one, other in zip(got, numbered(step), strict=True):
            assert torch.equal(one.codes_BST, other.codes_BST) and torch.equal(one.weights_BPT, other.weights_BPT)
            assert one.rejected == other.rejected and one.codes_BST.dtype is other.codes_BST.dtype
            one.codes_BST.add_(1)  # it may be written to, as any other tensor


@pytest.fixture(autouse=True)
def no_worker_left():
    yield
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3, 9])
def test_batches_come_in_order(num_workers: int) -> None:
    steps = range(5, 12)
    assert_all_in_order(list(StepBatches(numbered, steps=steps, num_workers=num_workers)), steps)
    assert list(StepBatches(numbered, steps=range(3, 3), num_workers=num_workers)) == []


def test_batches_of_shards_are_the_same_with_workers(tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        f"data.directory={tmp_path}",
        "data.mixture={asr-en = 1.0, tts-en = 3.0}",
        "data.codebook_dropout=0.5",
        "loss.silence_fraction=0.5",
    )
    write_synthetic_shards(tmp_path, streams=config.streams)
    load = TrainBatches(config, dp_rank=1, dp_size=2)
    alone, ahead = (list(StepBatches(load, steps=range(2, 14), num_workers=count)) for count in (0, 2))
    for mine, theirs in zip(alone, ahead, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert torch.equal(one.codes_BST, other.codes_BST) and torch.equal(one.weights_BPT, other.weights_BPT)


def test_workers_load_ahead(tmp_path: Path) -> None:
    """While the first batch is in use, others are being made."""

    def load(step: int) -> list[Batch]:
        (tmp_path / f"{step}").touch()
        return numbered(step)

    batches = iter(StepBatches(load, steps=range(100), num_workers=2))
    next(batches)
    wait_for(lambda: (tmp_path / "1").exists() and (tmp_path / "2").exists())
    assert not (tmp_path / "9").exists()  # but not without end
    batches.close()


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_worker_that_dies_is_named_and_nothing_is_lost(tmp_path: Path, by: signal.Signals) -> None:
    said: list[str] = []
    load, steps = dies_at(7, home=tmp_path, by=by), range(3, 12)
    assert_all_in_order(list(StepBatches(load, steps=steps, num_workers=2, say=said.append)), steps)
    (line,) = said
    assert line.startswith("data worker 0 of 2 (pid ") and f"was killed by {by.name} while it loaded step 7" in line


def test_worker_that_dies_in_the_middle_of_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Connection.send_bytes

    def half(self: Connection, content: bytes) -> None:
        if not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.write(self.fileno(), struct.pack("!i", len(content)) + content[:1000])
            os.kill(os.getpid(), signal.SIGKILL)
        whole(self, content)

    monkeypatch.setattr(Connection, "send_bytes", half)
    said: list[str] = []
    assert_all_in_order(list(StepBatches(numbered, steps=range(4), num_workers=2, say=said.append)), range(4))
    assert len(said) == 1 and "SIGKILL while it loaded step" in said[0]


def test_workers_that_were_killed_while_they_waited() -> None:
    said: list[str] = []
    batches = iter(StepBatches(numbered, steps=range(8), num_workers=2, say=said.append))
    got = [next(batches)]
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()
    assert_all_in_order(got + list(batches), range(8))
    assert len(said) == 1


def test_three_deaths_in_a_row_end_the_run(tmp_path: Path) -> None:
    said: list[str] = []
    load = dies_at(3, home=tmp_path, times=9)
    batches = iter(StepBatches(load, steps=range(10), num_workers=2, say=said.append))
    assert_all_in_order([next(batches) for _ in range(3)], range(3))
    with pytest.raises(ValueError, match=r"^data\.num_workers = 2: data worker . of 2 .* step 3, and 3 in a row died"):
        next(batches)
    assert len(said) == 2


def test_deaths_with_batches_between_them_do_not_add_up(tmp_path: Path) -> None:
    said: list[str] = []
    load = dies_at(1, 2, 3, 4, home=tmp_path, times=2)
    assert_all_in_order(list(StepBatches(load, steps=range(6), num_workers=1, say=said.append)), range(6))
    assert len(said) == 8


def fails(error: Exception) -> Load:
    def load(step: int) -> list[Batch]:
        if step == 2:
            raise error
        return numbered(step)

    return load


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_a_user_can_mend_arrives_as_it_is(num_workers: int) -> None:
    batches = iter(StepBatches(fails(ValueError("shard x is torn; mend it")), steps=range(9), num_workers=num_workers))
    assert_all_in_order([next(batches), next(batches)], range(2))
    with pytest.raises(ValueError) as caught:
        next(batches)
    assert str(caught.value) == "shard x is torn; mend it"


def test_what_is_our_fault_arrives_with_its_traceback() -> None:
    batches = StepBatches(fails(KeyError("lost")), steps=range(9), num_workers=2)
    with pytest.raises(RuntimeError, match=r"(?s)of step 2 could not be loaded:.*raise error.*KeyError: 'lost'"):
        list(batches)


def test_signals_to_the_whole_job_do_not_concern_workers() -> None:
    said: list[str] = []
    batches = iter(StepBatches(numbered, steps=range(9), num_workers=2, say=said.append))
    got = [next(batches), next(batches)]  # both have come up
    for worker in multiprocessing.active_children():
        for number in (signal.SIGUSR1, signal.SIGINT):
            os.kill(worker.pid, number)
    assert_all_in_order(got + list(batches), range(9))
    assert said == []


@pytest.mark.parametrize("rank_raises", [False, True])
def test_workers_end_with_the_iterator(rank_raises: bool) -> None:
    def rank() -> None:
        batches = iter(StepBatches(numbered, steps=range(1000), num_workers=3))
        next(batches)
        assert len(multiprocessing.active_children()) == 3
        if rank_raises:
            raise InterruptedError

    started = time.monotonic()
    try:
        rank()
    except InterruptedError:
        assert rank_raises
    wait_for(lambda: not multiprocessing.active_children())
    assert time.monotonic() - started < DEADLINE


RANK = """
import sys, torch
from megaspeech.data.loading import StepBatches
from megaspeech.data.batch import Batch
from megaspeech.parallel.lifeline import end_with_parent

def load(step):
    while step == 2 and {hangs}:
        pass
    codes = torch.zeros(1, 1, {large}, dtype=torch.int64)
    return [Batch(codes, codes)]

batches = iter(StepBatches(load, steps=range(1000), num_workers=2, on_start={on_start}))
next(batches)
import multiprocessing
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("on_start, hangs", [("end_with_parent", True), ("None", False)])
def test_workers_end_with_a_rank_that_is_killed(on_start: str, hangs: bool) -> None:
    """By the kernel, in the middle of anything; or, where only Linux can do that, by the pipe that nobody reads."""
    code = RANK.format(on_start=on_start, hangs=hangs, large=LARGE)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as rank:
        pids = list(map(int, rank.stdout.readline().split()))
        workers = [psutil.Process(pid) for pid in pids]
        assert len(workers) == 2
        rank.kill()
        rank.wait()
        wait_for(lambda: not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers))
