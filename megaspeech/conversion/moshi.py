"""Native models to the files of Kyutai's `moshi` runtime, and back.

A folder holds `config.json` (`moshi_config`), `model.safetensors` and, if we wrote it, the run's config as
`megaspeech.toml`. `rules` is the table of its weights. The packed names (`self_attn.in_proj_weight`) are what Kyutai
releases; moshi, its Rust and MLX ports and the transformers converter read them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaspeech.codecs.moshi_mimi import KYUTAI_FILES
from megaspeech.config import Config, as_toml
from megaspeech.conversion.companions import missing
from megaspeech.conversion.deferred import Deferred, Weights
from megaspeech.conversion.layouts import Chain, GroupedQueries, Joined, Same, Stacked, Table, Unbound, Viewed
from megaspeech.conversion.mimi_files import KYUTAI_FILE, beside_the_runtime, kyutai_file, open_mimi
from megaspeech.conversion.moshi_config import (
    CONFIG_FILE,
    LEGACY,
    WEIGHTS_FILE,
    Values,
    moshi_config,
    num_copies,
    num_depformer_sets,
    sections_of,
)
from megaspeech.conversion.moshi_int8 import from_int8, in_int8
from megaspeech.conversion.moshi_lora import folded
from megaspeech.conversion.moshi_names import copied, split
from megaspeech.conversion.moshi_refusals import TENSORS_OF, held_values
from megaspeech.conversion.native import native_shapes
from megaspeech.conversion.rules import Layout, Rule, to_foreign, to_native
from megaspeech.conversion.safetensors_files import INDEX, open_safetensors
from megaspeech.conversion.stored import Companions, ForeignFiles, StoredModel, kept_in, overlaid
from megaspeech.streaming.folder import CODEC_FOLDER, RUN_FILE, TOKENIZER_FILE, files_beside, run_of
from megaspeech.streaming.runtime import named_file

MIMI_FRAME_RATE = 12.5
LORA_SCALING = 2.0
"""Where a config.json does not say (moshi/models/loaders.py)."""
EARLY_END, PAD = 2, 3
"""Rows of the text embedding: moshi runs "hibiki" models with the first, end of sentence, made equal to the second."""


def rules(config: Config, *, packed: bool = True, half_split: bool = False) -> list[Rule]:
    """Which of the runtime's tensors hold the numbers of which native ones.

    Args:
        config: the model.
        packed: all sets of an attention's weights in one tensor, as in released files, not as in moshi's state dict.
        half_split: the runtime is to rotate halves of heads ("rope_concat"), not pairs ("rope").
    """
    temporal = _temporal(config, packed=packed, half_split=half_split)
    return [*_embeddings(config), *temporal, *_depth(config, packed=packed), *_extra_heads(config)]


def _one(native: str, foreign: str, layout: Layout) -> Rule:
    return Rule((native,), (foreign,), layout)


def _norm(native: str, foreign: str, *, width: int) -> Rule:
    return _one(native, foreign, Viewed((width,), (1, 1, width)))


def _embeddings(config: Config) -> Iterator[Rule]:
    streams = config.streams
    names = ("text_emb.weight", *(f"emb.{index}.weight" for index in range(streams.num_streams - 1)))
    yield Rule(("embedding.weight",), names, Table(streams.cardinalities))
    yield _one("text_head.weight", "text_linear.weight", Same())


def _temporal(config: Config, *, packed: bool, half_split: bool) -> Iterator[Rule]:
    shape = config.temporal
    width, head = shape.hidden_size, shape.hidden_size // shape.num_attention_heads
    parts = (width, shape.num_query_groups * head, shape.num_query_groups * head)
    queries = Chain(GroupedQueries.of(shape, half_split=half_split), Joined(parts))
    names = ("in_proj_weight", "out_proj.weight") if packed else ("in_projs.0.weight", "out_projs.0.weight")
    for layer in range(shape.num_layers):
        ours, theirs = f"temporal.block.layers.{layer}", f"transformer.layers.{layer}"
        yield _norm(f"{ours}.input_layernorm.weight", f"{theirs}.norm1.alpha", width=width)
        yield _one(f"{ours}.self_attention.linear_qkv.weight", f"{theirs}.self_attn.{names[0]}", queries)
        yield _one(f"{ours}.self_attention.linear_proj.weight", f"{theirs}.self_attn.{names[1]}", Same())
        yield _norm(f"{ours}.pre_mlp_layernorm.weight", f"{theirs}.norm2.alpha", width=width)
        # SwiGLU's rows are [gate; up] on both sides.
        yield _one(f"{ours}.mlp.linear_fc1.weight", f"{theirs}.gating.linear_in.weight", Same())
        yield _one(f"{ours}.mlp.linear_fc2.weight", f"{theirs}.gating.linear_out.weight", Same())
    yield _norm("temporal.block.final_layernorm.weight", "out_norm.alpha", width=width)


def _depth(config: Config, *, packed: bool) -> Iterator[Rule]:
    shape, codebooks, sets = config.depth, config.streams.num_codebooks, config.num_weight_sets
    if not codebooks:
        return
    width, head = shape.hidden_size, shape.hidden_size // shape.num_attention_heads
    tables = ("depformer_text_emb", *(f"depformer_emb.{index}" for index in range(codebooks - 1)))
    names = tuple(f"{name}.weight" for name in tables)
    yield Rule(("depth.embedding",), names, Table(config.streams.cardinalities[:codebooks]))
    if shape.low_rank_embeddings is not None:
        names = tuple(f"{name}.low_rank.weight" for name in tables)
        yield Rule(("depth.low_rank.weight",), names, Stacked(codebooks))
    yield _stacked("depth.input.weight", "depformer_in.{}.weight", config.num_input_sets)
    for layer in range(shape.num_layers):
        ours, theirs = f"depth.layers.{layer}", f"depformer.layers.{layer}"
        yield _norm(f"{ours}.attention_norm.weight", f"{theirs}.norm1.alpha", width=width)
        for name, projection, rows in (
            ("qkv", "in_proj", width + 2 * shape.num_query_groups * head),
            ("proj", "out_proj", width),
        ):
            if packed:
                foreign = f"{theirs}.self_attn.{projection}" + ("_weight" if projection == "in_proj" else ".weight")
                yield _one(f"{ours}.{name}.weight", foreign, Chain(Stacked(sets), Joined((rows,) * sets)))
            else:
                yield _stacked(f"{ours}.{name}.weight", f"{theirs}.self_attn.{projection}s.{{}}.weight", sets)
        yield _norm(f"{ours}.mlp_norm.weight", f"{theirs}.norm2.alpha", width=width)
        yield _stacked(f"{ours}.fc1.weight", theirs + ".gating.{}.linear_in.weight", sets)
        yield _stacked(f"{ours}.fc2.weight", theirs + ".gating.{}.linear_out.weight", sets)
    yield _stacked("depth.heads.weight", "linears.{}.weight", codebooks)


def _stacked(native: str, foreign: str, num_sets: int) -> Rule:
    return Rule((native,), tuple(foreign.format(index) for index in range(num_sets)), Stacked(num_sets))


def _extra_heads(config: Config) -> Iterator[Rule]:
    if count := config.temporal.num_extra_heads:
        yield Rule(("extra_heads",), tuple(f"extra_heads.{index}.weight" for index in range(count)), Unbound())


def moshi_files(model: StoredModel, *, int8: bool = False) -> ForeignFiles:
    """What the runtime opens: weights, `config.json`, and the run's config for our own tools.

    Args:
        model: in FP32 or BF16.
        int8: matrices in eight bits, which the runtime takes if it loads the model in FP32 (`streaming.runtime` does;
            its own commands do not) and bitsandbytes is installed.

    Raises:
        ValueError: the model has what the runtime knows nothing of.
    """
    values = moshi_config(model.config) | ({"quantize": True} if int8 else {})
    codec, copies = _codec(model), {}
    if model.companions.tokenizer is not None:
        values["tokenizer_name"] = TOKENIZER_FILE
        copies[TOKENIZER_FILE] = model.companions.tokenizer
    if name := next((name for name in (*codec.copies, *codec.weights_beside) if fnmatch(name, KYUTAI_FILES)), None):
        values["mimi_name"] = name
    files = {CONFIG_FILE: json.dumps(values, indent=1).encode(), RUN_FILE: as_toml(model.config).encode()}
    weights = to_foreign(model.weights, rules(model.config))
    weights = in_int8(weights) if int8 else weights
    notes = tuple(missing(model))
    return ForeignFiles(weights, files | codec.small_files, codec.weights_beside, copies | codec.copies, notes)


def _codec(model: StoredModel) -> ForeignFiles:
    """The codec's files: a Mimi in Kyutai's one file wherever it can be had, another codec's as they are."""
    path = model.companions.codec or model.companions.model_with_mimi
    if path is None:
        return ForeignFiles({})
    if model.config.codec.name != "mimi":
        return ForeignFiles({}, copies={CODEC_FOLDER if path.is_dir() else f"{CODEC_FOLDER}/{path.name}": path})
    if file := kyutai_file(path):
        return ForeignFiles({}, copies={file.name if fnmatch(file.name, KYUTAI_FILES) else KYUTAI_FILE: file})
    return beside_the_runtime(open_mimi(path))


