"""A text file made into speech: audio and NeMo manifests, in units that any number of machines share.

    OUTPUT/made_of.json              what all of it is made of; another text or other settings are refused
    OUTPUT/000000/manifest.jsonl     unit 0: the first lines of the text, those that could be spoken
    OUTPUT/000000/audio_0.tar        their audio; that of line 17 is 000000017.flac in it
    OUTPUT/000000/rejected.jsonl     the lines that could not, each with its reason
    OUTPUT/000000/summary.json       what the unit holds

One tar a unit, since a file system that thousands share suffers from hundreds of millions of files; it is read in
place, as NeMo's tarred data sets are. A unit appears when all of it is written, so a run that was killed goes on where
it was and ends with the same bytes. Every unit is made in a process of its own: espeak-ng's samples depend on what it
said before.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import tarfile
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from megaspeech.data.whole_files import replacing
from megaspeech.preparation.synthesis.speech import Speech
from megaspeech.preparation.synthesis.voices import LANGUAGES, voices_for
from megaspeech.preparation.synthesis.words import read_aloud

FEWEST_LINES, MOST_LINES, NUM_UNITS = 50, 5000, 64
"""A unit becomes a shard, and shall hold much; but a short text is to be shared out too, in `NUM_UNITS`."""
_PEAK = 0.9
_PACES, _PITCHES = (0.85, 1.2), (35, 66)


@dataclass(frozen=True)
class SpeechSettings:
    """What is made of a text; the same settings and text make the same bytes.

    Attributes:
        language: of lines that name none themselves.
        voices: how many are drawn for each language, or the labels of voices, separated by commas.
        seed: of who says what, how fast and how high.
        tasks: that each line is given for in the manifest, `tts` or `asr`.
        sample_rate: Hz.
        audio: "flac" or "wav", of 16 bits.
        lines_per_unit: of the text; 0 is what makes `NUM_UNITS`, but no less than `FEWEST_LINES` nor more than
            `MOST_LINES`.
    """

    language: str
    voices: str = "100"
    seed: int = 0
    tasks: tuple[str, ...] = ("tts",)
    sample_rate: int = 24000
    audio: str = "flac"
    lines_per_unit: int = 0

    def __post_init__(self) -> None:
        for key, values, known in (
            ("language", (self.language,), tuple(LANGUAGES)),
            ("tasks", self.tasks, ("tts", "asr")),
            ("audio", (self.audio,), ("flac", "wav")),
        ):
            for value in values:
                if value not in known:
                    raise ValueError(f"{key}: {value!r} is unknown; use {' or '.join(known)}")
        for key, least in (("sample_rate", 1), ("lines_per_unit", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"{key}: {getattr(self, key)} is less than {least}")


@dataclass
class Summary:
    """What was made, of a unit or of several."""

    num_utterances: int = 0
    seconds: float = 0.0
    num_bytes: int = 0
    rejected: Counter = field(default_factory=Counter)

    def add(self, other: Summary) -> None:
        """Count another's in."""
        self.num_utterances += other.num_utterances
        self.seconds += other.seconds
        self.num_bytes += other.num_bytes
        self.rejected += other.rejected


