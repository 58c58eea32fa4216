"""Is a checkpoint whole? Every file's length and checksum stand in `checksums.json`, the last file to be written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from megaspeech.checkpoint.ranks import Ranks, reason

CHECKSUMS = "checksums.json"
CHUNK = 1 << 24  # bytes


@dataclass(frozen=True)
class Checksum:
    """Of a file: its length in bytes and its XXH3 of 128 bits, in hexadecimal."""

    num_bytes: int
    xxh3_128: str


def checksum(path: Path, *, progress: Callable[[int], object] = lambda _: None) -> Checksum:
    """A file's checksum as it lies on the disk; `progress` is told how many bytes more were read."""
    digest, num_bytes = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            num_bytes += len(chunk)
            progress(len(chunk))
    return Checksum(num_bytes, digest.hexdigest())


def write_checksums(directory: Path, checksums: Mapping[str, Checksum]) -> None:
    """Put `checksums.json`, by file name, into a folder."""
    values = {name: asdict(checksums[name]) for name in sorted(checksums)}
    (directory / CHECKSUMS).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def read_checksums(directory: Path) -> dict[str, Checksum]:
    """The `checksums.json` of a folder, by file name.

    Raises:
        ValueError: it is missing or unreadable.
    """
    path = directory / CHECKSUMS
    if not path.is_file():
        raise ValueError(f"{CHECKSUMS} is missing")
    try:
        return {name: Checksum(**values) for name, values in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{CHECKSUMS} is unreadable ({reason(error)})") from error


def find_damage(
    directory: Path, *, ranks: Ranks | None = None, progress: Callable[[int], object] = lambda _: None
) -> str | None:
    """What is wrong with a checkpoint's folder, in words; None where it is whole.

    All `ranks` call this, read a share of the files each, and get the same answer; without them this process reads all.
    """
    ranks = ranks or Ranks()
    shares = ranks.each(lambda: _share_damage(directory, ranks=ranks, progress=progress))
    found = [damage for share in shares for damage in share]
    return min(found, default=(0, None))[1]


def _share_damage(directory: Path, *, ranks: Ranks, progress: Callable[[int], object]) -> list[tuple[int, str]]:
    """(place in the list of files, what is wrong) of this rank's share. Large files are dealt out first."""
    try:
        listed = sorted(read_checksums(directory).items(), key=lambda item: (-item[1].num_bytes, item[0]))
    except ValueError as error:
        return [(0, str(error))]
    damages = []
    for place, (name, expected) in list(enumerate(listed))[ranks.rank :: ranks.size]:
        damage = _file_damage(directory / name, expected=expected, progress=progress)
        if damage:
            damages.append((place, damage))
    return damages


def _file_damage(path: Path, *, expected: Checksum, progress: Callable[[int], object]) -> str | None:
    try:
        if not path.is_file():
            return f"{path.name} is missing"
        if (num_bytes := path.stat().st_size) != expected.num_bytes:
            return f"{path.name} has {num_bytes:,} bytes of {expected.num_bytes:,}"
        found = checksum(path, progress=progress)
    except OSError as error:
        return f"{path.name} cannot be read ({reason(error)})"
    if found != expected:
        return f"{path.name} is corrupt: its checksum is {found.xxh3_128}, and was {expected.xxh3_128}"
    return None
