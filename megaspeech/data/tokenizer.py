"""The text tokenizer: sentencepiece, trained on the run's own text, with the task prompts as symbols of its own.

Special ids follow the moshi runtime: unknown 0 (which doubles as EPAD), begin 1, end 2, PAD 3.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from megaspeech.data.tasks import PROMPT_SYMBOLS, Task

NUM_SPECIAL = 4


class Tokenizer:
    """A sentencepiece model and what speech streams need of it. `model` is the content of its `.model` file."""

    def __init__(self, model: bytes) -> None:
        self.model = model
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._first_text_id = NUM_SPECIAL + len(PROMPT_SYMBOLS)
        if self.processor.piece_to_id(list(PROMPT_SYMBOLS)) != list(range(NUM_SPECIAL, self._first_text_id)):
            raise ValueError(
                f"the sentencepiece model lacks the prompt symbols {' '.join(PROMPT_SYMBOLS)} at ids from "
                f"{NUM_SPECIAL} on; train it with megaspeech.data.tokenizer.train_tokenizer"
            )

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a `.model` file. Raises ValueError naming the path where there is none."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"data.tokenizer: there is no file {path}; train it with tools/prepare_data.py")
        return cls(path.read_bytes())

    @property
    def vocabulary_size(self) -> int:
        """Number of pieces, special ones included."""
        return self.processor.vocab_size()

    @property
    def fingerprint(self) -> str:
        """A short hash of the model, written into shards so that another tokenizer is refused."""
        return hashlib.sha256(self.model).hexdigest()[:16]

    def encode_word(self, word: str) -> list[int]:
        """Piece ids of one word, its leading space mark included."""
        return self.processor.encode(word)

    def encode_words(self, words: Sequence[str], *, told: bool) -> list[list[int]]:
        """Piece ids of each word of a sample.

        Where the model is told what to say, end of sentence follows the last word's pieces: whether one more word
        comes cannot be guessed, and a model that has to would fall silent too early, or wait for more.
        """
        pieces = [self.encode_word(word) for word in words]
        if told and pieces:
            pieces[-1] = [*pieces[-1], self.processor.eos_id()]
        return pieces

    def encode_prompt(self, task: Task) -> list[int]:
        """Piece ids of the task's prompt, one a frame."""
        return self.processor.piece_to_id(list(task.prompt))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids of a text stream; special and prompt ids, PAD and EPAD among them, are dropped."""
        return self.processor.decode([i for i in ids if self._first_text_id <= i < self.vocabulary_size])


def train_tokenizer(texts: Sequence[str], *, vocabulary_size: int) -> Tokenizer:
    """Train a unigram sentencepiece model of exactly `vocabulary_size` pieces on `texts`.

    Where the text has not that many pieces, unused symbols fill up, because the model's text logits and the
    tokenizer must have one size (the runtime looks up every id it samples).

    Raises:
        ValueError: no text, or too few pieces for the characters of the text.
    """
    if not texts:
        raise ValueError("there is no text to train a tokenizer on; the train manifest is empty")
    tokenizer = _train(texts, vocabulary_size, unused=0)
    missing = vocabulary_size - tokenizer.vocabulary_size
    return _train(texts, vocabulary_size, unused=missing) if missing else tokenizer


def _train(texts: Sequence[str], vocabulary_size: int, *, unused: int) -> Tokenizer:
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
            user_defined_symbols=[*PROMPT_SYMBOLS, *(f"<unused_{i}>" for i in range(unused))],
            num_threads=1,  # more threads sum in another order: the model would differ from run to run
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"streams.text_cardinality = {vocabulary_size} is too small for this text: {error}") from error
    return Tokenizer(model.getvalue())
