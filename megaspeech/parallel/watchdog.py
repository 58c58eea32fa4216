"""Names the rank that hangs, with its stack, instead of a silent stall.

The loop reports progress. When a rank's watchdog has seen none for the timeout, it asks all ranks, through a store
connection of its own, where their main threads are. Those inside a collective wait; the one that is elsewhere, or does
not answer, hangs. One rank says so, and all end with `launch.REQUEUE`.

nvidia-resiliency-ext's ft_launcher would replace torchrun, and its monitors do not talk to each other: they kill a rank
that is late, but cannot say which one the others wait for, nor where it is.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import sys
import threading
import time
from datetime import datetime, timedelta
from pathlib import Path
from textwrap import indent

import torch.distributed as dist

from megaspeech.parallel.launch import REQUEUE, tell_torchrun
from megaspeech.parallel.stacks import Answer, describe_hang, main_thread_place

LONGEST_PAUSE = 5.0
"""Seconds between two looks; shorter where the timeout is short."""
SECONDS_TO_ANSWER = 3.0
"""Beyond a pause, until which a rank that was asked has answered."""
KEY = "megaspeech/hang"


def collective_timeout(timeout: float) -> float:
    """Seconds after which a collective may give up: when a watchdog of `timeout` has named the rank that hangs."""
    return 2 * timeout + 60


class Watchdog:
    """Watches this rank inside a `with` block; process groups are up.

    Args:
        directory: of the run; the report is written to `hang.txt` there.
        timeout: seconds without progress.
    """

    def __init__(self, *, directory: str | Path, timeout: float) -> None:
        self.directory, self.timeout = Path(directory), timeout
        self.pause = min(LONGEST_PAUSE, timeout / 10)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._name = f"rank {self.rank} on {socket.gethostname()}, pid {os.getpid()}"
        self._store = dist.distributed_c10d._get_default_store().clone()
        self._phase, self._microbatch, self._reports = "start", 0, 0
        self._last = time.monotonic()
        self._stopped = threading.Event()

    def progress(self, phase: str | None = None) -> None:
        """The loop has come to `phase`; None for the next microbatch of the phase it is in."""
        self._phase, self._microbatch = (phase, 0) if phase else (self._phase, self._microbatch + 1)
        self._reports += 1
        self._last = time.monotonic()

    def __enter__(self) -> Watchdog:
        for target in (self._watch, self._end_without_store):
            threading.Thread(target=target, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    def _stalled_for(self) -> float:
        return time.monotonic() - self._last

    def _where(self) -> str:
        return self._phase + (f", microbatch {self._microbatch}" if self._microbatch else "")

    def _watch(self) -> None:
        is_over = False
        while not is_over:
            try:
                is_asked = self._is_asked()
            except RuntimeError:  # the rank, or the torchrun, that kept the store has ended: then so will this rank
                is_asked = False
            if is_asked:
                try:
                    self._take_part()
                finally:
                    os._exit(REQUEUE)
            is_over = self._stopped.wait(self.pause)

    def _is_asked(self) -> bool:
        """Leave word where this rank is, and ask if it has stalled; whether all are asked."""
        self._store.set(f"{KEY}/seen/{self.rank}", f"{self._where()} ({self._name})")
        if self._stalled_for() > self.timeout:
            self._store.set(f"{KEY}/asked", "")
        return self._store.check([f"{KEY}/asked"])

    def _take_part(self) -> None:
        """Answer; on the first rank that comes here report, on the others hand torchrun what that one says."""
        answer = Answer(self._name, self._where(), self._reports, self._stalled_for(), main_thread_place())
        self._store.set(f"{KEY}/answer/{self.rank}", pickle.dumps(answer))
        if self._store.add(f"{KEY}/reporter", 1) > 1:
            self._store.wait([f"{KEY}/report"], timedelta(seconds=2 * (self.pause + SECONDS_TO_ANSWER)))
            tell_torchrun(self._store.get(f"{KEY}/report").decode(), is_consequence=True)
            return
        answers = self._collect()
        seen = {rank: self._seen(rank) for rank in range(self.world_size) if rank not in answers}
        text = describe_hang(answers, seen)
        self._say(text)
        self._store.set(f"{KEY}/report", text.splitlines()[0])

    def _collect(self) -> dict[int, Answer]:
        """The answers that come in time, by rank."""
        answers: dict[int, Answer] = {}
        deadline = time.monotonic() + self.pause + SECONDS_TO_ANSWER
        while len(answers) < self.world_size and time.monotonic() < deadline:
            for rank in set(range(self.world_size)) - answers.keys():
                if self._store.check([f"{KEY}/answer/{rank}"]):
                    answers[rank] = pickle.loads(self._store.get(f"{KEY}/answer/{rank}"))
            time.sleep(0.1)
        return answers

    def _seen(self, rank: int) -> str:
        key = f"{KEY}/seen/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else "start"

    def _say(self, text: str) -> None:
        text = f"the run hangs: no progress for {self.timeout:.0f} s (training.hang_timeout)\n{text}"
        print(f"megaspeech.train: {text}", file=sys.stderr, flush=True)
        tell_torchrun(text)
        with contextlib.suppress(OSError), (self.directory / "hang.txt").open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {text}\n\n")

    def _end_without_store(self) -> None:
        """Without torchrun rank 0 keeps the store; when it is stopped, or its node gone, requests to it never return.

        One rank a node says so, they cannot agree on one.
        """
        patience = self.timeout + 3 * (self.pause + SECONDS_TO_ANSWER)
        while not self._stopped.wait(self.pause):
            if self._stalled_for() > patience:
                if self.rank == 1 or os.environ.get("LOCAL_RANK", "0") == "0":
                    keeper = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                    place = main_thread_place()
                    self._say(
                        f"rank 0, which keeps the store at {keeper}, does not answer: stopped, or its node is gone\n"
                        f"{self._name} is in {self._where()}, at {place.ours}\n{indent(place.stack, '    ')}"
                    )
                os._exit(REQUEUE)
