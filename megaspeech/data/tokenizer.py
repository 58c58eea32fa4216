"""The text tokenizer: any sentencepiece model that has the prompts' symbols, or one trained on the run's own text.

What is special about an id is looked up in the model, not assumed: prompts, PAD and EPAD may stand anywhere among the
pieces that text never holds (control, unknown and unused ones). A model that is trained here has the ids of the moshi
runtime: unknown 0 (which doubles as EPAD), begin 1, end 2, PAD 3, and the prompts from 4 on.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from megaspeech.config.schema import StreamsSection
from megaspeech.data.tasks import TASKS, Task, prompt_symbols

SPACE = "\u2581"
"""How sentencepiece writes the space that a word begins with."""

EXTEND = "tools/extend_tokenizer.py"
# Control characters that are no white space, soft hyphens, marks of writing direction, halves of surrogate pairs: they
# are not spoken, and the last cannot even be encoded.
_NOT_TEXT = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u200e\u200f\u202a-\u202e\u2060-\u2069\ud800-\udfff\ufeff]"
)
# Thai to Lao, Myanmar, Khmer, kana, Han: written without spaces between words.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)


@dataclass(frozen=True)
class SpelledWord:
    """A word as it is written: its pieces (none if all are unknown), and how much of the text they stand for.

    `num_characters` leaves spaces out; `num_unknown` counts the stretches that the tokenizer has no piece for.
    """

    pieces: tuple[int, ...]
    num_characters: int
    num_unknown: int


class Tokenizer:
    """A sentencepiece model and what speech streams need of it.

    Args:
        model: the content of its `.model` file.
        name: for messages.

    Raises:
        ValueError: it is no sentencepiece model, or one that does not mark where words begin.
    """

    def __init__(self, model: bytes, *, name: str = "the tokenizer") -> None:
        self.model, self.name = model, name
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"{name}: not a sentencepiece model ({error}); name a .model file") from error
        if not self.processor.normalize("a").startswith(SPACE):
            raise ValueError(
                f"{name}: words would run together, because it marks no word by a space before it; take a model "
                f"trained with add_dummy_prefix and without treat_whitespace_as_suffix"
            )
        ids = list(range(self.vocabulary_size))
        kinds = (self.processor.is_control, self.processor.is_unknown, self.processor.is_unused)
        self._is_text = [not any(one) for one in zip(*(kind(ids) for kind in kinds), strict=True)]

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a `.model` file. Raises ValueError naming the path where there is none, or it is something else."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"data.tokenizer: there is no file {path}; train it with tools/prepare_data.py")
        return cls(path.read_bytes(), name=str(path))

    @property
    def vocabulary_size(self) -> int:
        """Number of pieces, special ones included."""
        return self.processor.vocab_size()

    @property
    def fingerprint(self) -> str:
        """A short hash of the model, written into shards so that another tokenizer is refused."""
        return hashlib.sha256(self.model).hexdigest()[:16]

    def is_text(self, token: int) -> bool:
        """Whether `token` stands for text: no prompt, PAD, EPAD, zero or initial token, or end of sentence."""
        return 0 <= token < len(self._is_text) and self._is_text[token]

    def normalise(self, text: str) -> str:
        """`text` as it is written: the model's own normalisation (NFKC and more, as a rule), without what is no text,
        words separated by one space."""
        normal = self.processor.normalize(clean(text))
        return " ".join(normal.replace(SPACE, " ").split())

    def spell(self, text: str, *, ends: bool = False) -> list[SpelledWord]:
        """The words of a text, in order; in scripts without spaces between words, every piece is one.

        Args:
            text: as people write it.
            ends: end of sentence follows the last word's pieces. So it is where the model is told what to say: whether
                one more word comes cannot be guessed, and a model that has to would fall silent too early, or wait.
        """
        groups: list[list] = []
        before = ""
        for piece in self.processor.encode_as_proto(self.normalise(text)).pieces:
            if not groups or begins_word(piece.piece, after=before):
                groups.append([])
            groups[-1].append(piece)
            before = piece.piece
        words = [self._word(group) for group in groups]
        if ends and any(word.pieces for word in words):
            last = words[-1]
            words[-1] = SpelledWord((*last.pieces, self._end_id()), last.num_characters, last.num_unknown)
        return words

    def _word(self, pieces: Sequence) -> SpelledWord:
        known = [piece for piece in pieces if piece.id != self.processor.unk_id()]
        ids = tuple(piece.id for piece in known) if _num_characters(known) else ()  # not the mark of a space alone
        return SpelledWord(ids, _num_characters(pieces), num_unknown=len(pieces) - len(known))

    def _end_id(self) -> int:
        end = self.processor.eos_id()
        if end < 0:
            raise ValueError(f"{self.name}: it has no end of sentence; add one with {EXTEND}")
        return end

    def encode_word(self, word: str) -> list[int]:
        """Piece ids of one word, its leading space mark included."""
        return [piece for part in self.spell(word) for piece in part.pieces]

    def encode_prompt(self, task: Task) -> list[int]:
        """Piece ids of the task's prompt, one a frame. Raises ValueError naming the symbols that are missing."""
        missing = [symbol for symbol in task.prompt if not self._has_symbol(symbol)]
        if missing:
            raise ValueError(
                f"{self.name}: it lacks the prompt symbols {' '.join(missing)} of {task.key}; add them with "
                f"{EXTEND} --languages {task.target}"
            )
        return self.processor.piece_to_id(list(task.prompt))

    def _has_symbol(self, symbol: str) -> bool:
        token = self.processor.piece_to_id(symbol)  # that of the unknown piece, where there is none
        return self.processor.id_to_piece(token) == symbol and self.processor.is_control(token)

    @property
    def knows_tasks(self) -> bool:
        """Whether it has the prompt of any task."""
        return any(self._has_symbol(f"<{task}>") for task in TASKS)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids of a text stream; prompts, PAD, EPAD and all else that is no text are dropped."""
        return self.processor.decode([token for token in ids if self.is_text(token)])

    def check_streams(self, streams: StreamsSection, *, tasks: Iterable[Task] = ()) -> None:
        """See that the model fits `[streams]`, and has the prompts of `tasks`.

        Raises:
            ValueError: names the key, its value and what it should be.
        """
        if streams.text_cardinality != self.vocabulary_size:
            raise ValueError(
                f"streams.text_cardinality = {streams.text_cardinality}, but {self.name} has {self.vocabulary_size} "
                f"pieces; set streams.text_cardinality = {self.vocabulary_size}, or make it anew for these streams"
            )
        for key in ("text_pad_id", "text_end_pad_id"):
            token = getattr(streams, key)
            if token >= self.vocabulary_size or self.is_text(token):
                what = "no piece" if token >= self.vocabulary_size else repr(self.processor.id_to_piece(token))
                raise ValueError(
                    f"streams.{key} = {token} is {what} of {self.name}; name a piece that text never holds"
                    + (f": {self.processor.pad_id()} is its PAD" if self.processor.pad_id() >= 0 else f" ({EXTEND})")
                )
        for task in tasks:
            self.encode_prompt(task)


def _num_characters(pieces: Sequence) -> int:
    """Of the text that they stand for, spaces left out; of the bytes of one character the last stands for it."""
    return sum(len(piece.surface.replace(" ", "")) for piece in pieces)


def clean(text: str) -> str:
    """`text` without the characters that are no text; sentencepiece's mark of a space becomes one."""
    return _NOT_TEXT.sub("", text).replace(SPACE, " ")


