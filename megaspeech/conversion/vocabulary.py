"""A model's text in another vocabulary: another sentencepiece model, of any size.

Three tables follow: the text rows of the temporal embedding, those of the depth transformer's, and the text head. All
three by the same rules, the first that applies:

1. PAD, EPAD (the unknown piece), begin and end of a sentence have the rows of what had that part before.
2. A piece that the old tokenizer has too keeps its row: one of the same text, one of the same byte, a control piece of
   the same name.
3. Another piece of text is composed: its row is the mean of those of the old tokenizer's pieces of that text. So are
   the prompts of tasks and languages, of the word between their brackets ("<ja>" of "ja").
4. What the old tokenizer has no piece for starts from the mean of all rows.

The mean is Fast Vocabulary Transfer (Gee et al. 2022, arXiv 2402.09977): a model reads the new piece as the blend of
what it would have read, one after the other, and a head's logit of it is the mean of theirs. The mean of all rows is
for the head, too, the least surprising of new rows: its logit lies below the largest of the others whatever is heard.
The initial token keeps its row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from megaspeech.config import changed
from megaspeech.conversion.deferred import Deferred
from megaspeech.conversion.new_weights import ROWS_AT_ONCE, mean_row
from megaspeech.conversion.old_vocabulary import BYTE, OldVocabulary, open_vocabulary
from megaspeech.conversion.stored import StoredModel
from megaspeech.data.tasks import LANGUAGE, TASKS
from megaspeech.data.tokenizer import EXTEND, SPACE, Tokenizer
from megaspeech.model.counting import padded_rows, used_rows

Fill: TypeAlias = Callable[[Tensor, Tensor], None]
"""Writes new rows, its first argument, which are zeros, made of the old ones."""
Origins: TypeAlias = Sequence[tuple[int, ...]]
"""For every new piece the old ones whose mean it is; none for the mean of all."""


def swap_vocabulary(model: StoredModel, *, tokenizer: Path, old_tokenizer: Path | None = None) -> StoredModel:
    """The model with another tokenizer, its weights unread; `streams.text_cardinality` and the like follow.

    Args:
        model: with the vocabulary it was trained with.
        tokenizer: the new sentencepiece model.
        old_tokenizer: what the model was trained with, a sentencepiece model or a tokenizer.json; None takes the one
            that lies beside the model.

    Raises:
        ValueError: a tokenizer is missing, cannot be read, has no PAD, or is not the model's.
    """
    new = Tokenizer.load(tokenizer)
    pad, end_pad = new.processor.pad_id(), new.processor.unk_id()
    if pad < 0:
        raise ValueError(f"{tokenizer} has no PAD, which speech streams need; add it with {EXTEND}")
    old = _old_vocabulary(model, old_tokenizer)
    streams = model.config.streams
    roles = {pad: streams.text_pad_id, end_pad: streams.text_end_pad_id}
    origins = [_origin(piece, new=new, old=old, roles=roles) for piece in range(new.vocabulary_size)]
    named = {"text_cardinality": new.vocabulary_size, "text_pad_id": pad, "text_end_pad_id": end_pad}
    tables = {"streams": named, "data": {"tokenizer": str(tokenizer)}}
    config = changed(model.config, tables, source=f"the model with {tokenizer}")
    weights = dict(model.weights)
    fill = partial(_fill, origins=origins, num_known=old.size)
    weights["text_head.weight"] = _made(weights["text_head.weight"], new.vocabulary_size, fill)
    for name, num_streams in (("embedding.weight", streams.num_streams), ("depth.embedding", streams.num_codebooks)):
        if name in weights:
            read = config.streams.cardinalities[:num_streams]
            table = partial(_fill_table, fill=fill, read=read, old_size=streams.text_cardinality)
            weights[name] = _made(weights[name], padded_rows(read), table)
    return replace(
        model,
        config=config,
        weights=weights,
        companions=replace(model.companions, tokenizer=tokenizer),
        notes=(*model.notes, _note(origins, tokenizer=tokenizer)),
    )


def _old_vocabulary(model: StoredModel, path: Path | None) -> OldVocabulary:
    path = path or model.companions.tokenizer
    if path is None:
        raise ValueError("no tokenizer lies beside the model, so its rows have no meaning; give --old-tokenizer")
    old, rows = open_vocabulary(path), model.config.streams.text_cardinality
    # Text models round their tables up; a sentencepiece model of ours or of Kyutai's has as many pieces as rows.
    if old.size > rows or (old.size < rows and path.suffix != ".json"):
        raise ValueError(
            f"{path} has {old.size:,} pieces, and the model's text has {rows:,} rows (streams.text_cardinality); "
            f"give the tokenizer that it was trained with by --old-tokenizer"
        )
    return old


def _origin(piece: int, *, new: Tokenizer, old: OldVocabulary, roles: dict[int, int]) -> tuple[int, ...]:
    """The old pieces that a new one is the mean of; see the rules above. `roles`: new to old PAD and EPAD."""
    processor, name = new.processor, new.processor.id_to_piece(piece)
    if piece in roles:
        return (roles[piece],)
    for role, place in (("begin", processor.bos_id()), ("end", processor.eos_id())):
        if piece == place and role in old.roles:
            return (old.roles[role],)
    if processor.is_byte(piece):
        byte = int(BYTE.fullmatch(name)[1], 16)
        found = old.byte_pieces.get(byte, old.texts.get(bytes([byte])))
        return () if found is None else (found,)
    if not new.is_text(piece):
        if name in old.symbols:
            return (old.symbols[name],)
        word = name[1:-1]
        is_prompt = word in TASKS or LANGUAGE.fullmatch(word)
        return old.parts(word) if is_prompt else ()
    text = name.replace(SPACE, " ")
    same = old.texts.get(text.encode())
    return old.parts(text) if same is None else (same,)


def _made(source: Deferred, num_rows: int, fill: Fill) -> Deferred:
    shape = (num_rows, *source.shape[1:])

    def read() -> Tensor:
        made = torch.zeros(shape, dtype=source.dtype)
        fill(made, source.read())
        return made

    return Deferred(shape, source.dtype, read)


def _fill(new_VH: Tensor, old_VH: Tensor, *, origins: Origins, num_known: int) -> None:
    """Rows of text. A mean of one row is that row, bit for bit. `num_known`: old rows that belong to a piece."""
    new_VH[:] = mean_row(old_VH[:num_known])
    for first in range(0, len(origins), ROWS_AT_ONCE):
        known = {place: parts for place, parts in enumerate(origins[first : first + ROWS_AT_ONCE], first) if parts}
        sizes_K = torch.tensor([len(parts) for parts in known.values()], dtype=torch.int64)
        picked_P = torch.tensor([part for parts in known.values() for part in parts], dtype=torch.int64)
        owners_P = torch.arange(len(sizes_K)).repeat_interleave(sizes_K)
        sums_KH = torch.zeros(len(sizes_K), old_VH.shape[1]).index_add_(0, owners_P, old_VH[picked_P].float())
        new_VH[torch.tensor(list(known), dtype=torch.int64)] = (sums_KH / sizes_K[:, None]).to(new_VH.dtype)


def _fill_table(new_RH: Tensor, old_RH: Tensor, *, fill: Fill, read: tuple[int, ...], old_size: int) -> None:
    """A packed table of the streams `read`, of which text is the first; the rows after it are taken over."""
    new_size, num_others = read[0], used_rows(read) - read[0]
    fill(new_RH[:new_size], old_RH[:old_size])
    new_RH[new_size : new_size + num_others] = old_RH[old_size : old_size + num_others]  # text's initial token first


def _note(origins: Origins, *, tokenizer: Path) -> str:
    """How many rows came of what."""
    sizes = Counter(min(len(parts), 4) for parts in origins)
    words = {2: "two old pieces", 3: "three", 4: "four or more"}
    composed = ", ".join(f"{sizes[size]:,} of {words[size]}" for size in words)
    return (
        f"vocabulary: of {len(origins):,} pieces of {tokenizer.name}, {sizes[1]:,} have an old one's row, {composed} "
        f"are the mean of theirs, {sizes[0]:,} are the mean of all rows"
    )
