"""Sources cut into units of work: so many lines of a manifest, which become one shard a task.

Whoever lists the units of the same sources gets the same ones with the same numbers, so that any number of jobs share
them out by themselves. Listing finds where units begin in a manifest (`line_index`); reading a unit begins
there. Memory does not grow with the number of lines.
"""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash

from megaspeech.config.preparation import SourceSection
from megaspeech.data.tasks import LANGUAGE
from megaspeech.preparation.line_index import line_starts, open_manifest
from megaspeech.preparation.manifests import folder, lhotse_cuts, moshi_finetune, nemo
from megaspeech.preparation.manifests.line import LANGUAGE_NAMES, TASK_NAMES
from megaspeech.preparation.utterance import Utterance

Split = Literal["train", "valid"]
_READERS: dict[str, Callable[..., list[Utterance]]] = {
    "nemo": nemo.read_line,
    "moshi": moshi_finetune.read_line,
    "lhotse": lhotse_cuts.read_line,
    "folder": folder.read_name,
}
_TASKS = {"moshi": ("s2s",), "folder": ("asr", "st", "tts")}
"""What a format can hold, where not everything."""


@dataclass(frozen=True)
class Refused:
    """What cannot be read: where it stands, and why it was left out, in words for a person."""

    where: str
    reason: str


@dataclass(frozen=True)
class Unit:
    """Lines of one manifest of one source, all of whose samples of a task make up a shard.

    Attributes:
        source: whose manifest it is.
        split: which set its samples belong to.
        number: among the units of its source and split, from 0.
        path: the manifest; for a folder of audio the folder, whose "lines" are its files in order.
        first_line, num_lines: which lines, from 0; blank ones count.
        offset: byte at which the first line begins, in what a compressed manifest unpacks to.
        first_file: where a folder's unit begins.
        held_out: share of the lines that belong to "valid"; 0 where all are of one split.
    """

    source: SourceSection
    split: Split
    number: int
    path: Path
    first_line: int
    num_lines: int
    offset: int = 0
    first_file: str = ""
    held_out: float = 0.0

    def __str__(self) -> str:
        return f"{self.path}, lines {self.first_line + 1} to {self.first_line + self.num_lines}"


def list_units(sources: Iterable[SourceSection], *, lines_per_shard: int, kept: Path | None = None) -> list[Unit]:
    """The units of all sources, in the same order with the same numbers whoever asks.

    Where a share is held out, "train" has one unit for each block of `lines_per_shard` lines, and "valid" one for as
    many blocks as it takes to hold out about `lines_per_shard` of them. `kept` is a folder that remembers where the
    lines of manifests begin (`line_index`).

    Raises:
        ImportError: a source has Lhotse's cuts, and lhotse is not installed.
        ValueError: a source names nothing that can be read, or not enough to know its task; names the key, the value
            and the remedy.
    """
    return [unit for source in sources for unit in _units_of(source, lines_per_shard=lines_per_shard, kept=kept)]


def evenly_spread(units: Sequence[Unit], *, most: int) -> list[Unit]:
    """Up to `most` of several units, the first and the last among them: a sample of what they hold."""
    places = np.linspace(0, len(units) - 1, min(most, len(units)))
    return [units[place] for place in sorted({int(place) for place in places})]


def read_unit(unit: Unit) -> Iterator[Utterance | Refused]:
    """What a unit's lines hold, in order; faulty lines come as `Refused`, and the others go on.

    Raises:
        OSError: the manifest itself can no longer be read.
    """
    read = _READERS[unit.source.format]
    for where, content in _contents(unit):
        try:
            utterances = read(content, manifest=unit.path, source=unit.source)
            _check_texts(utterances)
            yield from utterances
        except (ValueError, RecursionError) as fault:  # RecursionError: of JSON, too many brackets in each other
            yield Refused(where, str(fault))
        except OSError as error:  # of a transcript, or an archive
            yield Refused(where, f"unreadable: {error.strerror}")


def is_held_out(content: bytes, *, share: float) -> bool:
    """Whether a line is kept for validation: by a hash of it alone, so that it is on the same side in every run.

    Args:
        content: the line without whitespace around it.
        share: of all lines, 0 to 1.
    """
    return xxhash.xxh64_intdigest(content) < share * 2**64


def _check_texts(utterances: Sequence[Utterance]) -> None:
    """See that texts are such as can be written, since JSON may also hold half a surrogate pair."""
    try:
        for utterance in utterances:
            utterance.text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"not Unicode: half a surrogate pair at character {error.start}; write the text anew"
        ) from None


def _contents(unit: Unit) -> Iterator[tuple[str, bytes]]:
    """(where it stands, line) of the unit's lines that are not blank and belong to its split."""
    for number, content in _lines(unit):
        content = content.strip()
        if not content:
            continue
        if unit.held_out and is_held_out(content, share=unit.held_out) != (unit.split == "valid"):
            continue
        if unit.source.format == "folder":
            yield str(unit.path / content.decode("utf-8", errors="backslashreplace")), content
        else:
            yield f"{unit.path}, line {number}", content


