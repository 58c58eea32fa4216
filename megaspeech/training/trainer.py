"""The loop: step, log, validate, save, go on where it was."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megaspeech.checkpoint import state, store
from megaspeech.codecs.registry import load_codec
from megaspeech.config import Config, write_config
from megaspeech.data.mixture import Batch, TrainBatches, valid_batches
from megaspeech.data.shards import check_origins
from megaspeech.data.tokenizer import Tokenizer
from megaspeech.model.counting import count_flops, count_parameters
from megaspeech.model.initialisation import initialise_from_codebooks
from megaspeech.model.speech_text_model import SpeechTextModel
from megaspeech.parallel.agreement import true_on_any_rank
from megaspeech.parallel.groups import Grid
from megaspeech.parallel.reductions import sum_over_data_parallel
from megaspeech.parallel.schedule import run_microbatches
from megaspeech.parallel.watchdog import Watchdog
from megaspeech.parallel.wrap import wrap
from megaspeech.training.forward_step import make_forward_step
from megaspeech.training.guarded_step import GuardedStep
from megaspeech.training.journal import Journal
from megaspeech.training.metrics import StreamMetrics, reduce_metrics
from megaspeech.training.signals import StopSignals
from megaspeech.training.spoken_samples import log_spoken_sample

REFUSAL = "gradient_history"
"""Key of a checkpoint's state: `GradientHistory.state`."""


