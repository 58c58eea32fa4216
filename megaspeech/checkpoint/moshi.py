"""Native weights to Kyutai's `moshi` runtime: packed on-disk names, `config.json`, and the check that both sides agree.

`to_moshi` is a table: which native tensor becomes which of the runtime's, and how. The packed names
(`self_attn.in_proj_weight`) are what Kyutai releases; moshi, its Rust and MLX ports and the transformers converter
read them. In the runtime's vocabulary `card` is cardinality, `n_q` all audio streams, `dep_q` the predicted codebooks,
`depformer` the depth transformer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megaspeech.config import Config
from megaspeech.config.schema import TransformerSection
from megaspeech.model.embedding import table_offsets

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"

DIRECT = {
    "temporal.block.layers.{}.self_attention.linear_proj.weight": "transformer.layers.{}.self_attn.out_proj.weight",
    "temporal.block.layers.{}.mlp.linear_fc1.weight": "transformer.layers.{}.gating.linear_in.weight",
    "temporal.block.layers.{}.mlp.linear_fc2.weight": "transformer.layers.{}.gating.linear_out.weight",
}
"""Taken over as they are. SwiGLU's rows are [gate; up] on both sides."""
NORMS = {
    "temporal.block.layers.{}.input_layernorm.weight": "transformer.layers.{}.norm1.alpha",
    "temporal.block.layers.{}.pre_mlp_layernorm.weight": "transformer.layers.{}.norm2.alpha",
}
DEPTH_NORMS = {
    "depth.layers.{}.attention_norm.weight": "depformer.layers.{}.norm1.alpha",
    "depth.layers.{}.mlp_norm.weight": "depformer.layers.{}.norm2.alpha",
}
DEPTH_PACKED = {
    "depth.layers.{}.qkv.weight": "depformer.layers.{}.self_attn.in_proj_weight",
    "depth.layers.{}.proj.weight": "depformer.layers.{}.self_attn.out_proj.weight",
}
"""`[Q * in, out]` to `[Q * out, in]`, codebook after codebook."""
DEPTH_STACKED = {
    "depth.layers.{}.fc1.weight": "depformer.layers.{}.gating.{}.linear_in.weight",
    "depth.layers.{}.fc2.weight": "depformer.layers.{}.gating.{}.linear_out.weight",
}
"""`[Q * in, out]` to Q tensors `[out, in]`."""


