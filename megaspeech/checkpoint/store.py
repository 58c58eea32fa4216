"""Checkpoints on disk: written aside, renamed when whole, `latest` moved last, old ones removed (see `folders`).

step_00000200/     megatron-core's torch_dist format, and
  config.toml        the resolved run
  manifest.json      what its streams mean
  checksums.json     of every other file
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

from megaspeech.checkpoint.checksums import Checksum, checksum, find_damage, write_checksums
from megaspeech.checkpoint.folders import (
    LATEST,
    REMOVED,
    UNFINISHED,
    finished,
    folder_of,
    leftovers,
    named_latest,
    outlived,
    remove,
    step_of,
)
from megaspeech.checkpoint.origin import CONFIG, StreamManifest, check_origin, check_shape
from megaspeech.checkpoint.ranks import RankFailure, Ranks
from megaspeech.checkpoint.writing import Snapshot, take_snapshot, write_format, write_snapshots
from megaspeech.config import Config, write_config


class SaveError(ValueError):
    """A checkpoint could not be written: what, why, and what is intact. Raised on every rank alike."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was written: its folder, and a line for each thing that is not as it should be."""

    path: Path
    notes: tuple[str, ...]


class CheckpointStore:
    """The checkpoints of one run. In a launch all ranks make one, and call its methods together.

    Args:
        directory: holds them.
        config: the run.
        manifest: what the streams mean; only needed to save and to check.
    """

    def __init__(self, directory: str | Path, *, config: Config, manifest: StreamManifest | None = None) -> None:
        self.directory, self.config, self.manifest = Path(directory), config, manifest
        self.ranks = Ranks.apart()
        wanted = config.checkpoint.async_save
        self.in_background = torch.accelerator.is_available() if wanted is None else wanted
        self._writing: _Writing | None = None

    def latest(self) -> Path | None:
        """The newest whole checkpoint, see `search`."""
        return self.search()[0]

    def search(self) -> tuple[Path | None, list[str]]:
        """(the newest whole checkpoint, None where there is none; a line for each damaged one that was passed over).

        Not newer than the one that `latest` names. Every file of it has been read and its checksum compared. A save
        under way is waited for.

        Raises:
            ValueError: there are checkpoints, but no whole one.
        """
        if self._writing is not None and self._writing.is_alive():
            self._writing.join()  # its ranks talk over the same line
        damaged: list[str] = []
        for path in self.ranks.first(self._candidates):
            damage = find_damage(path, ranks=self.ranks)
            if damage is None:
                return path, damaged
            damaged.append(f"{path}: {damage}")
        if damaged:
            raise ValueError(
                f"{self.directory} holds no whole checkpoint: {'; '.join(damaged)}; "
                f"put one back, or remove the folder to start anew"
            )
        return None, damaged

    def _candidates(self) -> list[Path]:
        """The checkpoint that `latest` names, though it be gone, then those before it; without `latest`, all."""
        named, there = named_latest(self.directory), finished(self.directory)
        return [named, *(path for path in there if path.name < named.name)] if named else there

    def latest_step(self) -> int:
        """The step of `latest()`, 0 without one."""
        path = self.latest()
        return step_of(path) if path else 0

    def check(self, path: str | Path, *, going_on: bool) -> None:
        """Raises ValueError where the run may not start from the whole checkpoint `path`; see `origin.check_origin`."""
        assert self.manifest is not None
        check_origin(path, config=self.config, manifest=self.manifest, going_on=going_on)

    def save(self, state: dict[str, Any], *, step: int) -> None:
        """Write a sharded state dict, or, in the background, copy it and begin to; `finish` tells how it went."""
        assert self._writing is None, "one save at a time: finish the one before"
        snapshot = take_snapshot(state, rank=self.ranks.rank, copy=self.in_background)
        self._writing = _Writing(lambda: self._write(snapshot, step=step))
        if self.in_background:
            self._writing.start()
        else:
            self._writing.run()

    def finish(self, *, blocking: bool) -> Saved | None:
        """What has become of the save that was begun; None where none was, or it goes on and we are not to wait.

        Raises:
            SaveError: it failed; on every rank, though not at the same step unless `blocking`.
        """
        writing = self._writing
        if writing is None or (writing.is_alive() and not blocking):
            return None
        if self.in_background:
            writing.join()
        self._writing = None
        if writing.error is not None:
            raise writing.error
        return writing.saved

    def _write(self, snapshot: Snapshot, *, step: int) -> Saved:
        path = self.directory / folder_of(step)
        aside = path.with_suffix(UNFINISHED)
        try:
            needed = sum(self.ranks.each(lambda: snapshot.num_bytes))
            notes = self.ranks.first(lambda: self._prepare(aside, needed=needed))
            written = write_snapshots(snapshot, aside, ranks=self.ranks)
            checksums = {name: value for part in self.ranks.each(lambda: written) for name, value in part.items()}
            notes += self.ranks.first(lambda: self._complete(aside, path, snapshot=snapshot, checksums=checksums))
        except RankFailure as failure:
            left = self.ranks.first(lambda: self._give_up(aside))
            raise SaveError(
                f"checkpoint {path} could not be written: {failure}; {left}; make room or mend the disk, "
                f"keep fewer (checkpoint.keep_last, keep_every), or choose another run.directory"
            ) from None
        return Saved(path, tuple(notes))

    def _prepare(self, aside: Path, *, needed: int) -> list[str]:
        """An empty folder, on a disk with room for `needed` bytes; what killed runs left is removed first."""
        self.directory.mkdir(parents=True, exist_ok=True)
        notes = [note for path in leftovers(self.directory) if (note := remove(path))]
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise ValueError(f"{self.directory} has {free:,} bytes free, and it takes {needed:,}")
        aside.mkdir()
        return notes

    def _complete(self, aside: Path, path: Path, *, snapshot: Snapshot, checksums: dict[str, Checksum]) -> list[str]:
        """The small files, the checksums of all, the renames, the removal of what need not be kept."""
        assert self.manifest is not None
        for name, value in checksums.items():
            if not (aside / name).is_file() or (aside / name).stat().st_size != value.num_bytes:
                raise ValueError(f"{name} is not as its rank wrote it; do all nodes see one file system?")
        write_format(snapshot, aside)
        write_config(self.config, aside / CONFIG)
        self.manifest.write(aside)
        small = {file.name: checksum(file) for file in aside.iterdir() if file.name not in checksums}
        write_checksums(aside, {**checksums, **small})
        # Whatever may need room on the disk is written by now.
        pointer = self.directory / f"{LATEST}{UNFINISHED}"
        pointer.write_text(path.name + "\n", encoding="utf-8")
        replaced = path.with_suffix(REMOVED)
        if path.exists():  # of a course that the run went back from, or damaged
            path.rename(replaced)
        aside.rename(path)
        pointer.replace(self.directory / LATEST)
        old = [replaced] if replaced.exists() else []
        old += outlived(path, section=self.config.checkpoint)
        return [note for path in old if (note := remove(path))]

    def _give_up(self, aside: Path) -> str:
        """Remove what was begun; says what there is."""
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):
            (self.directory / f"{LATEST}{UNFINISHED}").unlink()
        try:
            there = self._candidates()
        except OSError:
            return "those before it are untouched"
        return f"{there[0].name}, saved before, is untouched" if there else "there is none before it"


class _Writing(threading.Thread):
    """A save under way. Ends with the process: what it has written by then is never read."""

    def __init__(self, write: Callable[[], Saved]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.write = write
        self.saved: Saved | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.saved = self.write()
        except Exception as error:
            self.error = error


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

    In a launch all ranks call this, read a share each, and raise alike.
    """
    path, ranks = Path(path), Ranks()
    if not ranks.first((path / CONFIG).is_file):
        raise ValueError(f"there is no checkpoint at {path} ({CONFIG} is missing); name a folder step_...")
    damage = find_damage(path, ranks=ranks)
    if damage is not None:
        raise ValueError(f"checkpoint {path} is damaged: {damage}; name another one, or write it anew")
