"""One run after another in the processes of one launch, as those do who compare runs, and what each left behind."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

from megaspeech.checkpoint.folders import folder_of
from megaspeech.config import Config
from megaspeech.parallel import groups
from megaspeech.parallel.groups import Grid
from megaspeech.parallel.watchdog import Watchdog, collective_timeout
from megaspeech.training.signals import StopSignals
from megaspeech.training.trainer import Trainer

QUIET = (
    *("training.exit_step=0", "training.eval_interval=0", "checkpoint.save_interval=0"),
    *("logging.tensorboard=false", "logging.sample_interval=0"),
)
"""Settings of a run that leaves no files but its records and its last checkpoint."""


@contextlib.contextmanager
def trainer_of(config: Config, *, grid: Grid) -> Iterator[Trainer]:
    """The trainer of a run that no signal stops, watched, and let go of in the end."""
    with Watchdog(directory=config.run.directory, timeout=config.training.hang_timeout) as watchdog:
        trainer = Trainer(config, grid=grid, signals=StopSignals(), watchdog=watchdog)
        yield trainer
        trainer.wrapped.release()


def train_here(config: Config) -> None:
    """Train a run to its end without a word, and leave these processes ready for the next one.

    The process group of all ranks is up (`parallel.groups.join`), its grid is not; all ranks call this.
    """
    timeout = collective_timeout(config.training.hang_timeout)
    grid = groups.build_grid(config.parallel, seed=config.run.seed, timeout=timeout)
    with contextlib.redirect_stdout(io.StringIO()), trainer_of(config, grid=grid) as trainer:
        trainer.run()
    del trainer
    groups.remove_grid()


def seed_checkpoint(directory: Path) -> Path:
    """The untrained weights of a run in `directory` with `checkpoint.save_seed`."""
    return directory / "checkpoints" / folder_of(0)


def curve(directory: Path) -> list[dict]:
    """The training records of a run, in the order they were written."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]
