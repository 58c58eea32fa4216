"""Bytes of activations: what one microbatch leaves for its backward pass, and what that pass needs on top.

Counted tensor by tensor. The layers of megatron-core's local spec are held against the real modules, stage by stage
(`tests/unit/test_planned_stages.py`); TransformerEngine's are counted from its source (2.20: `layernorm_linear.py`,
`attention`, and megatron-core's fused SwiGLU) and have not been measured yet.
"""

from __future__ import annotations

from megaspeech.config import Config

LOCAL, TRANSFORMER_ENGINE = "local", "transformer_engine"


def saved_bytes(config: Config, *, num_layers: int, is_first: bool, is_last: bool, layer_kind: str) -> dict[str, int]:
    """Bytes that one microbatch keeps on a rank, by part, all frames going through the depth transformer.

    Args:
        config: the run: its shape, layout, precision, recomputation, `data.num_frames` and microbatch.
        num_layers: temporal layers of the chunk.
        is_first: whether it has the embedding.
        is_last: whether it has the text head and the depth transformer.
        layer_kind: LOCAL or TRANSFORMER_ENGINE, whose temporal layers they are.
    """
    frames, shared = _frames(config)
    norm = _temporal_norm(config, layer_kind=layer_kind) * shared
    sizes = {"temporal": _kept_of_layers(config, num_layers=num_layers, layer_kind=layer_kind)}
    if is_first:  # indices of all streams, and of the reference kernels the places of the bag
        sizes["embedding"] = (18 if config.model.kernels == "reference" else 8) * config.streams.num_streams * frames
    if is_last:
        tensor = config.parallel.tensor_model_parallel_size
        # The text head's input, and the exponentials of its logits in FP32 (megatron-core's cross_entropy.py).
        sizes["text_loss"] = norm + 4 * config.streams.text_cardinality * frames // tensor
        sizes["depth"] = _depth_bytes(config, layer_kind=layer_kind)
    return sizes