class Trainer:
    """One run on one rank.

    Args:
        config: the run.
        grid: this rank's place; process groups are up (`parallel.groups.initialise`).
        signals: those that ask the run to stop.
        watchdog: is told of progress.
    """

    def __init__(self, config: Config, *, grid: Grid, signals: StopSignals, watchdog: Watchdog) -> None:
        self.config, self.grid, self.signals, self.watchdog = config, grid, signals, watchdog
        self.batches = TrainBatches(config, dp_rank=grid.dp_rank, dp_size=grid.dp_size)
        self.valid = valid_batches(config, dp_rank=grid.dp_rank, dp_size=grid.dp_size)
        self.codec = load_codec(config.codec.path) if config.codec.path else None
        self._check_shards()
        self.wrapped = wrap(config, build=self._build, initialise=self._initialise)
        self.device = next(self.wrapped.model.parameters()).device
        self.store = store.CheckpointStore(Path(config.run.directory) / "checkpoints", config=config)
        header = self.batches.samples.datasets[0].shard.header
        self.journal = Journal(config, is_main=grid.is_main, frame_rate=header.frame_rate)
        self.guarded = GuardedStep(
            self.wrapped,
            config=config,
            batches=self.batches,
            journal=self.journal,
            signals=signals,
            latest=self.store.latest,
        )
        for chunk in [self.wrapped.chunk]:
            chunk.register_forward_pre_hook(lambda *_: watchdog.progress())
        self.step, self.saved_step = 0, -1
        if grid.is_main:
            Path(config.run.directory).mkdir(parents=True, exist_ok=True)
            write_config(config, Path(config.run.directory) / "config.toml")

    def run(self) -> bool:
        """Train from the newest checkpoint, or the seed, to `training.exit_step` or `training.train_steps`.

        Returns:
            False where a signal ended it before; the checkpoint to go on from is saved.
        """
        self._announce()
        self.watchdog.progress("loading")
        self._resume()
        training, checkpoint = self.config.training, self.config.checkpoint
        if checkpoint.save_seed and self.step == 0:
            self.save()
        last = min(training.exit_step or training.train_steps, training.train_steps)
        self.signals.hold()
        stopping = self._is_asked_to_stop()
        while self.step < last and not stopping:
            self.watchdog.progress(f"step {self.step + 1}")
            started, learning_rate = time.perf_counter(), self.wrapped.optimizer.param_groups[0]["lr"]
            metrics, grad_norm = self.train_step(self.batches(self.step))
            self.step += 1
            if metrics is not None:
                self.journal.step(
                    self.step,
                    metrics,
                    grad_norm=grad_norm,
                    learning_rate=learning_rate,
                    seconds=time.perf_counter() - started,
                )
            stopping = self.guarded.is_asked_to_stop
            if not stopping or self.step == last:
                stopping = self._between_steps(is_last=self.step == last)
        if self.step < last:
            self._save_and_stop()
        self.journal.close()
        return self.step >= last

    def _between_steps(self, *, is_last: bool) -> bool:
        """What is due after a step that no signal has ended; whether one has come meanwhile."""
        evaluates = is_last or _is_due(self.step, self.config.training.eval_interval)
        saves = is_last or _is_due(self.step, self.config.checkpoint.save_interval)
        if evaluates:
            self.evaluate()
        if saves:
            self.save()
        if _is_due(self.step, self.config.logging.sample_interval):
            self._log_sample()
        return (evaluates or saves) and self._is_asked_to_stop()

    def _is_asked_to_stop(self) -> bool:
        return true_on_any_rank(self.signals.received is not None)[0]

    def _save_and_stop(self) -> None:
        """Save, but for what is there already. A validation that was due is left out: the checkpoint cannot wait."""
        if self.saved_step != self.step:
            self.save()
        self.journal.say(f"step {self.step:>6}  stopped by a signal; the same command goes on from here")

    def train_step(self, batches: list[Batch]) -> tuple[StreamMetrics | None, float]:
        """One optimizer step over this rank's microbatches.

        Returns:
            (metrics on the last stage, None elsewhere; gradient norm before clipping).
        """
        (reports, totals), grad_norm = self.guarded(self.step, partial(self._run, batches, forward_only=False))
        self.wrapped.scheduler.step(increment=1)
        return self._metrics(reports, totals), grad_norm

    def evaluate(self) -> None:
        """Validation losses of every task, all samples of `valid/`."""
        self.watchdog.progress(f"validation after step {self.step}")
        self.wrapped.chunk.eval()
        by_task = {}
        with torch.no_grad():
            for task, batches in self.valid.items():
                by_task[task] = self._metrics(*self._run(batches, forward_only=True))
        self.wrapped.chunk.train()
        if self.grid.is_last_stage:
            self.journal.valid(self.step, by_task)

    def save(self) -> None:
        """A checkpoint of the current step."""
        self.watchdog.progress(f"saving step {self.step}")
        started = time.perf_counter()
        path = self.store.save({**self._state(is_loading=False), REFUSAL: self.guarded.history.state()}, step=self.step)
        self.saved_step = self.step
        self.journal.say(f"step {self.step:>6}  saved {path} in {time.perf_counter() - started:.1f} s")

    def _run(self, batches: list[Batch], *, forward_only: bool) -> tuple[list[dict[str, Tensor]], Tensor]:
        totals = sum_over_data_parallel(torch.stack([batch.totals() for batch in batches]).sum(0).to(self.device))
        reports = run_microbatches(
            make_forward_step(
                weight_sums=totals[:2],
                num_microbatches=len(batches),
                dp_size=self.grid.dp_size,
                tensor_parallel_size=self.config.parallel.tensor_model_parallel_size,
            ),
            chunk=self.wrapped.chunk,
            microbatches=[batch.to(self.device) for batch in batches],
            num_frames=batches[0].num_frames,
            micro_batch_size=self.config.training.micro_batch_size,
            forward_only=forward_only,
        )
        return reports, totals

    def _metrics(self, reports: list[dict[str, Tensor]], totals: Tensor) -> StreamMetrics | None:
        if not self.grid.is_last_stage:
            return None
        return reduce_metrics(reports, totals=totals, streams=self.config.streams)

    def _check_shards(self) -> None:
        """Refuse shards of another codec or tokenizer than the run's, or of several."""
        data, tokenizer = self.config.data, Path(self.config.data.tokenizer)
        check_origins(
            [Path(data.directory) / split / name for split in ("train", "valid") for name in data.mixture],
            codec=(f"codec.path = {self.config.codec.path}", self.codec.fingerprint) if self.codec else None,
            tokenizer=(f"data.tokenizer = {tokenizer}", Tokenizer.load(tokenizer).fingerprint)
            if tokenizer.is_file()
            else None,
        )

    def _build(self) -> SpeechTextModel:
        return SpeechTextModel(self.config, pre_process=self.grid.is_first_stage, post_process=self.grid.is_last_stage)

    def _initialise(self, model: SpeechTextModel) -> None:
        vectors = self.codec.codebook_vectors() if self.codec else None
        if vectors is not None:
            initialise_from_codebooks(model, vectors, streams=self.config.streams, seed=self.config.run.seed)

    def _state(self, *, is_loading: bool) -> dict:
        distributed = self.config.parallel.use_distributed_optimizer
        return state.run_state(self.wrapped, step=self.step, distributed_optimizer=distributed, is_loading=is_loading)

    def _resume(self) -> None:
        seed = self.config.checkpoint.seed_checkpoint
        latest, damaged = self.store.search()
        for line in damaged:
            self.journal.say(f"skipping a damaged checkpoint, {line}")
        if latest is not None:
            loaded = store.load(latest, self._state(is_loading=True), config=self.config)
            self.step = self.saved_step = state.load_run_state(self.wrapped, loaded)
            if REFUSAL in loaded:  # not in checkpoints of older versions
                self.guarded.history.load_state(loaded[REFUSAL])
            self.journal.say(f"going on at step {self.step} from {latest}")
        elif seed:
            store.check_whole(seed)
            distributed = self.config.parallel.use_distributed_optimizer
            wanted = state.model_state(self.wrapped, distributed_optimizer=distributed)
            state.load_model_state(self.wrapped, store.load(seed, wanted, config=self.config))
            self.journal.say(f"starting from the weights of {seed}")
        self.journal.resume(self.step)

    def _announce(self) -> None:
        parallel, parameters = self.config.parallel, count_parameters(self.config)
        flops = count_flops(self.config, num_frames=self.config.data.num_frames)
        layout = (
            f"tensor {parallel.tensor_model_parallel_size} x pipeline {parallel.pipeline_model_parallel_size} x data"
        )
        self.journal.say(
            f"{self.config.run.name}: {sum(parameters.values()):,} parameters ("
            + ", ".join(f"{part} {count:,}" for part, count in parameters.items())
            + f"), {3 * sum(flops.values()) / 1e6:.1f} MFLOP a frame; {layout} {self.grid.dp_size}"
            + (" with sequence parallelism" if parallel.sequence_parallel else "")
        )

    def _log_sample(self) -> None:
        log_spoken_sample(
            self.journal,
            step=self.step,
            chunk=self.wrapped.chunk,
            batches=self.valid,
            codec=self.codec,
            config=self.config,
            grid=self.grid,
        )


def _is_due(step: int, interval: int) -> bool:
    """Whether something that is done every `interval` steps, 0 for never, is done after `step`."""
    return interval > 0 and step % interval == 0