def to_moshi(state: Mapping[str, Tensor], *, config: Config) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the runtime, one after the other, from the state dict of the whole model."""
    yield from _embeddings(state, config=config)
    yield "text_linear.weight", state["text_head.weight"]
    yield "out_norm.alpha", state["temporal.block.final_layernorm.weight"].view(1, 1, -1)
    for layer in range(config.temporal.num_layers):
        for native, name in DIRECT.items():
            yield name.format(layer), state[native.format(layer)]
        for native, name in NORMS.items():
            yield name.format(layer), state[native.format(layer)].view(1, 1, -1)
        qkv = state[f"temporal.block.layers.{layer}.self_attention.linear_qkv.weight"]
        yield f"transformer.layers.{layer}.self_attn.in_proj_weight", _ungrouped(qkv, config.temporal)
    yield from _depth(state, config=config)


def _embeddings(state: Mapping[str, Tensor], *, config: Config) -> Iterator[tuple[str, Tensor]]:
    """The packed tables cut into one embedding a stream, padding rows left out."""
    streams = config.streams
    names = ["text_emb.weight", *(f"emb.{index}.weight" for index in range(streams.num_streams - 1))]
    yield from _cut(state["embedding.weight"], names, streams.cardinalities)
    read = streams.cardinalities[: streams.num_codebooks]
    names = ["depformer_text_emb.weight", *(f"depformer_emb.{index}.weight" for index in range(len(read) - 1))]
    yield from _cut(state["depth.embedding"], names, read)


def _cut(table_RH: Tensor, names: list[str], cardinalities: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    for name, first, cardinality in zip(names, table_offsets(cardinalities), cardinalities, strict=True):
        yield name, table_RH[first : first + cardinality + 1]


def _ungrouped(qkv: Tensor, shape: TransformerSection) -> Tensor:
    """megatron's rows (by group: its queries, its key, its value) to the runtime's (all queries, all keys, all values).

    Both rotate interleaved pairs, so the rows within a head stay.
    """
    per_group = shape.num_attention_heads // shape.num_query_groups
    grouped = qkv.view(shape.num_query_groups, per_group + 2, -1, qkv.shape[-1])
    return torch.cat([part.reshape(-1, qkv.shape[-1]) for part in grouped.split([per_group, 1, 1], dim=1)])


def _depth(state: Mapping[str, Tensor], *, config: Config) -> Iterator[tuple[str, Tensor]]:
    codebooks = config.streams.num_codebooks

    def stacked(key: str) -> Tensor:
        return state[key].unflatten(0, (codebooks, -1))

    for layer in range(config.depth.num_layers):
        for native, name in DEPTH_NORMS.items():
            yield name.format(layer), state[native.format(layer)].view(1, 1, -1)
        for native, name in DEPTH_PACKED.items():
            yield name.format(layer), stacked(native.format(layer)).transpose(1, 2).flatten(0, 1)
        for native, name in DEPTH_STACKED.items():
            for codebook, weight in enumerate(stacked(native.format(layer))):
                yield name.format(layer, codebook), weight.T
    for codebook in range(codebooks):
        yield f"depformer_in.{codebook}.weight", stacked("depth.input.weight")[codebook].T
        yield f"linears.{codebook}.weight", stacked("depth.heads.weight")[codebook].T


def moshi_config(config: Config) -> dict:
    """The runtime's `config.json`: arguments of `LMModel`, and nothing it does not know.

    Raises:
        ValueError: the model has what the runtime knows nothing of.
    """
    streams, temporal, depth = config.streams, config.temporal, config.depth
    if temporal.num_moe_experts is not None:
        raise ValueError(
            f"temporal.num_moe_experts: {temporal.num_moe_experts}, but the moshi runtime has no mixtures of experts; "
            f"only models without can be exported"
        )
    return {
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
        "norm": "rms_norm_f32",
        "gating": "silu",
        "positional_embedding": "rope",
        "depformer_dim": depth.hidden_size,
        "depformer_num_heads": depth.num_attention_heads,
        "depformer_num_layers": depth.num_layers,
        "depformer_kv_repeat": depth.num_attention_heads // depth.num_query_groups,
        "depformer_dim_feedforward": _feed_forward(depth),
        "depformer_gating": "silu",
        "depformer_pos_emb": "none",
        "depformer_multi_linear": True,
        "depformer_weights_per_step": True,
    }


def _feed_forward(shape: TransformerSection) -> int:
    """The `dim_feedforward` from which the runtime computes our gate width h: int(2 * dim_feedforward / 3) = h.

    It makes an exception of 4 * dim (h = 21 * dim / 8 then), so that value is stepped over.
    """
    for value in range(3 * shape.ffn_hidden_size // 2, 3 * shape.ffn_hidden_size // 2 + 3):
        if 2 * value // 3 == shape.ffn_hidden_size and value != 4 * shape.hidden_size:
            return value
    if 21 * shape.hidden_size // 8 == shape.ffn_hidden_size:
        return 4 * shape.hidden_size
    raise ValueError(f"ffn_hidden_size {shape.ffn_hidden_size} cannot be expressed in the runtime's config")


def write_moshi(state: Mapping[str, Tensor], directory: str | Path, *, config: Config) -> Path:
    """Write `config.json` and `model.safetensors`; the config comes last, so a folder with one is whole."""
    directory, values = Path(directory), moshi_config(config)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in to_moshi(state, config=config)}
    save_file(tensors, directory / WEIGHTS_FILE)
    aside = directory / f"{CONFIG_FILE}.part"
    aside.write_text(json.dumps(values, indent=1), encoding="utf-8")
    os.replace(aside, directory / CONFIG_FILE)
    return directory
