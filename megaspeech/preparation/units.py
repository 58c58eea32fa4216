"""What a unit of work leaves behind, and when all of it is there: no coordinator, no lock, killed at any moment.

    data.directory/{train,valid}/SOURCE/TASK/{unit:06d}.{bin,idx,xxh64,json}   samples
    data.directory/{train,valid}/SOURCE/units/{unit:06d}.{json,rejected.jsonl} the done-mark; what was left out, and why
    data.directory/{train,valid}/SOURCE/TASK/catalogue.json                    when every unit of all sources is done
    data.directory/rejected.jsonl                                              all that was left out, likewise
    data.directory/manifests/                                                  see `line_index`

A unit's files are written to a folder of their own and renamed, the done-mark last. What a unit becomes follows from
its lines, its audio and the config alone, so that a unit made twice, after a kill or by two array tasks that were given
the same one, has the same bytes; and whoever finds every unit done writes the same catalogues.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megaspeech.data.shard_set import write_catalogue
from megaspeech.data.shards import ShardHeader, write_shard
from megaspeech.data.whole_files import replacing
from megaspeech.preparation.audio_checks import kind_of
from megaspeech.preparation.sources import Unit

UNITS = "units"
REJECTED = "rejected.jsonl"
ESCAPED = "backslashreplace"
"""Of names of files that are not UTF-8: half surrogate pairs, which so become what JSON writes for them."""


@dataclass
class Totals:
    """What became of a unit, or of several."""

    samples: Counter[str] = field(default_factory=Counter)
    """By task."""
    frames: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    """By the first words of the reason."""
    notes: Counter[str] = field(default_factory=Counter)
    """Of what was kept though something was changed, for the report."""
    effects: Counter[str] = field(default_factory=Counter)
    """Recordings by what was done to them, each altered version by itself (`Plan.effects`)."""
    largest_shift: int = 0
    """Frames by which the word that was moved farthest was."""
    seconds: float = 0.0
    """Of audio that was encoded, each recording once a unit."""

    def add(self, other: Totals) -> None:
        """Take another's into this one's."""
        for name in ("samples", "frames", "rejected", "notes", "effects"):
            getattr(self, name).update(getattr(other, name))
        self.largest_shift = max(self.largest_shift, other.largest_shift)
        self.seconds += other.seconds


class UnitStore:
    """The results of units in `directory` (`data.directory`).

    Args:
        directory: made if missing.
        made_with: what the codes depend on, by the name that a message shall have; see `prepare.made_with`.
    """

    def __init__(self, directory: str | Path, *, made_with: Callable[[Unit], Mapping[str, Any]]) -> None:
        self.directory, self._made_with = Path(directory), made_with

    def folder(self, unit: Unit) -> Path:
        """Of the unit's source, with a folder for each task."""
        return self.directory / unit.split / unit.source.name

    def mark(self, unit: Unit) -> Path:
        """The file that says that the unit is done."""
        return self.folder(unit) / UNITS / f"{unit.number:06d}.json"

    def rejections(self, unit: Unit) -> Path:
        """The file with what was left out of the unit."""
        return self.folder(unit) / UNITS / f"{unit.number:06d}.{REJECTED}"

    def is_done(self, unit: Unit) -> bool:
        """Whether the unit's results are all there.

        Raises:
            ValueError: they are, but of other lines, or made with another codec, tokenizer or config.
        """
        values = _read(self.mark(unit))
        if values is None:
            return False
        theirs, mine = {**values["made_with"], **values["made_of"]}, self._origin(unit)
        for key, value in mine.items():
            if theirs.get(key) != value:
                raise ValueError(
                    f"{self.mark(unit)}: made with {key} = {theirs.get(key)}, now it is {value}; remove "
                    f"{self.directory} to prepare all of it anew, or name another data.directory"
                )
        return True

    def _origin(self, unit: Unit) -> dict[str, Any]:
        """As JSON gives it back."""
        origin = {**self._made_with(unit), **_made_of(unit)}
        return json.loads(json.dumps(origin))

    def totals(self, unit: Unit) -> Totals:
        """Of a unit that is done."""
        values = _read(self.mark(unit))
        assert values is not None, f"{self.mark(unit)} is missing"
        totals = values["totals"]
        return Totals(**{key: Counter(value) if isinstance(value, dict) else value for key, value in totals.items()})

    def publish(
        self,
        unit: Unit,
        samples: Mapping[str, Sequence[np.ndarray]],
        *,
        header: Callable[[str], ShardHeader],
        rejected: Sequence[Mapping[str, str]],
        totals: Totals,
    ) -> None:
        """Write a unit's shards, what was left out, and then the mark that it is done.

        Args:
            unit: whose.
            samples: `[S, T]` by `Task.key`.
            header: of a task's shard.
            rejected: lines for `rejected.jsonl`; "reason" is counted.
            totals: what became of the unit beside that; samples, frames and rejections are counted in here.
        """
        # Another task that does this unit too has a folder of another name.
        aside = self.folder(unit) / UNITS / f"{unit.number:06d}.{uuid.uuid4().hex}.part"
        try:
            aside.mkdir(parents=True)
            self._write(unit, aside, samples, header=header, rejected=rejected, totals=totals)
            self._move_in(unit, aside, tasks=list(samples))
        except FileNotFoundError:
            if not self.is_done(unit):  # else that task was faster, and cleared up: see `finish`
                raise

    def _write(
        self,
        unit: Unit,
        aside: Path,
        samples: Mapping[str, Sequence[np.ndarray]],
        *,
        header: Callable[[str], ShardHeader],
        rejected: Sequence[Mapping[str, str]],
        totals: Totals,
    ) -> None:
        """Write a unit's files into a folder of their own; completes the totals."""
        for task, rows in samples.items():
            written = write_shard(aside / task, rows, header=header(task))
            totals.samples[task], totals.frames[task] = written.num_samples, written.num_frames
        totals.rejected.update(kind_of(line["reason"]) for line in rejected)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in rejected)
        (aside / REJECTED).write_text(text, encoding="utf-8", errors=ESCAPED)
        mark = {
            "made_of": _made_of(unit),
            "made_with": dict(self._made_with(unit)),
            "totals": {key: _plain(value) for key, value in vars(totals).items()},
        }
        (aside / "mark").write_text(json.dumps(mark, ensure_ascii=False, indent=1), encoding="utf-8", errors=ESCAPED)

    def _move_in(self, unit: Unit, aside: Path, *, tasks: Sequence[str]) -> None:
        """Rename a unit's files into place, the mark last."""
        for stale in self.folder(unit).glob(f"*/{unit.number:06d}.*"):  # of a run that was killed, with another config
            if stale.parent.name not in (UNITS, *tasks):
                stale.unlink(missing_ok=True)
        for task in tasks:
            place = self.folder(unit) / task
            place.mkdir(exist_ok=True)
            for suffix in ("bin", "idx", "xxh64", "json"):
                os.replace(aside / f"{task}.{suffix}", place / f"{unit.number:06d}.{suffix}")
        os.replace(aside / REJECTED, self.rejections(unit))
        os.replace(aside / "mark", self.mark(unit))
        aside.rmdir()

    def missing(self, units: Iterable[Unit]) -> list[Unit]:
        """Those that are not done; their files are not looked into."""
        marks = {path for folder in {self.folder(unit) for unit in units} for path in (folder / UNITS).glob("*.json")}
        return [unit for unit in units if self.mark(unit) not in marks]

    def finish(self, units: Sequence[Unit]) -> bool:
        """Write catalogues and the joined `rejected.jsonl` if every unit is done; whether it is.

        Raises:
            ValueError: no sample at all is left of a split, or there are units that the sources no longer have.
        """
        if self.missing(units):
            return False
        self._refuse_strangers(units)
        for split in dict.fromkeys(unit.split for unit in units):
            self._refuse_nothing(split, [unit for unit in units if unit.split == split])
        for folder in dict.fromkeys(self.folder(unit) for unit in units):
            for task in sorted(path for path in folder.iterdir() if path.name != UNITS and any(path.glob("*.bin"))):
                write_catalogue(task)
        self._join_rejections(units)
        for folder in {self.folder(unit) for unit in units}:
            for leftover in (folder / UNITS).glob("*.part"):  # of runs that were killed
                shutil.rmtree(leftover, ignore_errors=True)
        return True

    def _refuse_strangers(self, units: Sequence[Unit]) -> None:
        known = {self.mark(unit) for unit in units}
        for folder in {self.folder(unit) for unit in units}:
            for mark in sorted((folder / UNITS).glob("*.json")):
                if mark not in known:
                    raise ValueError(
                        f"{mark}: of a unit that the sources no longer have: the manifest is shorter than it was; "
                        f"remove {folder} to prepare it anew"
                    )

    def _refuse_nothing(self, split: str, units: Sequence[Unit]) -> None:
        totals = self.sum(units)
        if not totals.samples.total():
            reasons = ", ".join(f"{reason} ({count:,})" for reason, count in totals.rejected.most_common(3))
            if not reasons:
                is_held_out = split == "valid" and any(unit.held_out for unit in units)
                reasons = "no line is held out; raise held_out" if is_held_out else "the manifests are empty"
            example = next((path for unit in units if (path := self.rejections(unit)).stat().st_size), None)
            raise ValueError(
                f"{split}: no sample is left; the reasons: {reasons}"
                + (f"; each is in {example} and its like" if example else "")
                + f"; mend them, remove {self.directory / split}, and run again"
            )

    def sum(self, units: Iterable[Unit]) -> Totals:
        """The totals of units that are done, together."""
        together = Totals()
        for unit in units:
            together.add(self.totals(unit))
        return together

    def _join_rejections(self, units: Sequence[Unit]) -> None:
        with replacing(self.directory / REJECTED) as aside, aside.open("wb") as file:
            for unit in units:
                with self.rejections(unit).open("rb") as part:
                    shutil.copyfileobj(part, file)


def _made_of(unit: Unit) -> dict[str, Any]:
    """Which lines a unit is, so that a manifest that was changed meanwhile is seen."""
    return {"manifest": unit.path.name, "first_line": unit.first_line, "num_lines": unit.num_lines}


def _plain(value: Any) -> Any:
    return dict(sorted(value.items())) if isinstance(value, dict) else value


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON any more ({error}); remove it, and its unit is prepared again") from error
