"""The step that is measured: the trainer's own, with everything that training does in one."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from megaspeech.benchmarks.case import MOSHI, WARM_UP, Case
from megaspeech.benchmarks.parts import PartTimes
from megaspeech.benchmarks.peer import MoshiPeer
from megaspeech.config import Config
from megaspeech.data.batch import Batch
from megaspeech.data.loading import StepBatches
from megaspeech.data.mixture import TrainBatches
from megaspeech.parallel import groups
from megaspeech.training.one_run import trainer_of
from megaspeech.training.trainer import Trainer

Step = Callable[[list[Batch]], float]
"""One optimizer step over some microbatches; returns the loss, for which the host waits."""


@dataclass(frozen=True)
class Measured:
    """`seconds` of each timed step, `parts_ms` of each step that was taken apart, `losses` of every step in order.

    `peak_bytes` are allocated on the device at most, None on a CPU.
    """

    num_parameters: int
    seconds: list[float]
    parts_ms: list[dict[str, float]]
    losses: list[float]
    peak_bytes: int | None


@contextmanager
def training(config: Config) -> Iterator[Trainer]:
    """A trainer of the run alone in this process, up to its first step; process groups come and go with it."""
    grid = groups.initialise(config.parallel, seed=config.run.seed)
    try:
        with trainer_of(config, grid=grid) as trainer:
            trainer.journal.resume(0)
            yield trainer
            trainer.journal.close()
    finally:
        groups.shut_down()


def measure_case(case: Case, *, say: Callable[[str], None] = lambda _: None) -> Measured:
    """Build what the case asks for and measure it, in a process of its own on one device.

    `say` hears of every step.

    Raises:
        ValueError: the case cannot run here, and why.
    """
    with tempfile.TemporaryDirectory() as directory:
        config = case.prepare(Path(directory))
        say(f"{case.name}: building")
        if case.provider == MOSHI:
            return _measure_peer(case, config, say=say)
        with training(config) as trainer:
            return _measure_ours(case, trainer, say=say)


def _measure_ours(case: Case, trainer: Trainer, *, say: Callable[[str], None]) -> Measured:
    def step(batches: list[Batch]) -> float:
        metrics, _ = trainer.train_step(batches)
        trainer.step += 1
        if trainer.guarded.history.num_skipped:
            raise ValueError("the gradient was not finite and the step was skipped; lower optimizer.lr")
        return metrics.loss

    parameters = sum(parameter.numel() for model in trainer.wrapped.models for parameter in model.parameters())
    batches = _load(trainer.batches, case, device=trainer.wrapped.device)
    measured = _measure(case, step, batches, num_parameters=parameters, say=say)
    for own in batches[-case.steps_by_part :]:
        with PartTimes(trainer.wrapped) as parts:
            measured.losses.append(step(own))
        measured.parts_ms.append(parts.milliseconds())
        say(f"{case.name}: step by part")
    return measured


def _measure_peer(case: Case, config: Config, *, say: Callable[[str], None]) -> Measured:
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    peer = MoshiPeer(config, device=device)
    batches = _load(TrainBatches(config, dp_rank=0, dp_size=1), case, device=device)
    return _measure(case, peer.step, batches, num_parameters=peer.num_parameters, say=say)


def _load(load: Callable[[int], list[Batch]], case: Case, *, device: torch.device) -> list[list[Batch]]:
    """The batches of all steps, as training has them when a step begins: in pinned memory, where there is a GPU."""
    return list(StepBatches(load, steps=range(case.num_steps), num_workers=0, pin_memory=device.type != "cpu"))


def _measure(
    case: Case, step: Step, batches: list[list[Batch]], *, num_parameters: int, say: Callable[[str], None]
) -> Measured:
    """Warm up, then time `case.steps` steps whole; the batches beyond them are left."""
    losses, seconds = [], []
    for number, own in enumerate(batches[: WARM_UP + case.steps]):
        if number == WARM_UP:
            _reset_peak()
        start = _now()
        losses.append(step(own))
        if number >= WARM_UP:
            seconds.append(_now() - start)
        say(f"{case.name}: step {number + 1}")
    if not all(map(math.isfinite, losses)):
        raise ValueError(f"the loss was {losses[-1]} after {len(losses)} steps; lower optimizer.lr")
    return Measured(num_parameters, seconds, [], losses, _peak())


def _now() -> float:
    """Seconds, when the device has done what it was asked to."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return perf_counter()


def _reset_peak() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.reset_peak_memory_stats()


def _peak() -> int | None:
    return torch.accelerator.max_memory_allocated() if torch.accelerator.is_available() else None


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high