def _lines(unit: Unit) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of all lines of a unit."""
    first = unit.first_line + 1
    if unit.source.format == "folder":
        files = folder.audio_files(unit.path, first=unit.first_file)
        yield from enumerate(map(os.fsencode, islice(files, unit.num_lines)), first)
        return
    with open_manifest(unit.path) as file:
        file.seek(unit.offset)
        yield from enumerate(islice(file, unit.num_lines), first)


def _units_of(source: SourceSection, *, lines_per_shard: int, kept: Path | None) -> Iterator[Unit]:
    _check(source)
    cut = {"lines_per_shard": lines_per_shard, "kept": kept}
    blocks = _blocks(source, "train", **cut) if source.train else []
    valid = _blocks(source, "valid", **cut) if source.valid else []
    if twice := {block.path for block in blocks} & {block.path for block in valid}:
        raise ValueError(f"sources.{source.name}.valid: {min(twice)} is one of 'train' too; name other files")
    if source.held_out:
        blocks = [replace(block, held_out=source.held_out) for block in blocks]
        valid = [*_joined(blocks, at_once=math.ceil(1 / source.held_out)), *valid]
    yield from (replace(block, number=number) for number, block in enumerate(blocks))
    yield from (replace(block, number=number, split="valid") for number, block in enumerate(valid))


def _check(source: SourceSection) -> None:
    """See that a source says what its lines do not."""
    key = f"sources.{source.name}"
    if not (source.train or source.valid):
        raise ValueError(f"{key}.train: names nothing; give a manifest, or 'valid' one")
    if source.held_out and not source.train:
        raise ValueError(f"{key}.held_out: {source.held_out} of nothing; give 'train', or leave it out")
    if source.format == "lhotse":
        lhotse_cuts.import_lhotse()
    allowed = _TASKS.get(source.format)
    if source.task and source.task not in (allowed or TASK_NAMES):
        raise ValueError(
            f"{key}.task: {source.task!r} is not one of {', '.join(allowed or TASK_NAMES)}, "
            f"which a source of format {source.format!r} can be"
        )
    for which in ("source_lang", "target_lang"):
        language = getattr(source, which)
        if language and not (LANGUAGE.fullmatch(language) or language.lower() in LANGUAGE_NAMES):
            raise ValueError(f"{key}.{which}: {language!r} is not a language's code; give one such as 'en' or 'ja'")
    if allowed and not (source.task or len(allowed) == 1):
        raise ValueError(
            f"{key}.task: is missing; give one of {', '.join(allowed)}, since a {source.format} names none"
        )
    if allowed and not (source.source_lang or source.target_lang):
        raise ValueError(f"{key}.target_lang: is missing; give the language of the text, which no file of it names")


def _blocks(source: SourceSection, split: Split, *, lines_per_shard: int, kept: Path | None) -> list[Unit]:
    """Every `lines_per_shard` lines of each manifest of a split, as units not yet numbered."""
    paths = _paths(source, split)
    find = _folder_blocks if source.format == "folder" else partial(_file_blocks, kept=kept)
    blocks = [Unit(source, split, 0, path, **place) for path in paths for place in find(path, lines_per_shard)]
    if not blocks:
        raise ValueError(f"sources.{source.name}.{split}: there is nothing in {getattr(source, split)!r}; leave it out")
    return blocks


def _paths(source: SourceSection, split: Split) -> list[Path]:
    """The manifests that a source names, in order."""
    pattern, key = getattr(source, split), f"sources.{source.name}.{split}"
    paths = [Path(pattern)] if os.path.exists(pattern) else sorted(map(Path, glob.glob(pattern, recursive=True)))
    if not paths:
        raise ValueError(
            f"{key}: {pattern!r}: there is no such file or folder, and as a pattern it matches nothing; "
            f"check the path, which is relative to {Path.cwd()}"
        )
    if source.format == "lhotse":  # a Shar folder
        paths = [cuts for path in paths for cuts in (sorted(path.glob("cuts*.jsonl*")) if path.is_dir() else [path])]
    for path in paths:
        if path.is_dir() != (source.format == "folder"):
            wanted = (
                "a folder of audio" if source.format == "folder" else "a manifest, or a pattern such as 'm/*.jsonl'"
            )
            raise ValueError(f"{key}: {path} is {'a folder' if path.is_dir() else 'a file'}; give {wanted}")
    return paths


def _folder_blocks(path: Path, num_lines: int) -> Iterator[dict]:
    files, first_line = folder.audio_files(path), 0
    while block := list(islice(files, num_lines)):
        yield {"first_line": first_line, "num_lines": len(block), "first_file": block[0]}
        first_line += len(block)


def _file_blocks(path: Path, num_lines: int, *, kept: Path | None) -> Iterator[dict]:
    offsets, total = line_starts(path, every=num_lines, kept=kept)
    for first, offset in zip(range(0, total, num_lines), offsets.tolist(), strict=True):
        yield {"first_line": first, "num_lines": min(num_lines, total - first), "offset": offset}


def _joined(blocks: Iterable[Unit], *, at_once: int) -> Iterator[Unit]:
    """As many neighbouring blocks of a manifest as one."""
    for _, of_one in groupby(blocks, key=lambda block: block.path):
        while several := list(islice(of_one, at_once)):
            yield replace(several[0], num_lines=sum(block.num_lines for block in several))
