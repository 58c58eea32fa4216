"""`config.json` of a text model of transformers, and the config of a speech-text model that starts from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaspeech.codecs.neural import import_transformers
from megaspeech.config import Config, changed, config_of
from megaspeech.config.schema import TemporalSection

CONFIG_FILE = "config.json"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type` of what can be read; sizes, versions and fine-tunes of them share it."""
DROPPABLE = {
    "rope_scaling": "positions are not stretched, as they were for texts longer than it was first trained on: it gives "
    "other logits, until it is trained",
    "rms_norm_eps": "norms add 1e-8 as Kyutai's do, and not its own: the first layers differ until they are trained",
}
"""What may be left out of the model, and what that means."""
EPSILON = 1e-8
"""Of the norms, when the text model's own is left out."""
PRESET, CODEC = "moshi-7b", "mimi"
"""Streams and depth transformer of a new model of which nothing is said."""


@dataclass(frozen=True)
class TextModel:
    """What a config.json says.

    Attributes:
        path: folder.
        family: of `FAMILIES`.
        shape: `[temporal]`, by key; `context` is the sliding window, or the longest text that it was made for.
        is_windowed: whether it has a sliding window.
        vocabulary_size: rows of its embedding.
        layernorm_epsilon: of its norms.
        is_tied: whether the text head has the embedding's rows.
        first_token: that documents begin with; None if it tells of none.
        pad_ids: (PAD, EPAD) for the time being: the token of padding or of a text's end, and that of its end.
        notes: what was left out.
    """

    path: Path
    family: str
    shape: dict[str, Any]
    is_windowed: bool
    vocabulary_size: int
    layernorm_epsilon: float
    is_tied: bool
    first_token: int | None
    pad_ids: tuple[int, int]
    notes: tuple[str, ...]


def read_text_model(path: Path, *, drop: Sequence[str] = ()) -> TextModel:
    """What `path/config.json` says, with transformers' own values for what it leaves out.

    Raises:
        ValueError: there is none, or it has what a native model cannot hold; names the key, its value, the remedy.
        ImportError: transformers is not installed.
    """
    values = _transformers_config(path)
    unknown = sorted(set(drop) - set(DROPPABLE))
    if unknown:
        raise ValueError(f"--drop {unknown[0]}: of a text model {' and '.join(DROPPABLE)} alone may be left out")
    for fault in _refused(values, drop=drop):
        raise ValueError(f"{path / CONFIG_FILE}: {fault}")
    window = _window(values)
    heads, width = values.num_attention_heads, getattr(values, "head_dim", None)
    own_width = width is not None and width * heads != values.hidden_size
    end = _first(values.eos_token_id)
    pad = next((token for token in (values.pad_token_id, end) if token is not None), 0)
    return TextModel(
        path=path,
        family=values.model_type,
        shape={
            "num_layers": values.num_hidden_layers,
            "hidden_size": values.hidden_size,
            "ffn_hidden_size": values.intermediate_size,
            "num_attention_heads": heads,
            "num_query_groups": values.num_key_value_heads,
            "kv_channels": width if own_width else None,
            "add_qkv_bias": values.model_type == "qwen2",
            "qk_layernorm": values.model_type == "qwen3",
            "rotary_base": int(values.rope_parameters["rope_theta"]),
            "context": window or values.max_position_embeddings,
            "num_moe_experts": None,
        },
        is_windowed=window is not None,
        vocabulary_size=values.vocab_size,
        layernorm_epsilon=EPSILON if "rms_norm_eps" in drop else values.rms_norm_eps,
        is_tied=values.tie_word_embeddings,
        first_token=next((token for token in (_first(values.bos_token_id), end) if token is not None), None),
        pad_ids=(pad, pad if end is None else end),
        notes=tuple(f"{key} is left out: {DROPPABLE[key]}" for key in drop),
    )


def _first(token: int | list[int] | None) -> int | None:
    """Of a text's ends some models have several."""
    return token[0] if isinstance(token, list) else token


def _transformers_config(path: Path) -> Any:
    try:
        family = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path / CONFIG_FILE} cannot be read ({error}); give the folder of a text model") from error
    if family not in FAMILIES:
        raise ValueError(f"{path / CONFIG_FILE}: model_type {family!r} is none of {', '.join(FAMILIES)}")
    loader = import_transformers().AutoConfig
    try:
        return loader.from_pretrained(path, local_files_only=True)
    except Exception as error:  # what it raises for a value that is wrong is no ValueError
        raise ValueError(f"{path / CONFIG_FILE}: {' '.join(str(error).split())}") from error