def begins_word(piece: str, *, after: str) -> bool:
    """Whether a piece begins a word, where `after` is the piece before it (empty for none): it has the mark of a space,
    or is of a script that has no spaces between words."""
    return piece.startswith(SPACE) or (_UNSPACED.match(piece) is not None and after != SPACE)


def train_tokenizer(texts: Sequence[str], *, vocabulary_size: int, languages: Iterable[str]) -> Tokenizer:
    """Train a unigram sentencepiece model of exactly `vocabulary_size` pieces on `texts`, always the same one.

    Where the text has not that many pieces, unused symbols fill up, because the model's text logits and the
    tokenizer must have one size (the runtime looks up every id it samples).

    Args:
        texts: of all languages, in the proportion that pieces shall be given to them.
        vocabulary_size: `streams.text_cardinality`.
        languages: that the model shall write; each has a prompt symbol.

    Raises:
        ValueError: no text, or too few pieces for the characters of the text.
    """
    texts = list(filter(None, map(clean, texts)))
    if not texts:
        raise ValueError("there is no text to train a tokenizer on; the train manifest is empty")
    symbols = prompt_symbols(languages)
    tokenizer = _train(texts, vocabulary_size, symbols=symbols)
    missing = vocabulary_size - tokenizer.vocabulary_size
    return _train(texts, vocabulary_size, symbols=symbols + unused_symbols(missing)) if missing else tokenizer


def unused_symbols(count: int, *, first: int = 0) -> tuple[str, ...]:
    """Symbols that fill a vocabulary up."""
    return tuple(f"<unused_{number}>" for number in range(first, first + count))


def _train(texts: Sequence[str], vocabulary_size: int, *, symbols: Sequence[str]) -> Tokenizer:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocabulary_size,
            model_type="unigram",
            character_coverage=1.0,
            hard_vocab_limit=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            control_symbols=list(symbols),  # which no text is encoded to, though it may hold "<en>"
            # Longer ones would be left out in silence; less than 10 is refused.
            max_sentence_length=max(10, *(len(text.encode()) for text in texts)),
            num_threads=1,  # more threads sum in another order: the model would differ from run to run
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"streams.text_cardinality = {vocabulary_size} is too small for this text: {error}") from error
    return Tokenizer(model.getvalue())
