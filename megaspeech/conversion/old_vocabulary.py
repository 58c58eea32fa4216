"""What the pieces of a trained model's tokenizer stand for: a sentencepiece model, or a tokenizer.json of Hugging Face.

Texts are compared as UTF-8 with plain spaces, because each kind writes them in its own way: sentencepiece a space as
U+2581, byte-level BPE (Llama 3, Qwen) every byte as a character of its own alphabet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from megaspeech.data.tokenizer import SPACE

BYTE = re.compile("<0x([0-9A-F]{2})>")
"""A piece that stands for a byte, as sentencepiece writes it."""


@dataclass(frozen=True)
class OldVocabulary:
    """Pieces by what they stand for.

    Attributes:
        size: pieces, special ones included.
        texts: pieces of text, by their UTF-8.
        byte_pieces: pieces that stand for one byte, where no piece has the text.
        symbols: control pieces and the like, by name.
        roles: those that begin and end a sentence, "begin" and "end", where they are known.
        spell: the pieces of a text, as it is: no space is put before it, and what has no piece is left out.
    """

    size: int
    texts: Mapping[bytes, int]
    byte_pieces: Mapping[int, int]
    symbols: Mapping[str, int]
    roles: Mapping[str, int]
    spell: Callable[[str], list[int]]
    blank: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "blank", frozenset(piece for text, piece in self.texts.items() if not text.strip()))

    def parts(self, text: str) -> tuple[int, ...]:
        """The pieces of a text, none where nothing but its spaces has any."""
        found = tuple(self.spell(text))
        return () if text.strip() and self.blank.issuperset(found) else found


def open_vocabulary(path: Path) -> OldVocabulary:
    """Read a sentencepiece `.model`, or a `tokenizer.json` with its `tokenizer_config.json` beside it, if there is one.

    Raises:
        ValueError: the file is missing or neither.
        ImportError: a tokenizer.json needs the package tokenizers.
    """
    if not path.is_file():
        raise ValueError(f"there is no tokenizer {path}; name a sentencepiece .model, or a tokenizer.json")
    return _of_tokenizer_json(path) if path.suffix == ".json" else _of_sentencepiece(path)


def _of_sentencepiece(path: Path) -> OldVocabulary:
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path}: not a sentencepiece model ({error}); name a .model or a tokenizer.json") from error
    # A piece is spelt as it stands, not as a sentence, which begins with a space and has no other at its ends.
    proto.normalizer_spec.add_dummy_prefix = proto.normalizer_spec.remove_extra_whitespaces = False
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    texts, byte_pieces, symbols = {}, {}, {}
    for piece in range(processor.vocab_size()):
        name = processor.id_to_piece(piece)
        if processor.is_byte(piece):
            byte_pieces[int(BYTE.fullmatch(name)[1], 16)] = piece
        elif processor.is_control(piece) or processor.is_unknown(piece) or processor.is_unused(piece):
            symbols[name] = piece
        else:
            texts[name.replace(SPACE, " ").encode()] = piece
    roles = {"begin": processor.bos_id(), "end": processor.eos_id()}
    return OldVocabulary(
        size=processor.vocab_size(),
        texts=texts,
        byte_pieces=byte_pieces,
        symbols=symbols,
        roles={role: piece for role, piece in roles.items() if piece >= 0},
        spell=lambda text: [piece for piece in processor.encode(text) if piece != processor.unk_id()],
    )


def _of_tokenizer_json(path: Path) -> OldVocabulary:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError("a tokenizer.json is read with tokenizers; pip install megaspeech[codecs]") from error
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        vocabulary, unknown = values["model"]["vocab"], values["model"].get("unk_token")
        added = {one["content"]: one["id"] for one in values["added_tokens"]}
        special = {one["content"]: one["id"] for one in values["added_tokens"] if one["special"]}
        is_byte_level = _spell_pieces(values)
        tokenizer = Tokenizer.from_str(json.dumps(values))
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"{path}: not a tokenizer.json ({' '.join(str(error).split())}); fetch it again") from error
    pieces = vocabulary if isinstance(vocabulary, dict) else {name: piece for piece, (name, _) in enumerate(vocabulary)}
    texts, byte_pieces = {name.encode(): piece for name, piece in added.items() if name not in special}, {}
    for name, piece in pieces.items():
        if name in added or name == unknown:
            continue
        byte = BYTE.fullmatch(name)
        if byte and not is_byte_level:
            byte_pieces[int(byte[1], 16)] = piece
        else:
            texts[_bytes(name) if is_byte_level else name.replace(SPACE, " ").encode()] = piece
    unknown_piece = tokenizer.token_to_id(unknown) if unknown else None
    return OldVocabulary(
        size=1 + max([*pieces.values(), *added.values()]),
        texts=texts,
        byte_pieces={text[0]: piece for text, piece in texts.items() if len(text) == 1} | byte_pieces,
        symbols=special,
        roles=_roles(path.with_name("tokenizer_config.json"), special=special),
        spell=lambda text: [p for p in tokenizer.encode(text, add_special_tokens=False).ids if p != unknown_piece],
    )


def _spell_pieces(values: dict[str, Any]) -> bool:
    """Have no space put before a text, in place; whether its pieces are written in the alphabet of bytes."""
    before = values.get("pre_tokenizer") or {}
    levels = [one for one in [before, *before.get("pretokenizers", [])] if one.get("type") == "ByteLevel"]
    for one in levels:
        one["add_prefix_space"] = False
    if not levels:  # as sentencepiece: spaces are written as a mark, and words are not set apart before
        values["pre_tokenizer"] = None
        values["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    return bool(levels)


def _alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes each byte as: itself if it can be seen, else one from U+0100 on (GPT-2,
    github.com/openai/gpt-2, encoder.py)."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = sorted(set(range(256)) - set(seen))
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(unseen)}


_ALPHABET = _alphabet()


def _bytes(piece: str) -> bytes:
    """What a piece of byte-level BPE stands for; one with other characters is its own text."""
    if all(character in _ALPHABET for character in piece):
        return bytes(_ALPHABET[character] for character in piece)
    return piece.encode()


def _roles(path: Path, *, special: Mapping[str, int]) -> dict[str, int]:
    """From a tokenizer_config.json."""
    if not path.is_file():
        return {}
    values = json.loads(path.read_text(encoding="utf-8"))
    found = {}
    for role, key in (("begin", "bos_token"), ("end", "eos_token")):
        name = values.get(key)
        name = name.get("content") if isinstance(name, dict) else name
        if name in special:
            found[role] = special[name]
    return found
