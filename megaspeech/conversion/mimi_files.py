"""Mimi in Kyutai's one file and in transformers' folder: the same weights under other names, both ways.

A `Mimi` is held as transformers names it. Kyutai's file knows no config; that of a Mimi of other sizes than the
published one lies beside it, as the moshi runtime reads it (`mimi_config_name`). transformers' modules have other names
than its files (`encoder.encoder_seanet.layers.0` and `encoder.layers.0`); here stand those of the files.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megaspeech.codecs.moshi_mimi import KYUTAI_FILES
from megaspeech.codecs.neural import NEEDS, import_transformers
from megaspeech.codecs.weights import CONFIG_FILE, only_file
from megaspeech.conversion.deferred import Deferred, Weights
from megaspeech.conversion.layouts import Same, Tensors, halves_of_pairs, pairs_of_halves
from megaspeech.conversion.mimi_config import from_runtime_config, to_runtime_config
from megaspeech.conversion.rules import Rule, to_foreign, to_native
from megaspeech.conversion.safetensors_files import open_safetensors
from megaspeech.conversion.stored import ForeignFiles

if TYPE_CHECKING:
    from transformers import MimiConfig

KYUTAI_FILE = "tokenizer-mimi.safetensors"
"""The name that a file in Kyutai's format is given."""

LAYER = {
    "self_attn.out_proj.weight": "self_attn.o_proj.weight",
    "linear1.weight": "mlp.fc1.weight",
    "linear2.weight": "mlp.fc2.weight",
    "norm1.weight": "input_layernorm.weight",
    "norm1.bias": "input_layernorm.bias",
    "norm2.weight": "post_attention_layernorm.weight",
    "norm2.bias": "post_attention_layernorm.bias",
    "layer_scale_1.scale": "self_attn_layer_scale.scale",
    "layer_scale_2.scale": "mlp_layer_scale.scale",
}
CODEBOOK = {
    "_codebook._initialized": "codebook.initialized",
    "_codebook.cluster_usage": "codebook.cluster_usage",
    "_codebook.embedding_sum": "codebook.embed_sum",
}
"""Kyutai's names within a transformer layer, a codebook, and those of transformers."""


INSIDE = {
    "moshi": ("audio_encoder_config", "audio_encoder."),
    "kyutai_speech_to_text": ("codec_config", "codec_model."),
}
"""Models of transformers with a Mimi inside, by `model_type`: the key of its config, the prefix of its weights."""


@dataclass(frozen=True)
class Mimi:
    """A Mimi, unread.

    Attributes:
        config: of transformers.
        weights: by the names of transformers' files.
    """

    config: MimiConfig
    weights: Weights


@dataclass(frozen=True)
class PackedHeads:
    """Kyutai's `[3 * H, H]` of queries, keys, values, and three tensors: RoPE turns neighbours there, halves here."""

    num_heads: int

    def to_foreign(self, native: Tensors) -> Tensors:
        """Queries, keys, values."""
        query, key, value = native[0].chunk(3)
        return [*(halves_of_pairs(x.unflatten(0, (self.num_heads, -1))).flatten(0, 1) for x in (query, key)), value]

    def to_native(self, foreign: Tensors) -> Tensors:
        """One tensor."""
        query, key, value = foreign
        turned = [pairs_of_halves(x.unflatten(0, (self.num_heads, -1))).flatten(0, 1) for x in (query, key)]
        return [torch.cat([*turned, value])]


def open_mimi(path: str | Path, *, runtime_config: str | Path | None = None) -> Mimi:
    """A Mimi of either format.

    Args:
        path: Kyutai's file, a folder that holds one (`tokenizer-*.safetensors`), or a folder of transformers: of
            a Mimi, or of a model with a Mimi inside.
        runtime_config: for Kyutai's file, the runtime's config (JSON) of a Mimi of other sizes than the published.

    Raises:
        ValueError: there is none, it is damaged, or it has what the other format cannot say; names file and key.
        ImportError: transformers is not installed; says how to.
    """
    file = kyutai_file(Path(path))
    if file is None:
        return _of_transformers(Path(path))
    values = json.loads(Path(runtime_config).read_text(encoding="utf-8")) if runtime_config else None
    config = from_runtime_config(values, name=str(runtime_config))
    table, weights = rules(config), packed(open_safetensors(file))
    _check_names(weights, {name for rule in table for name in rule.native}, file=file)
    return Mimi(config, to_foreign(weights, table))


def kyutai_file(path: Path) -> Path | None:
    """Kyutai's file of a Mimi: `path` itself, or the one in that folder; None of a folder without.

    Raises:
        ValueError: the folder has several, or the file is another.
    """
    if path.is_dir():
        return only_file(path, (KYUTAI_FILES,), codec="mimi", needs="one") if any(path.glob(KYUTAI_FILES)) else None
    if not any(name.startswith("quantizer.rvq_first.") for name in open_safetensors(path)):
        raise ValueError(
            f"{path}: is not Kyutai's file of a Mimi; of another codec, or of transformers' Mimi, name its folder"
        )
    return path


