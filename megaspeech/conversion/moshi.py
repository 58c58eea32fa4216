"""Native models to the files of Kyutai's `moshi` runtime, and back.

A folder holds `config.json` (`moshi_config`), `model.safetensors` and, if we wrote it, the run's config as
`megaspeech.toml`. `rules` is the table of its weights. The packed names (`self_attn.in_proj_weight`) are what Kyutai
releases; moshi, its Rust and MLX ports and the transformers converter read them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from megaspeech.config import Config, as_toml, config_of, read_config
from megaspeech.conversion.deferred import Deferred, Weights
from megaspeech.conversion.layouts import Chain, GroupedQueries, Joined, Packed, Same, Stacked, Table, Viewed
from megaspeech.conversion.moshi_config import CONFIG_FILE, LEGACY, WEIGHTS_FILE, moshi_config, sections_of
from megaspeech.conversion.rules import Layout, Rule, to_foreign, to_native
from megaspeech.conversion.stored import Companions, ForeignFiles, StoredModel

RUN_FILE, TOKENIZER_FILE = "megaspeech.toml", "tokenizer.model"


def rules(config: Config) -> list[Rule]:
    """Which of the runtime's tensors hold the numbers of which native ones."""
    return [*_embeddings(config), *_temporal(config), *_depth(config)]


def _one(native: str, foreign: str, layout: Layout) -> Rule:
    return Rule((native,), (foreign,), layout)


def _norm(native: str, foreign: str, *, width: int) -> Rule:
    return _one(native, foreign, Viewed((width,), (1, 1, width)))


def _embeddings(config: Config) -> Iterator[Rule]:
    streams = config.streams
    names = ("text_emb.weight", *(f"emb.{index}.weight" for index in range(streams.num_streams - 1)))
    yield Rule(("embedding.weight",), names, Table(streams.cardinalities))
    yield _one("text_head.weight", "text_linear.weight", Same())


def _temporal(config: Config) -> Iterator[Rule]:
    shape = config.temporal
    width, head = shape.hidden_size, shape.hidden_size // shape.num_attention_heads
    parts = (width, shape.num_query_groups * head, shape.num_query_groups * head)
    queries = Chain(GroupedQueries.of(shape), Joined(parts))
    for layer in range(shape.num_layers):
        ours, theirs = f"temporal.block.layers.{layer}", f"transformer.layers.{layer}"
        yield _norm(f"{ours}.input_layernorm.weight", f"{theirs}.norm1.alpha", width=width)
        yield _one(f"{ours}.self_attention.linear_qkv.weight", f"{theirs}.self_attn.in_proj_weight", queries)
        yield _one(f"{ours}.self_attention.linear_proj.weight", f"{theirs}.self_attn.out_proj.weight", Same())
        yield _norm(f"{ours}.pre_mlp_layernorm.weight", f"{theirs}.norm2.alpha", width=width)
        # SwiGLU's rows are [gate; up] on both sides.
        yield _one(f"{ours}.mlp.linear_fc1.weight", f"{theirs}.gating.linear_in.weight", Same())
        yield _one(f"{ours}.mlp.linear_fc2.weight", f"{theirs}.gating.linear_out.weight", Same())
    yield _norm("temporal.block.final_layernorm.weight", "out_norm.alpha", width=width)


