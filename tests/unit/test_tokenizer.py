"""The tokenizer: as many pieces as the model has text logits, the runtime's special ids, and text that comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece

from megaspeech.config.schema import StreamsSection
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


@pytest.mark.parametrize(
    "text, written",
    [
        ("  three\tseven\n", "three seven"),
        ("\uff54\uff48\uff52\uff45\uff45\u3000\uff17", "three 7"),  # full width, and the wide space
        ("\ufeffthr\u00adee\x00 \u202eseven\u202c\x1b", "three seven"),
        ("three\u2581seven", "three seven"),
        ("\ud800three\udfff", "three"),
        ("\uff76\uff9e\uff77\uff9e", "\u30ac\u30ae"),  # half width katakana with their marks
        (" \t\u200b\x07", ""),
    ],
)
def test_text_is_normalised(tokenizer: Tokenizer, text: str, written: str) -> None:
    assert tokenizer.normalise(text) == written
    assert tokenizer.normalise(written) == written


def test_words_are_spelled_one_by_one(tokenizer: Tokenizer) -> None:
    words = tokenizer.spell(" three  seven ")
    assert [tokenizer.decode(word.pieces) for word in words] == ["three", "seven"]
    assert [word.num_characters for word in words] == [5, 5] and not any(word.num_unknown for word in words)
    ending = tokenizer.spell("three seven", ends=True)
    assert ending[0] == words[0] and ending[1].pieces == (*words[1].pieces, 2)
    assert tokenizer.spell("") == tokenizer.spell(" ", ends=True) == []


def test_without_spaces_every_piece_is_a_word(tokenizer: Tokenizer) -> None:
    words = tokenizer.spell("三七 二八")
    assert [tokenizer.decode(word.pieces) for word in words] == list("三七二八")
    assert [word.num_characters for word in words] == [1, 1, 1, 1]
    assert tokenizer.decode(piece for word in words for piece in word.pieces) == "三七 二八"
    assert len(tokenizer.spell("seven")) == 1


def test_what_is_unknown_is_left_out_and_counted(tokenizer: Tokenizer) -> None:
    words = tokenizer.spell("three qq 山 seven山")
    pieces = [piece for word in words for piece in word.pieces]
    assert tokenizer.decode(pieces).split() == ["three", "seven"] and tokenizer.processor.unk_id() not in pieces
    assert sum(word.num_unknown for word in words) == 3 and sum(word.num_characters for word in words) == 5 + 2 + 1 + 6
    assert [word.pieces for word in tokenizer.spell("山", ends=True)] == [()]


def test_text_cannot_hold_a_prompt(tokenizer: Tokenizer) -> None:
    assert tokenizer.processor.piece_to_id("<asr>") not in tokenizer.encode_word("<asr>")
    assert not any(tokenizer.is_text(token) for token in (*range(NUM_SPECIAL + len(PROMPTS)), -1, 64))
    assert all(tokenizer.is_text(token) for token in tokenizer.encode_word("seven"))


def test_a_language_without_prompt_names_the_command(tokenizer: Tokenizer) -> None:
    with pytest.raises(
        ValueError, match=r"lacks the prompt symbols <fr> of st-en-fr; .*extend_tokenizer.py --languages"
    ):
        tokenizer.encode_prompt(Task("st", "en", "fr"))


def streams(**changes: int) -> StreamsSection:
    sizes = {"text_cardinality": 64, "num_codebooks": 1, "num_given_codebooks": 1, "cardinality": 8, **changes}
    return StreamsSection(delays=(0, 0, 0), **sizes)


def test_streams_that_do_not_fit_the_model(tokenizer: Tokenizer) -> None:
    space = tokenizer.processor.piece_to_id("\u2581")
    tokenizer.check_streams(streams(), tasks=[Task("asr", "ja", "en")])
    for changes, complaint in (
        ({"text_cardinality": 65}, "set streams.text_cardinality = 64"),
        ({"text_pad_id": space}, f"streams.text_pad_id = {space} is .* text never holds: 3 is its PAD"),
        ({"text_end_pad_id": 64}, "streams.text_end_pad_id = 64 is no piece"),
    ):
        with pytest.raises(ValueError, match=complaint):
            tokenizer.check_streams(streams(**changes))
    with pytest.raises(ValueError, match="<de>"):
        tokenizer.check_streams(streams(), tasks=[Task("asr", "de", "de")])


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.model"
    path.write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"x\.model: not a sentencepiece model"):
        Tokenizer.load(path)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(path.with_suffix("")),
        vocab_size=50,
        hard_vocab_limit=False,
        minloglevel=2,
        add_dummy_prefix=False,
    )
    with pytest.raises(ValueError, match="words would run together"):
        Tokenizer.load(path)
