"""Records, one JSON a line, in a file that holds whole lines only: after a kill, and on a full disk."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class RecordFile:
    """Records of a run that goes on after `step`: those of later steps, which will come again, are dropped.

    Args:
        path: of the file; it is made with the first record.
        step: every record has one.
        complain: told once that records cannot be written; without them training goes on.
    """

    def __init__(self, path: Path, *, step: int, complain: Callable[[str], None]) -> None:
        self.path, self.complain = path, complain
        self._complained = False
        self._try(lambda: self._drop_after(step))

    def add(self, record: dict[str, Any]) -> None:
        """Write a record."""
        self._try(lambda: self._append((json.dumps(record) + "\n").encode()))

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if not self._complained:
                self.complain(f"{self.path} cannot be written ({error}); training goes on, records are lost")
            self._complained = True

    def _append(self, line: bytes) -> None:
        with self.path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                while line:
                    line = line[file.write(line) :]
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(end)
                raise

    def _drop_after(self, step: int) -> None:
        """Cut the file, whose steps only grow, before the first later one, or a line that a kill cut short."""
        if not self.path.is_file():
            return
        with self.path.open("rb+") as file:
            end = 0
            for line in file:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
                end += len(line)
            file.truncate(end)
