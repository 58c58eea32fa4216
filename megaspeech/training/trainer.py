"""The loop: step, log, validate, save, go on where it was."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megaspeech.checkpoint.origin import StreamManifest
from megaspeech.checkpoint.store import CheckpointStore
from megaspeech.codecs.protocol import Codec
from megaspeech.codecs.registry import codec_of
from megaspeech.config import Config, write_config
from megaspeech.data.batch import Batch
from megaspeech.data.loading import StepBatches
from megaspeech.data.mixture import TrainBatches, valid_batches
from megaspeech.data.rejected import RejectedSamples
from megaspeech.data.shards import check_origins
from megaspeech.data.tokenizer import Tokenizer
from megaspeech.model.counting import count_flops, count_parameters
from megaspeech.model.initialisation import initialise_from_codebooks
from megaspeech.model.speech_text_model import SpeechTextModel
from megaspeech.model.transfer import to_device
from megaspeech.parallel.agreement import shared_by, true_on_any_rank
from megaspeech.parallel.groups import Grid
from megaspeech.parallel.lifeline import end_with_parent
from megaspeech.parallel.reductions import sum_over_data_parallel
from megaspeech.parallel.requirements import require_machine
from megaspeech.parallel.schedule import run_microbatches
from megaspeech.parallel.watchdog import Watchdog
from megaspeech.parallel.wrap import wrap
from megaspeech.training.checkpointing import Checkpointing
from megaspeech.training.forward_step import make_forward_step
from megaspeech.training.fp8_health import Fp8Health
from megaspeech.training.fp8_shadow import Fp8Shadow
from megaspeech.training.garbage import collected_at_steps
from megaspeech.training.guarded_step import GuardedStep
from megaspeech.training.journal import Journal
from megaspeech.training.metrics import StreamMetrics, reduce_metrics
from megaspeech.training.profiling import StepProfiler
from megaspeech.training.signals import StopSignals
from megaspeech.training.spoken_samples import log_spoken_sample


class Trainer:
    """One run on one rank.

    Args:
        config: the run.
        grid: this rank's place; process groups are up (`parallel.groups.initialise`).
        signals: those that ask the run to stop.
        watchdog: is told of progress.
    """

    def __init__(self, config: Config, *, grid: Grid, signals: StopSignals, watchdog: Watchdog) -> None:
        require_machine(config)
        self.config, self.grid, self.signals, self.watchdog = config, grid, signals, watchdog
        self.batches = TrainBatches(config, dp_rank=grid.dp_rank, dp_size=grid.dp_size)
        self.valid = valid_batches(config, dp_rank=grid.dp_rank, dp_size=grid.dp_size)
        self.codec: Codec | None = None
        self.wrapped = wrap(config, num_chunks=grid.num_chunks, build=self._build, initialise=self._initialiser())
        header = next(iter(self.batches.samples.values())).shards.header
        checkpoints = CheckpointStore(
            Path(config.run.directory) / "checkpoints", config=config, manifest=StreamManifest.of(header, config)
        )
        self.journal = Journal(config, is_main=grid.is_main, frame_rate=header.frame_rate)
        self.guarded = GuardedStep(
            self.wrapped,
            config=config,
            batches=self.batches,
            journal=self.journal,
            signals=signals,
            latest=checkpoints.latest,
        )
        self.checkpointing = Checkpointing(
            self.wrapped,
            config=config,
            checkpoints=checkpoints,
            history=self.guarded.history,
            journal=self.journal,
            watchdog=watchdog,
        )
        self.profiler = StepProfiler(config.logging, rank=grid.rank, directory=Path(config.run.directory) / "profile")
        self.health = Fp8Health(self.wrapped.models, config=config, journal=self.journal)
        self.shadow = Fp8Shadow(self.wrapped, config=config, health=self.health, journal=self.journal)
        for chunk in self.wrapped.chunks:
            chunk.register_forward_pre_hook(lambda *_: watchdog.progress())
        self.step = 0
        if grid.is_main:
            Path(config.run.directory).mkdir(parents=True, exist_ok=True)
            write_config(config, Path(config.run.directory) / "config.toml")

    def run(self) -> bool:
        """Train from the newest checkpoint, or the seed, to `training.exit_step` or `training.train_steps`.

        Returns:
            False where a signal ended it before; the checkpoint to go on from is saved.
        """
        self._announce()
        self.step = self.checkpointing.resume()
        self.journal.resume(self.step)
        training = self.config.training
        if self.config.checkpoint.save_seed and self.step == 0:
            self.checkpointing.save(self.step)
        last = min(training.exit_step or training.train_steps, training.train_steps)
        self.signals.hold()
        stopping, batches = self._is_asked_to_stop(), self._load_ahead(last)
        with collected_at_steps(training.manual_gc_interval) as collect_garbage:
            while self.step < last and not stopping:
                self.watchdog.progress(f"step {self.step + 1}")
                started, learning_rate = time.perf_counter(), self.wrapped.optimizer.param_groups[0]["lr"]
                with self.profiler.step(self.step + 1), self.health.step(self.step + 1):
                    metrics, grad_norm = self.train_step(next(batches))
                self.step += 1
                collect_garbage(self.step)
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
        if self.step < last:  # a validation that was due is left out: the checkpoint cannot wait
            self.checkpointing.save_to_stop(self.step)
        self.journal.close()
        return self.step >= last

    def _between_steps(self, *, is_last: bool) -> bool:
        """What is due after a step that no signal has ended; whether one has come meanwhile."""
        evaluates = is_last or _is_due(self.step, self.config.training.eval_interval)
        saves = is_last or _is_due(self.step, self.config.checkpoint.save_interval)
        if evaluates:
            self.evaluate()
        if saves:
            self.checkpointing.save(self.step, is_last=is_last)
        self.checkpointing.finish(self.step)
        if _is_due(self.step, self.config.logging.sample_interval):
            self._log_sample()
        return (evaluates or saves) and self._is_asked_to_stop()

    def _is_asked_to_stop(self) -> bool:
        return true_on_any_rank(self.signals.received is not None)[0]

    def _load_ahead(self, last: int) -> Iterator[list[Batch]]:
        """This rank's batches from the current step on, up to `last`; what is damaged in them is accounted for."""
        rejected = self._rejected()
        loaded = StepBatches(
            self.batches,
            steps=range(self.step, last),
            num_workers=self.config.data.num_workers,
            pin_memory=self.wrapped.device.type != "cpu",
            on_start=end_with_parent,
            say=lambda text: print(f"rank {self.grid.rank}: {text}", flush=True),  # only this rank knows
        )
        for step, batches in enumerate(loaded, self.step):
            rejected.take(step, batches)
            yield batches

    def train_step(self, batches: list[Batch]) -> tuple[StreamMetrics | None, float]:
        """One optimizer step over this rank's microbatches.

        Returns:
            (metrics on the last stage, None elsewhere; gradient norm before clipping).
        """
        shadow = self.shadow.forward(self.step + 1, batches, run=self._run)
        (reports, totals), grad_norm = self.guarded(self.step, partial(self._run, batches, forward_only=False))
        self.shadow.compare(self.step + 1, shadow, reports=reports)
        self.wrapped.scheduler.step(increment=1)
        return self._metrics(reports, totals), grad_norm

    def evaluate(self) -> None:
        """Validation losses of every set of `valid/`."""
        self.watchdog.progress(f"validation after step {self.step}")
        self.wrapped.gather_parameters()
        for chunk in self.wrapped.chunks:
            chunk.eval()
        by_task = {}
        with torch.no_grad():
            for task, batches in self.valid.items():
                by_task[task] = self._metrics(*self._validate(batches))
        for chunk in self.wrapped.chunks:
            chunk.train()
        if self.grid.is_last_stage:
            self.journal.valid(self.step, by_task)

    def _validate(self, portions: Iterable[list[Batch]]) -> tuple[list[dict[str, Tensor]], Tensor]:
        """As `_run`, of all portions together."""
        rejected, reports, totals = self._rejected(), [], []
        for batches in portions:
            rejected.take(self.step, batches)
            more, sums = self._run(batches, forward_only=True)
            reports += more
            totals.append(sums)
        return reports, torch.stack(totals).sum(0)

    def _rejected(self) -> RejectedSamples:
        return RejectedSamples(Path(self.config.run.directory) / "rejected_samples.jsonl")

    def _run(self, batches: list[Batch], *, forward_only: bool) -> tuple[list[dict[str, Tensor]], Tensor]:
        totals = sum_over_data_parallel(
            to_device(torch.stack([batch.totals() for batch in batches]).sum(0), self.wrapped.device)
        )
        reports = run_microbatches(
            make_forward_step(
                weight_sums=totals[:2],
                num_microbatches=len(batches),
                dp_size=self.grid.dp_size,
                tensor_parallel_size=self.config.parallel.tensor_model_parallel_size,
            ),
            chunks=self.wrapped.chunks,
            microbatches=[batch.to(self.wrapped.device) for batch in batches],
            num_frames=batches[0].num_frames,
            micro_batch_size=self.config.training.micro_batch_size,
            forward_only=forward_only,
        )
        return reports, totals

    def _metrics(self, reports: list[dict[str, Tensor]], totals: Tensor) -> StreamMetrics | None:
        if not self.grid.is_last_stage:
            return None
        return reduce_metrics(reports, totals=totals, streams=self.config.streams)

    def _initialiser(self) -> Callable[[SpeechTextModel], None]:
        """What starts a model from the codec's vectors.

        A codec is hundreds of MB, and files that thousands of ranks would read: one opens it for all.
        """
        vectors_QVE = shared_by(self.grid.is_main, self._open_codec() if self.grid.is_main else None)
        if vectors_QVE is None:
            return lambda model: None
        return partial(
            initialise_from_codebooks,
            vectors_QVE=vectors_QVE,
            streams=self.config.streams,
            seed=self.config.run.seed,
        )

    def _open_codec(self) -> Tensor | None:
        """The codec's vectors, once it is seen to be that of the shards; the codec is kept where it is to speak."""
        codec = codec_of(self.config)
        self._check_origins(codec)
        if self.config.logging.sample_interval:
            self.codec = codec
        return None if codec is None else codec.codebook_vectors()

    def _check_origins(self, codec: Codec | None) -> None:
        """Refuse shards of another codec or tokenizer than the run's, or of several, and a tokenizer that does not fit
        the streams."""
        path = Path(self.config.data.tokenizer)
        tokenizer = Tokenizer.load(path) if path.is_file() else None
        headers = {f"train/{name}": samples.shards.header for name, samples in self.batches.samples.items()}
        headers |= {f"valid/{name}": batches.samples.shards.header for name, batches in self.valid.items()}
        check_origins(
            headers,
            codec=(f"codec.path = {self.config.codec.path}", codec.fingerprint) if codec else None,
            tokenizer=(f"data.tokenizer = {path}", tokenizer.fingerprint) if tokenizer else None,
        )
        if tokenizer:
            tokenizer.check_streams(self.config.streams)

    def _build(self, vp_stage: int | None) -> SpeechTextModel:
        last = None if vp_stage is None else self.grid.num_chunks - 1
        return SpeechTextModel(
            self.config,
            pre_process=self.grid.is_first_stage and vp_stage in (None, 0),
            post_process=self.grid.is_last_stage and vp_stage == last,
            vp_stage=vp_stage,
        )

    def _announce(self) -> None:
        parallel, parameters = self.config.parallel, count_parameters(self.config)
        flops = count_flops(self.config, num_frames=self.config.data.num_frames)
        self.journal.say(
            f"{self.config.run.name}: {sum(parameters.values()):,} parameters ("
            + ", ".join(f"{part} {count:,}" for part, count in parameters.items())
            + f"), {3 * sum(flops.values()) / 1e6:.1f} MFLOP a frame; {parallel.describe(self.grid.dp_size)}"
        )
        epochs = self.batches.epochs()
        for name, share in self.batches.shares.items():
            self.journal.say(f"  {name}: {share:.1%} of the samples, {epochs[name]:,.2f} epochs")

    def _log_sample(self) -> None:
        self.wrapped.gather_parameters()
        log_spoken_sample(
            self.journal,
            step=self.step,
            chunks=self.wrapped.chunks,
            valid=self.valid,
            codec=self.codec,
            config=self.config,
            grid=self.grid,
        )


def _is_due(step: int, interval: int) -> bool:
    """Whether something that is done every `interval` steps, 0 for never, is done after `step`."""
    return interval > 0 and step % interval == 0
