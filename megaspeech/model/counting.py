"""Parameters and floating point operations by part, from the config alone."""

from __future__ import annotations

from megaspeech.config import Config
from megaspeech.config.schema import TemporalSection, TransformerSection


def count_parameters(config: Config) -> dict[str, int]:
    """Parameters by part, padding of the tables not counted; they sum to the exported model's.

    `embedding`, `temporal`, `text_head`, `depth`: as the runtime's `emb` + `text_emb`, `transformer` + `out_norm`,
    `text_linear`, and everything of the depth transformer with its inputs, embeddings and heads; and `extra_heads`
    where there are any.
    """
    streams, temporal = config.streams, config.temporal
    layer = _attention(temporal) + _attention_vectors(temporal) + sum(_feed_forward(temporal))
    layer += 2 * temporal.hidden_size
    parts = {
        "embedding": (sum(streams.cardinalities) + streams.num_streams) * temporal.hidden_size,
        "temporal": temporal.num_layers * layer + temporal.hidden_size,
        "text_head": streams.text_cardinality * temporal.hidden_size,
        "depth": _depth(config) if streams.num_codebooks else 0,
    }
    extra = temporal.num_extra_heads * temporal.extra_heads_dim * temporal.hidden_size
    return {**parts, "extra_heads": extra} if extra else parts


def _depth(config: Config) -> int:
    codebooks, shape = config.streams.num_codebooks, config.depth
    read = config.streams.cardinalities[:codebooks]
    rank = shape.low_rank_embeddings
    embeddings = (sum(read) + len(read)) * (rank or shape.hidden_size) + codebooks * (rank or 0) * shape.hidden_size
    layer = config.num_weight_sets * (_attention(shape) + _swiglu(shape)) + 2 * shape.hidden_size
    inputs = config.num_input_sets * config.temporal.hidden_size * shape.hidden_size
    return inputs + embeddings + shape.num_layers * layer + codebooks * shape.hidden_size * config.streams.cardinality


def count_flops(config: Config, *, num_frames: int) -> dict[str, int]:
    """Forward floating point operations of one frame by part; forward and backward cost three times as much.

    Two a multiply-add; matrix products and attention scores are counted, causal attention as the half that is used
    (PaLM, arXiv 2204.02311, appendix B); lookups, norms and softmax are not. `num_frames` is the length of a sample.
    """
    streams, temporal, depth = config.streams, config.temporal, config.depth
    growing = min(num_frames, temporal.context)  # frame t sees min(t + 1, context) frames, itself included
    seen = (growing * (growing + 1) // 2 + (num_frames - growing) * temporal.context) / num_frames
    codebooks = streams.num_codebooks
    attended = temporal.num_attention_heads * temporal.head_width
    temporal_matrices = _attention(temporal) + _feed_forward(temporal)[0]
    depth_matrices = depth.num_layers * (_attention(depth) + _swiglu(depth)) + depth.hidden_size * (
        streams.cardinality + (depth.low_rank_embeddings or 0)
    )
    projections = (codebooks if depth.multi_linear else min(1, codebooks)) * temporal.hidden_size * depth.hidden_size
    depth_scores = depth.num_layers * 2 * depth.hidden_size * (codebooks + 1) / 2
    return {
        "temporal": int(2 * temporal.num_layers * (temporal_matrices + 2 * attended * seen)),
        "text_head": 2 * streams.text_cardinality * temporal.hidden_size,
        "depth": int(2 * (projections + codebooks * (depth_matrices + depth_scores))),
    }


def _attention(shape: TransformerSection) -> int:
    """Weights of one layer's attention projections, for one codebook in the depth transformer."""
    queries, keys = shape.num_attention_heads * shape.head_width, shape.num_query_groups * shape.head_width
    return shape.hidden_size * (2 * queries + 2 * keys)


def _attention_vectors(shape: TemporalSection) -> int:
    """Biases and norms within one layer's attention."""
    heads = shape.num_attention_heads + 2 * shape.num_query_groups
    return shape.head_width * (heads * shape.add_qkv_bias + 2 * shape.qk_layernorm)


def _swiglu(shape: TransformerSection) -> int:
    """Weights of one layer's feed-forward projections, likewise."""
    return 3 * shape.hidden_size * shape.ffn_hidden_size


def _feed_forward(shape: TemporalSection) -> tuple[int, int]:
    """(weights that a frame meets, the others): the router and the experts it is sent to, and those it is not."""
    if shape.num_moe_experts is None:
        return _swiglu(shape), 0
    expert = 3 * shape.hidden_size * (shape.moe_ffn_hidden_size or shape.ffn_hidden_size)
    met = shape.num_moe_experts * shape.hidden_size + shape.moe_router_topk * expert
    return met, (shape.num_moe_experts - shape.moe_router_topk) * expert
