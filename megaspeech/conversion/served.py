"""Checkpoints of a run as folders that `streaming.folder.open_folder` opens: the newest one, or each as it comes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from megaspeech.checkpoint.folders import finished, named_latest, step_of
from megaspeech.checkpoint.origin import CONFIG
from megaspeech.config import read_config
from megaspeech.conversion.convert import Conversion, convert
from megaspeech.streaming.runtime import CONFIG_FILE

CHECKPOINTS = "checkpoints"


@contextmanager
def converted(path: Path, *, scratch: Path | None = None) -> Iterator[Path]:
    """A converted folder of a model, for as long as it is needed.

    Args:
        path: a converted folder, a native checkpoint, or the directory of a run, of which it is the newest.
        scratch: where a conversion is written, and removed from when done; None takes the system's place for that.

    Raises:
        ValueError: it is none of the three, or cannot be converted; names what is wrong.
    """
    if (path / CONFIG_FILE).is_file():
        yield path
        return
    source = newest_checkpoint(path) if (path / CHECKPOINTS).is_dir() else path
    if not (source / CONFIG).is_file():
        raise ValueError(f"{path}: is no converted folder, no checkpoint and no run's directory; give one of them")
    with tempfile.TemporaryDirectory(dir=scratch) as room:
        folder = Path(room) / source.name
        convert(Conversion(source, folder, source_format="native", target_format="moshi", verify=False))
        yield folder


def newest_checkpoint(run: Path) -> Path:
    """The newest finished checkpoint in the directory of a run.

    Raises:
        ValueError: there is none.
    """
    directory = run / CHECKPOINTS
    newest = named_latest(directory) or next(iter(finished(directory)), None)
    if newest is None:
        raise ValueError(f"{directory}: there is no finished checkpoint; wait for the first, or give another run")
    return newest


def new_checkpoints(run: Path, *, done: Collection[int], poll_seconds: float = 10.0) -> Iterator[Path]:
    """Finished checkpoints of a run that trains, oldest first, until that of its last step.

    A checkpoint that the run removes before its turn is passed over.

    Args:
        run: its directory, which may not be there yet.
        done: steps to leave out.
        poll_seconds: between looks at the directory.
    """
    seen = set(done)
    while True:
        there = finished(run / CHECKPOINTS)
        waiting = [path for path in reversed(there) if step_of(path) not in seen]
        if waiting:
            seen.add(step_of(waiting[0]))
            yield waiting[0]
        elif there and step_of(there[0]) >= _last_step(there[0]):
            return
        else:
            time.sleep(poll_seconds)


def _last_step(checkpoint: Path) -> int:
    """Of the run that wrote it."""
    training = read_config(checkpoint / CONFIG).training
    return training.exit_step or training.train_steps
