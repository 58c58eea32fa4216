"""Parameters and floating point operations by part, from the config alone."""

from __future__ import annotations

from collections.abc import Sequence

from megaspeech.config import Config
from megaspeech.config.checks import EMBEDDING_ROWS_MULTIPLE
from megaspeech.config.schema import TemporalSection, TransformerSection


def count_parameters(config: Config) -> dict[str, int]:
    """Parameters by part, padding of the tables not counted; they sum to the exported model's.

    `embedding`, `temporal`, `text_head`, `depth`: as the runtime's `emb` + `text_emb`, `transformer` + `out_norm`,
    `text_linear`, and everything of the depth transformer with its inputs, embeddings and heads; and `extra_heads`
    where there are any.
    """
    streams, temporal = config.streams, config.temporal
    layer = _attention(temporal) + _attention_biases(temporal) + sum(_feed_forward(temporal)) + _norms(temporal)
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
    inputs = config.num_input_sets * config.temporal.hidden_size * shape.hidden_size
    heads = codebooks * shape.hidden_size * config.streams.cardinality
    return inputs + embeddings + shape.num_layers * count_depth_layer(config) + heads


def count_depth_layer(config: Config) -> int:
    """Parameters of one layer of the depth transformer, of all sets of weights."""
    shape = config.depth
    return config.num_weight_sets * (_attention(shape) + _swiglu(shape)) + 2 * shape.hidden_size


def count_rank_parameters(config: Config, *, num_layers: int, is_first: bool, is_last: bool) -> dict[str, int]:
    """Parameters that one tensor parallel rank holds of a part of the model, by part, padding of the tables counted.

    Matrices and tables are cut over the tensor parallel ranks; norms, routers and the depth transformer, whose frames
    are shared out instead, are whole on each. "norms" are those of the temporal transformer, "experts" its experts'
    share, without the router, where it has any.

    Args:
        num_layers: temporal layers of the part.
        is_first: whether it has the embedding.
        is_last: whether it has the last norm, the text head and the depth transformer.
    """
    streams, temporal, parallel = config.streams, config.temporal, config.parallel
    tensor, width = parallel.tensor_model_parallel_size, temporal.hidden_size
    attention = (_attention(temporal) + _attention_biases(temporal)) // tensor
    feed_forward, experts = _rank_feed_forward(config)
    counts = {"temporal": num_layers * (attention + feed_forward)}
    if experts:
        counts["experts"] = num_layers * experts
    counts["norms"] = num_layers * _norms(temporal) + is_last * width
    if is_first:
        counts["embedding"] = padded_rows(streams.cardinalities) * width // tensor
    if is_last:
        counts["text_head"] = streams.text_cardinality * width // tensor
    if is_last and streams.num_codebooks:
        read = streams.cardinalities[: streams.num_codebooks]
        padding = padded_rows(read) - used_rows(read)
        counts["depth"] = _depth(config) + padding * (config.depth.low_rank_embeddings or config.depth.hidden_size)
    return counts


def _rank_feed_forward(config: Config) -> tuple[int, int]:
    """(weights of one layer's feed-forward part on a rank, or of its router, which is whole; its share of experts)."""
    temporal, parallel = config.temporal, config.parallel
    if temporal.num_moe_experts is None:
        return _swiglu(temporal) // parallel.tensor_model_parallel_size, 0
    expert = 3 * temporal.hidden_size * (temporal.moe_ffn_hidden_size or temporal.ffn_hidden_size)
    own = temporal.num_moe_experts // parallel.expert_model_parallel_size
    return temporal.num_moe_experts * temporal.hidden_size, own * expert // parallel.expert_tensor_size


def padded_rows(cardinalities: Sequence[int]) -> int:
    """Rows of a packed table of embeddings, padded to one multiple for every layout."""
    rows = used_rows(cardinalities)
    return rows + -rows % EMBEDDING_ROWS_MULTIPLE


def used_rows(cardinalities: Sequence[int]) -> int:
    """Rows of a packed table without its padding, which is zero and stays so: no gradient ever reaches it."""
    return sum(cardinalities) + len(cardinalities)


def count_flops(config: Config, *, num_frames: int) -> dict[str, int]:
    """Forward floating point operations of one frame by part; forward and backward cost three times as much.

    Two a multiply-add; matrix products and attention scores are counted, causal attention as the half that is used
    (PaLM, arXiv 2204.02311, appendix B); lookups, norms and softmax are not. `num_frames` is the length of a sample.
    """
    streams, temporal, depth = config.streams, config.temporal, config.depth
    codebooks = streams.num_codebooks
    depth_matrices = depth.num_layers * (_attention(depth) + _swiglu(depth)) + depth.hidden_size * (
        streams.cardinality + (depth.low_rank_embeddings or 0)
    )
    projections = (codebooks if depth.multi_linear else min(1, codebooks)) * temporal.hidden_size * depth.hidden_size
    depth_scores = depth.num_layers * 2 * depth.hidden_size * (codebooks + 1) / 2
    return {
        "temporal": int(temporal.num_layers * sum(count_layer_flops(config, num_frames=num_frames).values())),
        "text_head": 2 * streams.text_cardinality * temporal.hidden_size,
        "depth": int(2 * (projections + codebooks * (depth_matrices + depth_scores))),
    }


def count_layer_flops(config: Config, *, num_frames: int) -> dict[str, float]:
    """Forward operations of one temporal layer and one frame, as `count_flops` counts them: the attention's
    "projections", its "scores", and "feed_forward"."""
    temporal = config.temporal
    growing = min(num_frames, temporal.context)  # frame t sees min(t + 1, context) frames, itself included
    seen = (growing * (growing + 1) // 2 + (num_frames - growing) * temporal.context) / num_frames
    return {
        "projections": 2 * _attention(temporal),
        "scores": 4 * temporal.num_attention_heads * temporal.head_width * seen,
        "feed_forward": 2 * _feed_forward(temporal)[0],
    }


def _attention(shape: TransformerSection) -> int:
    """Weights of one layer's attention projections, for one codebook in the depth transformer."""
    queries, keys = shape.num_attention_heads * shape.head_width, shape.num_query_groups * shape.head_width
    return shape.hidden_size * (2 * queries + 2 * keys)


def _attention_biases(shape: TemporalSection) -> int:
    """Of one layer's queries, keys and values."""
    return shape.add_qkv_bias * shape.head_width * (shape.num_attention_heads + 2 * shape.num_query_groups)


def _norms(shape: TemporalSection) -> int:
    """Weights of one layer's norms, those of queries and keys included."""
    return 2 * shape.hidden_size + shape.qk_layernorm * 2 * shape.head_width


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
