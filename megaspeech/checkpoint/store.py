"""Checkpoints on disk: written aside, renamed when whole, `latest` moved last, the oldest removed.

checkpoints/
  latest              the name of the newest whole checkpoint
  step_00000200/      megatron-core's torch_dist format, and config.toml, the resolved run
  step_00000400.part  being written, or left by a killed run: never read, and overwritten
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing

from megaspeech.config import Config, read_config, write_config

LATEST, CONFIG = "latest", "config.toml"
SHAPE_SECTIONS = ("streams", "temporal", "depth")


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, directory: str | Path, *, config: Config) -> None:
        self.directory, self.config = Path(directory), config

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None. Raises ValueError when `latest` names one that is gone."""
        pointer = self.directory / LATEST
        if not pointer.is_file():
            return None
        path = self.directory / pointer.read_text(encoding="utf-8").strip()
        if not (path / CONFIG).is_file():
            raise ValueError(
                f"{pointer} names {path}, which is not there; write the name of another checkpoint into it"
            )
        return path

    def latest_step(self) -> int:
        """The step of the newest whole checkpoint, 0 without one."""
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
            self._remove_old()
        dist.barrier()
        return path

    def _point_to(self, path: Path) -> None:
        aside = self.directory / f"{LATEST}.part"
        aside.write_text(path.name + "\n", encoding="utf-8")
        os.replace(aside, self.directory / LATEST)

    def _remove_old(self) -> None:
        whole = sorted(path for path in self.directory.glob("step_*") if path.suffix != ".part")
        for path in whole[: -self.config.checkpoint.keep_last]:
            shutil.rmtree(path)


def load(path: str | Path, state: dict[str, Any], *, config: Config) -> dict[str, Any]:
    """Fill a sharded state dict of the current layout from a checkpoint of any layout; all ranks call this.

    Raises:
        ValueError: there is no checkpoint at `path`, or it is of another model; the difference is named.
    """
    check_shape(path, config=config)
    return dist_checkpointing.load(state, str(path))


def check_exists(path: str | Path) -> None:
    """Raises ValueError where `path` is not the folder of a whole checkpoint."""
    if not (Path(path) / CONFIG).is_file():
        raise ValueError(f"there is no checkpoint at {path} ({CONFIG} is missing); name a folder step_...")


def check_shape(path: str | Path, *, config: Config) -> None:
    """Raises ValueError where the checkpoint's model is not the config's, naming the key and both values."""
    check_exists(path)
    saved = read_config(Path(path) / CONFIG)
    for section in SHAPE_SECTIONS:
        theirs, mine = getattr(saved, section).model_dump(), getattr(config, section).model_dump()
        for key in mine:
            if mine[key] != theirs[key]:
                raise ValueError(
                    f"checkpoint {path}: {section}.{key} is {theirs[key]} there and {mine[key]} in this run; "
                    f"train with the checkpoint's shape, or from another directory"
                )
