"""Every layout of a model on so many GPUs that fits, fastest first; and why the obvious ones do not fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megaspeech.config import Config
from megaspeech.config.checks import cross_section_faults
from megaspeech.config.schema import SECTIONS
from megaspeech.data.batch import frame_multiple
from megaspeech.planning.activations import LOCAL, TRANSFORMER_ENGINE, recomputes_feed_forward
from megaspeech.planning.balance import balanced_pipelines
from megaspeech.planning.efficiency import MARGIN
from megaspeech.planning.gpus import Gpu
from megaspeech.planning.memory import StageMemory, stage_memory
from megaspeech.planning.nodes import Node
from megaspeech.planning.step_time import StepTime, step_time

SIZES = (1, 2, 4, 8)
STAGES = (1, 2, 3, 4, 5, 6, 8, 10, 11, 12, 16, 20)
CHUNKS = (1, 2, 3, 4, 5, 6)
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ("mlp",)},
    "full": {"recompute_granularity": "full"},
}
KEPT = (
    *("grad_reduce_in_fp32", "use_distributed_optimizer"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size"),
)
"""Keys of `parallel` that are not looked for: as the base has them."""
WASTE = ("tensor parallel", "context parallel", "pipeline sends", "data parallel", "depth gradients", "optimizer")


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind, in nodes of one kind."""

    gpu: Gpu
    node: Node
    num_gpus: int


@dataclass(frozen=True)
class Plan:
    """A layout with what it takes and how fast it is."""

    config: Config
    machine: Machine
    memory: tuple[StageMemory, ...]
    time: StepTime

    @property
    def data_parallel_size(self) -> int:
        """Replicas."""
        return self.machine.num_gpus // self.config.parallel.model_parallel_size

    @property
    def fullest(self) -> StageMemory:
        """The stage that takes most memory."""
        return max(self.memory, key=lambda memory: memory.total_gb)

    @property
    def fits(self) -> bool:
        """Whether the fullest stage leaves a little of the GPU's memory."""
        return self.fullest.total_gb <= MARGIN * self.machine.gpu.memory_gb

    @property
    def recompute(self) -> str:
        """ "none", "mlp" or "full"."""
        parallel = self.config.parallel
        return {None: "none", "selective": "mlp", "full": "full"}[parallel.recompute_granularity]

    @property
    def limit(self) -> str:
        """What costs most of all that is no computation, or what keeps memory from a better choice."""
        parts = self.time.parts
        waste = {name: parts.get(name, 0.0) for name in WASTE} | {"bubble": self.time.bubble * self.time.seconds}
        name = max(waste, key=lambda part: waste[part])
        full = self.fullest.total_gb / self.machine.gpu.memory_gb
        words = f"{name} {waste[name] / self.time.seconds:.0%}"
        return words + (f", memory of stage {self.fullest.stage.index} {full:.0%}" if full > 0.85 else "")


def plans(base: Config, machine: Machine, *, most: int = 10) -> list[Plan]:
    """The layouts that fit, fastest first, one of each tensor, pipeline, context size and kind of data parallelism.

    Args:
        base: model, precision, optimizer, `data.num_frames` and `training.global_batch_size`; its layout is replaced,
            but for KEPT.
        machine: what it is to run on.
        most: layouts to find.
    """
    bounds = [plan_of(config, machine, exact=False) for config in candidates(base, machine)]
    fitting = [plan for plan in bounds if plan.fits]
    best: dict[tuple, Plan] = {}
    for bound in sorted(fitting, key=lambda plan: plan.time.seconds):
        times = sorted(plan.time.seconds for plan in best.values())
        if len(times) >= most and bound.time.seconds >= times[most - 1]:
            break  # what follows takes longer even if no stage waits for another
        plan, parallel = plan_of(bound.config, machine), bound.config.parallel
        key = (
            *(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size),
            *(parallel.context_parallel_size, parallel.data_parallel),
        )
        if key not in best or plan.time.seconds < best[key].time.seconds:
            best[key] = plan
    return sorted(best.values(), key=lambda plan: plan.time.seconds)[:most]


def plan_of(config: Config, machine: Machine, *, exact: bool = True) -> Plan:
    """What a config takes on a machine, whether or not it fits; `exact` as in `step_time`."""
    layers = LOCAL if config.model.transformer_impl == LOCAL else TRANSFORMER_ENGINE
    replicas = machine.num_gpus // config.parallel.model_parallel_size
    memory = stage_memory(config, data_parallel_size=replicas, layer_kind=layers)
    gpus = {"gpu": machine.gpu, "node": machine.node, "num_gpus": machine.num_gpus}
    time = step_time(config, memory, **gpus, exact=exact)
    return Plan(config, machine, tuple(memory), time)


def valid_plan(config: Config, machine: Machine) -> Plan | None:
    """What a config takes, as `plan_of` says; None where it `is_valid` on no such machine."""
    return plan_of(config, machine) if is_valid(config, num_gpus=machine.num_gpus) else None


def require_plannable(base: Config, machine: Machine) -> None:
    """Raise ValueError, naming the key and the remedy, where no layout at all could run."""
    recipe, frames = base.precision.recipe, base.data.num_frames
    if not machine.gpu.has(base.precision.fp8_recipe):
        raise ValueError(f'precision.recipe: the {machine.gpu.name} has no products of "{recipe}"; use "bf16"')
    alone = base.model_copy(update={"data": base.data.model_copy(update={"length_multiple": 1})})
    for name, multiple in ((recipe, frame_multiple(alone)), ("data.length_multiple", base.data.length_multiple)):
        if frames % multiple:
            padded = frames + -frames % multiple
            raise ValueError(f"data.num_frames: {name} pads {frames} to a multiple of {multiple}; plan with {padded}")


