"""Who did what when while shards were made: whether the encoder ever waited for the decoder, and a picture of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megaspeech.data.whole_files import replacing

LANES = ("decode", "wait", "encode", "write")
"""What is recorded: decoding, the encoder waiting for it, encoding, and composing and writing samples."""
_COLOURS = {"decode": "tab:blue", "wait": "tab:red", "encode": "tab:green", "write": "tab:gray"}


@dataclass(frozen=True)
class Span:
    """A piece of work of one lane; seconds since the timeline began. `depth` is how many batches were ready then."""

    lane: str
    start: float
    end: float
    name: str
    depth: int = 0


class Timeline:
    """Records spans of work from several threads; each span costs some microseconds."""

    def __init__(self) -> None:
        self._origin = time.perf_counter()
        self.spans: list[Span] = []

    @contextmanager
    def span(self, lane: str, name: str = "", *, depth: int = 0) -> Iterator[None]:
        """Record what is done inside as work of `lane`."""
        start = time.perf_counter() - self._origin
        try:
            yield
        finally:
            self.spans.append(Span(lane, start, time.perf_counter() - self._origin, name, depth))

    def seconds(self, lane: str) -> float:
        """Spent in a lane, all in all."""
        return sum(span.end - span.start for span in self.spans if span.lane == lane)

    @property
    def seconds_to_first(self) -> float:
        """From the beginning until there was something to encode: nothing can be encoded before it is decoded."""
        return min((span.start for span in self.spans if span.lane == "encode"), default=0.0)

    @property
    def share_waited(self) -> float:
        """Of the encoder's time, from its first batch on, that it waited for the decoder."""
        first = self.seconds_to_first
        waited = sum(span.end - span.start for span in self.spans if span.lane == "wait" and span.start >= first)
        return waited / ((waited + self.seconds("encode")) or 1.0)

    def write(self, path: str | Path) -> None:
        """Write a picture (.png) or a Chrome trace (.json, for chrome://tracing or ui.perfetto.dev).

        Raises:
            ValueError: another suffix.
        """
        path = Path(path)
        if path.suffix not in (".json", ".png"):
            raise ValueError(f"timeline {path}: {path.suffix or 'no suffix'!r}; name a .png or a .json file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as aside:
            if path.suffix == ".png":
                self._draw(aside)
            else:
                aside.write_text(json.dumps(self._trace()), encoding="utf-8")

    def _trace(self) -> dict:
        names = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": lane, "args": {"name": name}}
            for lane, name in enumerate(LANES)
        ]
        spans = [
            {
                **{"name": span.name or span.lane, "ph": "X", "pid": 0, "tid": LANES.index(span.lane)},
                **{"ts": span.start * 1e6, "dur": (span.end - span.start) * 1e6, "args": {"ready": span.depth}},
            }
            for span in self.spans
        ]
        return {"traceEvents": names + spans}

    def _draw(self, path: Path) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(14, 3), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        lanes = [lane for lane in LANES if lane != "wait"]  # waiting is drawn where encoding would be
        for lane in LANES:
            place = lanes.index("encode" if lane == "wait" else lane)
            bars = [(span.start, span.end - span.start) for span in self.spans if span.lane == lane]
            axes.broken_barh(bars, (place - 0.4, 0.8), facecolors=_COLOURS[lane], edgecolor="white", linewidth=0.3)
        axes.set_yticks(range(len(lanes)), lanes)
        axes.invert_yaxis()
        axes.set_xlabel("seconds")
        axes.set_title(
            f"The encoder waited (red) {self.share_waited:.1%} of its time; its first batch came after "
            f"{self.seconds_to_first:.1f} s"
        )
        figure.savefig(path, format="png", dpi=110)
