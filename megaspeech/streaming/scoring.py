"""Word and character errors of answers, by task.

Both are counted in `plain` text. Words mean something where they are parted by spaces; in Japanese or Chinese as people
write it, the rate of characters does.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jiwer

from megaspeech.data.tokenizer import Tokenizer
from megaspeech.preparation.manifests.line import UNSPACED
from megaspeech.streaming.session import Answer


@dataclass(frozen=True)
class Score:
    """Errors over some samples; `num_words` and `num_characters` count those of the references."""

    num_samples: int
    num_words: int
    num_word_errors: int
    num_characters: int
    num_character_errors: int

    @property
    def word_error_rate(self) -> float | None:
        """Errors a reference word, a fraction (above 1 where much is inserted); None without reference words."""
        return self.num_word_errors / self.num_words if self.num_words else None

    @property
    def character_error_rate(self) -> float | None:
        """The same of characters."""
        return self.num_character_errors / self.num_characters if self.num_characters else None


def answer_text(answer: Answer, *, tokenizer: Tokenizer) -> str:
    """What an answer wrote, prompt, PAD and EPAD left out."""
    return tokenizer.decode(answer.text.tolist())


def plain(text: str) -> str:
    """Text as recognisers are compared: lower case, without punctuation and symbols, one space between words.

    Apostrophes go without a trace: "Don't!" is "dont".
    """
    kept = []
    for character in text.casefold():
        if character not in "'\u2019":
            kept.append(" " if unicodedata.category(character)[0] in "PSZC" else character)
    return " ".join("".join(kept).split())


def parts_words(language: str) -> bool:
    """Whether a language is written with spaces between words."""
    return language.partition("-")[0] not in UNSPACED


def score(references: Sequence[str], hypotheses: Sequence[str], *, language: str) -> Score:
    """Count errors over a corpus: substitutions, deletions and insertions of the best alignment of each pair.

    An empty hypothesis counts one deletion a reference word, an empty reference one insertion a hypothesis word.

    Args:
        references: each sample's text as it should be.
        hypotheses: as it came out, in the same order.
        language: of both; spaces are no characters in a language that parts no words.

    Raises:
        ValueError: there are not as many hypotheses as references.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references but {len(hypotheses)} hypotheses; give one for each sample")
    wanted, found = ([plain(text) for text in texts] for texts in (references, hypotheses))
    words = [[text.split() for text in texts] for texts in (wanted, found)]
    separator = " " if parts_words(language) else ""
    characters = [[list(separator.join(one)) for one in texts] for texts in words]
    return Score(
        num_samples=len(references),
        num_words=sum(map(len, words[0])),
        num_word_errors=_errors(*words),
        num_characters=sum(map(len, characters[0])),
        num_character_errors=_errors(*characters),
    )


def _errors(references: Sequence[list[str]], hypotheses: Sequence[list[str]]) -> int:
    """Of the alignments of pairs of lists of tokens."""
    # jiwer refuses empty references, and parts tokens by spaces, so that a space among characters needs another name.
    pairs = [(r, h) for r, h in zip(references, hypotheses, strict=True) if r]
    errors = sum(len(h) for r, h in zip(references, hypotheses, strict=True) if not r)
    if pairs:
        counts = jiwer.process_words([_joined(r) for r, _ in pairs], [_joined(h) for _, h in pairs])
        errors += counts.substitutions + counts.deletions + counts.insertions
    return errors


def _joined(tokens: Sequence[str]) -> str:
    return " ".join("\u2423" if token == " " else token for token in tokens)


def result_entries(scores: Mapping[str, Score]) -> dict[str, float | None]:
    """As `results.json` spells them: `{"asr_en_wer": 0.031, "st_ja_en_wer": 0.08}`, fractions."""
    return {f"{key.replace('-', '_')}_wer": value.word_error_rate for key, value in scores.items()}
