"""Configs and whole models on one rank, for tests that look inside a model in this very process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megaspeech.config import Config, read_config


def make_config(directory: Path, *overrides: str, preset: str = "tiny") -> Config:
    """The resolved config of a preset and `section.field=value` overrides."""
    path = directory / "config.toml"
    path.write_text(f'[model]\npreset = "{preset}"\n')
    return read_config(path, overrides)


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """Process groups of one rank, taken down again with everything the host replaced."""
    from megaspeech.config.computation import ParallelSection
    from megaspeech.parallel import groups

    groups.initialise(ParallelSection(), seed=1)
    yield
    groups.shut_down()
