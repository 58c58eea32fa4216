"""Latencies of served sessions shown and kept: tables in the terminal; JSON, Markdown and a chart side by side."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from megaspeech.benchmarks.sessions import Row
from megaspeech.benchmarks.sessions_run import AIMED_AT, BY_DELAYS, PROMISE_MS, SPEECH_MS, Judged, Report, Waited
from megaspeech.kernels.benchmarks.report import COLOURS, grid

PARTS = ("task_delay", "acoustic_delay", "compute")
FRAMES_HEADER = ("sessions", "codec in the loop", "step ms, p99", "floor ms", "frame ms, p99", "in time", "peak GB")
TASKS_HEADER = ("task", "sessions", "of", "median ms", "p99 ms", *(part.replace("_", " ") for part in PARTS))
AIMS_HEADER = ("aim", "bound", "worst", "where", "verdict")
MOSHI_THEORETICAL_MS, MOSHI_MEASURED_MS = 160.0, 200.0
"""Of Moshi on an L4 (arXiv 2410.00037, abstract)."""
FRAMES = (
    "Sessions of one batch, in step, greedily, with random codes and sounds. Step: the moshi runtime's, median and "
    "99th percentile; frame: with the codec's work. Floor: the weights that a step reads and the sessions' caches of "
    "keys and values, over the bandwidth of a large copy in the same run; a model that fits the processor's caches can "
    "be under it. In time: frames that took no longer than they last"
)
TASKS = (
    "From the end of the last heard word, or for tts from the text, to the last word's text or the first sound of the "
    "answer; parts are medians, and need not sum to the median. Of answers: real ones, to a manifest. Of delays: what "
    "the delays of data and model come to, for words of one piece, the last heard one ending anywhere in a frame; "
    "where the model speaks, with the lead of text over sound (data.speech_lead) in it"
)


def show(report: Report, console: Console) -> None:
    """The tables, what failed in red."""
    frames = Table(*FRAMES_HEADER, title=_title(report))
    for row in report.rows:
        frames.add_row(*_row_cells(row), style=None if row.step_ms else "red")
    tasks = Table(*TASKS_HEADER, title="response latency")
    for one in report.latencies:
        tasks.add_row(*_task_cells(one))
    aims = Table(*AIMS_HEADER, title=f"aims; {AIMED_AT}")
    for judged in report.aims:
        aims.add_row(*_aim_cells(judged), style=COLOURS[judged.verdict])
    for table in (frames, tasks, aims):
        console.print(table)


def write(report: Report, path: Path) -> None:
    """JSON to `path`; Markdown and chart beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {"frames": FRAMES, "tasks": TASKS, **asdict(report)}
    path.write_text(json.dumps(_rounded(kept), indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(_markdown(report, picture=path.with_suffix(".png").name), encoding="utf-8")
    draw(report, path.with_suffix(".png"))


def _rounded(value: object) -> object:
    """With five significant digits."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _title(report: Report) -> str:
    return f"{report.model}, {report.dtype}, {report.machine['device']}, frames of {1000 / report.frame_rate:g} ms"


def _markdown(report: Report, *, picture: str) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in report.machine.items() if value is not None)
    parts = [
        f"# Response latency: {_title(report)}",
        " ".join(filter(None, (f"{machine}. Copy: {report.bandwidth / 1e9:,.1f} GB/s.", report.note))),
        f"![latency by task, time by sessions]({picture})",
        f"{TASKS}.",
        grid(TASKS_HEADER, [_task_cells(one) for one in report.latencies]),
        f"{FRAMES}.",
        grid(FRAMES_HEADER, [_row_cells(row) for row in report.rows]),
        f"## Aims ({AIMED_AT})",
        grid(AIMS_HEADER, [_aim_cells(judged) for judged in report.aims]),
    ]
    return "\n\n".join(parts) + "\n"


def _row_cells(row: Row) -> tuple[str, ...]:
    name = (str(row.batch_size), row.codec or "none")
    if row.step_ms is None:
        return *name, row.status, *("-",) * (len(FRAMES_HEADER) - len(name) - 1)
    spans = [f"{low:,.1f}, {high:,.1f}" for low, high in (row.step_ms, row.frame_ms)]
    peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.1f}"
    return *name, spans[0], f"{row.floor_ms:,.2f}", spans[1], f"{row.in_time:.1%}", peak


def _task_cells(one: Waited) -> tuple[str, ...]:
    name = (one.task, str(one.batch_size), one.whence)
    if one.median is None:
        return *name, "no answer", *("-",) * (len(TASKS_HEADER) - len(name) - 1)
    return *name, f"{one.median:,.0f}", f"{one.p99:,.0f}", *(f"{one.parts[part]:,.0f}" for part in PARTS)


def _aim_cells(judged: Judged) -> tuple[str, ...]:
    worst = "-" if judged.worst is None else f"{judged.worst:,.0f}"
    return judged.text, f"{judged.bound:,.0f}", worst, judged.where, judged.verdict


def draw(report: Report, path: Path) -> None:
    """Write a PNG: latency of one session by task and part on the left, a frame's time by sessions on the right."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    tasks, frames = figure.subplots(1, 2)
    _draw_tasks(tasks, report)
    _draw_frames(frames, report)
    figure.suptitle(_title(report), fontsize=10)
    figure.savefig(path, dpi=110)


def _draw_tasks(axes: Axes, report: Report) -> None:
    fewest = min((one.batch_size for one in report.latencies), default=1)
    shown = [one for one in report.latencies if one.batch_size == fewest and one.median is not None]
    for place, one in enumerate(shown):
        left = 0.0
        for index, part in enumerate(PARTS):
            label = part.replace("_", " ") if place == 0 else None
            axes.barh(place, one.parts[part], left=left, color=f"C{index}", label=label)
            left += one.parts[part]
        axes.plot([one.p99], [place], "k|", markersize=14, label="99th percentile" if place == 0 else None)
    names = [f"{one.task}{', by delays' if one.whence == BY_DELAYS else ''}" for one in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.invert_yaxis()
    marks = (
        (PROMISE_MS, "red", "the promise"),
        (MOSHI_THEORETICAL_MS, "grey", "Moshi, theoretical"),
        (MOSHI_MEASURED_MS, "black", "Moshi, measured; our aim for speech"),
    )
    assert MOSHI_MEASURED_MS == SPEECH_MS, "one line stands for both"
    for value, colour, name in marks:
        axes.axvline(value, color=colour, linestyle="--", label=f"{value:.0f} ms: {name}")
    axes.set(xlabel="ms to the answer, medians of the parts", title=f"{fewest} session{'s' * (fewest > 1)}")
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)


def _draw_frames(axes: Axes, report: Report) -> None:
    for index, codec in enumerate(dict.fromkeys(row.codec for row in report.rows)):
        rows = [row for row in report.rows if row.codec == codec and row.frame_ms]
        sessions = [row.batch_size for row in rows]
        name = f"{codec} in the loop" if codec else "the model alone"
        axes.plot(sessions, [row.frame_ms[0] for row in rows], f"C{index}o-", label=f"{name}, median")
        axes.plot(sessions, [row.frame_ms[1] for row in rows], f"C{index}:", label=f"{name}, 99th percentile")
    alone = [row for row in report.rows if row.floor_ms and row.codec == report.rows[0].codec]
    axes.plot([row.batch_size for row in alone], [row.floor_ms for row in alone], "k-.", label="floor of the model")
    axes.axhline(1000 / report.frame_rate, color="red", linestyle="--", label="a frame lasts")
    axes.set(xlabel="sessions in a batch", ylabel="ms a frame", xscale="log", yscale="log")
    sizes = sorted({row.batch_size for row in report.rows})
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.legend(fontsize=7)
