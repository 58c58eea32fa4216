"""Adding to a sentencepiece model what it lacks, by editing its proto: prompts, symbols, pieces of another model.

Every piece keeps its id, so that embeddings and text heads of a trained model go on meaning what they meant; the
normalisation stays too. What is added gets the ids after them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from megaspeech.data.tasks import prompt_symbols
from megaspeech.data.tokenizer import Tokenizer, unused_symbols

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece


def extend_tokenizer(
    model: bytes,
    *,
    languages: Iterable[str] = (),
    symbols: Iterable[str] = (),
    donor: bytes | None = None,
    vocabulary_size: int | None = None,
    name: str = "the tokenizer",
) -> Tokenizer:
    """A tokenizer with what is missing for speech streams, and more if asked for.

    PAD, end of sentence, and the prompts of every task are control pieces, which no text is encoded to. One that is
    there already, as another kind of piece, becomes one and keeps its id.

    Args:
        model: the content of a `.model` file, unigram or BPE.
        languages: that the model shall write; each gets a prompt symbol.
        symbols: that text may hold, such as `[laugh]`; each is one piece whatever stands around it.
        donor: a model of the same kind, for example of another language, whose pieces are added: its most probable (of
            a BPE model its first) ones, up to `vocabulary_size`, or all.
        vocabulary_size: the exact size to reach; unused symbols fill up. None adds nothing more.
        name: for messages.

    Raises:
        ValueError: a model cannot be read, the kinds differ, or `vocabulary_size` is too small for what is asked for.
    """
    proto = _parse(model, name=name)
    spec = proto.trainer_spec
    ids = {piece.piece: place for place, piece in enumerate(proto.pieces)}

    def put(piece: str, *, kind: int, score: float = 0.0) -> None:
        if piece not in ids:
            ids[piece] = len(proto.pieces)
            proto.pieces.add(piece=piece, score=score, type=kind)
        elif kind != _Piece.NORMAL:
            proto.pieces[ids[piece]].type = kind

    for symbol in (spec.pad_piece, spec.eos_piece, *prompt_symbols(languages)):
        put(symbol, kind=_Piece.CONTROL)
    for symbol in symbols:
        put(symbol, kind=_Piece.USER_DEFINED)
    room = None if vocabulary_size is None else vocabulary_size - len(proto.pieces)
    if room is not None and room < 0:
        raise ValueError(
            f"{name}: with what is asked for it has {len(proto.pieces)} pieces, more than the size of "
            f"{vocabulary_size}; ask for a larger one"
        )
    if donor is not None:
        for piece, score in _lent(_parse(donor, name="the donor"), to=proto, known=ids, most=room):
            put(piece, kind=_Piece.NORMAL, score=score)
    for symbol in _filling(ids, vocabulary_size):
        put(symbol, kind=_Piece.CONTROL)
    spec.vocab_size = len(proto.pieces)
    return Tokenizer(proto.SerializeToString(), name=name)


def _parse(model: bytes, *, name: str) -> Any:
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(model)
    except DecodeError as error:
        raise ValueError(f"{name}: not a sentencepiece model ({error}); name a .model file") from error
    return proto


def _lent(donor: Any, *, to: Any, known: dict[str, int], most: int | None) -> Iterator[tuple[str, float]]:
    """(piece, score) of what the donor has and `to` has not, best first."""
    kinds = to.trainer_spec.model_type, donor.trainer_spec.model_type
    if kinds[0] != kinds[1]:
        named = [sentencepiece_model_pb2.TrainerSpec.ModelType.Name(kind) for kind in kinds]
        raise ValueError(
            f"the donor is a {named[1]} model, and the other a {named[0]} one: their scores do not compare"
        )
    new = [piece for piece in donor.pieces if piece.type == _Piece.NORMAL and piece.piece not in known]
    new.sort(key=lambda piece: -piece.score)  # stable: BPE's scores are its order of merging
    # BPE merges what has the highest score first: behind all that is there, so that nothing is merged otherwise. A
    # unigram model's scores are logarithms of probabilities, which can stand side by side.
    is_bpe = kinds[0] == sentencepiece_model_pb2.TrainerSpec.BPE
    least = min((piece.score for piece in to.pieces if piece.type == _Piece.NORMAL), default=0.0)
    for rank, piece in enumerate(new[:most], 1):
        yield piece.piece, least - rank if is_bpe else piece.score


def _filling(ids: dict[str, int], vocabulary_size: int | None) -> tuple[str, ...]:
    missing = 0 if vocabulary_size is None else vocabulary_size - len(ids)
    first = 0
    while f"<unused_{first}>" in ids:
        first += 1
    return unused_symbols(missing, first=first)
