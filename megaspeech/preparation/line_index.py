"""Where the lines of a manifest begin, found by reading it once and kept for whoever asks next.

Manifests of a million hours take tens of gigabytes, and each of hundreds of array tasks must know where its units
begin: the first to read a manifest writes that down, a few bytes a unit, and the others read those.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import IO

import numpy as np
import xxhash

from megaspeech.data.whole_files import replacing

BLOCK = 4 << 20
"""Bytes of a manifest that are looked at together."""


def open_manifest(path: Path) -> IO[bytes]:
    """Its bytes, unpacked where it is compressed."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def line_starts(path: Path, *, every: int, kept: Path | None = None) -> tuple[np.ndarray, int]:
    """(byte at which each `every`-th line begins, from the first on, int64; how many lines there are).

    Args:
        path: the manifest; blank lines count, and a last one without an end.
        every: lines from one that is told to the next.
        kept: folder of what was found before. It is looked for under the manifest's path, size and time of change, and
            written where it is not there.

    Raises:
        ValueError: the manifest cannot be read.
    """
    try:
        if kept is None:
            return _read(path, every=every)
        status = path.stat()
        identity = f"{path.absolute()} {status.st_size} {status.st_mtime_ns} {every}"
        index = kept / f"{xxhash.xxh3_64_hexdigest(identity.encode())}.npy"
        if index.is_file():
            total_and_starts = np.load(index)
            return total_and_starts[1:], int(total_and_starts[0])
        starts, total = _read(path, every=every)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: unreadable: {error}; write the manifest anew") from None
    kept.mkdir(parents=True, exist_ok=True)
    with replacing(index) as aside, aside.open("wb") as file:
        np.save(file, np.concatenate([[total], starts]))
    return starts, total


def _read(path: Path, *, every: int) -> tuple[np.ndarray, int]:
    starts, total, position, ending = [np.zeros(1, dtype=np.int64)], 0, 0, b"\n"
    with open_manifest(path) as file:
        while block := file.read(BLOCK):
            ends = np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n"))
            starts.append(position + 1 + ends[every - 1 - total % every :: every])
            total, position, ending = total + len(ends), position + len(block), block[-1:]
    total += ending != b"\n"  # a last line that does not end
    return np.concatenate(starts)[: -(-total // every)], total  # without what begins at the very end
