"""FP8 held against BF16: the same weights, the same microbatch, every so many steps; a run that drifts is flagged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megaspeech.config import Config
from megaspeech.data.batch import Batch
from megaspeech.parallel.precision import without_fp8
from megaspeech.parallel.wrap import Wrapped
from megaspeech.training.fp8_health import Fp8Health
from megaspeech.training.guarded_step import Outcome
from megaspeech.training.journal import Journal
from megaspeech.training.metrics import StreamMetrics, reduce_metrics

MOST_BANDS = 10**6
"""A drift of more, or an infinite one, is told of once."""


class Fp8Shadow:
    """Compares at the steps that `precision.shadow_interval` divides.

    The step's own forward pass is the one in FP8, so a comparison costs one forward pass of one microbatch.

    Args:
        wrapped: the model.
        config: the run.
        health: knows what FP8 loses most.
        journal: is given the figures, and speaks of a drift.
    """

    def __init__(self, wrapped: Wrapped, *, config: Config, health: Fp8Health, journal: Journal) -> None:
        self.wrapped, self.streams, self.health, self.journal = wrapped, config.streams, health, journal
        self.interval, self.band = config.precision.shadow_interval, config.precision.shadow_band
        # An interleaved pipeline takes microbatches in turns of one a stage.
        parallel = config.parallel
        self.num_microbatches = parallel.pipeline_model_parallel_size if parallel.num_chunks > 1 else 1
        self._told = 0  # whole bands of the drift that was last told of

    def forward(self, step: int, batches: Sequence[Batch], *, run: Callable[..., Outcome]) -> Outcome | None:
        """The first microbatch of a step, the `step`-th counted from 1, in BF16; None where no comparison is due.

        All ranks call this before the step, which does the same with the same weights in FP8. `run` takes batches and
        `forward_only`.
        """
        if not self.interval or step % self.interval:
            return None
        self.wrapped.gather_parameters()
        with torch.no_grad(), without_fp8(self.wrapped.models):
            return run(batches[: self.num_microbatches], forward_only=True)

    def compare(self, step: int, shadow: Outcome | None, *, reports: Sequence[dict[str, Tensor]]) -> None:
        """Hold the reports of the step, those of its first microbatch, against `shadow`; all ranks call this."""
        if shadow is None or not reports:  # the last stage alone has reports
            return
        shadow_reports, totals = shadow
        bf16 = reduce_metrics(shadow_reports, totals=totals, streams=self.streams)
        fp8 = reduce_metrics(reports[: len(shadow_reports)], totals=totals, streams=self.streams)
        text, audio = relative(fp8.text, bf16.text), relative(fp8.audio, bf16.audio)
        figures = {"text_loss": bf16.text, "audio_loss": bf16.audio, "text_drift": text, "audio_drift": audio}
        by_stream = {f"drift/{name}": relative(fp8.losses[name], loss) for name, loss in bf16.losses.items()}
        self.journal.scalars("fp8/shadow", step, figures | by_stream)
        self._judge(step, max(abs(text), abs(audio)), fp8=fp8, bf16=bf16)

    def _judge(self, step: int, drift: float, *, fp8: StreamMetrics, bf16: StreamMetrics) -> None:
        """Tell of a drift when it leaves the band, and again when it reaches another multiple of it."""
        bands = min(drift / self.band, MOST_BANDS)
        if bands < 1:
            self._told = 0
        elif bands >= self._told + 1:
            self._told = math.floor(bands)
            worst = f"; FP8 loses most in {self.health.worst}" if self.health.worst else ""
            self.journal.say(
                f"step {step:>6}  FP8 drifts from BF16: loss of text {fp8.text:.3f} against {bf16.text:.3f}, of audio "
                f"{fp8.audio:.3f} against {bf16.audio:.3f}, off by {drift:.1%} where precision.shadow_band allows "
                f"{self.band:.1%}{worst}; take another precision.recipe, or keep layers in BF16 "
                f"(precision.num_layers_at_start_in_bf16, num_layers_at_end_in_bf16), see docs/fp8.md"
            )


def relative(loss: float, reference: float) -> float:
    """How far `loss` lies above `reference`, as a share of that; infinite where `loss` alone is not finite."""
    if math.isfinite(reference) and not math.isfinite(loss):
        return math.inf
    return (loss - reference) / max(abs(reference), 1e-9)
