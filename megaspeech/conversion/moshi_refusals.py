"""What a `config.json` of moshi may say that a native model cannot hold, refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megaspeech.conversion.moshi_config import CONTEXT, DEFAULTS, EPSILON_OF_NORM, Lookup, Values

LOADER_KEYS = {
    *("moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name", "model_type", "model_id"),
    *("lm_gen_config", "tts_config", "stt_config"),
    *("lora", "lora_name", "lora_rank", "lora_scaling", "conditioners", "fuser"),
}
"""Read by moshi's loader, and no arguments of its model."""
DEPTH_KEYS = {
    f"depformer_{key}"
    for key in ("num_layers", "num_heads", "gating", "layer_scale", "kv_repeat", "context", "max_period", "causal")
}
"""Beside those of `DEFAULTS`. The last three have no effect."""
WITHOUT_DEFAULT = {"n_q", "dep_q", "num_layers"}

LEFT_OUT_BY = {
    "extra_heads": {"extra_heads_num_heads": 0},
    "conditioners": {"conditioners": {}, "fuser": None},
}
"""What may be dropped, and the values of a model without it, which works as well."""
TENSORS_OF = {"extra_heads": ("extra_heads.",), "conditioners": ("condition_provider.", "fuser.")}

NOT_KEPT = ("lm_gen_config", "tts_config", "model_id", "mimi_config_name")
"""Keys that say how to run the model, for which there is no place in a run's config."""


def held_values(values: Values, *, drop: Sequence[str], source: str) -> tuple[dict[str, Any], list[str]]:
    """(the values of the model without what is dropped, a line for each thing that the user should know).

    Args:
        values: of the `config.json`.
        drop: keys of `LEFT_OUT_BY`.
        source: names the file in messages.

    Raises:
        ValueError: names a key that a native model cannot hold, its value, and the remedy.
    """
    if odd := sorted(set(drop) - LEFT_OUT_BY.keys()):
        raise ValueError(f"--drop {odd[0]}: of moshi's models only {' and '.join(LEFT_OUT_BY)} can be left out")
    known = DEFAULTS.keys() | LOADER_KEYS | DEPTH_KEYS | WITHOUT_DEFAULT
    if odd := sorted(values.keys() - known):
        raise ValueError(f"{source}: {odd[0]} is no key that moshi knows; is the file of another runtime?")
    kept, notes = dict(values), []
    for name in drop:
        kept |= LEFT_OUT_BY[name]
        notes.append(f"{name}: left out, as asked for; the model runs as without")
    if missing := sorted(WITHOUT_DEFAULT - kept.keys()):
        raise ValueError(f"{source}: {missing[0]} is missing; without it there is no telling what the weights are")
    for fault in _faults(kept):
        raise ValueError(f"{source}: {fault}")
    notes += [f"{key} of {source} is not kept: the runtime will use its own" for key in NOT_KEPT if values.get(key)]
    if kept.get("quantize"):
        notes.append("matrices were in eight bits; what that lost is not in them any more")
    if not Lookup(kept)("context"):
        notes.append(f"{source} has no context, which streaming needs: set to {CONTEXT} frames (temporal.context)")
    return kept, notes


def _faults(values: Values) -> Iterator[str]:
    get = Lookup(values)
    for key, held in _held(get).items():
        value = get.of_depth(key.partition("_")[2]) if key in DEPTH_KEYS else get(key)
        if value not in held:
            words = " or ".join(map(repr, held))
            yield f"{key} = {value!r} cannot be held: native models have {words}; convert a model with that"
    if values.get("conditioners"):
        names = ", ".join(values["conditioners"])
        yield f"conditioners ({names}) cannot be held; --drop conditioners leaves them out, for a model without them"
    widths = get("depformer_dim_feedforward")
    if isinstance(widths, list) and len(set(widths)) > 1:
        yield f"depformer_dim_feedforward = {widths} cannot be held: native sets of weights are all of one width"
    if get("depformer_weights_per_step_schedule") and not get("depformer_weights_per_step"):
        yield "depformer_weights_per_step_schedule is for depformer_weights_per_step = true; correct one of them"


def _held(get: Lookup) -> dict[str, tuple[Any, ...]]:
    """The values that native models have, by key."""
    held: dict[str, tuple[Any, ...]] = {
        "text_card_out": (None, get("text_card")),
        "demux_second_stream": (False,),
        "demux_second_text_stream": (False,),
        "norm": tuple(EPSILON_OF_NORM),
        "norm_emb": (False,),
        "bias_proj": (False,),
        "causal": (True,),
        "gating": ("silu",),
        "layer_scale": (None,),
        "positional_embedding": ("rope", "rope_concat"),
        "cross_attention": (False,),
    }
    if get("dep_q"):
        held |= {"depformer_norm": (None,), "depformer_pos_emb": ("none",)}
        held |= {"depformer_gating": ("silu",), "depformer_layer_scale": (None,)}
    return held
