"""The utterances of manifests that a model is asked, in any format that preparation reads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from megaspeech.config.preparation import SourceSection
from megaspeech.data.tasks import Task
from megaspeech.preparation.sources import Refused, list_units, read_unit
from megaspeech.preparation.utterance import Utterance

LINES_AT_ONCE = 10_000


def read_manifests(
    paths: Iterable[str | Path], *, format: str = "nemo", task: str = ""
) -> tuple[list[Utterance], list[Refused]]:
    """(utterances in order, lines that cannot be read and why).

    Args:
        paths: manifests, folders of audio, or patterns of them.
        format: see `[[sources]]`.
        task: such as `asr-en`; that of lines which name none, and the only one that is taken. All are, without it.

    Raises:
        ValueError: a path names nothing, `task` is none, or without it lines say too little to know theirs.
    """
    wanted = Task.parse(task) if task else None
    known = {"task": wanted.name, "source_lang": wanted.source, "target_lang": wanted.target} if wanted else {}
    utterances: list[Utterance] = []
    refused: list[Refused] = []
    for path in paths:
        try:
            source = SourceSection(name="evaluation", format=format, valid=str(path), **known)
        except ValidationError as error:
            raise ValueError(f"--format {format}: {error.errors()[0]['msg']}") from error
        for unit in list_units([source], lines_per_shard=LINES_AT_ONCE):
            for line in read_unit(unit):
                if isinstance(line, Refused):
                    refused.append(line)
                elif wanted in (None, line.task):
                    utterances.append(line)
    return utterances, refused
