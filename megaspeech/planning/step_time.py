"""Seconds of an optimizer step of a layout: products, memory, communication, bubble; and what a whole run takes.

A model to choose by, not a measurement: see `efficiency` for what is assumed. Every frame is taken to pass the depth
transformer, every microbatch to be full.
"""

from __future__ import annotations

from dataclasses import dataclass

from megaspeech.config import Config
from megaspeech.model.counting import count_flops, count_layer_flops
from megaspeech.planning import efficiency
from megaspeech.planning.activations import recomputes_feed_forward
from megaspeech.planning.gpus import Gpu
from megaspeech.planning.memory import StageMemory, multiplied
from megaspeech.planning.nodes import Node, group_rate
from megaspeech.planning.pipeline import least_seconds, pipeline_seconds
from megaspeech.planning.stages import num_microbatches


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part, in `parts`, which add up; `stages` are seconds of one microbatch by stage."""

    parts: dict[str, float]
    stages: tuple[float, ...]
    flops: float
    peak: float
    frames: int
    num_gpus: int

    @property
    def seconds(self) -> float:
        """Of the step."""
        return sum(self.parts.values())

    @property
    def bubble(self) -> float:
        """Share of the step in which stages wait for each other: filling the pipeline, and for the slowest."""
        return (self.parts.get("bubble", 0.0) + self.parts.get("imbalance", 0.0)) / self.seconds

    @property
    def frames_per_second(self) -> float:
        """Of the whole run."""
        return self.frames / self.seconds

    @property
    def utilisation(self) -> float:
        """Model operations (`count_flops`, thrice forward; recomputation is no progress) over BF16's peak: MFU."""
        return self.flops / self.seconds / self.num_gpus / self.peak

    def hours(self, audio_hours: float, *, frame_rate: float) -> float:
        """Of training once over so much audio."""
        return audio_hours * frame_rate / self.frames_per_second


def step_time(
    config: Config, memory: list[StageMemory], *, gpu: Gpu, node: Node, num_gpus: int, exact: bool = True
) -> StepTime:
    """Predict a step.

    Args:
        config: the run, with its layout.
        memory: its stages (`stage_memory`).
        gpu, node, num_gpus: the machine.
        exact: whether to play the pipeline's schedule, or to take the least that it can last.
    """
    machine = _Machine(config, gpu, node, num_gpus)
    microbatches = num_microbatches(config, replicas=machine.replicas)
    works = [_stage_seconds(machine, stage) for stage in memory]
    chunks = [_by_chunk(work, memory=stage) for work, stage in zip(works, memory, strict=True)]
    each = [sum(seconds) for seconds in chunks]
    slowest, mean = max(each), sum(each) / len(each)
    parts = {part: microbatches * sum(work[part] for work in works) / len(works) for part in works[0]}
    parts["imbalance"] = microbatches * (slowest - mean)
    play = pipeline_seconds if exact else least_seconds
    parts["bubble"] = play(chunks, num_microbatches=microbatches) - microbatches * slowest
    after = [_after_backward(machine, stage, seconds) for stage, seconds in zip(memory, each, strict=True)]
    parts |= max(after, key=lambda found: sum(found.values())) | {"overhead": efficiency.STEP_OVERHEAD}
    frames = config.training.global_batch_size * config.data.num_frames
    flops = 3.0 * sum(count_flops(config, num_frames=config.data.num_frames).values()) * frames
    return StepTime(parts, tuple(each), flops, gpu.bf16_tflops * 1e12, frames, num_gpus)


def _by_chunk(work: dict[str, float], *, memory: StageMemory) -> list[float]:
    """Seconds of each chunk of a stage: of its layers, and on the last of the heads."""
    heads = work["text head"] + work["depth transformer"]
    layer = (sum(work.values()) - heads) / max(1, memory.stage.num_layers)
    seconds = [layers * layer for layers in memory.stage.chunks]
    return [*seconds[:-1], seconds[-1] + heads]


