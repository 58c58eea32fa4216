"""A model gets another vocabulary: real sentencepiece models and tokenizer.json files, trained on a few sentences."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from native_folders import logits
from one_rank import make_config, one_rank  # noqa: F401
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor

from megaspeech.conversion.native import check_native
from megaspeech.conversion.old_vocabulary import open_vocabulary
from megaspeech.conversion.random_model import random_model
from megaspeech.conversion.stored import Companions, StoredModel
from megaspeech.conversion.vocabulary import swap_vocabulary
from megaspeech.data.tasks import prompt_symbols
from megaspeech.data.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_rank")

ENGLISH = [
    "the weather in the city is fine today and the trains run on time",
    "this is a very long train to the other city",
    "the cat sat on the mat and said hello to the world",
    "hello world, is the weather fine in your world today?",
] * 4
JAPANESE = [
    "今日は天気がいいですね。電車は時間通りに走ります。",
    "猫がマットの上に座って、世界にこんにちはと言いました。",
    "こんにちは、世界。今日の天気はどうですか。",
    "the weather is fine と言いました。hello と hello world",
] * 4


def train(path: Path, texts: Iterable[str], *, size: int, **options: Any) -> Path:
    content = io.BytesIO()
    settings: dict[str, Any] = {
        "model_type": "unigram",
        "character_coverage": 1.0,
        "hard_vocab_limit": False,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": 3,
        "num_threads": 1,
        "minloglevel": 2,
        **options,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=content, vocab_size=size, **settings
    )
    path.write_bytes(content.getvalue())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """en.model, and ja.model with prompts and byte pieces."""
    directory = tmp_path_factory.mktemp("tokenizers")
    symbols = [*prompt_symbols(["en", "ja"]), "<unused_0>"]
    train(directory / "en.model", ENGLISH, size=100, user_defined_symbols=["▁hello"])
    sure = ["▁hello", "天気"]
    sizes = {"size": 420, "byte_fallback": True}
    train(directory / "ja.model", JAPANESE, control_symbols=symbols, user_defined_symbols=sure, **sizes)
    return directory


def old_model(tokenizer: Path | None, directory: Path, *, rows: int | None = None, **keys: Any) -> StoredModel:
    size = rows or open_vocabulary(tokenizer).size
    more = [f"{section}.{key}={value}" for section, table in keys.items() for key, value in table.items()]
    model = random_model(make_config(directory, f"streams.text_cardinality={size}", *more), seed=4)
    return StoredModel(model.config, model.weights, Companions(tokenizer=tokenizer))


def text_rows(model: StoredModel) -> list[Tensor]:
    """Of the temporal embedding, of the depth transformer's, of the head; initial tokens left out."""
    size = model.config.streams.text_cardinality
    names = ("embedding.weight", "depth.embedding", "text_head.weight")
    return [model.weights[name].read()[:size] for name in names]


def test_the_same_pieces_in_another_order_give_the_same_logits(folder: Path, tmp_path: Path) -> None:
    old = old_model(folder / "ja.model", tmp_path)
    size = old.config.streams.text_cardinality
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((folder / "ja.model").read_bytes())
    order = [0, 1, 2, 3, *(4 + torch.randperm(size - 4, generator=torch.Generator().manual_seed(1))).tolist()]
    pieces = [sentencepiece_model_pb2.ModelProto.SentencePiece.FromString(p.SerializeToString()) for p in proto.pieces]
    del proto.pieces[:]
    proto.pieces.extend(pieces[place] for place in order)
    other = tmp_path / "other.model"
    other.write_bytes(proto.SerializeToString())
    new = swap_vocabulary(old, tokenizer=other)

    rows = [torch.randint(-1, one, (2, 9)) for one in old.config.streams.cardinalities]
    rows[0] = torch.randint(size, (2, 9))
    codes = torch.stack(rows, 1)
    renamed = codes.clone()
    renamed[:, 0] = torch.tensor(order).argsort()[codes[:, 0]]
    (text, audio), (new_text, new_audio) = logits(old, codes), logits(new, renamed)
    torch.testing.assert_close(new_text, text[..., order], rtol=0, atol=0)
    torch.testing.assert_close(new_audio, audio, rtol=0, atol=0)
    assert f"of {size:,} pieces of other.model, {size:,} have an old one's row" in new.notes[-1]
    for name in old.weights:
        if name not in ("embedding.weight", "depth.embedding", "text_head.weight"):
            assert new.weights[name] is old.weights[name]


