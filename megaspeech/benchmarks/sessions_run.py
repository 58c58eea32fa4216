"""Response latency by task and number of sessions: of real answers, or by the delays of data and model.

**By delays.** The last heard word ends anywhere in a frame; the answer stands in a later frame, so many after it:

- `asr`, `st`: `task_delay`;
- `s2s`: 1, and `speech_lead` more, by which text precedes sound. Moshi's 160 ms (arXiv 2410.00037, section 3.4) count a
  whole frame of what is heard and its acoustic delay of 1, without a lead;
- `s2st`: `task_delay + speech_lead`, where data has the interpreter begin as early as `st` writes;
- `tts`: 1 for EPAD, and `speech_lead`, from the end of the prompt on, which is no part of a frame.

Where the model speaks, its acoustic delay comes on top, and everywhere the time that the frame takes. A word of several
pieces takes a frame more for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megaspeech.benchmarks.sessions import Coding, Row, Timed, row_of, time_frames
from megaspeech.config import Config
from megaspeech.data.tasks import Task
from megaspeech.kernels.benchmarks.aims import worst_of
from megaspeech.preparation.compose import timing_of
from megaspeech.streaming.latency import Latency, summarise
from megaspeech.streaming.session import Clock, acoustic_delay

if TYPE_CHECKING:
    from moshi.models import LMModel

TASKS = tuple(map(Task.parse, ("asr-en", "st-ja-en", "tts-en", "s2s-en", "s2st-ja-en")))
BY_DELAYS, BY_ANSWERS = "delays", "answers"
IN_TIME = 0.99
"""Share of the frames that a live session needs in time."""
SPEECH_MS, PROMISE_MS, LIVE_SESSIONS = 200.0, 500.0, 32
AIMED_AT = "live sessions: for one H200, model 8b"


@dataclass(frozen=True)
class Waited:
    """Response latency of a task in ms; `whence` says whether of answers or by delays."""

    task: str
    batch_size: int
    whence: str
    median: float | None
    p99: float | None
    parts: dict[str, float]


@dataclass(frozen=True)
class Judged:
    """An aim and its worst case. `verdict`: pass, fail, not measured."""

    text: str
    bound: float
    worst: float | None
    where: str
    verdict: str


@dataclass(frozen=True)
class Report:
    """A run of the benchmark: `bandwidth` is in bytes a second, of a copy; `note` is for people."""

    model: str
    dtype: str
    frame_rate: float
    machine: dict[str, Any]
    bandwidth: float
    rows: list[Row] = field(default_factory=list)
    latencies: list[Waited] = field(default_factory=list)
    aims: list[Judged] = field(default_factory=list)
    note: str = ""


def measure(
    report: Report,
    lm: LMModel,
    *,
    config: Config,
    batches: Sequence[int],
    num_frames: int,
    codings: dict[str, Coding | None],
    clock: Clock,
    advance: Callable[[str], None],
) -> None:
    """Fill in rows and latencies by delays. What does not fit the memory is a row that says so.

    Args:
        report: without rows.
        lm: what is served.
        config: its streams, and the delays of its data.
        batches: numbers of sessions.
        num_frames: that are timed for each.
        codings: codecs in the loop by name; of "" None.
        clock: gives seconds.
        advance: told what is begun.
    """
    for codec, coding in codings.items():
        for batch_size in batches:
            advance(_sessions(batch_size) + (f", {codec} in the loop" if codec else ""))
            timed, peak = _timed(lm, batch_size=batch_size, num_frames=num_frames, coding=coding, clock=clock)
            shared = {"frame_rate": report.frame_rate, "bandwidth": report.bandwidth, "peak_bytes": peak}
            report.rows.append(row_of(lm, timed, batch_size=batch_size, codec=codec, **shared))
            if isinstance(timed, Timed) and codec == list(codings)[-1]:
                report.latencies.extend(
                    _waited(task, timed, config=config, batch_size=batch_size, frame_rate=report.frame_rate)
                    for task in TASKS
                )


def by_delays(task: Task, timed: Timed, *, config: Config, frame_rate: float) -> list[Latency]:
    """A latency for each frame that was timed, with the end of the word moving through the frame.

    Args:
        task: what is asked.
        timed: the frames' work.
        config: the delays of streams and data.
        frame_rate: frames a second.
    """
    timing, spoken = timing_of(config), acoustic_delay(config.streams) if task.speaks else 0
    lead = timing.speech_lead if task.speaks else 0
    frames = lead + (timing.task_delay if task.name in ("asr", "st", "s2st") else 1)
    seconds = (timed.encode if task.hears else 0) + timed.step + (timed.decode if task.speaks else 0)
    gone_T = (np.arange(len(timed.step)) + 0.5) / len(timed.step) if task.hears else np.zeros(len(timed.step))
    return [
        Latency(1000 * (frames - gone) / frame_rate, 1000 * spoken / frame_rate, 1000 * spent)
        for gone, spent in zip(gone_T, seconds, strict=True)
    ]


def judge(report: Report, *, is_gpu: bool) -> list[Judged]:
    """The aims. What answers gave counts, where there are any; sessions are counted on a GPU, with a codec in the loop.

    `s2st` is not among the medians: when it speaks is the data's choice.
    """
    measured = [one for one in report.latencies if one.whence == BY_ANSWERS] or report.latencies
    known = [(one, Task.parse(one.task)) for one in measured if one.median is not None]
    medians = [
        (one.median, one.task) for one, task in known if task.speaks and task.name != "s2st" and one.batch_size == 1
    ]
    tails = [
        (one.p99, f"{one.task}, {_sessions(one.batch_size)}") for one, _ in known if one.batch_size <= LIVE_SESSIONS
    ]
    live = [
        (float(row.batch_size), row.codec)
        for row in report.rows
        if row.codec and row.in_time is not None and row.in_time >= IN_TIME
    ]
    is_counted = is_gpu and any(row.codec for row in report.rows)
    sessions = [max(live, default=(0.0, "no number of them"))] if is_counted else []
    return [
        _judge("median of speech out (tts, s2s), one session, ms", SPEECH_MS, medians, is_least=False),
        _judge(f"99th percentile of every task, up to {LIVE_SESSIONS} sessions, ms", PROMISE_MS, tails, is_least=False),
        _judge(f"live sessions, {IN_TIME:.0%} of the frames in time", LIVE_SESSIONS, sessions, is_least=True),
    ]


def _judge(text: str, bound: float, figures: list[tuple[float, str]], *, is_least: bool) -> Judged:
    verdict, worst, where = worst_of(figures, bound=bound, is_least=is_least)
    return Judged(text, bound, worst, where or "-", verdict)


def _waited(task: Task, timed: Timed, *, config: Config, batch_size: int, frame_rate: float) -> Waited:
    found = summarise(by_delays(task, timed, config=config, frame_rate=frame_rate))
    return waited(task.key, found, batch_size=batch_size, whence=BY_DELAYS)


def waited(task: str, found: dict[str, Any], *, batch_size: int, whence: str) -> Waited:
    """Of what `latency.summarise` found."""
    return Waited(task, batch_size, whence, found["median"], found["p99"], found["median_parts"])


def _sessions(batch_size: int) -> str:
    return "1 session" if batch_size == 1 else f"{batch_size} sessions"


def _timed(lm: LMModel, *, batch_size: int, **options: Any) -> tuple[Timed | str, int | None]:
    on_accelerator = lm.device.type != "cpu"
    if on_accelerator:
        torch.accelerator.reset_peak_memory_stats(lm.device)
    try:
        timed = time_frames(lm, batch_size=batch_size, **options)
    except torch.OutOfMemoryError:
        if on_accelerator:
            torch.accelerator.empty_cache()
        return "out of memory", None
    return timed, torch.accelerator.max_memory_allocated(lm.device) if on_accelerator else None
