"""Starting the audio embeddings from what the codec's codes mean.

A residual codec's codes are indices of vectors whose sum is the frame's features. A model whose embeddings start as a
random projection of those vectors reads, from the first step on, a linear image of the features, instead of having to
find out what `2 x Q x cardinality` arbitrary symbols stand for. The architecture does not change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaspeech.config.schema import StreamsSection
from megaspeech.model.embedding import table_offsets
from megaspeech.model.speech_text_model import SpeechTextModel

TEXT_SCALE = 0.2
"""Standard deviation of the text rows' elements. The audio of a frame sums to 1; drawn as usual, with 1 / sqrt(width),
text would be a sixteenth of that at a width of 256, and prompts and words be hardly noticed at first."""


@torch.no_grad()
def initialise_from_codebooks(
    model: SpeechTextModel, vectors_QVE: Tensor, *, streams: StreamsSection, seed: int
) -> None:
    """Overwrite the audio rows of the embedding tables that this stage holds; every layout gets the same rows.

    Args:
        model: one pipeline stage.
        vectors_QVE: the codec's codebook vectors, `[Q, cardinality, E]`.
        streams: layout of the tables.
        seed: of the random projections.
    """
    rows_QVE = _normalised(vectors_QVE)
    text_rows = streams.text_cardinality + 1
    if model.pre_process:
        table = model.embedding
        mine = max(0, min(text_rows - table.vocab_start_index, table.weight.shape[0]))
        _rescale(table.weight[:mine], TEXT_SCALE)
        projected = _project(rows_QVE, table.weight.shape[1], seed=seed)
        for stream, first_row in enumerate(table_offsets(streams.cardinalities)[1:]):
            codebook = stream % streams.num_codec_codebooks
            _fill(table.weight, projected[codebook], first_row=first_row - table.vocab_start_index)
    if model.post_process and model.depth is not None:
        depth = model.depth
        _rescale(depth.embedding[:text_rows], TEXT_SCALE)
        projected = _project(rows_QVE, depth.embedding.shape[1], seed=seed + 1)
        for codebook, first_row in enumerate(depth.offsets[1:].tolist()):
            _fill(depth.embedding, projected[codebook], first_row=first_row)


def _rescale(rows_RH: Tensor, scale: float) -> None:
    """Bring rows drawn with standard deviation 1 / sqrt(width) to `scale`, in place."""
    rows_RH.mul_(scale * rows_RH.shape[1] ** 0.5)


def _normalised(vectors_QVE: Tensor) -> Tensor:
    """Scaled so that the sum over the codebooks of a random frame has mean square 1 over its features."""
    variance = vectors_QVE.var(dim=1, unbiased=False).sum()
    return vectors_QVE / variance.sqrt()


def _project(rows_QVE: Tensor, width: int, *, seed: int) -> Tensor:
    """`[Q, cardinality, width]`; a projection with unit-variance entries keeps the sum's elements at variance 1."""
    generator = torch.Generator().manual_seed(seed)
    return rows_QVE @ torch.randn(rows_QVE.shape[-1], width, generator=generator)


def _fill(table_RH: Tensor, rows_VH: Tensor, *, first_row: int) -> None:
    """Write rows at `first_row`, as far as this rank's part of the table holds them."""
    low, high = max(0, first_row), min(table_RH.shape[0], first_row + rows_VH.shape[0])
    if low < high:
        table_RH[low:high] = rows_VH[low - first_row : high - first_row].to(table_RH.dtype)
