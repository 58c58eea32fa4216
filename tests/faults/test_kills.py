"""Twenty SIGKILLs, of one rank or of all, whenever: every step is there once, and the same bit for bit."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
from conftest import STEPS, course
from launching import TIMEOUT, command, environment, kill_family, wait_until

NUM_KILLS = 20
SECONDS_OF_START, SECONDS_OF_SAVE, SECONDS_OF_STEP = 4.0, 1.0, 0.05
"""A kill comes at a random moment of them."""
NEAR_THE_END = STEPS - 8
"""From that step on only starts are killed, so that there is a run left for the last kill."""


class Storm:
    """Kills the ranks of a running torchrun, start after start."""

    def __init__(self, torchrun: subprocess.Popen, *, run: Path, seed: int) -> None:
        self.torchrun, self.run, self.random = torchrun, run, np.random.default_rng(seed)
        self.killed: list[int] = []

    def strike(self) -> str:
        """Wait for the next start, and for a moment of it, and kill; "start", "step" or "save"."""
        wait_until(lambda: len(self._new_ranks()) == 2, process=self.torchrun)
        ranks = self._new_ranks()
        kind = str(self.random.choice(["start", "step", "save"])) if self._num_records() < NEAR_THE_END else "start"
        {"start": self._await_start, "step": self._await_steps, "save": self._await_save}[kind]()
        victims = ranks if self.random.random() < 0.5 else [ranks[self.random.integers(2)]]
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):  # the first one's end may have ended it
                victim.kill()
        self.killed += [rank.pid for rank in ranks]
        return kind

    def _new_ranks(self) -> list[psutil.Process]:
        children = psutil.Process(self.torchrun.pid).children()
        return [child for child in children if child.pid not in self.killed]

    def _await_start(self) -> None:
        time.sleep(self.random.uniform(0, SECONDS_OF_START))

    def _await_steps(self) -> None:
        """So many records more than there were at any time since."""
        wanted, grown, last = int(self.random.integers(1, 8)), 0, self._num_records()

        def has_grown() -> bool:
            nonlocal grown, last
            now = self._num_records()
            grown, last = grown + max(0, now - last), now
            return grown >= wanted

        wait_until(has_grown, process=self.torchrun)
        time.sleep(self.random.uniform(0, SECONDS_OF_STEP))

    def _await_save(self) -> None:
        began = time.time()
        wait_until(lambda: any(_age(path) > began for path in self._unfinished()), process=self.torchrun)
        time.sleep(self.random.uniform(0, SECONDS_OF_SAVE))

    def _unfinished(self) -> list[Path]:
        return list((self.run / "checkpoints").glob("step_*.part"))

    def _num_records(self) -> int:
        metrics = self.run / "metrics.jsonl"
        return metrics.read_bytes().count(b'"train"') if metrics.is_file() else 0


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # renamed meanwhile
        return 0.0


def test_storm_of_kills(arguments: Callable, run_directory: Callable, reference: list[tuple], tmp_path: Path) -> None:
    log, run = tmp_path / "log", run_directory("storm")
    storm_command = command(*arguments("storm"), "checkpoint.save_interval=2", ranks=2, max_restarts=NUM_KILLS)
    with (
        log.open("w") as output,
        subprocess.Popen(storm_command, env=environment(), stdout=output, stderr=output) as torchrun,
    ):
        try:
            storm = Storm(torchrun, run=run, seed=1)
            kinds = Counter(storm.strike() for _ in range(NUM_KILLS))
            assert torchrun.wait(TIMEOUT) == 0, log.read_text()[-5000:]
        finally:
            if torchrun.poll() is None:
                kill_family(torchrun)
    assert min(kinds[kind] for kind in ("start", "step", "save")) >= 3, kinds
    assert course(run) == reference
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step_{STEPS:08d}"