def _refused(values: Any, *, drop: Sequence[str]) -> Iterator[str]:
    """What a native model cannot hold."""
    rope = values.rope_parameters
    kind, base = rope.get("rope_type", "default"), rope.get("rope_theta", 0)
    if kind != "default" and "rope_scaling" not in drop:
        yield f'rope_scaling: "{kind}" has no counterpart in the moshi runtime; --drop rope_scaling leaves it out'
    if rope.get("partial_rotary_factor", 1) != 1:
        yield f"partial_rotary_factor: {rope['partial_rotary_factor']}, but heads are turned whole; take another model"
    if base < 1 or base != int(base):
        yield f"rope_theta: {base} is no whole number, which temporal.rotary_base is; take another model"
    for key, held in (("hidden_act", "silu"), ("mlp_bias", False), ("attention_bias", False)):
        if (value := getattr(values, key, held)) != held:
            yield f"{key}: {value!r}, but a native model has {held!r} alone; take another model"
    if getattr(values, "quantization_config", None) is not None:
        yield "quantization_config: quantised weights cannot be trained; take the model that they were made of"
    if len(set(getattr(values, "layer_types", None) or [""])) > 1:
        yield "layer_types: some layers have a sliding window and some have not; native ones are all alike"


def _window(values: Any) -> int | None:
    """The sliding window of all layers; None where there is none."""
    kinds = set(getattr(values, "layer_types", None) or ["sliding_attention"])
    return getattr(values, "sliding_window", None) if kinds == {"sliding_attention"} else None


def unlike_moshis(shape: TemporalSection) -> Iterator[str]:
    """What a temporal transformer has from its text model and Moshi's has not, a line each."""
    if shape.head_width * shape.num_attention_heads != shape.hidden_size:
        yield f"temporal.kv_channels: {shape.kv_channels}, but Moshi's heads share hidden_size = {shape.hidden_size}"
    for key, what in (("add_qkv_bias", "no biases"), ("qk_layernorm", "no norms of queries and keys")):
        if getattr(shape, key):
            yield f"temporal.{key}: true, but Moshi has {what}"


def config_of_text_model(text: TextModel, *, config: Config | None, recipe: str) -> Config:
    """The config of a speech-text model that starts from a text model.

    Text's cardinality, PAD and EPAD are the text model's, until `vocabulary` changes them.

    Args:
        text: the text model.
        config: see `text_models.open_text_model`.
        recipe: `precision.recipe` of its weights.

    Raises:
        ValueError: the config's temporal transformer is another one; names every key, and the right value.
    """
    source = str(text.path / CONFIG_FILE)
    if config is None:
        config = config_of({"model": {"preset": PRESET}, "codec": {"name": CODEC}}, source=source)
        config = changed(config, {"temporal": text.shape}, source=source)
    else:
        _check_agreement(text, config=config)
    tables: dict[str, dict[str, Any]] = {"model": {"layernorm_epsilon": text.layernorm_epsilon}}
    if config.precision.params_dtype != recipe:
        tables["precision"] = {"recipe": recipe}
    if config.streams.text_cardinality != text.vocabulary_size:
        pad, end_pad = text.pad_ids
        named = {"text_cardinality": text.vocabulary_size, "text_pad_id": pad, "text_end_pad_id": end_pad}
        tables["streams"] = named
    return changed(config, tables, source=source)


def _check_agreement(text: TextModel, *, config: Config) -> None:
    wanted = {f"temporal.{key}": value for key, value in text.shape.items() if key != "context" or text.is_windowed}
    found = {f"temporal.{key}": value for key, value in config.temporal.model_dump().items()}
    if config.temporal.head_width * config.temporal.num_attention_heads == config.temporal.hidden_size:
        found["temporal.kv_channels"] = None  # whether it is said or not
    wanted["model.layernorm_epsilon"] = text.layernorm_epsilon
    found["model.layernorm_epsilon"] = config.model.layernorm_epsilon
    differing = [
        f"{key} is {found[key]} and must be {'left out' if value is None else value}"
        for key, value in wanted.items()
        if found[key] != value
    ]
    if differing:
        raise ValueError(f"--config: {'; '.join(differing)} to start from {text.path}")