def open_moshi(path: str | Path, *, drop: Sequence[str] = (), lora: Path | None = None) -> StoredModel:
    """The model of a folder that moshi opens, or of a weights file in one; without `config.json` it is Moshi 7B.

    Args:
        path: the folder, or a safetensors file.
        drop: "extra_heads", "conditioners": what may be left out of the model.
        lora: file of low-rank changes to fold in; else that of the `config.json`, if it names one.

    Raises:
        ValueError: the model cannot be held; names the file and the key or tensor.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    found, notes = _settings(folder)
    source = str(folder / CONFIG_FILE)
    values, more = held_values(found, drop=drop, source=source)
    file = path if path.is_file() else _weights_file(folder, values)
    try:
        weights = split(from_int8(open_safetensors(file)), num_sets=num_depformer_sets(values))
        weights, folding = _with_lora(weights, values, folder=folder, file=lora)
        weights, casting = _as_held(weights, values, drop=drop)
        config = _config(folder, values, dtype=weights["text_emb.weight"].dtype)
        half_split = values.get("positional_embedding") == "rope_concat"
        table = rules(config, packed=False, half_split=half_split)
        _check_tensors(weights, table, config=config)
        native = to_native(weights, table)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return StoredModel(config, native, _companions(folder, values), (*notes, *more, *folding, *casting))


def _settings(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """(values of the `config.json`, a note where there is none)."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        return dict(LEGACY), [f"{folder} has no {CONFIG_FILE}: taken to be Moshi 7B, as the runtime does"]
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} is no table of keys; fetch it again")
    return values, []


