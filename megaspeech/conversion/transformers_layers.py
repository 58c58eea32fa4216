"""What transformers' Moshi and its speech-to-text sibling share: the temporal layers, and how their configs say it.

transformers turns the halves of a head against each other where we and Kyutai turn neighbours, so rows of queries and
keys are in another order there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from megaspeech.config import Config
from megaspeech.conversion.deferred import Weights
from megaspeech.conversion.layouts import GroupedQueries, Same
from megaspeech.conversion.mimi_files import Mimi
from megaspeech.conversion.rules import Rule
from megaspeech.conversion.text_config import unlike_moshis

if TYPE_CHECKING:
    from transformers import PretrainedConfig

INSTEAD = "convert it to moshi instead"
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def one(native: str, foreign: str) -> Rule:
    """A tensor that is the same on both sides."""
    return Rule((native,), (foreign,), Same())


def temporal_rules(config: Config, prefix: str) -> Iterator[Rule]:
    """Those of the layers over frames, which transformers keeps under `prefix`."""
    shape = config.temporal
    for layer in range(shape.num_layers):
        ours, theirs = f"temporal.block.layers.{layer}", f"{prefix}.layers.{layer}"
        yield one(f"{ours}.input_layernorm.weight", f"{theirs}.input_layernorm.weight")
        projections = tuple(f"{theirs}.self_attn.{part}_proj.linear.weight" for part in "qkv")
        queries = GroupedQueries.of(shape, half_split=True)
        yield Rule((f"{ours}.self_attention.linear_qkv.weight",), projections, queries)
        yield one(f"{ours}.self_attention.linear_proj.weight", f"{theirs}.self_attn.o_proj.linear.weight")
        yield one(f"{ours}.pre_mlp_layernorm.weight", f"{theirs}.post_attention_layernorm.weight")
        yield one(f"{ours}.mlp.linear_fc1.weight", f"{theirs}.mlp.fc1.weight")  # [gate; up] on both sides
        yield one(f"{ours}.mlp.linear_fc2.weight", f"{theirs}.mlp.fc2.weight")
    yield one("temporal.block.final_layernorm.weight", f"{prefix}.norm.weight")


def temporal_values(config: Config) -> dict[str, Any]:
    """Of transformers' config, what describes the layers over frames."""
    shape = config.temporal
    return {
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "ffn_dim": 2 * shape.ffn_hidden_size,
        # The cache holds so many frames; what is not cached, a whole sequence at once, sees all that came before.
        "sliding_window": shape.context,
        "max_position_embeddings": shape.context,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(shape.rotary_base)},
        "rms_norm_eps": config.model.layernorm_epsilon,
        "hidden_act": "silu",
    }


def temporal_section(config: PretrainedConfig) -> dict[str, Any]:
    """`[temporal]` of transformers' config.

    Raises:
        ValueError: the config has what the native model has not; names key and value.
    """
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default" or rope["rope_theta"] % 1:
        raise ValueError(f"rope_parameters = {rope}: only plain RoPE with a whole rope_theta is known")
    return {
        **shape_section(config),
        "context": config.sliding_window,
        "num_extra_heads": 0,
        "rotary_base": int(rope["rope_theta"]),
    }


def unknown_layers(config: Config) -> Iterator[str]:
    """What a native model's layers over frames have and transformers' have not, a line each."""
    if config.temporal.num_moe_experts is not None:
        yield f"temporal.num_moe_experts: {config.temporal.num_moe_experts}, but transformers has no experts there"
    yield from unlike_moshis(config.temporal)


def unknown_codec(config: Config, *, mimi: Mimi, num_codebooks: int) -> Iterator[str]:
    """In what a Mimi is not the codec that a native model knows, a line each; `num_codebooks` of it are used."""
    if mimi.config.codebook_size != config.streams.cardinality:
        yield f"streams.cardinality: {config.streams.cardinality}, but the Mimi has {mimi.config.codebook_size}"
    if mimi.config.num_quantizers < num_codebooks:
        yield f"streams: {num_codebooks} codebooks a speaker, but the Mimi has {mimi.config.num_quantizers}"


def shape_section(config: PretrainedConfig) -> dict[str, Any]:
    """What `[temporal]` and `[depth]` share, of transformers' config; raises ValueError as `temporal_section`."""
    width, heads = config.hidden_size, config.num_attention_heads
    expected = {"hidden_act": "silu", "head_dim": width // heads}
    for key, value in expected.items():
        if (found := getattr(config, key)) != value:
            raise ValueError(f"{config.model_type}: {key} = {found!r}, but the native model only has {value!r}")
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": width,
        "ffn_hidden_size": config.ffn_dim // 2,
        "num_attention_heads": heads,
        "num_query_groups": config.num_key_value_heads,
    }


def recipe_of(weights: Weights, name: str) -> str:
    """`precision.recipe` of weights whose tensor `name` tells their precision."""
    dtype = weights[name].dtype
    if dtype not in DTYPES:
        raise ValueError(f"tensor {name}: {dtype} weights are not known, only {' and '.join(map(str, DTYPES))}")
    return DTYPES[dtype]
