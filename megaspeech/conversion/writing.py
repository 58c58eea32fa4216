"""Large files written so that a conversion that is killed goes on: aside, a segment at a time, with a journal.

DST.part/      the files of DST
DST.journal    what is being converted, and how far each file has come

The journal is a line of JSON for each portion that is on the disk: how many bytes of a file, and their checksum. The
same command again reads that portion, sees that it is what was written, and goes on behind it. When all is done and
verified DST.part becomes DST, and the journal goes; until then there is no DST.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
import xxhash
from torch import Tensor

from megaspeech.checkpoint.checksums import CHUNK, Checksum, checksum

UNFINISHED, JOURNAL = ".part", ".journal"
MARK_EVERY = 1 << 30
"""Bytes after which what was written is made durable and noted: the most that a killed conversion does again."""
PORTION = 1 << 20
"""Numbers looked at together for ones that are not finite: they fit a core's cache, and need no memory to speak of."""
ROOM_BESIDE = 1 << 24
"""Bytes for configs, indexes and the journal."""

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Segment:
    """A part of a file that is written in one go: a tensor, or a header.

    Attributes:
        num_bytes: about how many, for the progress.
        write: puts it at the end of a stream.
    """

    num_bytes: int
    write: Callable[[IO[bytes]], object]


@dataclass(frozen=True)
class Written:
    """A whole file: its checksum, and where each of its segments ends, in bytes from its start."""

    checksum: Checksum
    ends: tuple[int, ...]


@dataclass
class _Portion:
    """Of a file, what is on the disk: the ends of its segments, and the checksum of all up to the last."""

    ends: list[int] = field(default_factory=list)
    xxh3_128: str = ""


class Aside:
    """The folder DST.part of one conversion, and its journal; made by `aside`.

    `keep` says that a refusal leaves it for the user to look into.
    """

    def __init__(self, path: Path, journal: IO[bytes], portions: dict[str, _Portion]) -> None:
        self.path, self._journal, self._portions = path, journal, portions
        self.keep = False

    @property
    def num_bytes(self) -> int:
        """That are written already."""
        return sum(portion.ends[-1] for portion in self._portions.values() if portion.ends)

    def write(self, name: str, segments: Sequence[Segment], *, progress: Progress) -> Written:
        """A file of segments, one after the other; those that are there already are read and kept.

        `progress` is told how many bytes more are done.
        """
        path, portion = self.path / name, self._portions.setdefault(name, _Portion())
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("r+b" if path.is_file() else "w+b") as file:
            stream = _kept(file, portion)
            progress(sum(segment.num_bytes for segment in segments[: len(portion.ends)]))
            ends, marked = list(portion.ends), stream.num_bytes
            for segment in segments[len(ends) :]:
                segment.write(stream)
                ends.append(stream.num_bytes)
                progress(segment.num_bytes)
                if stream.num_bytes - marked >= MARK_EVERY or len(ends) == len(segments):
                    stream.make_durable()
                    self._mark(name, ends=ends[len(portion.ends) :], stream=stream)
                    marked = stream.num_bytes
        return Written(Checksum(stream.num_bytes, stream.digest.hexdigest()), tuple(ends))

    def _mark(self, name: str, *, ends: list[int], stream: _HashedFile) -> None:
        portion, found = self._portions[name], stream.digest.hexdigest()
        _append(self._journal, {"file": name, "from": len(portion.ends), "ends": ends, "xxh3_128": found})
        portion.ends += ends
        portion.xxh3_128 = found

    def checksums(self, known: Mapping[str, Checksum]) -> dict[str, Checksum]:
        """Of all files, by their names within the folder; those that are known are not read."""
        files = {file.relative_to(self.path).as_posix(): file for file in self.path.rglob("*") if file.is_file()}
        return {name: known[name] if name in known else checksum(file) for name, file in sorted(files.items())}

    def finish(self, destination: Path) -> None:
        """All is there: DST.part becomes DST."""
        for path in [*self.path.rglob("*"), self.path]:
            _sync(path)
        self.path.rename(destination)
        _sync(destination.parent)
        _journal_of(destination).unlink()


def refuse_existing(destination: Path) -> None:
    """Raises ValueError where DST is there."""
    if destination.exists():
        raise ValueError(f"{destination} is there already; name another folder, or remove it first")


