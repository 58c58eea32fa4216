"""An optimizer step that looks at the gradient first: what is not finite, or a spike, is replayed once, then skipped.

megatron-core's RerunStateMachine is for the same, but owns the data iterator, keeps its state in the checkpoint, and
restarts the job on another GPU to judge; where batches are a function of the step, a replay is a loop of two.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megaspeech.config import Config
from megaspeech.data.mixture import TrainBatches
from megaspeech.parallel.agreement import true_on_any_rank, union_over_ranks
from megaspeech.parallel.update import gradient_norm, update_weights
from megaspeech.parallel.wrap import Wrapped
from megaspeech.training.journal import Journal, shorten
from megaspeech.training.refusal import GradientHistory
from megaspeech.training.signals import StopSignals

Outcome = tuple[list[dict[str, Tensor]], Tensor]
"""Reports of the microbatches, and totals of the global batch."""


class GuardedStep:
    """Steps the weights of one run.

    `is_asked_to_stop`: whether a stop signal had come on any rank by the last step; the same on all ranks.

    Args:
        wrapped: the model and its optimizer.
        config: the run.
        batches: names the samples of a step.
        journal: is told what was refused.
        signals: of this rank.
        latest: finds the newest whole checkpoint; all ranks call it.
    """

    def __init__(
        self,
        wrapped: Wrapped,
        *,
        config: Config,
        batches: TrainBatches,
        journal: Journal,
        signals: StopSignals,
        latest: Callable[[], Path | None],
    ) -> None:
        self.wrapped, self.config, self.batches = wrapped, config, batches
        self.journal, self.signals, self.latest = journal, signals, latest
        self.history = GradientHistory(config.training)
        self.is_asked_to_stop = False

    def __call__(self, step: int, run: Callable[[], Outcome]) -> tuple[Outcome, float]:
        """One step, the `step`-th counted from 0, whose forward and backward passes are `run()`; all ranks call this.

        Returns:
            (the outcome, the gradient norm before clipping), of the replay where there was one.

        Raises:
            ValueError: `training.max_skipped_steps` steps in a row were skipped.
        """
        outcome, norm, fault = self._attempt(run)
        if fault is not None:
            samples = self._samples_at_fault(step, outcome)
            outcome, replayed_norm, second_fault = self._attempt(run)
            action = "replayed" if second_fault is None else "skipped"
            self.journal.refused(step + 1, action=action, reason=fault, samples=samples, grad_norm=norm)
            if second_fault is not None:
                self._skip(step, fault=second_fault, samples=samples)
                return outcome, replayed_norm
            norm = replayed_norm
        update_weights(self.wrapped.optimizer, grad_norm=norm)
        self.history.use(norm)
        return outcome, norm

    def _attempt(self, run: Callable[[], Outcome]) -> tuple[Outcome, float, str | None]:
        """(outcome, gradient norm, why no rank may use it)."""
        for chunk in self.wrapped.chunks:
            chunk.zero_grad_buffer()
        self.wrapped.optimizer.zero_grad()
        outcome = run()
        norm = gradient_norm(self.wrapped.optimizer)
        fault = self.history.fault(norm)
        # Reading the norm has just made the ranks wait for each other: beside that these two flags cost nothing.
        refused, self.is_asked_to_stop = true_on_any_rank(fault is not None, self.signals.received is not None)
        return outcome, norm, (fault or "another rank refuses it") if refused else None

    def _samples_at_fault(self, step: int, outcome: Outcome) -> list[str]:
        """Ids of the samples of the microbatches whose loss is not finite; of the whole global batch where all are."""
        mine = self.batches.sample_ids(step)
        reports, _ = outcome
        guilty = [
            sample
            for report, samples in zip(reports, mine, strict=False)  # no reports but on the last stage
            if not torch.isfinite(report["weighted"]).all()
            for sample in samples
        ]
        return union_over_ranks(guilty) or sorted(self.batches.all_sample_ids(step))

    def _skip(self, step: int, *, fault: str, samples: list[str]) -> None:
        if not self.history.skip():
            return
        count = self.history.num_skipped
        raise ValueError(
            f"training.max_skipped_steps: {count} steps in a row had to be skipped, up to step {step + 1}, where "
            f"{fault}; samples {shorten(samples)} (all are in {self.config.run.directory}/skipped_steps.jsonl). "
            f"The last good checkpoint is {self.latest() or 'none'}: look at these samples, lower optimizer.lr, or go "
            f"back further by writing the name of an older checkpoint into checkpoints/latest"
        )