def obvious(base: Config, machine: Machine) -> dict[str, Plan | None]:
    """What one would try first: replicas alone, a node's GPUs sharing each layer, and FSDP over all; None where that is
    no layout of this model on so many GPUs."""
    node = max(size for size in SIZES if size <= machine.node.num_gpus and machine.num_gpus % size == 0)
    tries = {
        "replicas alone": {},
        f"tensor {node}, no pipeline": {"tensor_model_parallel_size": node, "sequence_parallel": node > 1},
        "FSDP alone": {"data_parallel": "fsdp2"},
    }
    return {name: valid_plan(_with(base, micro=1, **keys), machine) for name, keys in tries.items()}


def candidates(base: Config, machine: Machine) -> Iterator[Config]:
    """Configs of all layouts that are valid on the machine, memory not looked at."""
    for tensor, stages, context in itertools.product(SIZES, STAGES, SIZES):
        model_size = tensor * stages * context
        if machine.num_gpus % model_size or tensor > machine.node.num_gpus:
            continue
        replicas = machine.num_gpus // model_size
        for micro, chunks, kind in itertools.product(SIZES, CHUNKS, ("ddp", "fsdp2", "megatron_fsdp")):
            uneven = base.training.global_batch_size % (micro * replicas) and not base.data.pack
            if uneven or (kind != "ddp" and stages > 1):
                continue
            yield from _layouts(
                base, machine, tensor=tensor, stages=stages, context=context, micro=micro, chunks=chunks, kind=kind
            )


def _layouts(
    base: Config, machine: Machine, *, tensor: int, stages: int, context: int, micro: int, chunks: int, kind: str
) -> Iterator[Config]:
    """Those of given sizes, by what they recompute, the pipeline balanced for the depth transformer."""
    sizes = {"tensor_model_parallel_size": tensor, "context_parallel_size": context, "data_parallel": kind}
    overlap = {"overlap_grad_reduce": kind == "ddp", "overlap_param_gather": kind == "ddp" and _may_gather_late(base)}
    even = base.data.length_multiple == base.data.num_frames  # microbatches all as long, as user buffers want them
    sizes |= overlap | {"sequence_parallel": tensor > 1, "tp_comm_overlap": tensor > 1 and even}
    pipelines = balanced_pipelines(
        base.temporal.num_layers,
        num_stages=stages,
        num_chunks=chunks,
        last_load=_last_load(_with(base, micro=micro, **sizes), machine) if stages > 1 else 0.0,
    )
    for pipeline, recompute in itertools.product(pipelines, RECOMPUTE):
        config = _with(base, micro=micro, **sizes, **pipeline, **RECOMPUTE[recompute])
        is_idle = recompute == "mlp" and not recomputes_feed_forward(config)
        if not is_idle and is_valid(config, num_gpus=machine.num_gpus):
            yield config


def _may_gather_late(base: Config) -> bool:
    """Whether `config.checks` let a forward pass gather weights, which hides that."""
    in_mxfp8 = base.precision.fp8_param_gather and base.precision.recipe == "mxfp8"
    return base.parallel.use_distributed_optimizer and not base.model.depth_graph_multiple and not in_mxfp8


def is_valid(config: Config, *, num_gpus: int) -> bool:
    """Whether our own checks let it pass, and samples of `data.num_frames` need no padding for the layout."""
    parallel = config.parallel
    if config.data.num_frames % frame_multiple(config):
        return False
    shards = num_gpus // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    if parallel.data_parallel != "ddp" and any(width % shards for width in _widths(config)):
        return False  # `parallel.fsdp2.shard_axis`
    sections = {name: getattr(config, name) for name in SECTIONS}
    return not cross_section_faults(sections, world_size=num_gpus)


def _widths(config: Config) -> list[int]:
    """Of what has one axis alone: norms, and the bias of queries, keys and values on a tensor parallel rank."""
    temporal, widths = config.temporal, [config.temporal.hidden_size, config.depth.hidden_size]
    if temporal.qk_layernorm:
        widths.append(temporal.head_width)
    if temporal.add_qkv_bias:
        heads = temporal.num_attention_heads + 2 * temporal.num_query_groups
        widths.append(heads * temporal.head_width // config.parallel.tensor_model_parallel_size)
    return widths


def _with(base: Config, *, micro: int, **keys: Any) -> Config:
    """`base` with a microbatch and keys of `parallel`, of whose own only those that are no layout stay."""
    kept = {name: getattr(base.parallel, name) for name in KEPT}
    training = base.training.model_copy(update={"micro_batch_size": micro})
    return base.model_copy(update={"parallel": type(base.parallel)(**kept, **keys), "training": training})


def _last_load(config: Config, machine: Machine) -> float:
    """What the text head and the depth transformer take, in temporal layers' time."""
    parallel = config.parallel
    ranks = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    plan = plan_of(config, Machine(machine.gpu, machine.node, ranks))
    parts, layers = plan.time.parts, config.temporal.num_layers
    heads = parts["text head"] + parts["depth transformer"]
    layer = (
        parts["temporal products"] + parts["attention"] + parts["norms, SwiGLU"] + parts["tensor parallel"]
    ) / layers
    return heads / layer
