"""The utterances of manifests that a model is asked, in any format that preparation reads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from megaspeech.config.preparation import SourceSection
from megaspeech.preparation.sources import Refused, list_units, read_unit
from megaspeech.preparation.utterance import Utterance

LINES_AT_ONCE = 10_000


def read_manifests(
    paths: Iterable[str | Path],
    *,
    format: str = "nemo",
    task: str = "",
    source_lang: str = "",
    target_lang: str = "",
) -> tuple[list[Utterance], list[Refused]]:
    """(utterances in order, lines that cannot be read and why).

    Args:
        paths: manifests, folders of audio, or patterns of them.
        format, task, source_lang, target_lang: as those of `[[sources]]`.

    Raises:
        ValueError: a path names nothing, or its lines say too little to know their task.
    """
    utterances: list[Utterance] = []
    refused: list[Refused] = []
    for path in paths:
        try:
            source = SourceSection(
                name="evaluation", format=format, valid=str(path), task=task, source_lang=source_lang,
                target_lang=target_lang,
            )  # fmt: skip
        except ValidationError as error:
            raise ValueError(f"--format {format}: {error.errors()[0]['msg']}") from error
        for unit in list_units([source], lines_per_shard=LINES_AT_ONCE):
            for line in read_unit(unit):
                (utterances if isinstance(line, Utterance) else refused).append(line)
    return utterances, refused
