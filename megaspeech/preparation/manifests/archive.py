"""Where files lie within a tar, so that each can be read by itself: only headers are read, never the audio."""

from __future__ import annotations

import tarfile
from functools import lru_cache
from pathlib import Path

Span = tuple[int, int]
"""(first byte, number of bytes)"""


def find_archive(name: str, *, manifest: Path) -> Path:
    """The archive beside a manifest or, as where NeMo keeps manifests in a folder of their own, one folder up.

    Raises:
        ValueError: it is in neither.
    """
    for folder in (manifest.parent, manifest.parent.parent):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"no archive: there is no {name} beside {manifest.name} or one folder up; put the archives there")


def span_of(name: str, *, archive: Path) -> Span | None:
    """Where a file of this name lies in a tar; None where it does not, or not whole."""
    return spans(archive).get(name)


@lru_cache(maxsize=8)  # the lines of a unit refer to a few archives, one after the other
def spans(archive: Path) -> dict[str, Span]:
    """Where each whole file of a tar lies, by name.

    Raises:
        ValueError: the file cannot be read, or is not a tar, or is compressed.
    """
    found: dict[str, Span] = {}
    try:
        size = archive.stat().st_size
        with tarfile.open(archive, "r:") as tar:
            while member := _next(tar):
                if member.isreg() and member.offset_data + member.size <= size:
                    found[member.name] = (member.offset_data, member.size)
                tar.members.clear()  # else it keeps them all
    except OSError as error:
        raise ValueError(f"archive unreadable: {archive}: {error.strerror}") from None
    except tarfile.ReadError:
        raise ValueError(
            f"archive unreadable: {archive} is not a tar from which single files can be read; if compressed, unpack it"
        ) from None
    return found


@lru_cache(maxsize=8)
def names_by_stem(archive: Path) -> dict[str, str]:
    """Names of the data in an archive of Lhotse's Shar format, without what stands behind the last dot.

    There is a JSON beside each of them; ".nodata" stands where an item has none.
    """
    stems = {}
    for name in spans(archive):
        stem, _, ending = name.rpartition(".")
        if ending not in ("json", "nometa"):
            stems[stem] = name
    return stems


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        return tar.next()
    except tarfile.ReadError:  # cut short: what stands before is whole
        return None