def test_english_to_japanese(folder: Path, tmp_path: Path) -> None:
    old = old_model(folder / "en.model", tmp_path)
    new = swap_vocabulary(old, tokenizer=folder / "ja.model")
    streams, tokenizer = new.config.streams, Tokenizer.load(folder / "ja.model")
    tokenizer.check_streams(streams)
    assert new.companions.tokenizer == folder / "ja.model" == Path(new.config.data.tokenizer)
    english = sentencepiece.SentencePieceProcessor(model_file=str(folder / "en.model"))
    japanese = tokenizer.processor
    for before, after in zip(text_rows(old), text_rows(new), strict=True):
        mean = before.mean(0)

        def row(piece: str, after: Tensor = after) -> Tensor:
            assert japanese.id_to_piece(japanese.piece_to_id(piece)) == piece, piece
            return after[japanese.piece_to_id(piece)]

        def part(*pieces: str, before: Tensor = before) -> Tensor:
            ids = [english.piece_to_id(piece) for piece in pieces]
            assert [english.id_to_piece(one) for one in ids] == list(pieces)
            return before[ids].mean(0)

        assert torch.equal(row("▁hello"), part("▁hello"))  # shared
        assert torch.equal(row("e"), part("e"))
        assert torch.equal(row("</s>"), part("</s>")) and torch.equal(row("<s>"), part("<s>"))
        assert torch.equal(after[0], before[0]) and torch.equal(after[3], before[3])  # EPAD, PAD
        torch.testing.assert_close(row("天気"), mean)  # unknown
        torch.testing.assert_close(row("<unused_0>"), mean)
        torch.testing.assert_close(row("<0xE5>"), mean)
        assert torch.equal(row("<0x65>"), part("e"))  # the byte of "e"
        torch.testing.assert_close(row("<asr>"), part("a", "s", "r"))
        assert not torch.equal(row("<en>"), row("<ja>"))
    words = r"vocabulary: of \d+ pieces of ja\.model, .* [1-9]\d* of two .* [1-9]\d* are the mean of all"
    assert re.search(words, new.notes[0])
    check_native(new)


def test_composed_of_parts_with_and_without_a_space_before(folder: Path, tmp_path: Path) -> None:
    symbols = ["catmat", "▁catmat", "の", "cat の"]
    wide = train(tmp_path / "wide.model", ENGLISH, size=120, user_defined_symbols=symbols)
    old = old_model(folder / "en.model", tmp_path)
    new, english = swap_vocabulary(old, tokenizer=wide), open_vocabulary(folder / "en.model")
    names = sentencepiece.SentencePieceProcessor(model_file=str(wide))
    spelled = {symbol: english.spell(symbol.replace("▁", " ")) for symbol in symbols}
    texts = {piece: text.decode() for text, piece in english.texts.items()}
    assert "".join(texts[piece] for piece in spelled["catmat"]) == "catmat"
    assert "".join(texts[piece] for piece in spelled["▁catmat"]) == " catmat"
    for before, after in zip(text_rows(old), text_rows(new), strict=True):
        for symbol in ("catmat", "▁catmat", "cat の"):
            expected = before[spelled[symbol]].mean(0)
            torch.testing.assert_close(after[names.piece_to_id(symbol)], expected)
        torch.testing.assert_close(after[names.piece_to_id("の")], before.mean(0))
    assert len(english.parts("cat の")) > 0 and english.parts(" の") == ()


def test_bytes_make_up_what_has_no_piece(folder: Path) -> None:
    japanese = open_vocabulary(folder / "ja.model")
    assert japanese.parts("é") == (japanese.byte_pieces[0xC3], japanese.byte_pieces[0xA9])


BYTE_LEVEL, METASPACE = "byte-level", "metaspace"


