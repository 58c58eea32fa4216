"""A plan as a picture: memory by stage, and what more GPUs would bring."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megaspeech.planning.plan_report import PARTS, memory_rows, of_ideal
from megaspeech.planning.search import Plan


def draw(plan: Plan, sweep: Mapping[int, Plan | None], path: Path) -> None:
    """Bars of memory by stage, the GPU's own as a line; beside them frames a second by GPUs, where a sweep was made.

    PNG, or what the suffix says.
    """
    fitting = {num_gpus: each for num_gpus, each in sweep.items() if each}
    width = max(6, 1 + 0.7 * len(plan.memory))
    figure = Figure(figsize=(width + (6 if fitting else 0), 4.5), layout="constrained")
    axes = figure.subplots(1, 2 if fitting else 1, squeeze=False)[0]
    _draw_memory(plan, axes[0])
    if fitting:
        _draw_sweep(fitting, axes[1])
    figure.savefig(path, dpi=120)


def _draw_memory(plan: Plan, axes: Axes) -> None:
    rows, limit = memory_rows(plan), plan.machine.gpu.memory_gb
    below = [0.0] * len(rows)
    for part in PARTS:
        heights = [row[part] for row in rows]
        axes.bar(range(len(rows)), heights, bottom=below, label=part)
        below = [sum(pair) for pair in zip(below, heights, strict=True)]
    axes.axhline(limit, color="black", linestyle="--", linewidth=1)
    axes.set_xticks(range(len(rows)), [f"{i}\n{row['layers']} layers" for i, row in enumerate(rows)])
    axes.set_xlabel("pipeline stage")
    axes.set_ylabel("GB a GPU")
    layout = plan.config.parallel.describe(plan.data_parallel_size)
    axes.set_title(f"{layout}\non {plan.machine.num_gpus:,} x {plan.machine.gpu.name}", fontsize="medium")
    axes.legend(fontsize="small", ncols=3, loc="upper center")
    axes.set_ylim(top=1.25 * limit)  # room for the legend above the line


def _draw_sweep(sweep: Mapping[int, Plan], axes: Axes) -> None:
    rates = [plan.time.frames_per_second for plan in sweep.values()]
    gpus, shares = list(sweep), of_ideal(sweep)
    axes.plot(gpus, [rates[0] * number / gpus[0] for number in gpus], color="grey", linestyle="--", label="ideal")
    axes.plot(gpus, rates, marker="o", label="modelled")
    for number, rate in zip(gpus, rates, strict=True):
        axes.annotate(f"{shares[number]:.0%}", (number, rate), xytext=(6, -12), textcoords="offset points", fontsize=8)
    axes.margins(0.1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(gpus, [f"{number:,}" for number in gpus])
    axes.set_xlabel("GPUs, the step staying the same")
    axes.set_ylabel("frames a second")
    axes.set_title("the best layout for each number of GPUs, share of the ideal", fontsize="medium")
    axes.legend(fontsize="small")