class TextToSpeech:
    """One text file on its way to be speech."""

    def __init__(self, text: Path, output: Path, *, settings: SpeechSettings) -> None:
        """Args:
            text: UTF-8, an utterance a line; `.jsonl` has objects with `text` and, if it likes, `lang` and `speaker`.
                Blank lines are skipped. A speaker speaks with one voice throughout.
            output: a new folder, or that of a run which was killed.
            settings: what to make.

        Raises:
            ImportError: an engine is not installed.
            ValueError: there is no such text, or `output` holds something else.
        """
        if not text.is_file():
            raise ValueError(f"text: there is no file {str(text)!r}; check the path")
        self.text, self.output, self.settings = text, output, settings
        self._voices = voices_for(settings.language, settings.voices, seed=settings.seed)
        with text.open("rb") as file:
            self.num_lines = sum(1 for _ in file)
        shared_out = max(FEWEST_LINES, -(-self.num_lines // NUM_UNITS))
        self._lines_per_unit = settings.lines_per_unit or min(MOST_LINES, shared_out)
        self._mark()

    @property
    def num_units(self) -> int:
        """Of the whole text."""
        return -(-self.num_lines // self._lines_per_unit)

    def make(self, *, processes: int, task: int = 0, num_tasks: int = 1) -> Iterator[int]:
        """Make every `num_tasks`-th unit from `task` on that is not there yet; yields the number of each that is.

        Raises:
            RuntimeError: the process of a unit died.
        """
        context = multiprocessing.get_context("spawn")
        running: dict[int, tuple[int, multiprocessing.process.BaseProcess]] = {}
        waiting = self._units(task, num_tasks)
        try:
            while True:
                while len(running) < processes and (unit := next(waiting, None)) is not None:
                    if self._folder(unit[0]).is_dir():
                        yield unit[0]
                        continue
                    process = context.Process(target=self._make_unit, args=unit)
                    process.start()
                    running[process.sentinel] = (unit[0], process)
                if not running:
                    return
                for sentinel in multiprocessing.connection.wait(list(running)):
                    number, process = running.pop(sentinel)
                    process.join()
                    if process.exitcode:
                        raise RuntimeError(f"unit {number} failed with status {process.exitcode}; its message is above")
                    yield number
        finally:
            for _, process in running.values():
                process.terminate()

    def summary(self) -> tuple[Summary, int]:
        """(what there is, the number of units still to be made); with the last of them, rests of killed runs go."""
        total, missing = Summary(), 0
        for number in range(self.num_units):
            try:
                values = json.loads((self._folder(number) / "summary.json").read_text())
            except FileNotFoundError:
                missing += 1
                continue
            total.add(Summary(**{**values, "rejected": Counter(values["rejected"])}))
        if not missing:
            for rest in self.output.glob("*.part-*"):
                shutil.rmtree(rest, ignore_errors=True)
        return total, missing

    def _units(self, task: int, num_tasks: int) -> Iterator[tuple[int, list[bytes]]]:
        """(number, lines) of the units that are this task's, read as they are needed."""
        size, lines = self._lines_per_unit, []
        with self.text.open("rb") as file:
            for index, line in enumerate(file):
                if index // size % num_tasks == task:
                    lines.append(line)
                    if len(lines) == size or index == self.num_lines - 1:
                        yield index // size, lines
                        lines = []

    def _folder(self, number: int) -> Path:
        return self.output / f"{number:06d}"

    def _mark(self) -> None:
        """See that `output` is this run's."""
        digest = xxhash.xxh64()
        with self.text.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        made_of = json.dumps({"text": digest.hexdigest(), **asdict(self.settings)}, indent=1)
        mark = self.output / "made_of.json"
        self.output.mkdir(parents=True, exist_ok=True)
        # Array tasks may do this at one time, with one content; whatever they write comes after the mark.
        others = [path for path in self.output.iterdir() if not path.name.startswith(mark.name)]
        if not mark.is_file():
            if others:
                raise ValueError(
                    f"output: {self.output} holds something that is not speech from a text; name a new folder"
                )
            with replacing(mark) as aside:
                aside.write_text(made_of)
        if mark.read_text() != made_of:
            raise ValueError(f"output: {mark} says another text or other settings; name another folder")

    def _make_unit(self, number: int, lines: Sequence[bytes]) -> None:
        aside = Path(tempfile.mkdtemp(prefix=f"{number:06d}.part-", dir=self.output))
        aside.chmod(0o755)
        summary, manifest, rejected = Summary(), [], []
        first = number * self._lines_per_unit
        with tarfile.open(aside / f"audio_{number}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for index, line in enumerate(lines, first):
                try:
                    if line.strip():
                        manifest += self._make_line(index, line, archive=archive, summary=summary)
                except ValueError as error:
                    # Which character it was belongs to the line; what is counted is the kind of fault.
                    summary.rejected[str(error).split("'")[0].rstrip(" :")] += 1
                    text = line.decode("utf-8", errors="replace").strip()
                    rejected.append({"line": index + 1, "text": text, "reason": str(error)})
        manifest = [{**entry, "shard_id": number} for entry in manifest]
        for name, entries in (("manifest", manifest), ("rejected", rejected)):
            content = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
            (aside / f"{name}.jsonl").write_text(content, encoding="utf-8")
        (aside / "summary.json").write_text(json.dumps(vars(summary)))
        try:
            os.replace(aside, self._folder(number))
        except OSError:  # another has made it meanwhile, with the same bytes
            if not self._folder(number).is_dir():
                raise
            shutil.rmtree(aside)

    def _make_line(self, index: int, line: bytes, *, archive: tarfile.TarFile, summary: Summary) -> list[dict]:
        """Speak a line and add it to the archive; its manifest lines."""
        text, language, speaker = self._read(line)
        rng = np.random.default_rng([self.settings.seed, index])
        voices = self._voices.get(language)
        if voices is None:
            raise ValueError(f"lang: no voice was asked for {language!r}")
        chosen = xxhash.xxh64_intdigest(speaker.encode(), self.settings.seed) if speaker else rng.integers(1 << 31)
        voice = voices[int(chosen) % len(voices)]
        speech, words = read_aloud(
            text,
            voice=voice,
            sample_rate=self.settings.sample_rate,
            pace=round(float(rng.uniform(*_PACES)), 3),
            pitch=int(rng.integers(*_PITCHES)),
        )
        name, content = f"{index:09d}.{self.settings.audio}", _encoded(speech, kind=self.settings.audio)
        entry = tarfile.TarInfo(name)  # of no time and nobody: the same bytes whoever makes it, whenever
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
        summary.num_bytes += len(content)
        summary.num_utterances += 1
        summary.seconds += len(speech.samples) / speech.sample_rate
        line_of = _manifest_line(name, speech, words, text=text, language=language, speaker=speaker or voice.label)
        return [{**line_of, "taskname": task} for task in self.settings.tasks]

    def _read(self, line: bytes) -> tuple[str, str, str]:
        """(text, language, speaker) of a line."""
        try:
            content = line.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError("text: not UTF-8") from None
        if self.text.suffix != ".jsonl":
            return _cleaned(content), self.settings.language, ""
        try:
            values = json.loads(content)
        except json.JSONDecodeError:
            raise ValueError("text: not JSON") from None
        if not isinstance(values, dict) or not isinstance(values.get("text"), str):
            raise ValueError("text: the line has no such key")
        language = values.get("lang") or self.settings.language
        return _cleaned(values["text"]), str(language), str(values.get("speaker") or "")


def _cleaned(text: str) -> str:
    """One space between words. An engine would stop at a control character, and nobody would notice."""
    text = " ".join(text.split())
    if any(unicodedata.category(sign) in ("Cc", "Cs") for sign in text):
        raise ValueError("text: a control character")
    return text


def _manifest_line(
    name: str, speech: Speech, words: Sequence[str], *, text: str, language: str, speaker: str
) -> dict[str, object]:
    return {
        "audio_filepath": name,
        "duration": round(len(speech.samples) / speech.sample_rate, 4),
        "source_lang": language,
        "target_lang": language,
        "text": text,
        "words": [
            {"word": word, "start": round(start, 3), "end": round(end, 3)}
            for word, (start, end) in zip(words, speech.times, strict=True)
        ],
        "speaker": speaker,
    }


def _encoded(speech: Speech, *, kind: str) -> bytes:
    """A file of 16 bits, no louder than full scale."""
    import soundfile

    peak = float(np.abs(speech.samples).max())
    encoded = io.BytesIO()
    soundfile.write(
        encoded,
        speech.samples * (_PEAK / max(_PEAK, peak)),
        speech.sample_rate,
        format=kind,
        subtype="PCM_16",
    )
    return encoded.getvalue()
