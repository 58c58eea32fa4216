"""Where the main threads of the ranks are, which only wait for others, and which one the others wait for."""

from __future__ import annotations

import linecache
import re
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from types import FrameType

OURS, HOST = str(Path(__file__).parents[1]), str(Path(__file__).with_name("host.py"))
WAITS_IN = re.compile(r"torch/(distributed|cuda)/")
"""Files whose innermost frame waits in a collective, or for the GPU that runs one."""
WAITS_FOR_DEVICE = re.compile(r"\.(item|tolist|cpu|numpy|synchronize|wait)\(")
"""The same in other files: the line reads a result off the GPU, which a collective has yet to write."""


@dataclass(frozen=True)
class Place:
    """`site`: the innermost line; `ours`: the innermost line of this library; `stack`: all lines, innermost first."""

    site: str
    ours: str
    stack: str
    waits: bool


def main_thread_place() -> Place:
    """Where this process's main thread is now."""
    frame: FrameType | None = sys._current_frames()[threading.main_thread().ident]
    frames = []
    while frame is not None:
        frames.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    lines = [_line(*where) for where in frames]
    # Every call to torch goes through the host's mode on CPU ranks: that says nothing of where they are.
    ours = [line for line, (file, *_) in zip(lines, frames, strict=True) if file.startswith(OURS) and file != HOST]
    innermost_file, number, _ = frames[0]
    source = linecache.getline(innermost_file, number)
    return Place(
        site=lines[0],
        ours=ours[0] if ours else lines[0],
        stack="\n".join(lines),
        waits=bool(WAITS_IN.search(innermost_file) or WAITS_FOR_DEVICE.search(source)),
    )


@dataclass(frozen=True)
class Answer:
    """What a rank says when it is asked where it is: the step, progress reports so far, seconds since the last one."""

    name: str
    phase: str
    num_reports: int
    seconds: float
    place: Place


def describe_hang(answers: Mapping[int, Answer], seen: Mapping[int, str]) -> str:
    """The report on a hang, in lines.

    Args:
        answers: of the ranks that have answered.
        seen: where the others were last.
    """
    lines = [
        f"rank {rank} does not answer: stopped, in a call that holds Python's lock, or its node is gone; "
        f"last seen at {where}"
        for rank, where in seen.items()
    ]
    suspects = _suspects(answers) if not seen else []
    for answer in (answers[rank] for rank in suspects):
        lines.append(f"{answer.name} hangs in {answer.phase} for {answer.seconds:.0f} s, at {answer.place.ours}")
        lines.append(indent(answer.place.stack, "    "))
    if not lines:
        lines.append("no rank stands out: all wait, and all have come equally far")
    waiting: dict[str, list[int]] = {}
    for rank, answer in answers.items():
        if rank not in suspects:
            where = f"in {answer.phase} at {answer.place.ours}\n    {answer.place.site}"
            waiting.setdefault(where, []).append(rank)
    lines += [f"rank {', '.join(map(str, sorted(ranks)))} waits {where}" for where, ranks in waiting.items()]
    return "\n".join(lines)


def _suspects(answers: Mapping[int, Answer]) -> list[int]:
    """The ranks that are not in a collective; where that tells nothing, those that others are ahead of."""
    elsewhere = [rank for rank, answer in answers.items() if not answer.place.waits]
    if elsewhere and len(elsewhere) < len(answers):
        return sorted(elsewhere)
    least = min(answer.num_reports for answer in answers.values())
    behind = [rank for rank, answer in answers.items() if answer.num_reports == least]
    return sorted(behind) if len(behind) < len(answers) or elsewhere else []


def _line(file: str, number: int, function: str) -> str:
    shown = file.removeprefix(f"{Path(OURS).parent}/").rpartition("/site-packages/")[2]
    return f"{shown}:{number} {function}: {linecache.getline(file, number).strip()}"