def working_bytes(config: Config, *, is_last: bool, layer_kind: str) -> int:
    """Bytes that a backward pass needs beside what the forward pass kept, at its worst moment.

    What is recomputed of the layer at hand, and the gradients of its widest products; on the last stage the logits of
    the text, or a layer of the depth transformer with the gradient of its widest matrices.
    """
    frames, _ = _frames(config)
    tensor = config.parallel.tensor_model_parallel_size
    at_once = (config.parallel.recompute_num_layers or 1) if config.parallel.recompute_method == "uniform" else 1
    recomputed = at_once * _whole_layer(config, layer_kind=layer_kind) - _kept_of_layer(config, layer_kind=layer_kind)
    shape = config.temporal
    layer = recomputed + 2 * frames * (3 * shape.ffn_hidden_size // tensor + 2 * shape.hidden_size)
    if layer_kind == LOCAL:  # the widest matrix's gradient, which TransformerEngine adds straight to DDP's
        layer += 2 * shape.hidden_size * 2 * shape.ffn_hidden_size // tensor
    if not is_last:
        return layer
    vocabulary = config.streams.text_cardinality
    text = (10 * frames * vocabulary + 2 * vocabulary * shape.hidden_size) // tensor
    per_place = 2 * 3 * config.depth.ffn_hidden_size + 2 * 2 * config.depth.hidden_size
    depth = _places(config) * per_place
    depth += 2 * config.streams.num_codebooks * config.depth.hidden_size * 2 * config.depth.ffn_hidden_size
    if config.parallel.recompute_granularity == "full":
        depth += _places(config) * _depth_layer(config, layer_kind=layer_kind)
    return int(max(layer, text, depth))


def _frames(config: Config) -> tuple[int, int]:
    """(frames of a microbatch on a context parallel rank, those of them that sequence parallelism leaves a rank)."""
    parallel = config.parallel
    frames = config.training.micro_batch_size * config.data.num_frames // parallel.context_parallel_size
    return frames, frames // (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)


def _kept_of_layers(config: Config, *, num_layers: int, layer_kind: str) -> int:
    """Of a chunk's layers; those that megatron-core recomputes in full are the first few ("block"), or all, of which
    every few leave one input (its `transformer_block.py`)."""
    parallel, kept = config.parallel, _kept_of_layer(config, layer_kind=layer_kind)
    few = parallel.recompute_num_layers or 1
    if parallel.recompute_granularity != "full":
        return num_layers * kept
    if parallel.recompute_method == "block":
        return min(few, num_layers) * kept + max(0, num_layers - few) * _whole_layer(config, layer_kind=layer_kind)
    return -(-num_layers // few) * kept


def _kept_of_layer(config: Config, *, layer_kind: str) -> int:
    """Of one layer and a microbatch, what is not recomputed."""
    parallel, (frames, shared) = config.parallel, _frames(config)
    if parallel.recompute_granularity == "full":
        return 2 * config.temporal.hidden_size * shared  # its input
    whole = _whole_layer(config, layer_kind=layer_kind)
    if recomputes_feed_forward(config):
        whole -= _feed_forward(config, layer_kind=layer_kind) * frames
    return whole


def recomputes_feed_forward(config: Config) -> bool:
    """Whether it is recomputed by itself; megatron-core's "mlp" is no mixture of experts (`transformer_layer.py`)."""
    parallel, experts = config.parallel, config.temporal.num_moe_experts
    chosen = parallel.recompute_granularity == "selective" and "mlp" in (parallel.recompute_modules or ())
    return chosen and experts is None


def _whole_layer(config: Config, *, layer_kind: str) -> int:
    frames, shared = _frames(config)
    by_norms = 2 * _temporal_norm(config, layer_kind=layer_kind) * shared
    return (
        by_norms + (_attention(config, layer_kind=layer_kind) + _feed_forward(config, layer_kind=layer_kind)) * frames
    )


def _bytes_of_input(config: Config) -> int:
    """Of a number that waits for the product with the incoming gradient: FP8 products keep it in FP8."""
    return 1 if config.precision.fp8_recipe else 2


def _temporal_norm(config: Config, *, layer_kind: str) -> int:
    return _norm(config.temporal.hidden_size, layer_kind=layer_kind, bytes_of_output=_bytes_of_input(config))


def _norm(width: int, *, layer_kind: str, bytes_of_output: int = 2) -> int:
    """Bytes of a norm and of the product that it goes into, for each of the frames that it sees.

    torch's on the CPU computes in FP32, of which its input and its normalised input stay; then its output. On GPUs
    torch's (`_fused_rms_norm`) and TransformerEngine's keep their input as it came.
    """
    return (4 + 4 + 2 if layer_kind == LOCAL else 2 + bytes_of_output) * width


def _attention(config: Config, *, layer_kind: str) -> int:
    """Bytes a frame: queries, keys and values as attention takes them, what it gives, and its sums by head."""
    shape, tensor = config.temporal, config.parallel.tensor_model_parallel_size
    queries, key_value = shape.num_attention_heads * shape.head_width, shape.num_query_groups * shape.head_width
    sums = 4 * shape.num_attention_heads // tensor
    if shape.qk_layernorm:  # what the norms of queries and keys keep: in FP32 input and normalised, or their input
        sums += (8 if layer_kind == LOCAL else 2) * (queries + key_value) // tensor
    if layer_kind == LOCAL:
        # Values are a part of what the projection gave, all of which stays beside the turned queries and keys.
        angles = 4 * 2 * shape.head_width
        return 2 * (3 * queries + 3 * key_value) // tensor + sums + angles
    in_fp8 = queries // tensor if config.precision.fp8_recipe else 0  # for the projection; attention is BF16
    return 2 * (2 * queries + 2 * key_value) // tensor + sums + in_fp8


def _feed_forward(config: Config, *, layer_kind: str) -> int:
    """Bytes a frame: gate and up, and their product; the local layers keep the gate's silu and a copy of up too.

    Of experts, those that a frame is sent to, as if loads were even.
    """
    shape = config.temporal
    width = shape.ffn_hidden_size
    if shape.num_moe_experts:
        width = (shape.moe_ffn_hidden_size or width) * shape.moe_router_topk
    width //= config.parallel.tensor_model_parallel_size
    return 10 * width if layer_kind == LOCAL else (4 + _bytes_of_input(config)) * width


def _places(config: Config) -> int:
    """Codebooks times frames that a rank's depth transformer runs for a microbatch."""
    frames, _ = _frames(config)
    return config.streams.num_codebooks * -(-frames // config.parallel.tensor_model_parallel_size)


def _depth_layer(config: Config, *, layer_kind: str) -> int:
    """Bytes of a place and a depth layer, torch's own: two norms and their outputs, attention's tensors, SwiGLU's."""
    shape = config.depth
    key_value = shape.hidden_size * shape.num_query_groups // shape.num_attention_heads
    attention = 2 * (2 * shape.hidden_size + 2 * key_value) + 4 * shape.num_attention_heads
    return 2 * _norm(shape.hidden_size, layer_kind=layer_kind) + attention + 8 * shape.ffn_hidden_size


def _depth_bytes(config: Config, *, layer_kind: str) -> int:
    streams, shape, places = config.streams, config.depth, _places(config)
    if not streams.num_codebooks:
        return 0  # text alone: there is no depth transformer
    is_recomputed = config.parallel.recompute_granularity == "full"
    layer = 2 * shape.hidden_size if is_recomputed else _depth_layer(config, layer_kind=layer_kind)
    # torch folds the product of frames with every codebook's matrix into one, for which it copies the matrices.
    entry = 2 * streams.num_codebooks * config.temporal.hidden_size * shape.hidden_size
    entry += 2 * config.temporal.hidden_size * places // streams.num_codebooks
    head = 2 * shape.hidden_size + (4 * streams.cardinality if config.model.kernels == "reference" else 8)
    return entry + places * (shape.num_layers * layer + head)
