"""Parameters and floating point operations by part, from the config alone."""

from __future__ import annotations

from megaspeech.config import Config
from megaspeech.config.schema import TransformerSection


def count_parameters(config: Config) -> dict[str, int]:
    """Parameters by part, padding of the tables not counted; they sum to the exported model's.

    `embedding`, `temporal`, `text_head`, `depth`: as the runtime's `emb` + `text_emb`, `transformer` + `out_norm`,
    `text_linear`, and everything of the depth transformer with its inputs, embeddings and heads.
    """
    streams, temporal, depth = config.streams, config.temporal, config.depth
    layer = _matrix_parameters(temporal) + 2 * temporal.hidden_size
    codebooks = streams.num_codebooks
    read = streams.cardinalities[:codebooks]
    return {
        "embedding": (sum(streams.cardinalities) + streams.num_streams) * temporal.hidden_size,
        "temporal": temporal.num_layers * layer + temporal.hidden_size,
        "text_head": streams.text_cardinality * temporal.hidden_size,
        "depth": codebooks * temporal.hidden_size * depth.hidden_size
        + (sum(read) + len(read)) * depth.hidden_size
        + depth.num_layers * (codebooks * _matrix_parameters(depth) + 2 * depth.hidden_size)
        + codebooks * depth.hidden_size * streams.cardinality,
    }


def count_flops(config: Config, *, num_frames: int) -> dict[str, int]:
    """Forward floating point operations of one frame by part; forward and backward cost three times as much.

    Two a multiply-add; matrix products and attention scores are counted, causal attention as the half that is used
    (PaLM, arXiv 2204.02311, appendix B); lookups, norms and softmax are not. `num_frames` is the length of a sample.
    """
    streams, temporal, depth = config.streams, config.temporal, config.depth
    growing = min(num_frames, temporal.context)  # frame t sees min(t + 1, context) frames, itself included
    seen = (growing * (growing + 1) // 2 + (num_frames - growing) * temporal.context) / num_frames
    codebooks = streams.num_codebooks
    depth_matrices = (
        temporal.hidden_size * depth.hidden_size
        + depth.num_layers * _matrix_parameters(depth)
        + depth.hidden_size * streams.cardinality
    )
    depth_scores = depth.num_layers * 2 * depth.hidden_size * (codebooks + 1) / 2
    return {
        "temporal": int(2 * temporal.num_layers * (_matrix_parameters(temporal) + 2 * temporal.hidden_size * seen)),
        "text_head": 2 * streams.text_cardinality * temporal.hidden_size,
        "depth": int(2 * codebooks * (depth_matrices + depth_scores)),
    }


def _matrix_parameters(shape: TransformerSection) -> int:
    """Weights of one layer's projections, for one codebook in the depth transformer."""
    width = shape.hidden_size
    key_value = width * shape.num_query_groups // shape.num_attention_heads
    return width * (width + 2 * key_value) + width * width + 3 * width * shape.ffn_hidden_size
