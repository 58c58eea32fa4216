"""Plans for people and for programs: tables and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from megaspeech.model.counting import count_parameters
from megaspeech.planning import efficiency
from megaspeech.planning.memory import RESERVED_GB
from megaspeech.planning.search import Plan

PARTS = ("weights", "gradients", "optimizer", "activations", "working", "reserved")


def show(plans: Sequence[Plan], console: Console, *, audio_hours: float, frame_rate: float) -> None:
    """What a step computes, the layouts, then the first one's memory by stage and time by part."""
    first = plans[0]
    parameters = sum(count_parameters(first.config).values())
    console.print(
        f"{parameters / 1e9:,.2f} billion parameters, {first.time.flops / 1e15:,.2f} PFLOP a step of "
        f"{first.time.frames:,} frames, forward and backward"
    )
    table = Table(title="layouts that fit, fastest first")
    for name in ("", "tp", "pp", "virtual", "cp", "dp", "data", "micro", "recompute", "step s", "frames/s", "MFU"):
        table.add_column(name, justify="right")
    table.add_column("bubble", justify="right")
    for name in ("GB by stage", "limited by"):
        table.add_column(name)
    for number, plan in enumerate(plans, start=1):
        table.add_row(str(number), *_cells(plan))
    console.print(table)
    _show_memory(first, console)
    _show_time(first, console)
    costs = _costs(first, audio_hours=audio_hours, frame_rate=frame_rate)
    console.print(
        f"Layout 1 trains once over {audio_hours:,.0f} hours of audio in {costs['hours']:,.1f} hours: "
        f"{costs['gpu_hours']:,.0f} GPU-hours, at most {costs['mwh']:,.2f} MWh in the GPUs alone."
    )
    console.print("Times are a model's, with assumed efficiencies (planning/efficiency.py): not measured yet.")


def _costs(plan: Plan, *, audio_hours: float, frame_rate: float) -> dict[str, float]:
    """Of training once over so much audio; energy as if every GPU drew all that its board may."""
    hours = plan.time.hours(audio_hours, frame_rate=frame_rate)
    gpu_hours = hours * plan.machine.num_gpus
    return {"hours": hours, "gpu_hours": gpu_hours, "mwh": gpu_hours * plan.machine.gpu.watts / 1e6}


def _cells(plan: Plan) -> list[str]:
    parallel, time = plan.config.parallel, plan.time
    sizes = (
        *(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.num_chunks),
        *(parallel.context_parallel_size, plan.data_parallel_size, parallel.data_parallel),
        *(plan.config.training.micro_batch_size, plan.recompute),
    )
    rates = (f"{time.seconds:.2f}", f"{time.frames_per_second:,.0f}", f"{time.utilisation:.1%}", f"{time.bubble:.1%}")
    return [*map(str, sizes), *rates, " ".join(f"{memory.total_gb:.0f}" for memory in plan.memory), plan.limit]


def memory_rows(plan: Plan) -> list[dict[str, float]]:
    """GB of 10^9 bytes of every stage, by PARTS, and its layers."""
    rows = []
    for memory in plan.memory:
        state = {kind: size / 1e9 for kind, size in memory.state.items()}
        rows.append(
            {
                "layers": memory.stage.num_layers,
                "weights": sum(state.get(kind, 0) for kind in ("weights", "FP8 weights", "gathered")),
                "gradients": state["gradients"],
                "optimizer": state.get("main weights", 0) + state.get("moments", 0),
                "activations": memory.activations / 1e9,
                "working": memory.working / 1e9,
                "reserved": RESERVED_GB,
                "sum": memory.total_gb,
            }
        )
    return rows


def _show_memory(plan: Plan, console: Console) -> None:
    gpu = plan.machine.gpu
    table = Table(title=f"layout 1: GB on a GPU of each stage, of {gpu.memory_gb:.0f}")
    rows = memory_rows(plan)
    for name in ("stage", *rows[0]):
        table.add_column(name, justify="right")
    for index, row in enumerate(rows):
        table.add_row(str(index), *(f"{value:.1f}" if name != "layers" else str(value) for name, value in row.items()))
    console.print(table)


