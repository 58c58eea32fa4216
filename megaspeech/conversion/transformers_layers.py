"""What transformers' Moshi and its speech-to-text sibling share: the temporal layers, and how their configs say it.

transformers turns the halves of a head against each other where we and Kyutai turn neighbours, so rows of queries and
keys are in another order there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megaspeech.config import Config
from megaspeech.config.schema import StreamsSection, TemporalSection
from megaspeech.conversion.layouts import GroupedQueries, Same
from megaspeech.conversion.mimi_files import Mimi
from megaspeech.conversion.rules import Rule

if TYPE_CHECKING:
    from transformers import PretrainedConfig

INSTEAD = "convert it to moshi instead"


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
        "head_dim": shape.head_width,
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
    shared = config.hidden_size // config.num_attention_heads
    return {
        **shape_section(config),
        "kv_channels": None if config.head_dim == shared else config.head_dim,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "context": config.sliding_window,
        "num_extra_heads": 0,
        "rotary_base": int(rope["rope_theta"]),
    }


def refuse_unknown_layers(shape: TemporalSection) -> None:
    """Raises ValueError where the layers over frames have what transformers' (and the moshi runtime's) have not."""
    unknown = {"num_moe_experts": "experts", "add_qkv_bias": "biases", "qk_layernorm": "norms of queries and keys"}
    for key, what in unknown.items():
        if value := getattr(shape, key):
            raise ValueError(f"temporal.{key}: {value}, but neither transformers' Moshi nor the runtime's has {what}")


def check_mimi(mimi: Mimi, *, streams: StreamsSection) -> None:
    """Raises ValueError where a Mimi is not the codec of these streams."""
    used = streams.num_codec_codebooks
    if mimi.config.codebook_size != streams.cardinality:
        fault = f"streams.cardinality: {streams.cardinality}, but the Mimi has {mimi.config.codebook_size}"
    elif mimi.config.num_quantizers < used:
        fault = f"streams: {used} codebooks a speaker, but the Mimi has {mimi.config.num_quantizers}"
    else:
        return
    raise ValueError(f"{fault}; give the codec that the model was trained on by --codec, or {INSTEAD}")


def shape_section(config: PretrainedConfig) -> dict[str, Any]:
    """What `[temporal]` and `[depth]` share, of transformers' config; raises ValueError as `temporal_section`."""
    if config.hidden_act != "silu":
        raise ValueError(
            f"{config.model_type}: hidden_act = {config.hidden_act!r}, but the native model only has 'silu'"
        )
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_dim // 2,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
    }