def _depth(config: Config) -> Iterator[Rule]:
    shape, codebooks = config.depth, config.streams.num_codebooks
    width = shape.hidden_size
    names = ("depformer_text_emb.weight", *(f"depformer_emb.{index}.weight" for index in range(codebooks - 1)))
    yield Rule(("depth.embedding",), names, Table(config.streams.cardinalities[:codebooks]))
    yield _stacked("depth.input.weight", "depformer_in.{}.weight", codebooks)
    for layer in range(shape.num_layers):
        ours, theirs = f"depth.layers.{layer}", f"depformer.layers.{layer}"
        yield _norm(f"{ours}.attention_norm.weight", f"{theirs}.norm1.alpha", width=width)
        yield _one(f"{ours}.qkv.weight", f"{theirs}.self_attn.in_proj_weight", Packed(codebooks))
        yield _one(f"{ours}.proj.weight", f"{theirs}.self_attn.out_proj.weight", Packed(codebooks))
        yield _norm(f"{ours}.mlp_norm.weight", f"{theirs}.norm2.alpha", width=width)
        yield _stacked(f"{ours}.fc1.weight", theirs + ".gating.{}.linear_in.weight", codebooks)
        yield _stacked(f"{ours}.fc2.weight", theirs + ".gating.{}.linear_out.weight", codebooks)
    yield _stacked("depth.heads.weight", "linears.{}.weight", codebooks)


def _stacked(native: str, foreign: str, num_sets: int) -> Rule:
    return Rule((native,), tuple(foreign.format(index) for index in range(num_sets)), Stacked(num_sets))


def moshi_files(model: StoredModel) -> ForeignFiles:
    """What the runtime opens: weights, `config.json`, and the run's config for our own tools.

    Raises:
        ValueError: the model has what the runtime knows nothing of.
    """
    values = moshi_config(model.config)
    if model.companions.tokenizer is not None:
        values["tokenizer_name"] = TOKENIZER_FILE
    if model.companions.codec is not None and model.companions.codec.is_file():
        values["mimi_name"] = model.companions.codec.name
    files = {CONFIG_FILE: json.dumps(values, indent=1).encode(), RUN_FILE: as_toml(model.config).encode()}
    return ForeignFiles(to_foreign(model.weights, rules(model.config)), files)


def open_moshi(path: str | Path, *, drop: Sequence[str] = (), lora: Path | None = None) -> StoredModel:
    """The model of a folder that moshi opens, or of one weights file without config.

    Args:
        path: the folder, or a safetensors file: then Moshi 7B, as moshi itself takes it to be.
        drop: what may be left out of the model.
        lora: low-rank changes to fold in.

    Raises:
        ValueError: the model cannot be held; names the file and the key or tensor.
    """
    path = Path(path)
    folder, values = path.parent if path.is_file() else path, dict(LEGACY)
    if (path / CONFIG_FILE).is_file():
        values = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    file = path if path.is_file() else folder / values.get("moshi_name", WEIGHTS_FILE)
    weights = _read(file)
    config = _config(folder, values, weights=weights)
    return StoredModel(config, to_native(weights, rules(config)), _companions(folder, values))


def _config(folder: Path, values: dict[str, Any], *, weights: Weights) -> Config:
    """The run's own config if we wrote the folder, else one with the model's shape and defaults for the rest."""
    if (folder / RUN_FILE).is_file():
        return read_config(folder / RUN_FILE)
    sections = sections_of(values)
    recipe = {"float32": "fp32", "bfloat16": "bf16"}[str(weights["text_emb.weight"].dtype).partition(".")[2]]
    return config_of({**sections, "precision": {"recipe": recipe}}, source=str(folder / CONFIG_FILE))


def _companions(folder: Path, values: dict[str, Any]) -> Companions:
    tokenizer = folder / values.get("tokenizer_name", TOKENIZER_FILE)
    codec = next((one for one in (folder / values.get("mimi_name", "codec"), folder / "codec") if one.exists()), None)
    return Companions(tokenizer=tokenizer if tokenizer.is_file() else None, codec=codec)


def _read(file: Path) -> dict[str, Deferred]:
    """The tensors of a safetensors file, unread."""
    with safe_open(file, framework="pt") as opened:
        found = {}
        for name in opened.keys():  # noqa: SIM118
            part = opened.get_slice(name)
            dtype = opened.get_tensor(name).dtype

            def read(name: str = name) -> Any:
                with safe_open(file, framework="pt") as again:
                    return again.get_tensor(name)

            found[name] = Deferred(tuple(part.get_shape()), dtype, read)
    return found
