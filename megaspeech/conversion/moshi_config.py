"""`config.json` of Kyutai's `moshi` runtime from a run's config, and back.

It holds the arguments of moshi's `LMModel` beside keys that its loader reads (moshi/models/loaders.py and lm.py of
0.2.13). In its vocabulary `card` is cardinality, `n_q` all audio streams, `dep_q` the predicted codebooks, `depformer`
the depth transformer, `dim_feedforward` one and a half gate widths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megaspeech.config import Config
from megaspeech.config.schema import TransformerSection
from megaspeech.conversion.text_config import unlike_moshis

Values = Mapping[str, Any]

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
CONTEXT = 3000
"""Frames that are seen where a config.json does not say, which streaming needs: Moshi's, four minutes."""

DEFAULTS: dict[str, Any] = {
    "delays": [0],
    "card": 1024,
    "text_card": 32000,
    "text_card_out": None,
    "demux_second_stream": False,
    "demux_second_text_stream": False,
    "dim": 128,
    "num_heads": 8,
    "hidden_scale": 4,
    "norm": "layer_norm",
    "norm_emb": False,
    "bias_proj": False,
    "depformer_dim": 256,
    "depformer_dim_feedforward": None,
    "depformer_multi_linear": False,
    "depformer_weights_per_step": False,
    "depformer_weights_per_step_schedule": None,
    "depformer_low_rank_embeddings": None,
    "depformer_pos_emb": "sin",
    "depformer_norm": None,
    "existing_text_padding_id": 3,
    "existing_text_end_padding_id": 0,
    "extra_heads_num_heads": 0,
    "extra_heads_dim": 6,
    "context": None,
    "causal": True,
    "gating": "none",
    "layer_scale": None,
    "positional_embedding": "sin",
    "max_period": 10000,
    "kv_repeat": 1,
    "cross_attention": False,
    "quantize": False,
}
"""What moshi takes a key that is left out to be. `n_q`, `dep_q`, `num_layers` and `depformer_num_heads` have none."""
LEGACY: dict[str, Any] = {
    "dim": 4096,
    "text_card": 32000,
    "existing_text_padding_id": 3,
    "n_q": 16,
    "dep_q": 8,
    "card": 2048,
    "num_heads": 32,
    "num_layers": 32,
    "hidden_scale": 4.125,
    "context": 3000,
    "max_period": 10000,
    "gating": "silu",
    "norm": "rms_norm_f32",
    "positional_embedding": "rope",
    "depformer_dim": 1024,
    "depformer_dim_feedforward": 4224,
    "depformer_num_heads": 16,
    "depformer_num_layers": 6,
    "depformer_multi_linear": True,
    "depformer_pos_emb": "none",
    "depformer_weights_per_step": True,
    "delays": [0, 0, *[1] * 7, 0, *[1] * 7],
}
"""Moshi 7B, which moshi takes a folder without config.json to hold."""

EPSILON_OF_NORM = {"rms_norm_f32": 1e-8, "rms_norm": 1e-5}


def moshi_config(config: Config) -> dict[str, Any]:
    """The runtime's `config.json` of a run's model, and nothing that the runtime does not know.

    Raises:
        ValueError: the model has what the runtime knows nothing of.
    """
    streams, temporal, depth = config.streams, config.temporal, config.depth
    for fault in _unknown_to_the_runtime(config):
        raise ValueError(f"{fault}; it cannot be exported to moshi")
    norms = {epsilon: norm for norm, epsilon in EPSILON_OF_NORM.items()}
    values = {
        "model_type": "moshi",
        "moshi_name": WEIGHTS_FILE,
        "card": streams.cardinality,
        "n_q": streams.num_streams - 1,
        "dep_q": streams.num_codebooks,
        "delays": list(streams.delays),
        "text_card": streams.text_cardinality,
        "existing_text_padding_id": streams.text_pad_id,
        "existing_text_end_padding_id": streams.text_end_pad_id,
        "dim": temporal.hidden_size,
        "num_heads": temporal.num_attention_heads,
        "num_layers": temporal.num_layers,
        "kv_repeat": temporal.num_attention_heads // temporal.num_query_groups,
        # The runtime computes int(hidden_scale * dim), which the exact quotient can miss by one.
        "hidden_scale": (_feed_forward(temporal) + 0.5) / temporal.hidden_size,
        "context": temporal.context,
        "max_period": temporal.rotary_base,
        "causal": True,
        "norm": norms[config.model.layernorm_epsilon],
        "gating": "silu",
        "positional_embedding": "rope",
        "extra_heads_num_heads": temporal.num_extra_heads,
        "extra_heads_dim": temporal.extra_heads_dim,
        "depformer_multi_linear": depth.multi_linear or not streams.num_codebooks,  # else it has an unused projection
    }
    return {**values, **_depformer(config)} if streams.num_codebooks else values


def _depformer(config: Config) -> dict[str, Any]:
    depth = config.depth
    values = {
        "depformer_dim": depth.hidden_size,
        "depformer_num_heads": depth.num_attention_heads,
        "depformer_num_layers": depth.num_layers,
        "depformer_kv_repeat": depth.num_attention_heads // depth.num_query_groups,
        "depformer_dim_feedforward": _feed_forward(depth),
        "depformer_gating": "silu",
        "depformer_pos_emb": "none",
        "depformer_weights_per_step": True,
    }
    if depth.weights_per_step_schedule is not None:
        values["depformer_weights_per_step_schedule"] = list(depth.weights_per_step_schedule)
    if depth.low_rank_embeddings is not None:
        values["depformer_low_rank_embeddings"] = depth.low_rank_embeddings
    return values


