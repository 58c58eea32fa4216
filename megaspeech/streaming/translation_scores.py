"""BLEU and chrF of a corpus by sacrebleu, so that figures can be compared with those of papers.

BLEU (Papineni et al., 2002) counts the words that its tokenizer finds: 13a's, as most papers have it; sacrebleu's own
for Chinese; single characters in the other languages that part no words by spaces (`ja-mecab` would need a dictionary).
chrF (Popovic, 2015) counts stretches of up to six characters, and depends on no tokenizer. Both are from 0 to 100; the
signatures say with what settings and version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from megaspeech.preparation.manifests.line import UNSPACED


@dataclass(frozen=True)
class TranslationScore:
    """0 to 100, and what to quote with the figures."""

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str


def translation_score(references: Sequence[str], hypotheses: Sequence[str], *, language: str) -> TranslationScore:
    """Score a corpus.

    Args:
        references, hypotheses: texts, one a sample.
        language: of the texts, which settles BLEU's tokenizer.

    Raises:
        ValueError: there is no sample.
        ImportError: sacrebleu is not installed.
    """
    if not references:
        raise ValueError("there are no translations to score; name a manifest that has some")
    metrics = _import_sacrebleu().metrics
    bleu, chrf = metrics.BLEU(tokenize=bleu_tokenizer(language)), metrics.CHRF()
    found = [metric.corpus_score(list(hypotheses), [list(references)]).score for metric in (bleu, chrf)]
    return TranslationScore(*found, str(bleu.get_signature()), str(chrf.get_signature()))


def bleu_tokenizer(language: str) -> str:
    """sacrebleu's name of the tokenizer for texts of a language: `en`, `ja`, `zh-Hant`."""
    main = language.partition("-")[0]
    if main in ("zh", "yue"):
        return "zh"
    return "char" if main in UNSPACED else "13a"


def _import_sacrebleu() -> ModuleType:
    try:
        import sacrebleu.metrics
    except ImportError as error:
        raise ImportError(
            f"scoring translations needs sacrebleu ({error}): pip install megaspeech[evaluation]"
        ) from None
    return sacrebleu
