"""Files that are there whole or not at all, whoever is killed while writing."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A place beside `path` to write a file to, which then takes the place of `path`.

    Several processes may do so at once: each has a place of its own, which ends in ".part". One that is killed leaves
    it behind, to be read by nobody.
    """
    path = Path(path)
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
