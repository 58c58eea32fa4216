"""Embeddings start from the codec's codebooks: the sum over a frame's codes is a projection of the features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from one_rank import make_config, one_rank  # noqa: F401

from megaspeech.model.embedding import table_offsets
from megaspeech.model.initialisation import TEXT_SCALE

pytestmark = pytest.mark.usefixtures("one_rank")
WIDTH = 10


@pytest.fixture
def initialised(tmp_path: Path):
    """(model, streams, vectors `[Q, V, E]`)."""
    from megaspeech.model.initialisation import initialise_from_codebooks
    from megaspeech.model.speech_text_model import SpeechTextModel

    config = make_config(tmp_path)
    model = SpeechTextModel(config, pre_process=True, post_process=True)
    streams = config.streams
    vectors = torch.randn(streams.num_codebooks, streams.cardinality, WIDTH) * 3
    initialise_from_codebooks(model, vectors, streams=streams, seed=5)
    return model, streams, vectors


def _rows(table: torch.Tensor, first: int, count: int) -> torch.Tensor:
    return table.detach()[first : first + count]


def test_one_projection_for_all_codebooks_and_both_speakers(initialised) -> None:
    model, streams, vectors = initialised
    offsets = table_offsets(streams.cardinalities)[1:]
    rows = [_rows(model.embedding.weight, first, streams.cardinality) for first in offsets]
    stacked = torch.cat(rows[: streams.num_codebooks])
    solution = torch.linalg.lstsq(vectors.flatten(0, 1), stacked).solution
    torch.testing.assert_close(vectors.flatten(0, 1) @ solution, stacked, rtol=1e-4, atol=1e-5)
    for own, given in zip(rows[: streams.num_codebooks], rows[streams.num_codebooks :], strict=True):
        torch.testing.assert_close(own, given)


def test_the_sum_of_a_frame_has_variance_one(initialised) -> None:
    model, streams, _ = initialised
    offsets = table_offsets(streams.cardinalities)[1 : 1 + streams.num_codebooks]
    codes = torch.randint(0, streams.cardinality, (4000, streams.num_codebooks))
    table = model.embedding.weight.detach()
    total = sum(table[codes[:, q] + offset] for q, offset in enumerate(offsets))
    assert total.var(0).mean().item() == pytest.approx(1.0, rel=0.3)


def test_text_is_heard_beside_audio_and_initial_tokens_are_left(initialised) -> None:
    model, streams, _ = initialised
    for table in (model.embedding.weight, model.depth.embedding):
        text = _rows(table, 0, streams.text_cardinality + 1)
        assert text.std().item() == pytest.approx(TEXT_SCALE, rel=0.15)
    first = table_offsets(streams.cardinalities)[1]
    initial = model.embedding.weight.detach()[first + streams.cardinality]
    assert initial.std().item() == pytest.approx(model.config.hidden_size**-0.5, rel=0.4)