@dataclass(frozen=True)
class _Machine:
    """A config on so many GPUs, and the rates that follow from it."""

    config: Config
    gpu: Gpu
    node: Node
    num_gpus: int

    @property
    def replicas(self) -> int:
        return self.num_gpus // self.config.parallel.model_parallel_size

    @property
    def bandwidth(self) -> float:
        """Of the memory, bytes a second."""
        return (self.gpu.bandwidth or efficiency.BANDWIDTH_UNKNOWN) * 1e9 * efficiency.MEMORY

    def rate(self, *, size: int, stride: int) -> float:
        return group_rate(self.gpu, self.node, size=size, stride=stride)

    @property
    def product(self) -> float:
        """Of the temporal transformer's products, operations a second."""
        in_fp8 = self.config.precision.fp8_recipe is not None and self.gpu.fp8_tflops
        peak, kind = (self.gpu.fp8_tflops, "fp8") if in_fp8 else (self.gpu.bf16_tflops, "bf16")
        width = self.config.temporal.hidden_size
        full = efficiency.PRODUCT[kind] * width / (width + efficiency.HALF_WIDTH)
        return peak * 1e12 * full * _fill(self.frames)

    @property
    def frames(self) -> int:
        """Of a microbatch, on a context parallel rank."""
        config = self.config
        return config.training.micro_batch_size * config.data.num_frames // config.parallel.context_parallel_size


def _stage_seconds(machine: _Machine, memory: StageMemory) -> dict[str, float]:
    """Of one microbatch, forward and backward, on a rank of a stage."""
    config, layers, frames = machine.config, memory.stage.num_layers, machine.frames
    tensor, peak = config.parallel.tensor_model_parallel_size, machine.gpu.bf16_tflops * 1e12
    work = count_layer_flops(config, num_frames=config.data.num_frames)
    again, feed_forward_again = _recomputes(config)
    projections, feed_forward = (3 + again) * work["projections"], (3 + feed_forward_again) * work["feed_forward"]
    share = frames / tensor
    found = {
        "temporal products": share * layers * (projections + feed_forward) / machine.product,
        "attention": share * layers * (3 + again) * work["scores"] / (peak * efficiency.ATTENTION),
        "norms, SwiGLU": frames * layers * (3 + again) * _bytes_by_number(config) / machine.bandwidth,
        "text head": 0.0,
        "depth transformer": 0.0,
        "tensor parallel": layers * _tensor_seconds(machine, again=again + feed_forward_again),
        "context parallel": layers * _context_seconds(machine),
        "pipeline sends": _pipeline_seconds(machine),
    }
    if memory.stage.is_last:
        flops = count_flops(config, num_frames=config.data.num_frames)
        head = 3 * flops["text_head"] / (peak * efficiency.PRODUCT["bf16"])
        # Logits are written in BF16, and in FP32, and read and written for the exponentials and their gradient.
        found["text head"] = share * (head + 24 * config.streams.text_cardinality / machine.bandwidth)
        product = peak * efficiency.DEPTH_PRODUCT * _fill(share)
        depth = flops["depth"] / product + _depth_bytes(config) / machine.bandwidth
        found["depth transformer"] = share * (3 + again) * depth
    return found


def _fill(rows: float) -> float:
    """Share of its rate that a product of so many rows reaches."""
    return rows / (rows + efficiency.HALF_ROWS)


def _recomputes(config: Config) -> tuple[int, int]:
    """Times that a layer, and its feed-forward part, goes forward again."""
    again = int(config.parallel.recompute_granularity == "full")
    return again, int(again or recomputes_feed_forward(config))


def _bytes_by_number(config: Config) -> float:
    """Read and written a frame, a layer and a pass by what is no product: two norms and two residual sums on the
    frames that sequence parallelism leaves, RoPE and SwiGLU; with FP8 the roundings of the products' inputs."""
    shape, parallel = config.temporal, config.parallel
    tensor = parallel.tensor_model_parallel_size
    width, gate = shape.hidden_size, shape.ffn_hidden_size / tensor
    turned = shape.head_width * (shape.num_attention_heads + shape.num_query_groups)
    whole = 2 * (2 * 2 + 3 * 2) * width / (tensor if parallel.sequence_parallel else 1)
    rounding = 6 * (3 * width / tensor + gate) if config.precision.fp8_recipe else 0
    return whole + 4 * turned / tensor + 6 * gate + rounding


def _depth_bytes(config: Config) -> float:
    """Likewise for a frame in the depth transformer, all codebooks."""
    shape, streams = config.depth, config.streams
    layer = 2 * (8 + 6) * shape.hidden_size + 8 * shape.hidden_size + 6 * shape.ffn_hidden_size
    return streams.num_codebooks * (shape.num_layers * layer + 6 * streams.cardinality)


