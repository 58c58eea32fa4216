"""A run's checkpoints as the loop sees them: going on from one, saving one, and what is said of either."""

from __future__ import annotations

import time
from pathlib import Path

from megaspeech.checkpoint import state, store
from megaspeech.config import Config
from megaspeech.parallel.watchdog import Watchdog
from megaspeech.parallel.wrap import Wrapped
from megaspeech.training.journal import Journal
from megaspeech.training.refusal import GradientHistory

HISTORY = "gradient_history"
"""Key of a checkpoint's state: `GradientHistory.state`."""


class Checkpointing:
    """Saves and resumes one run.

    Args:
        wrapped: what is saved, with its optimizer.
        config: the run.
        checkpoints: where.
        history: of gradient norms, saved with it.
        journal: is told.
        watchdog: is told of progress.
    """

    def __init__(
        self,
        wrapped: Wrapped,
        *,
        config: Config,
        checkpoints: store.CheckpointStore,
        history: GradientHistory,
        journal: Journal,
        watchdog: Watchdog,
    ) -> None:
        self.wrapped, self.config, self.store, self.history = wrapped, config, checkpoints, history
        self.journal, self.watchdog = journal, watchdog
        self.saved_step, self._started = -1, 0.0

    def resume(self) -> int:
        """Load the newest whole checkpoint, or the seed's weights; returns the step to go on with."""
        self.watchdog.progress("loading")
        latest, damaged = self.store.search()
        for line in damaged:
            self.journal.say(f"skipping a damaged checkpoint, {line}")
        if latest is not None:
            return self._go_on_from(latest)
        if seed := self.config.checkpoint.seed_checkpoint:
            store.check_whole(seed)
            self.store.check(seed, going_on=False)
            loaded = store.load(seed, state.model_state(self.wrapped), config=self.config)
            state.load_model_state(self.wrapped, loaded)
            self.journal.say(f"starting from the weights of {seed}")
        return 0

    def _go_on_from(self, path: Path) -> int:
        self.store.check(path, going_on=True)
        wanted = state.run_state(self.wrapped, step=0, is_loading=True)
        loaded = store.load(path, wanted, config=self.config)
        self.saved_step = state.load_run_state(self.wrapped, loaded)
        self.history.load_state(loaded[HISTORY])
        self.journal.say(f"going on at step {self.saved_step} from {path}")
        return self.saved_step

    def save(self, step: int, *, is_last: bool = False) -> None:
        """A checkpoint after `step`, once the one that may still be written is; the last one is waited for.

        Raises:
            SaveError: the last one could not be written; of others it is said, and training goes on.
        """
        self.watchdog.progress(f"saving step {step}")
        self.finish(step, blocking=True)
        self._started = time.perf_counter()
        self.store.save({**state.run_state(self.wrapped, step=step), HISTORY: self.history.state()}, step=step)
        self.saved_step = step
        self.finish(step, blocking=is_last, is_last=is_last)

    def finish(self, step: int, *, blocking: bool = False, is_last: bool = False) -> None:
        """Say what has become of a checkpoint that was being written, once that is known."""
        try:
            saved = self.store.finish(blocking=blocking)
        except store.SaveError as error:
            if is_last:
                raise
            self.journal.say(f"step {step:>6}  NOT SAVED: {error}")
            return
        if saved is not None:
            seconds = time.perf_counter() - self._started
            self.journal.say("\n  ".join([f"step {step:>6}  saved {saved.path} in {seconds:.1f} s", *saved.notes]))

    def save_to_stop(self, step: int) -> None:
        """Save before a signal ends the run, but for what is there already."""
        if self.saved_step != step:
            self.save(step, is_last=True)
        else:
            self.finish(step, blocking=True, is_last=True)
        self.journal.say(f"step {step:>6}  stopped by a signal; the same command goes on from here")