def _show_time(plan: Plan, console: Console) -> None:
    table = Table(title="layout 1: seconds of a step")
    table.add_column("part")
    table.add_column("s", justify="right")
    table.add_column("share", justify="right")
    for part, seconds in plan.time.parts.items():
        if seconds > 5e-4:
            table.add_row(part, f"{seconds:.3f}", f"{seconds / plan.time.seconds:.1%}")
    console.print(table)


def show_tries(tries: Mapping[str, Plan | None], console: Console) -> None:
    """Why each does not fit, or that it does, and how long a step would take; by what to call them."""
    for name, plan in tries.items():
        if plan is None:
            console.print(f"{name}: sizes or the global batch cannot be shared out so")
            continue
        memory, limit = plan.fullest, plan.machine.gpu.memory_gb
        verdict = f"fits, {plan.time.seconds:.2f} s a step" if plan.fits else "does not fit"
        kinds = ", ".join(f"{kind} {size / 1e9:.0f}" for kind, size in memory.state.items() if size > 5e8)
        console.print(
            f"{name}: {verdict}: {memory.total_gb:.0f} GB of {limit:.0f} with microbatches of "
            f"{plan.config.training.micro_batch_size} ({kinds}, activations {memory.activations / 1e9:.0f}, "
            f"working {memory.working / 1e9:.0f})"
        )


def show_sweep(sweep: Mapping[int, Plan | None], console: Console, *, audio_hours: float, frame_rate: float) -> None:
    """How time falls with more GPUs, and what the model of time assumes; None where nothing fits."""
    table = Table(title="the same step on more GPUs")
    for name in ("GPUs", "step s", "frames/s", "of ideal", "MFU", f"hours for {audio_hours:,.0f} h", "layout"):
        table.add_column(name, justify="right")
    shares_of_ideal = of_ideal(sweep)
    for num_gpus, plan in sweep.items():
        if plan is None:
            table.add_row(f"{num_gpus:,}", *["-"] * 5, "none fits, or the batch cannot be shared out")
            continue
        time = plan.time
        hours = time.hours(audio_hours, frame_rate=frame_rate)
        rates = (f"{time.seconds:.2f}", f"{time.frames_per_second:,.0f}")
        shares = (f"{shares_of_ideal[num_gpus]:.0%}", f"{time.utilisation:.1%}", f"{hours:,.1f}")
        table.add_row(f"{num_gpus:,}", *rates, *shares, plan.config.parallel.describe(plan.data_parallel_size))
    console.print(table)
    names = [name for name in vars(efficiency) if name.isupper()]
    console.print("assumed: " + ", ".join(f"{name} {getattr(efficiency, name)}" for name in names))
    console.print("not in it: stragglers, failures, checkpoints, traffic of others, latency of small messages")


def of_ideal(sweep: Mapping[int, Plan | None]) -> dict[int, float]:
    """Frames a second and GPU over those of the first number of GPUs that fits, where something does."""
    rates = {num_gpus: plan.time.frames_per_second / num_gpus for num_gpus, plan in sweep.items() if plan}
    return {num_gpus: rate / next(iter(rates.values())) for num_gpus, rate in rates.items()}


def as_json(plan: Plan, *, audio_hours: float, frame_rate: float) -> dict[str, Any]:
    """Everything of a plan that was counted; `parameters` are those of a GPU of each stage."""
    return {
        "parallel": plan.config.parallel.model_dump(mode="json", exclude_defaults=True),
        "data_parallel_size": plan.data_parallel_size,
        "micro_batch_size": plan.config.training.micro_batch_size,
        "recipe": plan.config.precision.recipe,
        "parameters": [sum(memory.parameters.values()) for memory in plan.memory],
        "flops": plan.time.flops,
        "memory_gb": memory_rows(plan),
        "seconds": plan.time.parts,
        "step_seconds": plan.time.seconds,
        "frames_per_second": plan.time.frames_per_second,
        "utilisation": plan.time.utilisation,
        "bubble": plan.time.bubble,
        "limited_by": plan.limit,
        "audio_hours": audio_hours,
        **_costs(plan, audio_hours=audio_hours, frame_rate=frame_rate),
    }
