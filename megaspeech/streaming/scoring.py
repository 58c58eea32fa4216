"""Word and character error rates of answers, by task.

Both count on `plain` text. A word error rate means something where words are parted by spaces; elsewhere, in Japanese
or Chinese, the rate of characters does.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jiwer

from megaspeech.data.tasks import Task
from megaspeech.data.tokenizer import Tokenizer
from megaspeech.preparation.manifests.line import UNSPACED
from megaspeech.streaming.session import Answer

Words = Sequence[str]


@dataclass(frozen=True)
class Score:
    """Word errors over some samples; `num_words` counts the words of the references."""

    num_samples: int
    num_words: int
    num_errors: int

    @property
    def word_error_rate(self) -> float | None:
        """Errors a reference word, a fraction (above 1 where much is inserted); None without reference words."""
        return self.num_errors / self.num_words if self.num_words else None


def plain(text: str) -> str:
    """Text as recognisers are compared: lower case, without punctuation and symbols, one space between words.

    Apostrophes go without a trace: "Don't!" is "dont".
    """
    kept = []
    for character in text.casefold():
        if character in "'\u2019":
            continue
        kept.append(" " if unicodedata.category(character)[0] in "PSZC" else character)
    return " ".join("".join(kept).split())


def characters(text: str, *, language: str) -> list[str]:
    """The characters that errors are counted in: of `plain` text, without spaces in languages that part no words."""
    found = plain(text)
    return list(found.replace(" ", "") if language.partition("-")[0] in UNSPACED else found)


def answer_words(answer: Answer, *, tokenizer: Tokenizer) -> list[str]:
    """The words that an answer wrote, prompt, PAD and EPAD left out."""
    return tokenizer.decode(answer.text.tolist()).split()


def score(references: Sequence[Words], hypotheses: Sequence[Words]) -> Score:
    """Count word errors over a corpus: substitutions, deletions and insertions of the best alignment of each pair.

    An empty hypothesis counts one deletion a reference word, an empty reference one insertion a hypothesis word.

    Args:
        references: the words of each sample as they should be.
        hypotheses: the words of each sample as they came out, in the same order.

    Raises:
        ValueError: there are not as many hypotheses as references.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references but {len(hypotheses)} hypotheses; give one for each sample")
    num_words = sum(len(reference) for reference in references)
    # jiwer refuses empty references.
    num_errors = sum(len(h) for r, h in zip(references, hypotheses, strict=True) if not r)
    pairs = [(" ".join(r), " ".join(h)) for r, h in zip(references, hypotheses, strict=True) if r]
    if pairs:
        counts = jiwer.process_words([r for r, _ in pairs], [h for _, h in pairs])
        num_errors += counts.substitutions + counts.deletions + counts.insertions
    return Score(num_samples=len(references), num_words=num_words, num_errors=num_errors)


def word_error_rate(references: Sequence[Words], hypotheses: Sequence[Words]) -> float:
    """Word errors over the corpus divided by its reference words, a fraction. See `score`.

    Raises:
        ValueError: unequal numbers, or no reference word at all.
    """
    rate = score(references, hypotheses).word_error_rate
    if rate is None:
        raise ValueError("no reference holds a word, so there is no error rate; check the manifest's text")
    return rate


def score_by_task(
    tasks: Sequence[Task], *, references: Sequence[Words], hypotheses: Sequence[Words]
) -> dict[str, Score]:
    """A score for every task key (`asr-en`, `st-ja-en`), in the order of first appearance.

    Raises:
        ValueError: the three do not have one length.
    """
    if not len(tasks) == len(references) == len(hypotheses):
        raise ValueError(
            f"{len(tasks)} tasks, {len(references)} references, {len(hypotheses)} hypotheses; give one for each sample"
        )
    groups: dict[str, list[tuple[Words, Words]]] = defaultdict(list)
    for task, reference, hypothesis in zip(tasks, references, hypotheses, strict=True):
        groups[task.key].append((reference, hypothesis))
    return {key: score([r for r, _ in pairs], [h for _, h in pairs]) for key, pairs in groups.items()}


def result_entries(scores: Mapping[str, Score]) -> dict[str, float | None]:
    """As `results.json` spells them: `{"asr_en_wer": 0.031, "st_ja_en_wer": 0.08}`, fractions."""
    return {f"{key.replace('-', '_')}_wer": value.word_error_rate for key, value in scores.items()}


def format_table(scores: Mapping[str, Score]) -> str:
    """A table for the terminal, one line a task."""
    lines = [f"{'task':<12} {'samples':>8} {'words':>8} {'errors':>8} {'word error':>11}"]
    for key, value in scores.items():
        rate = "-" if value.word_error_rate is None else f"{value.word_error_rate:.1%}"
        lines.append(f"{key:<12} {value.num_samples:>8} {value.num_words:>8} {value.num_errors:>8} {rate:>11}")
    return "\n".join(lines)
