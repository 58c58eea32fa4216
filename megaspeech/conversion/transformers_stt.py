"""Native models that write and do not speak, as transformers' `KyutaiSpeechToTextForConditionalGeneration`, and back.

It has one table for all streams, text first, with a row of zeros for padding at its end, and counts the initial token
as a piece of the text: so the head has a row of zeros for it, and `generate` is told never to choose it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.nn import functional as F

from megaspeech.codecs.neural import import_transformers
from megaspeech.config import Config
from megaspeech.conversion.layouts import Tensors
from megaspeech.conversion.mimi_files import Mimi
from megaspeech.conversion.rules import Rule
from megaspeech.conversion.transformers_layers import (
    INSTEAD,
    check_mimi,
    refuse_unknown_layers,
    temporal_rules,
    temporal_section,
    temporal_values,
)
from megaspeech.model.counting import padded_rows, used_rows

if TYPE_CHECKING:
    from transformers import GenerationConfig, KyutaiSpeechToTextConfig


@dataclass(frozen=True)
class OneMoreRow:
    """The first rows of a native matrix, the rest of which pads it with zeros, and the same rows and one of zeros."""

    num_rows: int
    num_native_rows: int

    def to_foreign(self, native: Tensors) -> Tensors:
        """`[num_rows + 1, H]`."""
        return [F.pad(native[0][: self.num_rows], (0, 0, 0, 1))]

    def to_native(self, foreign: Tensors) -> Tensors:
        """`[num_native_rows, H]`. Raises ValueError where the rows are not as many."""
        if foreign[0].shape[0] != self.num_rows + 1:
            raise ValueError(f"by the config there should be {self.num_rows + 1} rows, not {foreign[0].shape[0]}")
        return [F.pad(foreign[0][: self.num_rows], (0, 0, 0, self.num_native_rows - self.num_rows))]


def stt_rules(config: Config) -> list[Rule]:
    """Which of transformers' tensors hold the numbers of which native ones; those of the Mimi inside are not among."""
    sizes, text = config.streams.cardinalities, config.streams.text_cardinality
    table = OneMoreRow(used_rows(sizes), padded_rows(sizes))
    return [
        Rule(("embedding.weight",), ("model.embed_tokens.embed_tokens.weight",), table),
        *temporal_rules(config, "model"),
        Rule(("text_head.weight",), ("lm_head.weight",), OneMoreRow(text, text)),
    ]


def stt_config(config: Config, *, mimi: Mimi, dtype: str) -> KyutaiSpeechToTextConfig:
    """transformers' config of a native model.

    Args:
        config: of the model.
        mimi: to be put inside, with just the codebooks that the model hears.
        dtype: torch's name of the weights' precision.

    Raises:
        ValueError: the model has what transformers' has not; names the key and the remedy.
    """
    refuse_unknown_layers(config.temporal)
    for fault in _unknown_to_transformers(config):
        raise ValueError(f"{fault}; {INSTEAD}")
    check_mimi(mimi, streams=config.streams)
    streams = config.streams
    return import_transformers().KyutaiSpeechToTextConfig(
        **temporal_values(config),
        architectures=["KyutaiSpeechToTextForConditionalGeneration"],
        dtype=dtype,
        vocab_size=streams.text_cardinality + 1,
        codebook_vocab_size=streams.cardinality + 1,
        num_codebooks=streams.num_given_codebooks,
        bos_token_id=streams.text_cardinality,
        pad_token_id=streams.text_pad_id,
        audio_bos_token_id=streams.cardinality,
        audio_pad_token_id=used_rows(streams.cardinalities),
        codec_config=mimi.config.to_dict(),
    )


def _unknown_to_transformers(config: Config) -> Iterator[str]:
    streams = config.streams
    if streams.num_given_codebooks < 2:
        yield f"streams.num_given_codebooks: {streams.num_given_codebooks}, but a Mimi in transformers has 2 or more"
    if any(streams.delays):
        yield f"streams.delays: {list(streams.delays)}, but transformers' speech to text has none"


def stt_generation(config: Config) -> GenerationConfig:
    """How `generate` goes unless told otherwise: the likeliest piece a frame.

    The audio is encoded whole. The published models name an `audio_window_size` to encode it by, but transformers
    (5.23) then encodes the first window twice, and hears everything a window late.
    """
    initial = config.streams.text_cardinality
    return import_transformers().GenerationConfig(
        bos_token_id=initial,
        pad_token_id=config.streams.text_pad_id,
        # The head's last row is zeros: its logit of 0 would win where all others are negative.
        suppress_tokens=[initial],
    )


def stt_sections(config: KyutaiSpeechToTextConfig) -> dict[str, dict[str, Any]]:
    """The sections `model`, `streams`, `temporal` and `codec` of a native config, unchecked.

    Raises:
        ValueError: transformers' config has what the native model has not; names key and value.
    """
    expected = {
        "audio_bos_token_id": config.codebook_vocab_size - 1,
        "audio_pad_token_id": config.vocab_size + config.num_codebooks * config.codebook_vocab_size,
        "tie_word_embeddings": False,
    }
    for key, value in expected.items():
        if (found := getattr(config, key)) != value:
            raise ValueError(
                f"{config.model_type}: {key} = {found}, but by its other sizes it should be {value}; mend it"
            )
    streams = {
        "text_cardinality": config.vocab_size - 1,
        "text_pad_id": config.pad_token_id,
        "num_codebooks": 0,
        "num_given_codebooks": config.num_codebooks,
        "cardinality": config.codebook_vocab_size - 1,
        "delays": [0] * (1 + config.num_codebooks),
    }
    return {
        "model": {"layernorm_epsilon": config.rms_norm_eps},
        "streams": streams,
        "temporal": temporal_section(config),
        "codec": {"name": "mimi"},
    }
