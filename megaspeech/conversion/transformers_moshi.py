"""Native models as transformers' `MoshiForConditionalGeneration`, and back.

Its layers over frames are `transformers_layers`'; this is the rest: a table a stream, one text head, and the depth
transformer, whose weights are stacked `[Q, out, in]` for Q codebooks, and know no RoPE. A Mimi is inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from megaspeech.codecs.neural import import_transformers
from megaspeech.config import Config
from megaspeech.conversion.layouts import Chain, Table, Tensors
from megaspeech.conversion.mimi_files import Mimi
from megaspeech.conversion.rules import Rule
from megaspeech.conversion.transformers_layers import (
    INSTEAD,
    check_mimi,
    one,
    refuse_unknown_layers,
    shape_section,
    temporal_rules,
    temporal_section,
    temporal_values,
)

if TYPE_CHECKING:
    from transformers import GenerationConfig, MoshiConfig

TEXT_TEMPERATURE, TEXT_TOP_K = 0.7, 25
AUDIO_TEMPERATURE, AUDIO_TOP_K = 0.8, 250
"""Defaults of the moshi runtime's `LMGen` (moshi/models/lm.py, 0.2.13)."""


@dataclass(frozen=True)
class PerCodebook:
    """One native `[S * I, O]`, S sets of weights, and one foreign `[Q, O, I]`, a copy for each codebook.

    Attributes:
        schedule: the set that each codebook uses, `[Q]`; for what is read from transformers each has its own.
    """

    schedule: tuple[int, ...]

    def to_foreign(self, native: Tensors) -> Tensors:
        """Each codebook's, transposed."""
        sets_SOI = native[0].unflatten(0, (max(self.schedule) + 1, -1)).transpose(1, 2)
        return [sets_SOI[list(self.schedule)]]

    def to_native(self, foreign: Tensors) -> Tensors:
        """Each codebook's, transposed back."""
        assert self.schedule == tuple(range(foreign[0].shape[0])), "transformers knows no shared weights"
        return [foreign[0].transpose(1, 2).flatten(0, 1)]


@dataclass(frozen=True)
class Projections:
    """One `[Q, heads * D, I]` of queries, keys and values, and three tensors."""

    rows: tuple[int, int, int]

    def to_foreign(self, native: Tensors) -> Tensors:
        """Cut."""
        return native[0].split(list(self.rows), dim=1)

    def to_native(self, foreign: Tensors) -> Tensors:
        """One after the other."""
        return [torch.cat(list(foreign), dim=1)]


def moshi_rules(config: Config) -> list[Rule]:
    """Which of transformers' tensors hold the numbers of which native ones; those of the Mimi inside are not among."""
    streams = config.streams
    tables = (
        "decoder.model.embed_tokens.weight",
        *(f"embed_tokens.{k}.weight" for k in range(streams.num_streams - 1)),
    )
    return [
        Rule(("embedding.weight",), tables, Table(streams.cardinalities)),
        *temporal_rules(config, "decoder.model"),
        one("text_head.weight", "decoder.lm_head.weight"),
        *_depth_rules(config),
    ]


def _depth_rules(config: Config) -> Iterator[Rule]:
    shape, codebooks = config.depth, config.streams.num_codebooks
    own, keys = tuple(range(codebooks)), shape.num_query_groups * shape.hidden_size // shape.num_attention_heads
    sets = shape.weights_per_step_schedule or own
    queries = Chain(PerCodebook(sets), Projections((shape.hidden_size, keys, keys)))

    def rule(native: str, foreign: str, schedule: tuple[int, ...] = sets) -> Rule:
        return Rule((f"depth.{native}.weight",), (f"depth_decoder.{foreign}.weight",), PerCodebook(schedule))

    tables = ("text_embed_tokens", *(f"embed_tokens.{index}" for index in range(codebooks - 1)))
    names = tuple(f"depth_decoder.{name}.weight" for name in tables)
    yield Rule(("depth.embedding",), names, Table(config.streams.cardinalities[:codebooks]))
    yield rule("input", "input_projections", sets if shape.multi_linear else (0,) * codebooks)
    for layer in range(shape.num_layers):
        ours, theirs = f"layers.{layer}", f"depth_decoder.layers.{layer}"
        yield one(f"depth.{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight")
        projections = tuple(f"{theirs}.self_attn.{part}_proj.linear.weight" for part in "qkv")
        yield Rule((f"depth.{ours}.qkv.weight",), projections, queries)
        yield rule(f"{ours}.proj", f"{ours}.self_attn.o_proj.linear")
        yield one(f"depth.{ours}.mlp_norm.weight", f"{theirs}.post_attention_layernorm.weight")
        yield rule(f"{ours}.fc1", f"{ours}.mlp.fc1")
        yield rule(f"{ours}.fc2", f"{ours}.mlp.fc2")
    yield rule("heads", "lm_heads", own)


