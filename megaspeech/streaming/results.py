"""What an evaluation comes to: figures by task, every answer in a file, what could not be asked in another.

    answers.jsonl     {"task", "audio", "reference", "hypothesis"}, and of speech {"wav", "heard"}
    rejected.jsonl    {"where", "reason"}
    spoken/000012.wav what the model said

`asr`: word and character errors. `st`: those, BLEU and chrF. `tts`: the errors of what a recogniser hears. `s2st`: of
what is written as of `st`, and of what is heard. `s2s` has no right answer: it is written down, not scored.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaspeech.data.tasks import Task
from megaspeech.data.whole_files import replacing
from megaspeech.preparation.encoding import encode_recordings
from megaspeech.preparation.other_formats import import_soundfile
from megaspeech.preparation.reading import recordings_of
from megaspeech.preparation.sources import Refused
from megaspeech.preparation.utterance import Utterance
from megaspeech.streaming.evaluation import BATCH, Evaluated, Evaluator, first_of_each_task, place_of
from megaspeech.streaming.folder import ServedFolder
from megaspeech.streaming.judging import judge
from megaspeech.streaming.scoring import parts_words, score
from megaspeech.streaming.translation_scores import translation_score

ANSWERS, REJECTED, SPOKEN = "answers.jsonl", "rejected.jsonl", "spoken"
Watch = Callable[[Iterable, str], Iterable]
"""Wraps an iteration of so many steps under a name, for a progress bar."""


@dataclass(frozen=True)
class Settings:
    """How it is evaluated.

    Attributes:
        batch_size: sessions at once.
        num_timed: utterances of each task whose latency is measured, one session at a time.
        judges: commands that hear what is said, see `judging`, by language; "" is for all that none is named for.
            Speech that no judge is for is not scored.
    """

    batch_size: int = BATCH
    num_timed: int = 8
    judges: Mapping[str, str] = field(default_factory=dict)


def evaluate(
    served: ServedFolder,
    utterances: Sequence[Utterance],
    *,
    folder: Path,
    settings: Settings,
    refused: Iterable[Refused] = (),
    watch: Watch = lambda steps, _: steps,
) -> dict[str, Any]:
    """Ask all utterances, write down the answers, and score them.

    Args:
        served: see `folder.open_folder`.
        utterances: of manifests.
        folder: gets the files.
        settings: how.
        refused: lines that could not be read, to be written down with what cannot be asked.
        watch: shows progress.

    Returns:
        `{"tasks": {"asr-en": {"num_samples", "word_error_rate", ...}}, "latency_ms": {"asr-en": {"median", ...}},
        "num_rejected"}`.

    Raises:
        ValueError: nothing can be asked, or the judge fails.
        ImportError: a package is missing; names it.
    """
    if not served.knows_tasks:
        raise ValueError(
            "the model knows no tasks (its folder has no megaspeech.toml, or its tokenizer no prompts); it cannot be "
            "asked, only be measured by tools/measure_latency.py"
        )
    aside, evaluator = list(refused), Evaluator(served)
    codes, faults = encode_recordings(
        recordings_of(utterances), codec=served.codec, progress=lambda windows, _: watch(windows, "encoding")
    )
    for utterance in utterances:
        aside += [Refused(place_of(utterance), faults[one]) for one in utterance.recordings if one in faults]
    asked = evaluator.requests(utterances, codes, refuse=aside.append)
    answers = evaluator.answers(
        asked, batch_size=settings.batch_size, progress=lambda batches: watch(batches, "batches of answers")
    )
    lines = _write_down(answers, folder, sample_rate=served.codec.sample_rate)
    _write_lines(folder / REJECTED, ({"where": one.where, "reason": one.reason} for one in aside))
    if not lines:
        first = f": {aside[0].where}: {aside[0].reason}" if aside else "; name a manifest that has something"
        raise ValueError(f"there is nothing to ask{first}")
    if settings.judges:
        _hear(lines, folder=folder, judges=settings.judges)
        _write_lines(folder / ANSWERS, lines)
    latency = evaluator.latencies(
        first_of_each_task(asked, settings.num_timed),
        progress=lambda sessions: watch(sessions, "sessions timed one by one"),
    )
    return {"tasks": figures_by_task(lines), "latency_ms": latency, "num_rejected": len(aside)}


def figures_by_task(lines: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The figures of each task from the lines of an answers.jsonl, in the order of first appearance."""
    by_task: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        by_task[line["task"]].append(line)
    return {key: dict(_figures(Task.parse(key), group)) for key, group in by_task.items()}


def _figures(task: Task, lines: list[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    yield "num_samples", len(lines)
    if task.name in ("asr", "st", "s2st"):
        yield from _compared(task, lines, "hypothesis").items()
    heard = [line for line in lines if "heard" in line]
    if task.name in ("tts", "s2st") and heard:
        yield "heard", _compared(task, heard, "heard")


def _compared(task: Task, lines: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """Figures of one of the texts of lines; words are counted where the references part them."""
    references, texts = [line["reference"] for line in lines], [line[key] for line in lines]
    found = score(references, texts, language=task.target)
    has_words = parts_words(task.target) or any(" " in reference.strip() for reference in references)
    figures: dict[str, Any] = {"word_error_rate": found.word_error_rate} if has_words else {}
    figures["character_error_rate"] = found.character_error_rate
    if task.name in ("st", "s2st"):
        translated = translation_score(references, texts, language=task.target)
        figures |= vars(translated)
    return figures


def _write_down(answers: Iterable[Evaluated], folder: Path, *, sample_rate: int) -> list[dict[str, Any]]:
    """The lines of answers.jsonl, which is written; what was said goes to wavs."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, one in enumerate(answers):
        line = {
            "task": one.utterance.task.key,
            "audio": place_of(one.utterance) if one.utterance.recordings else "",
            "reference": one.reference,
            "hypothesis": one.text,
        }
        if one.waveform_N is not None:
            line["wav"] = f"{SPOKEN}/{number:06}.wav"
            (folder / SPOKEN).mkdir(exist_ok=True)
            import_soundfile().write(folder / line["wav"], one.waveform_N, sample_rate)
        lines.append(line)
    _write_lines(folder / ANSWERS, lines)
    return lines


def _hear(lines: list[dict[str, Any]], *, folder: Path, judges: Mapping[str, str]) -> None:
    """Give each line that has a wav what the judge of its language hears in it."""
    by_language: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        if "wav" in line:
            by_language[Task.parse(line["task"]).target].append(line)
    for language, group in by_language.items():
        if command := judges.get(language, judges.get("")):
            heard = judge(command, [folder / line["wav"] for line in group], language=language)
            for line, text in zip(group, heard, strict=True):
                line["heard"] = text


def _write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    with replacing(path) as aside:
        aside.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