def _weights_file(folder: Path, values: Values) -> Path:
    """That which the config names, or an index of shards."""
    file = named_file(folder, values.get("moshi_name", WEIGHTS_FILE))
    return folder / INDEX if not file.is_file() and (folder / INDEX).is_file() else file


def _with_lora(
    weights: Weights, values: Values, *, folder: Path, file: Path | None
) -> tuple[dict[str, Deferred], list[str]]:
    if file is None and values.get("lora_name"):
        file = named_file(folder, values["lora_name"])
    if file is None:
        if values.get("lora"):
            raise ValueError(f"{CONFIG_FILE} says lora = true and names no file of it; give it by --lora")
        return dict(weights), []
    own, _ = _settings(file.parent) if (file.parent / CONFIG_FILE).is_file() else (values, [])
    scaling, rank = own.get("lora_scaling", LORA_SCALING), own.get("lora_rank")
    changes = split(open_safetensors(file), num_sets=num_depformer_sets(values))
    found = folded(weights, changes, scaling=scaling, rank=rank)
    return found, [f"{file}: {len(changes)} tensors of low-rank changes folded in, scaled by {scaling:g}"]


def _as_held(weights: Weights, values: Values, *, drop: Sequence[str]) -> tuple[dict[str, Deferred], list[str]]:
    """The weights as `rules` name them, in one precision; (weights, notes)."""
    notes = []
    left_out = tuple(start for name in drop for start in TENSORS_OF[name])
    found = {name: one for name, one in weights.items() if not name.startswith(left_out or ("\0",))}
    if not values["dep_q"] and "depformer_in.0.weight" in found:
        del found["depformer_in.0.weight"]
        notes.append("depformer_in.0.weight: left out; nothing reads it in a model without codebooks of its own")
    if values["dep_q"] and not values.get("depformer_weights_per_step"):
        count = num_copies(values)
        found = copied(found, num_copies=count)
        notes += [f"depformer: its one set of weights copied for each of {count} codebooks"] if count > 1 else []
    if values.get("model_type") == "hibiki":
        found["text_emb.weight"] = _without_early_end(found["text_emb.weight"])
        notes.append(f"text_emb.weight: row {EARLY_END} made equal to row {PAD}, as the runtime does with hibiki")
    return _in_one_precision(found, notes)


