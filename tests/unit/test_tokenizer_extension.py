"""Models that others trained, extended: every id means what it meant, and what is missing is there."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from megaspeech.config.schema import StreamsSection
from megaspeech.data.tasks import Task, prompt_symbols
from megaspeech.data.tokenizer import Tokenizer
from megaspeech.data.tokenizer_extension import extend_tokenizer

ROOT = Path(__file__).resolve().parents[2]
ENGLISH = ["the weather is fine today", "she sells sea shells", "seven thin things", "to be or not to be"] * 4
JAPANESE = ["今日は天気がいいですね", "明日は雨が降るでしょう", "音声を認識する", "七つの海を渡る"] * 4


def trained(texts: list[str], **settings: object) -> bytes:
    model = io.BytesIO()
    settings = {"vocab_size": 60, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1, **settings}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **settings)
    return model.getvalue()


UNIGRAM = trained(ENGLISH, pad_id=3)
# As Llama's: BPE, bytes for what is unknown, no normalisation, no PAD.
LIKE_LLAMA = trained(
    ENGLISH, model_type="bpe", byte_fallback=True, vocab_size=330, normalization_rule_name="identity", pad_id=-1
)


def pieces(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.processor.id_to_piece(token) for token in range(tokenizer.vocabulary_size)]


@pytest.mark.parametrize("model", [UNIGRAM, LIKE_LLAMA], ids=["unigram", "like Llama"])
def test_what_is_there_keeps_its_ids_and_its_pieces(model: bytes) -> None:
    before, after = Tokenizer(model), extend_tokenizer(model, languages=["ja", "en"], symbols=["[laugh]"])
    assert pieces(after)[: before.vocabulary_size] == pieces(before)
    for text in (*ENGLISH, "\uff33hells today ", "unheard-of 山"):
        assert after.processor.encode(text) == before.processor.encode(text)
    prompts = [after.encode_prompt(Task("st", "en", target)) for target in ("en", "ja")]
    assert all(before.vocabulary_size <= token < after.vocabulary_size for prompt in prompts for token in prompt)
    assert not any(after.is_text(token) for prompt in prompts for token in prompt)
    assert after.processor.pad_id() >= 0 and after.spell("to be", ends=True)[-1].pieces[-1] == after.processor.eos_id()
    laugh = after.processor.piece_to_id("[laugh]")
    assert after.is_text(laugh) and laugh in after.processor.encode("she[laugh]sells")
    assert extend_tokenizer(after.model, languages=["en", "ja"], symbols=["[laugh]"]).model == after.model


def test_bytes_of_an_unknown_character_are_one_word() -> None:
    after = extend_tokenizer(LIKE_LLAMA, languages=["ja"])
    (word,) = after.spell("山")
    assert len(word.pieces) >= 3 and (word.num_characters, word.num_unknown) == (1, 0)
    assert after.decode(word.pieces) == "山" and all(map(after.is_text, word.pieces))


def test_pad_of_the_config_must_be_pad_of_the_model() -> None:
    after = extend_tokenizer(LIKE_LLAMA, languages=["en"])
    sizes = {"text_cardinality": after.vocabulary_size, "num_codebooks": 1, "num_given_codebooks": 0, "cardinality": 8}
    with pytest.raises(ValueError, match=rf"text_pad_id = 3 is '<0x00>' of .*: {after.processor.pad_id()} is its PAD"):
        after.check_streams(StreamsSection(delays=(0, 0), **sizes))
    after.check_streams(StreamsSection(delays=(0, 0), text_pad_id=after.processor.pad_id(), **sizes))


def test_a_piece_that_looks_like_a_prompt_becomes_one() -> None:
    model = trained(ENGLISH, user_defined_symbols=["<en>"], control_symbols=["<asr>"])
    before, after = Tokenizer(model), extend_tokenizer(model, languages=["en"])
    with pytest.raises(ValueError, match="lacks the prompt symbols <en> of asr-en"):
        before.encode_prompt(Task("asr", "en", "en"))
    assert after.encode_prompt(Task("asr", "en", "en")) == before.processor.piece_to_id(["<asr>", "<en>"])
    assert len(set(pieces(after))) == after.vocabulary_size


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_pieces_of_another_language(kind: str) -> None:
    model, donor = (trained(texts, model_type=kind, vocab_size=75, pad_id=3) for texts in (ENGLISH, JAPANESE))
    plain, after = Tokenizer(model), extend_tokenizer(model, languages=["en", "ja"], donor=donor)
    assert pieces(after)[: plain.vocabulary_size] == pieces(plain)
    for text in JAPANESE:
        assert sum(word.num_unknown for word in plain.spell(text)) and not any(w.num_unknown for w in after.spell(text))
        assert after.processor.encode(text, out_type=str) == Tokenizer(donor).processor.encode(text, out_type=str)
        assert after.decode(after.encode_word(text)) == text
    for text in ENGLISH:
        assert after.processor.encode(text) == plain.processor.encode(text)
    least = plain.vocabulary_size + len(prompt_symbols(["en", "ja"]))
    some = extend_tokenizer(model, languages=["en", "ja"], donor=donor, vocabulary_size=least + 10)
    assert some.vocabulary_size == least + 10 and pieces(some) == pieces(after)[: least + 10]
    full = extend_tokenizer(model, languages=["en", "ja"], donor=donor, vocabulary_size=200)
    assert full.vocabulary_size == 200 and pieces(full)[: after.vocabulary_size] == pieces(after)
    assert not full.is_text(199) and "<unused_0>" in pieces(full)


def test_bpe_first_merges_what_it_merged_before() -> None:
    texts, others = ["abab abab cc", "ab cab ab"] * 4, ["bca bca aca", "aca bca"] * 4
    model, donor = (trained(lines, model_type="bpe", vocab_size=14, pad_id=3) for lines in (texts, others))
    plain, after = Tokenizer(model), extend_tokenizer(model, languages=["en"], donor=donor)
    for text in (*texts, *others, "cac"):  # of which one makes "c" the beginning of a word, the other "ca" a piece
        old, new = (
            set(itertools.accumulate(map(len, tokenizer.processor.encode(text, out_type=str))))
            for tokenizer in (plain, after)
        )
        assert new <= old  # where pieces end
    proto = sentencepiece_model_pb2.ModelProto.FromString(after.model)
    assert proto.trainer_spec.vocab_size == len(proto.pieces) == after.vocabulary_size


def test_faults_name_what_to_do() -> None:
    with pytest.raises(ValueError, match="more than the size of 20; ask for a larger one"):
        extend_tokenizer(UNIGRAM, vocabulary_size=20)
    with pytest.raises(ValueError, match="the donor is a BPE model, and the other a UNIGRAM one"):
        extend_tokenizer(UNIGRAM, donor=LIKE_LLAMA)
    with pytest.raises(ValueError, match="the donor: not a sentencepiece model"):
        extend_tokenizer(UNIGRAM, donor=b"{}")


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools/extend_tokenizer.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_command(tmp_path: Path) -> None:
    model, output = tmp_path / "llama.model", tmp_path / "mine.model"
    model.write_bytes(LIKE_LLAMA)
    arguments = (model, output, "--languages", "en,pt-BR", "--symbols", "[laugh],[um]", "--size", 400)
    shown = run(*arguments)
    assert shown.returncode == 0, shown.stderr
    tokenizer = Tokenizer.load(output)
    assert tokenizer.vocabulary_size == 400 and tokenizer.encode_prompt(Task("asr", "pt-BR", "pt-BR"))
    assert {"[laugh]", "[um]"} < set(pieces(tokenizer))
    assert "text_cardinality = 400" in shown.stdout
    assert f"text_pad_id = {tokenizer.processor.pad_id()}" in shown.stdout
    again, wrong = run(*arguments), run(model, tmp_path / "y", "--languages", "english")
    assert again.returncode == 1 and "exists already" in again.stderr
    assert wrong.returncode == 1 and "'english' is no code" in wrong.stderr