def moshi_config(config: Config, *, mimi: Mimi, dtype: str) -> MoshiConfig:
    """transformers' config of a native model.

    Args:
        config: of the model.
        mimi: to be put inside.
        dtype: torch's name of the weights' precision.

    Raises:
        ValueError: the model has what transformers' Moshi has not; names the key and the remedy.
    """
    refuse_unknown_layers(config.temporal)
    for fault in _unknown_to_transformers(config):
        raise ValueError(f"{fault}; {INSTEAD}")
    check_mimi(mimi, streams=config.streams)
    streams, depth = config.streams, config.depth
    return import_transformers().MoshiConfig(
        **temporal_values(config),
        architectures=["MoshiForConditionalGeneration"],
        dtype=dtype,
        vocab_size=streams.text_cardinality,
        audio_vocab_size=streams.cardinality,
        num_codebooks=streams.num_codebooks,
        audio_encoder_config=mimi.config.to_dict(),
        depth_decoder_config={
            "hidden_size": depth.hidden_size,
            "num_hidden_layers": depth.num_layers,
            "num_attention_heads": depth.num_attention_heads,
            "num_key_value_heads": depth.num_query_groups,
            "ffn_dim": 2 * depth.ffn_hidden_size,
            "hidden_act": "silu",
            "rms_norm_eps": config.model.layernorm_epsilon,
            # What the cache holds. The default is 8: with more codebooks the later ones would come out wrong.
            "sliding_window": streams.num_codebooks,
            "max_position_embeddings": streams.num_codebooks + 1,
        },
    )


def _unknown_to_transformers(config: Config) -> Iterator[str]:
    """What a native model has and transformers' Moshi has not, a line each."""
    streams = config.streams
    if streams.num_codebooks < 2:
        yield f"streams.num_codebooks: {streams.num_codebooks}, but transformers' Moshi speaks 2 or more"
    if streams.num_given_codebooks != streams.num_codebooks:
        yield (
            f"streams.num_given_codebooks: {streams.num_given_codebooks}, but transformers' Moshi hears as many "
            f"codebooks as it speaks, {streams.num_codebooks}"
        )
    if streams.delays != (known := delays(streams.num_codebooks)):
        yield f"streams.delays: {list(streams.delays)}, but transformers' Moshi generates with {list(known)} alone"
    if config.depth.low_rank_embeddings is not None:
        yield f"depth.low_rank_embeddings: {config.depth.low_rank_embeddings}, but transformers' Moshi has whole tables"


def delays(num_codebooks: int) -> tuple[int, ...]:
    """The only acoustic delays that transformers' Moshi generates with: one frame, but for the semantic codebooks."""
    own = (0, *[1] * (num_codebooks - 1))
    return (0, *own, *own)


def moshi_generation(config: Config) -> GenerationConfig:
    """How `generate` goes unless told otherwise: sampled as the moshi runtime does.

    There is no padding token: `generate` would not look at the frames that hold it, and with no prompt at all the first
    of them holds the initial token, which the published models name.
    """
    length = config.streams.num_codebooks + 1
    return import_transformers().GenerationConfig(
        do_sample=True,
        temperature=TEXT_TEMPERATURE,
        top_k=TEXT_TOP_K,
        bos_token_id=config.streams.text_cardinality,
        depth_decoder_config={
            "do_sample": True,
            "temperature": AUDIO_TEMPERATURE,
            "top_k": AUDIO_TOP_K,
            "min_length": length,
            "max_length": length,
            "cache_implementation": "static",
        },
    )


def moshi_sections(config: MoshiConfig) -> dict[str, dict[str, Any]]:
    """The sections `model`, `streams`, `temporal`, `depth` and `codec` of a native config, unchecked.

    Raises:
        ValueError: transformers' config has what the native model has not; names key and value.
    """
    depth = config.depth_decoder_config
    if depth.head_dim * depth.num_attention_heads != depth.hidden_size:
        raise ValueError(f"depth_decoder_config.head_dim = {depth.head_dim}, but native depth heads share hidden_size")
    if depth.rms_norm_eps != config.rms_norm_eps:
        raise ValueError(
            f"rms_norm_eps = {config.rms_norm_eps} and {depth.rms_norm_eps} in depth_decoder_config, but the native "
            f"model has one for both"
        )
    streams = {
        "text_cardinality": config.vocab_size,
        "num_codebooks": config.num_codebooks,
        "num_given_codebooks": config.num_codebooks,
        "cardinality": config.audio_vocab_size,
        "delays": delays(config.num_codebooks),
    }
    return {
        "model": {"layernorm_epsilon": config.rms_norm_eps},
        "streams": streams,
        "temporal": temporal_section(config),
        "depth": {
            **shape_section(depth),
            "weights_per_step_schedule": None,
            "multi_linear": True,
            "low_rank_embeddings": None,
        },
        "codec": {"name": "mimi"},
    }
