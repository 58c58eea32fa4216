"""Where the time of a few steps goes: a trace to look at, and a table of the costliest operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile

from megaspeech.config.schema import LoggingSection

ROWS = 40
"""Operators in the table."""


class StepProfiler:
    """Profiles steps `logging.profile_step_start` to `profile_step_end`, where this rank is one of `profile_ranks`.

    Writes `rank0.json.gz`, which Perfetto and Chrome open, and `rank0.txt` into `directory`.
    """

    def __init__(self, section: LoggingSection, *, rank: int, directory: Path) -> None:
        self.first, self.last = section.profile_step_start, section.profile_step_end
        self.is_wanted = bool(self.first) and rank in section.profile_ranks
        self.path = directory / f"rank{rank}"
        self.running: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step; a run that goes on from a later checkpoint than `first` profiles what is left."""
        if self.is_wanted and self.running is None and self.first <= number <= self.last:
            self.running = profile()  # every activity that this machine has
            self.running.start()
        yield
        if self.running is not None and number >= self.last:
            self.running.stop()
            self._write(self.running)
            self.running = None

    def _write(self, finished: profile) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(f"{self.path}.json.gz")
        averages = finished.key_averages()
        on_device = any(each.self_device_time_total for each in averages)
        key = "self_device_time_total" if on_device else "self_cpu_time_total"
        self.path.with_suffix(".txt").write_text(averages.table(sort_by=key, row_limit=ROWS), encoding="utf-8")
        print(f"profile of steps {self.first} to {self.last}: {self.path}.txt, {self.path}.json.gz", flush=True)
