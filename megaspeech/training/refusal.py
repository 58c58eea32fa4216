"""Which gradients are refused: those that are not finite, and spikes; and when to give up."""

from __future__ import annotations

import math
import statistics
from typing import Any

from megaspeech.config.schema import TrainingSection

LONGEST_HISTORY, SHORTEST_HISTORY = 50, 20
"""Norms the median is taken of, and the fewest that make one."""


class GradientHistory:
    """The norms of the last gradients that were used, and the steps skipped since; alike on all ranks.

    The norm of a spike that was skipped is left out: it would make the next one look usual.
    """

    def __init__(self, section: TrainingSection) -> None:
        self.section = section
        self.norms: list[float] = []
        self.num_skipped = 0

    def fault(self, norm: float) -> str | None:
        """Why a gradient of this norm is refused, in words; None where it is used."""
        if not math.isfinite(norm):
            return f"the gradient norm is {norm}"
        if self.section.spike_factor and len(self.norms) >= SHORTEST_HISTORY:
            usual = statistics.median(self.norms)
            if norm > self.section.spike_factor * usual:
                return f"the gradient norm {norm:.3g} is {norm / usual:.1f} times the usual {usual:.3g}"
        return None

    def use(self, norm: float) -> None:
        """The gradient was used."""
        self.norms = [*self.norms, norm][-LONGEST_HISTORY:]
        self.num_skipped = 0

    def skip(self) -> bool:
        """The gradient was not used; whether it is one too many in a row."""
        self.num_skipped += 1
        return self.num_skipped >= self.section.max_skipped_steps

    def state(self) -> dict[str, Any]:
        """For a checkpoint: a resumed run refuses the same gradients."""
        return {"norms": self.norms, "num_skipped": self.num_skipped}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.norms, self.num_skipped = state["norms"], state["num_skipped"]
