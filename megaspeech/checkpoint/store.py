"""Checkpoints on disk: written aside, renamed when whole, `latest` moved last, the oldest removed.

checkpoints/
  latest              the name of the newest checkpoint, or of an older one to go back to
  step_00000200/      megatron-core's torch_dist format, and config.toml, the resolved run
  step_00000400.part  being written, or left by a killed run: never read, and overwritten
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core import dist_checkpointing

from megaspeech.checkpoint.damage import CONFIG, find_damage
from megaspeech.config import Config, read_config, write_config

LATEST = "latest"
SHAPE_SECTIONS = ("streams", "temporal", "depth")
Found = TypeVar("Found")


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, directory: str | Path, *, config: Config) -> None:
        self.directory, self.config = Path(directory), config

    def latest(self) -> Path | None:
        """The newest whole checkpoint, see `search`."""
        return self.search()[0]

    def search(self) -> tuple[Path | None, list[str]]:
        """(the newest whole checkpoint, None where there is none; a line for each damaged one that was passed over).

        Not newer than the one that `latest` names. In a launch all ranks call this, and get what the first one found.

        Raises:
            ValueError: there are checkpoints, but no whole one.
        """
        path, damaged = _found_by_first_rank(self._search)
        if path is None and damaged:
            raise ValueError(
                f"{self.directory} holds no whole checkpoint: {'; '.join(damaged)}; "
                f"put one back, or remove the folder to start anew"
            )
        return path, damaged

    def _search(self) -> tuple[Path | None, list[str]]:
        damaged = []
        for path in self._candidates():
            damage = find_damage(path)
            if damage is None:
                return path, damaged
            damaged.append(f"{path}: {damage}")
        return None, damaged

    def _candidates(self) -> list[Path]:
        """The checkpoint that `latest` names, though it be gone, then those before it; without `latest`, all."""
        pointer, there = self.directory / LATEST, self._finished()
        if pointer.is_file():
            named = self.directory / pointer.read_text(encoding="utf-8").strip()
            there = [named, *(path for path in there if path.name < named.name)]
        return there

    def latest_step(self) -> int:
        """The step of `latest()`, 0 without one."""
        path = self.latest()
        return int(path.name.removeprefix("step_")) if path else 0

    def save(self, state: dict[str, Any], *, step: int) -> Path:
        """Write a sharded state dict; all ranks call this. Returns the checkpoint's folder."""
        path = self.directory / f"step_{step:08d}"
        aside = path.with_suffix(".part")
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        dist.barrier()
        dist_checkpointing.save(state, str(aside))
        if dist.get_rank() == 0:
            write_config(self.config, aside / CONFIG)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(aside, path)
            self._point_to(path)
            self._remove_before(path)
        dist.barrier()
        return path

    def _point_to(self, path: Path) -> None:
        aside = self.directory / f"{LATEST}.part"
        aside.write_text(path.name + "\n", encoding="utf-8")
        os.replace(aside, self.directory / LATEST)

    def _finished(self) -> list[Path]:
        """Checkpoints that were written to the end, newest first."""
        return sorted((path for path in self.directory.glob("step_*") if path.suffix != ".part"), reverse=True)

    def _remove_before(self, newest: Path) -> None:
        """Newer ones, of a course that the run went back from, do not count."""
        older = [path for path in self._finished() if path.name < newest.name]
        for path in older[self.config.checkpoint.keep_last - 1 :]:
            shutil.rmtree(path)


def load(path: str | Path, state: dict[str, Any], *, config: Config) -> dict[str, Any]:
    """Fill a sharded state dict of the current layout from a checkpoint of any layout; all ranks call this.

    The checkpoint is whole: `search` found it, or `check_whole` has looked at it.

    Raises:
        ValueError: it is of another model; the difference is named.
    """
    check_shape(path, config=config)
    return dist_checkpointing.load(state, str(path))


def check_whole(path: str | Path) -> None:
    """Raises ValueError where `path` is not the folder of a whole checkpoint, naming what is wrong with it.

    In a launch all ranks call this, and get what the first one found.
    """
    fault = _found_by_first_rank(lambda: _fault(Path(path)))
    if fault is not None:
        raise ValueError(fault)


def _fault(path: Path) -> str | None:
    if not (path / CONFIG).is_file():
        return f"there is no checkpoint at {path} ({CONFIG} is missing); name a folder step_..."
    damage = find_damage(path)
    return damage and f"checkpoint {path} is damaged: {damage}; name another one, or write it anew"


def _found_by_first_rank(find: Callable[[], Found]) -> Found:
    """What `find()` gives on the first rank, on all of them: one reads the files, not every rank of a launch."""
    found = [find() if not dist.is_initialized() or dist.get_rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    return found[0]


def check_shape(path: str | Path, *, config: Config) -> None:
    """Raises ValueError where the checkpoint's model is not the config's, naming the key and both values."""
    saved = read_config(Path(path) / CONFIG)
    for section in SHAPE_SECTIONS:
        theirs, mine = getattr(saved, section).model_dump(), getattr(config, section).model_dump()
        for key in mine:
            if mine[key] != theirs[key]:
                raise ValueError(
                    f"checkpoint {path}: {section}.{key} is {theirs[key]} there and {mine[key]} in this run; "
                    f"train with the checkpoint's shape, or from another directory"
                )
