"""The tokenizer: as many pieces as the model has text logits, the runtime's special ids, and text that comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece

from megaspeech.data.tasks import TASKS, Task, prompt_symbols
from megaspeech.data.tokenizer import Tokenizer, train_tokenizer

ENGLISH = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
JAPANESE = list("零一二三四五六七八九")
LANGUAGES = ("en", "ja")
PROMPTS = prompt_symbols(LANGUAGES)
NUM_SPECIAL = 4
TEXTS = [" ".join(words[i:] + words[:i]) for words in (ENGLISH, JAPANESE) for i in range(10)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, vocabulary_size=64, languages=LANGUAGES)


@pytest.mark.parametrize("size", [48, 64, 300])
def test_vocabulary_has_exactly_the_size_asked_for(size: int) -> None:
    """The runtime looks up every id it samples: the text logits and the tokenizer must have one size."""
    tokenizer = train_tokenizer(TEXTS, vocabulary_size=size, languages=LANGUAGES)
    assert tokenizer.vocabulary_size == size
    assert tokenizer.decode(range(size)) is not None
    assert len({tokenizer.processor.id_to_piece(i) for i in range(size)}) == size


def test_special_ids_are_the_runtimes(tokenizer: Tokenizer) -> None:
    processor = tokenizer.processor
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id()) == (0, 1, 2, 3)
    assert processor.piece_to_id(list(PROMPTS)) == list(range(NUM_SPECIAL, NUM_SPECIAL + len(PROMPTS)))


def test_prompts_are_one_piece_a_symbol(tokenizer: Tokenizer) -> None:
    prompts = {tuple(tokenizer.encode_prompt(Task(name, "en", target))) for name in TASKS for target in LANGUAGES}
    assert len(prompts) == len(TASKS) * len(LANGUAGES) and {len(prompt) for prompt in prompts} == {2}
    assert tokenizer.encode_prompt(Task("st", "ja", "en")) == tokenizer.processor.piece_to_id(["<st>", "<en>"])


@pytest.mark.parametrize("words", [ENGLISH, JAPANESE])
def test_words_one_by_one_decode_to_the_text(tokenizer: Tokenizer, words: list[str]) -> None:
    pieces = [tokenizer.encode_word(word) for word in words]
    assert tokenizer.decode([piece for word in pieces for piece in word]) == " ".join(words)
    assert all(piece >= NUM_SPECIAL + len(PROMPTS) for word in pieces for piece in word)


def test_decoding_drops_what_is_no_text(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode_prompt(Task("asr", "en", "en"))
    seven, two = tokenizer.encode_word("seven"), tokenizer.encode_word("two")
    assert tokenizer.decode([*prompt, 3, 3, 0, *seven, 3, 0, *two, 3, -1, tokenizer.vocabulary_size]) == "seven two"
    assert tokenizer.decode([*prompt, 3, 0]) == ""


def test_training_is_deterministic_and_the_fingerprint_tells_models_apart(tokenizer: Tokenizer) -> None:
    again, other = (
        train_tokenizer(TEXTS, vocabulary_size=64, languages=LANGUAGES),
        train_tokenizer(TEXTS, vocabulary_size=65, languages=LANGUAGES),
    )
    assert again.model == tokenizer.model and again.fingerprint == tokenizer.fingerprint
    assert other.fingerprint != tokenizer.fingerprint and len(tokenizer.fingerprint) == 16


def test_file_holds_the_model(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tokenizer.model)
    assert Tokenizer.load(path).fingerprint == tokenizer.fingerprint
    assert sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size() == 64


def test_missing_file_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.model; train it"):
        Tokenizer.load(tmp_path / "absent.model")


def test_too_small_a_vocabulary_names_the_key() -> None:
    with pytest.raises(ValueError, match="streams.text_cardinality = 20 is too small"):
        train_tokenizer(TEXTS, vocabulary_size=20, languages=LANGUAGES)


def test_no_text() -> None:
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer([], vocabulary_size=64, languages=LANGUAGES)