@contextmanager
def aside(destination: Path, *, request: Mapping[str, Any], num_bytes: int) -> Iterator[Aside]:
    """DST.part, new or of the same conversion that did not finish, with room for `num_bytes` in all.

    A refusal (ValueError) on the way removes it, unless it was there before: the same command would be refused again.
    Anything else (a full disk, a kill) leaves it to be gone on with.

    Args:
        destination: DST.
        request: what is converted, and how, as JSON has it: a conversion is gone on with only by an equal one.
        num_bytes: of the files to be written.

    Raises:
        ValueError: DST is there; another conversion's DST.part is there or being written; the disk is too small.
    """
    refuse_existing(destination)
    path = destination.with_name(destination.name + UNFINISHED)
    _check_room(path, num_bytes=num_bytes)
    if path.exists() and not _journal_of(destination).exists():
        raise ValueError(f"{path} is in the way and no unfinished conversion; remove it, or name another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _journal_of(destination).open("a+b") as journal:
        _lock(journal, path=path)
        if is_new := not path.exists():
            journal.truncate(0)  # of a folder that the user has removed
        portions = _portions(journal, request=json.loads(json.dumps(request)), path=path)
        path.mkdir(exist_ok=True)
        folder = Aside(path, journal, portions)
        try:
            yield folder
        except ValueError:
            if is_new and not folder.keep:
                shutil.rmtree(path, ignore_errors=True)
                _journal_of(destination).unlink()
            raise


def _journal_of(destination: Path) -> Path:
    return destination.with_name(destination.name + JOURNAL)


def check_finite(tensor: Tensor, *, name: str) -> None:
    """Raises ValueError where a tensor holds a number that is not finite."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    for portion in tensor.reshape(-1).split(PORTION):
        portion = portion.float() if portion.dtype.itemsize == 1 else portion  # torch knows no extremes of FP8
        if not torch.isfinite(torch.stack(torch.aminmax(portion))).all():
            number = portion[~torch.isfinite(portion)][0]
            raise ValueError(f"tensor {name} holds {number}; no model computes with it: mend it, or take another file")


def _check_room(path: Path, *, num_bytes: int) -> None:
    """What DST.part takes already need not be free."""
    there = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    needed = num_bytes + ROOM_BESIDE - there
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ValueError(f"{path.parent} has {free:,} bytes free, and the conversion takes {needed:,}; make room")


def _lock(journal: IO[bytes], *, path: Path) -> None:
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(f"{path} is being written by another process; wait for it, or end it") from error


def _portions(journal: IO[bytes], *, request: dict[str, Any], path: Path) -> dict[str, _Portion]:
    """The portions that a journal tells of; an empty one is begun."""
    lines = _whole_lines(journal)
    if not lines:
        _append(journal, request)
    elif lines[0] != request:
        differing = sorted(key for key in {*lines[0], *request} if lines[0].get(key) != request.get(key))
        raise ValueError(
            f"{path} is an unfinished conversion with other {', '.join(differing)}; "
            f"finish it by its own command, or remove it"
        )
    portions: dict[str, _Portion] = {}
    for line in lines[1:]:
        portion = portions.setdefault(line["file"], _Portion())
        portion.ends[line["from"] :] = line["ends"]
        portion.xxh3_128 = line["xxh3_128"]
    return portions


def _whole_lines(journal: IO[bytes]) -> list[dict[str, Any]]:
    """The journal's lines; one that a kill cut short is cut off."""
    journal.seek(0)
    lines, whole = [], 0
    for line in journal:
        if not line.endswith(b"\n"):
            break
        lines.append(json.loads(line))
        whole += len(line)
    journal.truncate(whole)
    return lines


def _append(journal: IO[bytes], line: Mapping[str, Any]) -> None:
    journal.write(json.dumps(line).encode() + b"\n")
    journal.flush()
    os.fsync(journal.fileno())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _kept(file: IO[bytes], portion: _Portion) -> _HashedFile:
    """The file cut to its portion, which is forgotten where the file does not hold it."""
    stream, left = _HashedFile(file), portion.ends[-1] if portion.ends else 0
    while left and (chunk := file.read(min(left, CHUNK))):
        stream.count(chunk)
        left -= len(chunk)
    if left or (portion.ends and stream.digest.hexdigest() != portion.xxh3_128):
        portion.ends.clear()
        stream = _HashedFile(file)
    file.truncate(stream.num_bytes)
    file.seek(stream.num_bytes)
    return stream


class _HashedFile:
    """A file that is written from its start to its end, its checksum taken on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.num_bytes = file, xxhash.xxh3_128(), 0

    def count(self, data: Any) -> None:
        self.digest.update(data)
        self.num_bytes += memoryview(data).nbytes

    def write(self, data: Any) -> int:
        self.count(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.num_bytes

    def flush(self) -> None:
        """Nothing: the end of a segment is no reason to go to the disk."""

    def make_durable(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