def train_json(path: Path, kind: str) -> Path:
    """A tokenizer.json as Llama 3 and Qwen have it, or as Llama 2 and Mistral; and its tokenizer_config.json."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    special = ["<unk>", "<|begin|>", "<|end|>"]
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>" if kind == METASPACE else None))
    options: dict[str, Any] = {"special_tokens": special, "show_progress": False, "vocab_size": 330}
    if kind == BYTE_LEVEL:
        split = pre_tokenizers.Split(tokenizers.Regex(r" ?\w+|[^\w]+"), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(ENGLISH + JAPANESE, trainers.BpeTrainer(**options))
    if kind == METASPACE:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = None
    tokenizer.add_tokens(["[laugh]"])  # after the others, and text
    tokenizer.save(str(path))
    roles = {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|end|>"}
    path.with_name("tokenizer_config.json").write_text(json.dumps(roles))
    return path


@pytest.mark.parametrize("kind", [BYTE_LEVEL, METASPACE])
def test_from_a_tokenizer_of_hugging_face(kind: str, folder: Path, tmp_path: Path) -> None:
    path = train_json(tmp_path / "tokenizer.json", kind)
    old_vocabulary = open_vocabulary(path)
    assert b" hello" in old_vocabulary.texts and "は".encode() in old_vocabulary.texts
    assert old_vocabulary.roles == {"begin": 1, "end": 2}
    texts = {piece: text for text, piece in old_vocabulary.texts.items()}
    for text in ("hello", " hello", "世界 hello"):
        assert b"".join(texts[piece] for piece in old_vocabulary.spell(text)).decode() == text

    assert old_vocabulary.texts[b"[laugh]"] == old_vocabulary.size - 1

    keys = {"streams": {"text_pad_id": 2, "text_end_pad_id": 2}}
    old = old_model(path, tmp_path, rows=old_vocabulary.size + 70, **keys)  # rounded up, as text models are
    new = swap_vocabulary(old, tokenizer=folder / "ja.model")
    japanese = sentencepiece.SentencePieceProcessor(model_file=str(folder / "ja.model"))
    for before, after in zip(text_rows(old), text_rows(new), strict=True):
        for piece in range(len(japanese)):
            text = japanese.id_to_piece(piece).replace("▁", " ").encode()
            if text in old_vocabulary.texts:
                assert torch.equal(after[piece], before[old_vocabulary.texts[text]])
        assert torch.equal(after[japanese.bos_id()], before[1]) and torch.equal(after[japanese.eos_id()], before[2])
        assert torch.equal(after[japanese.pad_id()], before[2])
        torch.testing.assert_close(after[japanese.piece_to_id("<unused_0>")], before[: old_vocabulary.size].mean(0))
        if kind == BYTE_LEVEL:
            assert torch.equal(after[japanese.piece_to_id("<0xE5>")], before[old_vocabulary.texts[b"\xe5"]])
    check_native(new)


def test_models_without_a_depth_transformer_and_with_a_narrow_embedding(folder: Path, tmp_path: Path) -> None:
    hears = {"streams": {"num_codebooks": 0, "delays": [0, 0, 0, 0, 0]}}
    for keys in (hears, {"depth": {"low_rank_embeddings": 24}}):
        new = swap_vocabulary(old_model(folder / "en.model", tmp_path, **keys), tokenizer=folder / "ja.model")
        check_native(new)


def test_numbers_in_bf16_stay_in_bf16(folder: Path, tmp_path: Path) -> None:
    old = old_model(folder / "en.model", tmp_path, precision={"recipe": "bf16"})
    new = swap_vocabulary(old, tokenizer=folder / "ja.model")
    assert {one.dtype for one in new.weights.values()} == {torch.bfloat16}
    ours, theirs = text_rows(new)[0], text_rows(old)[0]
    assert torch.equal(ours[3], theirs[3]) and ours.dtype is torch.bfloat16


def test_what_is_wrong_is_named(folder: Path, tmp_path: Path) -> None:
    old = old_model(folder / "en.model", tmp_path)
    unpadded = train(tmp_path / "unpadded.model", ENGLISH, size=90, pad_id=-1)
    garbage = tmp_path / "garbage.model"
    garbage.write_bytes(b"\xff" * 40)
    (tmp_path / "tokenizer.json").write_text("{}")
    japanese = folder / "ja.model"
    for keys, words in (
        ({"tokenizer": unpadded}, "has no PAD"),
        ({"tokenizer": tmp_path / "none.model"}, "there is no file"),
        ({"tokenizer": japanese, "old_tokenizer": japanese}, "give the tokenizer that it was trained with"),
        ({"tokenizer": japanese, "old_tokenizer": garbage}, "not a sentencepiece model"),
        ({"tokenizer": japanese, "old_tokenizer": tmp_path / "tokenizer.json"}, "not a tokenizer.json"),
        ({"tokenizer": japanese, "old_tokenizer": tmp_path / "gone.model"}, "there is no tokenizer"),
    ):
        with pytest.raises(ValueError, match=words):
            swap_vocabulary(old, **keys)
    bare = StoredModel(old.config, old.weights)
    with pytest.raises(ValueError, match="no tokenizer lies beside the model"):
        swap_vocabulary(bare, tokenizer=japanese)