def _without_early_end(table: Deferred) -> Deferred:
    def read() -> Tensor:
        rows = table.read().clone()
        rows[EARLY_END] = rows[PAD]
        return rows

    return Deferred(table.shape, table.dtype, read)


def _in_one_precision(weights: Weights, notes: list[str]) -> tuple[dict[str, Deferred], list[str]]:
    """That of the text embedding, in which moshi runs all of them."""
    if "text_emb.weight" not in weights:
        raise ValueError("tensor text_emb.weight is missing; these are no weights of moshi's language model")
    held = weights["text_emb.weight"].held().dtype
    if held not in (torch.float32, torch.bfloat16):
        raise ValueError(f"tensor text_emb.weight is in {held}; take the model's weights in FP32 or BF16")
    odd = sum(one.dtype is not held for one in weights.values())
    notes = [*notes, f"{odd} tensors in another precision read as {held}"] if odd else notes
    return {name: one.to(held) for name, one in weights.items()}, notes


def _check_tensors(weights: Weights, table: list[Rule], *, config: Config) -> None:
    """Raises ValueError where names or shapes are not those that the config gives the model."""
    native = {name: Deferred(shape, dtype, torch.empty) for name, (shape, dtype) in native_shapes(config).items()}
    wanted = to_foreign(native, table)
    remedy = f"is {CONFIG_FILE} of this very model?"
    for name, one in wanted.items():
        if name not in weights:
            raise ValueError(f"tensor {name} {list(one.shape)} is missing; {remedy}")
        if weights[name].shape != one.shape:
            shapes = f"{list(weights[name].shape)}, and {CONFIG_FILE} makes it {list(one.shape)}"
            raise ValueError(f"tensor {name} is {shapes}; {remedy}")
    if odd := [name for name in weights if name not in wanted]:
        raise ValueError(f"tensor {odd[0]} ({len(odd)} such) is none that {CONFIG_FILE} speaks of; {remedy}")


def _config(folder: Path, values: Values, *, dtype: torch.dtype) -> Config:
    """The model's, within the run's own config if we wrote the folder, else with defaults for the rest."""
    run, sections = run_of(folder), sections_of(values)
    if run is None:
        sections |= _what_a_run_says(folder, values)
    elif not values["dep_q"]:
        del sections["depth"]  # a shape that nothing is made of
    return kept_in(overlaid(run, sections, source=folder / CONFIG_FILE), dtype)


def _what_a_run_says(folder: Path, values: Values) -> dict[str, dict[str, Any]]:
    """The sections `data` and `codec`, as far as a folder of others tells them."""
    data, delay = {}, values.get("stt_config", {}).get("audio_delay_seconds")
    if delay is not None:
        data["task_delay"] = round(delay * MIMI_FRAME_RATE)
    found = _companions(folder, values)
    if found.tokenizer is not None:
        data["tokenizer"] = str(found.tokenizer)
    return {"data": data, "codec": {"name": "mimi", "path": str(found.codec or "")}}


def _companions(folder: Path, values: Values) -> Companions:
    tokenizer, codec = files_beside(folder, values)
    return Companions(
        tokenizer=tokenizer if tokenizer.is_file() else None,
        codec=codec if codec.exists() else None,
    )
