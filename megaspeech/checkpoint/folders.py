"""The folders of a run's checkpoints, by name: which are finished, which are not to be read, which may go.

checkpoints/
  latest                 the name of the newest checkpoint, or of an older one to go back to
  step_00000200/         a checkpoint
  step_00000400.part     being written, or left by a killed run: never read
  step_00000100.removed  being removed, or left by a killed run: never read
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from megaspeech.checkpoint.ranks import reason
from megaspeech.config.schema import CheckpointSection

LATEST = "latest"
UNFINISHED, REMOVED = ".part", ".removed"


def folder_of(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The training step of a checkpoint's folder, finished or not."""
    return int(path.name.removeprefix("step_").partition(".")[0])


def finished(directory: Path) -> list[Path]:
    """Checkpoints that were written to the end, newest first."""
    return sorted((path for path in directory.glob("step_*") if re.fullmatch(r"step_\d+", path.name)), reverse=True)


def leftovers(directory: Path) -> list[Path]:
    """What killed runs have left of writing or removing."""
    return [path for path in directory.glob("step_*") if path.suffix in (UNFINISHED, REMOVED)]


def named_latest(directory: Path) -> Path | None:
    """The checkpoint that `latest` names, though it be gone; None without that file."""
    pointer = directory / LATEST
    return directory / pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None


def outlived(newest: Path, *, section: CheckpointSection) -> list[Path]:
    """Finished checkpoints that need not be kept. Those after `newest`, of a course that was left, do not count."""
    older = [path for path in finished(newest.parent) if path.name < newest.name]
    return [
        path for path in older[section.keep_last - 1 :] if not section.keep_every or step_of(path) % section.keep_every
    ]


def remove(path: Path) -> str | None:
    """Remove a folder, renamed first, so that a kill leaves none that looks whole; or say why it stays."""
    try:
        if path.suffix not in (UNFINISHED, REMOVED):
            path = path.rename(path.with_suffix(REMOVED))
        shutil.rmtree(path)
    except OSError as error:
        return f"{path} could not be removed ({reason(error)})"
    return None