def _tensor_seconds(machine: _Machine, *, again: int) -> float:
    """Of a layer and microbatch. Under sequence parallelism two gathers and two reductions each way, and two gathers
    more for the weights' gradients (arXiv 2205.05198, section 4.2.2); without it two sums each way, each worth two.
    `again` of attention and feed-forward part go forward once more."""
    config = machine.config
    size = config.parallel.tensor_model_parallel_size
    if size == 1:
        return 0.0
    times = (10 if config.parallel.sequence_parallel else 8) + 2 * again
    volume = 2 * machine.frames * config.temporal.hidden_size * (size - 1) / size
    hidden = efficiency.TENSOR_HIDDEN if config.parallel.tp_comm_overlap else 0.0
    return times * volume * (1 - hidden) / machine.rate(size=size, stride=1)


def _context_seconds(machine: _Machine) -> float:
    """Of a layer and microbatch: keys and values are gathered forward and backward, and their gradients reduced."""
    config = machine.config
    parallel, shape = config.parallel, config.temporal
    size, tensor = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    if size == 1:
        return 0.0
    key_value = 2 * shape.head_width * shape.num_query_groups / tensor
    return 3 * 2 * machine.frames * (size - 1) * key_value / machine.rate(size=size, stride=tensor)


def _pipeline_seconds(machine: _Machine) -> float:
    """Of a microbatch, on a stage: what each of its chunks sends on and sends back."""
    config = machine.config
    parallel, size = config.parallel, config.parallel.pipeline_model_parallel_size
    if size == 1:
        return 0.0
    cut = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    inside = machine.num_gpus <= machine.node.num_gpus  # else some stage sends to another node, and all wait for it
    rate = machine.gpu.nvlink * efficiency.NVLINK if inside else machine.node.network * efficiency.NETWORK
    sent = 2 * 2 * machine.frames * config.temporal.hidden_size / cut
    hidden = efficiency.PIPELINE_HIDDEN if parallel.num_chunks > 1 else 0.0
    return parallel.num_chunks * sent * (1 - hidden) / (rate * 1e9)


def _after_backward(machine: _Machine, memory: StageMemory, microbatch: float) -> dict[str, float]:
    """What of a step comes once, on a rank of a stage: data parallel communication that nothing hides, the sum of the
    depth transformer's gradients over tensor parallel ranks, the optimizer.

    Args:
        microbatch: seconds of one, of which a third is forward and the rest backward.
    """
    config, parallel = machine.config, machine.config.parallel
    tensor, shards = parallel.tensor_model_parallel_size, machine.replicas * parallel.context_parallel_size
    held = sum(memory.parameters.values())
    reduced, gathered = 4 if parallel.grad_reduce_in_fp32 else 2, 2
    if config.precision.fp8_param_gather and config.precision.fp8_recipe != "mxfp8":
        gathered -= multiplied(memory.parameters) / held
    share = (shards - 1) / shards / machine.rate(size=shards, stride=tensor) if shards > 1 else 0.0
    reduction, gather, own = reduced * held * share, gathered * held * share, held / shards
    if parallel.data_parallel == "ddp" and not parallel.use_distributed_optimizer:
        # A sum is worth two reductions, and every rank updates all weights.
        reduction, gather, own = 2 * reduction, 0.0, held
    if parallel.data_parallel != "ddp":  # every microbatch gathers twice and reduces once, behind its computation
        rounds = num_microbatches(config, replicas=machine.replicas)
        sent = reduction + 2 * gather
        exposed = rounds * max(sent - microbatch, sent * (1 - efficiency.SHARDED_HIDDEN))
    else:
        behind = microbatch * 2 / 3 if parallel.overlap_grad_reduce else 0.0
        before = microbatch / 3 if parallel.overlap_param_gather else 0.0
        exposed = max(0.0, reduction - behind) + max(0.0, gather - before)
    # `own` is what each rank's optimizer keeps, of which alone gradients are summed.
    summed = 2 * reduced * memory.parameters.get("depth", 0) * own / held * (tensor - 1) / tensor
    return {
        "data parallel": exposed,
        "depth gradients": summed / machine.rate(size=tensor, stride=1),
        # Adam reads gradients, reads and writes main weights and moments; buffers are set to 0 and normed.
        "optimizer": (30 * own + 2 * reduced * held) / machine.bandwidth,
    }