def _of_transformers(folder: Path) -> Mimi:
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder}: there is no Mimi ({NEEDS}, or Kyutai's {KYUTAI_FILES}); name a folder with one")
    config, prefix = import_transformers().AutoConfig.from_pretrained(folder, local_files_only=True), ""
    if config.model_type in INSIDE:
        key, prefix = INSIDE[config.model_type]
        config = getattr(config, key)
    if config.model_type != "mimi":
        raise ValueError(
            f"{folder}: model_type = {config.model_type!r} is no Mimi, nor has it one; name another folder"
        )
    found = open_safetensors(folder).items()
    weights = {name.removeprefix(prefix): one for name, one in found if name.startswith(prefix)}
    _check_names(weights, {name for rule in rules(config) for name in rule.foreign}, file=folder)
    return Mimi(config, weights)


def first_codebooks(mimi: Mimi, num_codebooks: int) -> Mimi:
    """A Mimi of its first codebooks alone: the same codes, for a residual quantiser's later ones change none before."""
    config = copy.deepcopy(mimi.config)
    config.num_quantizers = num_codebooks
    names = [name for rule in rules(config) for name in rule.foreign]
    return Mimi(config, {name: mimi.weights[name] for name in names})


def kyutai_weights(mimi: Mimi) -> dict[str, Deferred]:
    """The weights under the names of Kyutai's file."""
    return to_native(mimi.weights, rules(mimi.config))


def packed(weights: Weights) -> dict[str, Deferred]:
    """The runtime's own names of attention as those of its files."""
    names = {"in_projs.0.weight": "in_proj_weight", "out_projs.0.weight": "out_proj.weight"}
    return {_replaced(name, names): one for name, one in weights.items()}


def _replaced(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def _check_names(weights: Weights, names: set[str], *, file: Path) -> None:
    for fault, odd in (("lacks", names - weights.keys()), ("holds an unknown", weights.keys() - names)):
        if odd:
            raise ValueError(
                f"{file}: {fault} tensor {min(odd)} ({len(odd)} such): it is no Mimi of its config's sizes; "
                f"fetch it again, or give the config of its sizes"
            )


def beside_the_runtime(mimi: Mimi) -> ForeignFiles:
    """A Mimi as files that lie beside a model of the moshi runtime: Kyutai's file, which the runtime itself opens, or a
    folder of transformers, which our tools open, where the sizes are not the published ones."""
    try:
        is_published = to_runtime_config(mimi.config) == to_runtime_config(from_runtime_config(None))
    except ValueError:
        is_published = False
    if is_published:
        return ForeignFiles({}, weights_beside={KYUTAI_FILE: kyutai_weights(mimi)})
    config = mimi.config.to_json_string().encode()
    return ForeignFiles({}, {"codec/config.json": config}, {"codec/model.safetensors": mimi.weights})


def rules(config: MimiConfig) -> list[Rule]:
    """The table: as "native", what Kyutai's file has, as "foreign", what transformers' has."""
    return [
        *_same(_convolutions(config)),
        *_transformer(config, "encoder_transformer"),
        *_transformer(config, "decoder_transformer"),
        *_same(_quantizer(config)),
    ]


def _same(names: Iterable[tuple[str, str]]) -> list[Rule]:
    return [Rule((kyutai,), (transformers,), Same()) for kyutai, transformers in names]


def _convolutions(config: MimiConfig) -> Iterator[tuple[str, str]]:
    """Those of the SEANet encoder and decoder, and between the two rates.

    A stage is residual blocks, an activation (a place without weights) and the convolution that changes the rate; in
    the decoder activation and convolution come first.
    """
    blocks, stages = config.num_residual_layers, len(config.upsampling_ratios)
    size = blocks + 2
    for side, change, changing, inner in (("encoder", blocks + 1, "conv.conv", 0), ("decoder", 1, "convtr.convtr", 2)):
        places = {"0": "conv.conv", str(2 + stages * size): "conv.conv"}
        for first in range(1, 1 + stages * size, size):
            places[str(first + change)] = changing
            for block in range(blocks):
                places |= {f"{first + inner + block}.block.{part}": "conv.conv" for part in (1, 3)}
        for place, kind in places.items():
            for part in ("weight", "bias"):
                yield f"{side}.model.{place}.{kind}.{part}", f"{side}.layers.{place}.conv.{part}"
    yield "downsample.conv.conv.conv.weight", "downsample.conv.weight"
    yield "upsample.convtr.convtr.convtr.weight", "upsample.conv.weight"


def _transformer(config: MimiConfig, name: str) -> Iterator[Rule]:
    for layer in range(config.num_hidden_layers):
        kyutai, transformers = f"{name}.transformer.layers.{layer}.", f"{name}.layers.{layer}."
        projections = tuple(f"{transformers}self_attn.{one}_proj.weight" for one in "qkv")
        yield Rule((f"{kyutai}self_attn.in_proj_weight",), projections, PackedHeads(config.num_attention_heads))
        yield from _same((kyutai + one, transformers + other) for one, other in LAYER.items())


def _quantizer(config: MimiConfig) -> Iterator[tuple[str, str]]:
    semantic = config.num_semantic_quantizers
    counts = {"first": ("semantic", semantic), "rest": ("acoustic", config.num_quantizers - semantic)}
    for kyutai, (transformers, count) in counts.items():
        kyutai, transformers = f"quantizer.rvq_{kyutai}.", f"quantizer.{transformers}_residual_vector_quantizer."
        for projection in ("input_proj.weight", "output_proj.weight"):
            yield kyutai + projection, transformers + projection
        for layer in range(count):
            for one, other in CODEBOOK.items():
                yield f"{kyutai}vq.layers.{layer}.{one}", f"{transformers}layers.{layer}.{other}"