def _unknown_to_the_runtime(config: Config) -> Iterator[str]:
    if config.temporal.num_moe_experts is not None:
        yield f"temporal.num_moe_experts: {config.temporal.num_moe_experts}, but moshi has no mixtures of experts"
    yield from unlike_moshis(config.temporal)
    epsilon, known = config.model.layernorm_epsilon, sorted(EPSILON_OF_NORM.values())
    if epsilon not in known:
        yield f"model.layernorm_epsilon: {epsilon}, but moshi's norms have {' or '.join(map(str, known))}"


def _feed_forward(shape: TransformerSection) -> int:
    """The `dim_feedforward` from which the runtime computes our gate width h: int(2 * dim_feedforward / 3) = h.

    It makes an exception of 4 * dim (h = 21 * dim / 8 then), so that value is stepped over.
    """
    for value in range(3 * shape.ffn_hidden_size // 2, 3 * shape.ffn_hidden_size // 2 + 3):
        if _gate_width(value, width=shape.hidden_size) == shape.ffn_hidden_size:
            return value
    if _gate_width(4 * shape.hidden_size, width=shape.hidden_size) == shape.ffn_hidden_size:
        return 4 * shape.hidden_size
    raise ValueError(f"ffn_hidden_size {shape.ffn_hidden_size} cannot be expressed in the runtime's config")


def _gate_width(feed_forward: int, *, width: int) -> int:
    """Of a SwiGLU with this `dim_feedforward` (moshi/modules/gating.py)."""
    return 21 * width // 8 if feed_forward == 4 * width else 2 * feed_forward // 3


def sections_of(values: Values) -> dict[str, dict[str, Any]]:
    """The sections `model`, `streams`, `temporal` and `depth` that a `config.json` describes, unchecked.

    Raises:
        ValueError: a key that has no default is missing.
    """
    get = Lookup(values)
    temporal = {
        "num_layers": get("num_layers"),
        "hidden_size": get("dim"),
        "ffn_hidden_size": _gate_width(int(get("hidden_scale") * get("dim")), width=get("dim")),
        "num_attention_heads": get("num_heads"),
        "num_query_groups": get("num_heads") // get("kv_repeat"),
        "context": get("context") or CONTEXT,
        "rotary_base": get("max_period"),
        "num_extra_heads": get("extra_heads_num_heads"),
        "extra_heads_dim": get("extra_heads_dim"),
    }
    streams = {
        "text_cardinality": get("text_card"),
        "text_pad_id": get("existing_text_padding_id"),
        "text_end_pad_id": get("existing_text_end_padding_id"),
        "num_codebooks": get("dep_q"),
        "num_given_codebooks": get("n_q") - get("dep_q"),
        "cardinality": get("card"),
        "delays": get("delays"),
    }
    model = {"layernorm_epsilon": EPSILON_OF_NORM[get("norm")]}
    return {"model": model, "streams": streams, "temporal": temporal, "depth": _depth_section(get)}


def _depth_section(get: Lookup) -> dict[str, Any]:
    if not get("dep_q"):  # a shape that nothing is made of
        return {name: 1 for name in TransformerSection.model_fields}
    width, heads = get("depformer_dim"), get("depformer_num_heads")
    feed_forward = get("depformer_dim_feedforward")
    if isinstance(feed_forward, list):  # all alike, as `moshi_refusals` has seen
        feed_forward = feed_forward[0]
    if feed_forward is None:
        feed_forward = int(get("hidden_scale") * width)
    section = {
        "num_layers": get.of_depth("num_layers"),
        "hidden_size": width,
        "ffn_hidden_size": _gate_width(feed_forward, width=width),
        "num_attention_heads": heads,
        "num_query_groups": heads // get.of_depth("kv_repeat"),
        "multi_linear": get("depformer_multi_linear"),
        "weights_per_step_schedule": get("depformer_weights_per_step_schedule"),
        "low_rank_embeddings": get("depformer_low_rank_embeddings"),
    }
    if not get("depformer_weights_per_step") and not get("depformer_multi_linear"):
        section["weights_per_step_schedule"] = [0] * get("dep_q")
    return section


def num_copies(values: Values) -> int:
    """How many native sets of depth weights the one set is that a model with `depformer_weights_per_step = false` has.

    One, but where codebooks have projections of their own, whose number a schedule would have go with that of the sets.
    """
    get = Lookup(values)
    return get("dep_q") if get("depformer_multi_linear") else 1


def num_depformer_sets(values: Values) -> int:
    """Sets of weights that the file has."""
    get = Lookup(values)
    if not get("depformer_weights_per_step"):
        return 1
    schedule = get("depformer_weights_per_step_schedule")
    return max(schedule) + 1 if schedule else get("dep_q")


class Lookup:
    """Values of a `config.json`, with moshi's own for what it leaves out."""

    def __init__(self, values: Values) -> None:
        self.values = values

    def __call__(self, key: str) -> Any:
        """Raises ValueError where a key is missing that moshi has no value for."""
        if key not in self.values and key not in DEFAULTS:
            raise ValueError(f"the key {key} is missing; without it there is no telling what the weights are")
        return self.values.get(key, DEFAULTS.get(key))

    def of_depth(self, key: str) -> Any:
        """Of the depth transformer, which takes over what it does not say."""
        return self.values[f"depformer_{key}"] if f"depformer_{key}" in self.values else self(key)
