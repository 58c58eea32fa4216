"""sentencepiece models as tokenizers of transformers: the same ids for a text, the same text for its ids."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from megaspeech.conversion.transformers_text import fast_tokenizer, saved

pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")

CORPUS = [
    "hello world this is a test of the tokenizer",
    "one two three four five six seven",
    "the quick brown fox jumps over the lazy dog",
    "日本語 の 文章 です",
] * 3
TEXTS = (
    "hello world",
    "  two  spaces, here ",
    "ＦＵＬＬ ｗｉｄｔｈ test 日本語のです",
    "tabs\tand\nnewlines",
    "a\u3000b",
    "unknown \u2603\u2603x",
    " ",
    "",
)
KINDS: dict[str, dict[str, Any]] = {
    "as ours are": {},
    "as Kyutai's are": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        "vocab_size": 380,
    },
    "no space before the first word": {"add_dummy_prefix": False},
}


def train(path: Path, **options: Any) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        control_symbols=["<asr>", "<en>"],
        hard_vocab_limit=False,
        minloglevel=2,
        **({"vocab_size": 100} | options),
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_same_ids_and_same_text(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = train(tmp_path / "tokenizer.model", **KINDS[kind])
    own = sentencepiece.SentencePieceProcessor(model_file=str(path))
    files = saved(fast_tokenizer(path))
    assert sorted(files) == ["tokenizer.json", "tokenizer_config.json"]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert len(found) == own.vocab_size()
    assert [found.convert_ids_to_tokens(index) for index in range(len(found))] == own.id_to_piece(
        list(range(len(found)))
    )
    for text in TEXTS:
        ids = own.encode(text)
        assert found.encode(text, add_special_tokens=False) == ids, text
        if own.unk_id() not in ids:
            assert found.decode(ids) == own.decode(ids)


def test_control_pieces_are_left_out_of_text(tmp_path: Path) -> None:
    """PAD, EPAD and prompts, which a model's text is full of."""
    path = train(tmp_path / "tokenizer.model")
    own, found = sentencepiece.SentencePieceProcessor(model_file=str(path)), fast_tokenizer(path)
    prompt = [own.piece_to_id(symbol) for symbol in ("<asr>", "<en>")]
    ids = [*prompt, 3, 3, 0, *own.encode("hello world"), 3, 2]
    assert found.decode(ids, skip_special_tokens=True) == "hello world"
    assert (found.unk_token_id, found.bos_token_id, found.eos_token_id, found.pad_token_id) == (0, 1, 2, 3)


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    path = train(tmp_path / "tokenizer.model", model_type="bpe")
    with pytest.raises(ValueError, match="tokenizer.model: a sentencepiece model of type 2"):
        fast_tokenizer(path)
