"""One run after another in the processes of one launch, as those do who compare runs, and what each left behind."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

from megaspeech.config import Config
from megaspeech.parallel import groups
from megaspeech.parallel.watchdog import Watchdog
from megaspeech.training.signals import StopSignals
from megaspeech.training.trainer import Trainer


def train_here(config: Config) -> None:
    """Train a run to its end without a word, and leave these processes ready for the next one.

    The process group of all ranks is up (`parallel.groups.join`), its grid is not; all ranks call this.
    """
    grid = groups.build_grid(config.parallel, seed=config.run.seed)
    watchdog = Watchdog(directory=config.run.directory, timeout=config.training.hang_timeout)
    with contextlib.redirect_stdout(io.StringIO()), watchdog:
        trainer = Trainer(config, grid=grid, signals=StopSignals(), watchdog=watchdog)
        trainer.run()
        trainer.wrapped.release()
        del trainer
    groups.remove_grid()


def seed_checkpoint(directory: Path) -> Path:
    """The untrained weights of a run in `directory` with `checkpoint.save_seed`."""
    return directory / "checkpoints" / f"step_{0:08d}"


def curve(directory: Path) -> list[dict]:
    """The training records of a run, in the order they were written."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]
