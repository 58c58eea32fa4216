"""How a run is shown and kept: tables in the terminal; JSON, Markdown and a chart side by side."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megaspeech.benchmarks.aims import AIMED_AT, PUBLISHED, Judged
from megaspeech.benchmarks.case import MOSHI, OURS, Case
from megaspeech.benchmarks.chart import draw
from megaspeech.benchmarks.figures import FP8_PRODUCT, Row, step_flops
from megaspeech.benchmarks.parts import PARTS
from megaspeech.benchmarks.run import Report
from megaspeech.config import Config
from megaspeech.kernels.benchmarks.report import COLOURS, grid
from megaspeech.model.counting import count_flops, count_parameters
from megaspeech.planning.gpus import GPUS
from megaspeech.planning.memory import state_bytes

HEADER = (
    *("layers", "", "frames/s", "x real time", "step ms (quartiles)", "planned ms", "TFLOP/s", "MFU", "of product"),
    *("peak GB", "planned GB"),
)
PARTS_HEADER = ("layers", "", *PARTS, "sum", "median (quartiles)", "depth: time, FLOPs")
AIMS_HEADER = ("aim", "bound", "worst", "layers", "verdict")
WHAT = {
    OURS: "this library's trainer, its whole step",
    MOSHI: "the moshi package's LMModel, all weights trained as moshi-finetune does: BF16, FP32 copies for AdamW, "
    "activations recomputed, moshi's compiled functions; the same shape, microbatches and codes",
}
FORMULA = (
    "TFLOP/s: the model's operations, three times the forward pass's, two a multiply-add, causal attention as the half "
    "that is used, nothing recomputed. MFU is their share of the data sheet's dense rate, `of product` of a large "
    "matrix product's in the same run; both in the recipe's own numbers"
)


def show(report: Report, console: Console) -> None:
    """The tables, what failed in red."""
    table = Table(*HEADER, title=_title(report))
    for row in report.rows:
        table.add_row(*_cells(row), style=None if row.has_figures else "red")
    parts = Table(*PARTS_HEADER, title="ms by part, of steps with events in them")
    for row in filter(lambda row: row.parts_ms, report.rows):
        parts.add_row(*_part_cells(row))
    aims = Table(*AIMS_HEADER, title=f"aims, {AIMED_AT}")
    for judged in report.aims:
        aims.add_row(*_aim_cells(judged), style=COLOURS[judged.verdict])
    for each in (table, parts, aims):
        console.print(each)


def show_plan(case: Case, config: Config, console: Console) -> None:
    """What a case would be: parameters, operations, bytes of state, and which GPUs hold them."""
    parameters, flops = count_parameters(config), count_flops(config, num_frames=config.data.num_frames)
    table = Table("", *parameters, "sum", title=case.name)
    table.add_row("parameters", *(f"{count:,}" for count in parameters.values()), f"{sum(parameters.values()):,}")
    forward = [f"{flops.get(part, 0) / 1e9:,.4g}" for part in parameters]
    table.add_row("GFLOP a frame, forward", *forward, f"{sum(flops.values()) / 1e9:,.4g}")
    console.print(table)
    state = state_bytes(config)
    total = sum(state.values()) / 1e9
    console.print(f"{step_flops(config) / 1e12:,.4g} TFLOP a step of {case.frames:,} frames, forward and backward")
    kinds = ", ".join(f"{kind} {size / 1e9:,.4g}" for kind, size in state.items())
    console.print(f"state in GB on one GPU: {kinds}; {total:,.4g} in all. Left for activations, in GB:")
    for gpu in GPUS:
        left = gpu.memory_gb - total
        console.print(f"  {gpu.name}: " + (f"{left:,.4g}" if left > 0 else f"does not fit, {-left:,.4g} too many"))


def write(report: Report, path: Path) -> None:
    """JSON to `path`; Markdown and chart beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"what": WHAT, "formula": FORMULA, **asdict(report)}, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(_markdown(report, picture=path.with_suffix(".png").name), encoding="utf-8")
    draw(report.rows, path.with_suffix(".png"), title=_title(report))


def _title(report: Report) -> str:
    row = report.rows[0]
    return (
        f"{row.model}, {row.frames:,} frames a step in microbatches of {row.micro_batch_size} x {row.sample_frames:,}, "
        f"{report.machine['device']}"
    )


def _markdown(report: Report, *, picture: str) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in report.machine.items() if value is not None)
    floors = ", ".join(f"{value:,.1f} {unit}" for unit, value in report.floors.items() if value is not None)
    kinds = "BF16 and FP8 matrix products" if report.floors[FP8_PRODUCT] else "a BF16 matrix product"
    parts = [
        f"# Training steps: {_title(report)}",
        f"{machine}. Floors, a copy and {kinds} in the same run: {floors}. {FORMULA}.",
        "; ".join(f"{name}: {what}" for name, what in WHAT.items()) + ".",
        f"![frames a second, time by part]({picture})",
        grid(HEADER, [_cells(row) for row in report.rows]),
        "## Milliseconds by part, of steps with events in them",
        grid(PARTS_HEADER, [_part_cells(row) for row in report.rows if row.parts_ms]),
        f"## Aims, {AIMED_AT}",
        grid(AIMS_HEADER, [_aim_cells(judged) for judged in report.aims]),
        f"{PUBLISHED}.",
    ]
    return "\n\n".join(parts) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    name = (str(row.num_layers), row.name)
    if not row.has_figures:
        return *name, row.status, *("-",) * (len(HEADER) - len(name) - 1)
    return (
        *name,
        f"{row.frames_per_second:,.0f}",
        f"{row.x_real_time:,.0f}",
        f"{row.step_ms:,.1f} ({_quartiles(row)})",
        "-" if row.planned_ms is None else f"{row.planned_ms:,.1f}",
        f"{row.tflops:,.1f}",
        *("-" if share is None else f"{share:.1%}" for share in (row.mfu, row.share_of_product)),
        *("-" if size is None else f"{size / 1e9:.1f}" for size in (row.peak_bytes, row.planned_bytes)),
    )


def _quartiles(row: Row) -> str:
    return row.status if row.quartiles_ms is None else f"{row.quartiles_ms[0]:,.1f}, {row.quartiles_ms[1]:,.1f}"


def _part_cells(row: Row) -> tuple[str, ...]:
    total, (low, high) = sum(row.parts_ms.values()), row.quartiles_by_part_ms
    spent = [f"{milliseconds:,.1f} ({milliseconds / total:.0%})" for milliseconds in row.parts_ms.values()]
    shares = f"{row.depth_share_of_time:.1%}, {row.depth_share_of_flops:.1%}"
    median = f"{row.step_by_part_ms:,.1f} ({low:,.1f}, {high:,.1f})"
    return str(row.num_layers), row.name, *spent, f"{total:,.1f}", median, shares


def _aim_cells(judged: Judged) -> tuple[str, ...]:
    worst = "-" if judged.worst is None else f"{judged.worst:.3g}"
    bound = f"{judged.bound:.3g}"
    return judged.text, bound, worst, "-" if judged.num_layers is None else str(judged.num_layers), judged.verdict
