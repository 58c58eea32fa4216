"""One small run on two data parallel ranks, uninterrupted: what every faulty one is held against."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from launching import curve, train, write_tiny_run

STEPS = 40
OF_THE_COURSE = ("loss", "text_loss", "audio_loss", "grad_norm", "learning_rate", "loss/text", "loss/codebook_3")
"""The keys of a record that time does not touch."""


@pytest.fixture(scope="session")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple]:
    """Config and overrides of a run by name."""
    home = tmp_path_factory.mktemp("faults")
    config = write_tiny_run(home)
    fixed = (f"data.directory={home}/shards", f"training.train_steps={STEPS}")
    return lambda run: (config, *fixed, f"run.directory={home}/{run}")


@pytest.fixture(scope="session")
def run_directory(arguments: Callable[[str], tuple]) -> Callable[[str], Path]:
    """Where a run of that name lives."""
    return lambda run: arguments(run)[0].parent / run


@pytest.fixture(scope="session")
def reference(arguments: Callable[[str], tuple], run_directory: Callable[[str], Path]) -> list[tuple]:
    """(step, losses, ...) of every step of the uninterrupted run."""
    finished = train(*arguments("reference"), ranks=2)
    assert finished.returncode == 0, finished.stderr
    return course(run_directory("reference"))


def course(run: Path) -> list[tuple]:
    """What is the same, bit for bit, in a run that was interrupted and in one that was not."""
    return [(record["step"], *(record[key] for key in OF_THE_COURSE)) for record in curve(run)]
