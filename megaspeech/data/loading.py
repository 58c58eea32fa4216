"""Batches of step after step, loaded ahead by worker processes that may die without anything being lost.

A batch is a function of its step, so worker w of n loads steps w, w + n, w + 2n ... and has a pipe of its own. It waits
while its pipe is full: it is about one batch ahead. When it dies, in the middle of a message too, the kernel closes the
pipe, and the rank learns of it where it wants the batch. torch's DataLoader learns of it from a signal and raises
wherever the rank happens to be, inside a collective too, and its workers share one queue, whose lock dies with the one
that holds it. Workers are forked: they share the memory of the shards' indexes, and start in milliseconds.
"""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from megaspeech.data.batch import Batch

MAX_DEATHS = 3
"""Workers that may die in a row, without a batch between them, before the run stops."""
SECONDS_TO_END = 5.0

Load = Callable[[int], list[Batch]]


@dataclass(frozen=True)
class StepBatches:
    """The batches of `steps`, in order. Iterating starts the workers, and they end with the iterator.

    Args:
        load: the microbatches of a step, a function of the step alone, for example `TrainBatches`.
        steps: from the one that is wanted first.
        num_workers: processes that load ahead; with 0 the step itself loads.
        pin_memory: put batches where a GPU copies from by itself.
        on_start: called first in every worker: what makes it end with its parent, kill -9 included.
        say: takes a line for the human at the console.

    Iterating raises what `load` raised: a ValueError as it is, anything else as a RuntimeError with its traceback; and
    a ValueError when `MAX_DEATHS` workers in a row died.
    """

    load: Load
    steps: range
    num_workers: int
    pin_memory: bool = False
    on_start: Callable[[], None] | None = None
    say: Callable[[str], None] = print

    def __iter__(self) -> Iterator[list[Batch]]:
        for batches in self._loaded_ahead() if self.num_workers else map(self.load, self.steps):
            yield [batch.pin_memory() for batch in batches] if self.pin_memory else batches

    def _loaded_ahead(self) -> Iterator[list[Batch]]:
        steps, deaths = self.steps, 0
        while steps:
            with _workers(self.load, steps=steps, count=self.num_workers, on_start=self.on_start) as workers:
                for worker in itertools.cycle(workers):
                    try:
                        batches = worker.receive(steps[0])
                    except _WorkerDied as death:
                        deaths += 1
                        self._complain(death, deaths=deaths)
                        break
                    steps, deaths = steps[1:], 0
                    yield batches
                    if not steps:
                        break

    def _complain(self, death: _WorkerDied, *, deaths: int) -> None:
        if deaths == MAX_DEATHS:
            raise ValueError(
                f"data.num_workers = {self.num_workers}: {death}, and {MAX_DEATHS} in a row died without a batch "
                f"between them; if the machine's memory is full, use fewer workers (0 loads without any)"
            ) from death
        self.say(f"{death}; workers are started anew from this step, nothing is lost")


class _WorkerDied(Exception):
    """Says which worker, and of what."""


@dataclass(frozen=True)
class _Worker:
    process: multiprocessing.process.BaseProcess
    pipe: Connection

    def receive(self, step: int) -> list[Batch]:
        """The batches of `step`, which must be the next that this worker loads."""
        try:
            message = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):  # nothing, or half a message, before the end of the pipe
            raise _WorkerDied(f"{self._describe_end()} while it loaded step {step}") from None
        if isinstance(message, Exception):
            raise message
        return [_batch(parts) for parts in message]

    def end(self) -> None:
        """At once: it holds nothing that is not on disk."""
        self.process.kill()
        self.process.join(SECONDS_TO_END)  # one that hangs in the file system cannot be killed; it ends with its read
        self.pipe.close()

    def _describe_end(self) -> str:
        self.process.join(SECONDS_TO_END)
        code = self.process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with status {code}"
        return f"{self.process.name} (pid {self.process.pid}) {how}"


@contextmanager
def _workers(load: Load, *, steps: range, count: int, on_start: Callable[[], None] | None) -> Iterator[list[_Worker]]:
    """`count` workers that deal `steps` out among themselves."""
    processes, workers = multiprocessing.get_context("fork"), []
    try:
        for place in range(count):
            receiver, sender = processes.Pipe(duplex=False)
            process = processes.Process(
                target=_send_batches,
                args=(load, steps[place::count]),
                kwargs={"pipe": sender, "far_end": receiver, "on_start": on_start},
                name=f"data worker {place} of {count}",
                daemon=True,
            )
            process.start()
            sender.close()  # before the next fork: the pipe ends when its worker does, if nobody else can write to it
            workers.append(_Worker(process, receiver))
        yield workers
    finally:
        for worker in workers:
            worker.end()


def _send_batches(
    load: Load, steps: range, *, pipe: Connection, far_end: Connection, on_start: Callable[[], None] | None
) -> None:
    """What a worker does, until it has sent all, or is killed, or nobody holds the far end of its pipe any more."""
    far_end.close()
    # These go to every process of a job; what they mean to the run is for the rank to decide.
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if on_start is not None:
        on_start()
    for step in steps:
        try:
            message = [_parts(batch) for batch in load(step)]
        except ValueError as error:
            message = ValueError(str(error))
        except Exception:
            message = RuntimeError(f"the batches of step {step} could not be loaded:\n{traceback.format_exc()}")
        try:
            pipe.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
        except BrokenPipeError:  # the rank is gone
            return
        if isinstance(message, Exception):
            return


def _parts(batch: Batch) -> dict[str, Any]:
    """numpy's arrays go through the pipe itself; torch's tensors would need space in /dev/shm. Tokens need no 64 bits
    on the way, which takes longer than making them so."""
    parts = {name: value.numpy() if torch.is_tensor(value) else value for name, value in vars(batch).items()}
    return {**parts, "codes_BST": parts["codes_BST"].astype(np.int32)}


def _batch(parts: dict[str, Any]) -> Batch:
    parts = {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in parts.items()}
    return Batch(**{**parts, "codes_BST": parts["codes_BST"].long()})
