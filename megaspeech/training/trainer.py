"""The loop: step, log, validate, save, go on where it was."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megaspeech.checkpoint import state, store
from megaspeech.checkpoint.origin import StreamManifest
from megaspeech.codecs.registry import load_codec
from megaspeech.config import Config, write_config
from megaspeech.data.loading import StepBatches
from megaspeech.data.mixture import Batch, TrainBatches, valid_batches
from megaspeech.data.rejected import RejectedSamples
from megaspeech.data.shards import check_origins
from megaspeech.data.tokenizer import Tokenizer
from megaspeech.model.counting import count_flops, count_parameters
from megaspeech.model.initialisation import initialise_from_codebooks
from megaspeech.model.speech_text_model import SpeechTextModel
from megaspeech.parallel.groups import Grid
from megaspeech.parallel.lifeline import end_with_parent
from megaspeech.parallel.reductions import sum_over_data_parallel
from megaspeech.parallel.schedule import run_microbatches
from megaspeech.parallel.wrap import wrap
from megaspeech.training.forward_step import make_forward_step
from megaspeech.training.journal import Journal
from megaspeech.training.metrics import StreamMetrics, reduce_metrics
from megaspeech.training.spoken_samples import log_spoken_sample


class Trainer:
    """One run on one rank.

    Args:
        config: the run.
        grid: this rank's place; process groups are up (`parallel.groups.initialise`).
    """

    def __init__(self, config: Config, *, grid: Grid) -> None:
        self.config, self.grid = config, grid
        self.batches = TrainBatches(config, dp_rank=grid.dp_rank, dp_size=grid.dp_size)
        self.valid = valid_batches(config, dp_rank=grid.dp_rank, dp_size=grid.dp_size)
        self.codec = load_codec(config.codec.path) if config.codec.path else None
        self._check_shards()
        self.wrapped = wrap(config, num_chunks=grid.num_chunks, build=self._build, initialise=self._initialise)
        header = self.batches.samples.datasets[0].shard.header
        self.store = store.CheckpointStore(
            Path(config.run.directory) / "checkpoints", config=config, manifest=StreamManifest.of(header, config)
        )
        self.journal = Journal(config, is_main=grid.is_main, frame_rate=header.frame_rate)
        self.step = 0
        if grid.is_main:
            Path(config.run.directory).mkdir(parents=True, exist_ok=True)
            write_config(config, Path(config.run.directory) / "config.toml")

    def run(self) -> None:
        """Train from the newest checkpoint, or the seed, to `training.exit_step` or `training.train_steps`."""
        self._announce()
        self._resume()
        training, checkpoint = self.config.training, self.config.checkpoint
        if checkpoint.save_seed and self.step == 0:
            self.save()
        last = min(training.exit_step or training.train_steps, training.train_steps)
        batches = self._load_ahead(last)
        while self.step < last:
            started, learning_rate = time.perf_counter(), self.wrapped.optimizer.param_groups[0]["lr"]
            metrics, grad_norm = self.train_step(next(batches))
            self.step += 1
            if metrics is not None:
                self.journal.step(
                    self.step,
                    metrics,
                    grad_norm=grad_norm,
                    learning_rate=learning_rate,
                    seconds=time.perf_counter() - started,
                )
            is_last = self.step == last
            if is_last or (training.eval_interval and self.step % training.eval_interval == 0):
                self.evaluate()
            if is_last or (checkpoint.save_interval and self.step % checkpoint.save_interval == 0):
                self.save(is_last=is_last)
            self.finish_save()
            if self.config.logging.sample_interval and self.step % self.config.logging.sample_interval == 0:
                self._log_sample()
        self.journal.close()

    def _load_ahead(self, last: int) -> Iterator[list[Batch]]:
        """This rank's batches from the current step on, up to `last`; what is damaged in them is accounted for."""
        rejected = RejectedSamples(Path(self.config.run.directory) / "rejected_samples.jsonl")
        for batches in self.valid.values():
            rejected.take(self.step, batches)
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
        wrapped = self.wrapped
        for chunk in wrapped.chunks:
            chunk.zero_grad_buffer()
        wrapped.optimizer.zero_grad()
        reports, totals = self._run(batches, forward_only=False)
        _, grad_norm, _ = wrapped.optimizer.step()
        wrapped.scheduler.step(increment=1)
        return self._metrics(reports, totals), float(grad_norm)

    def evaluate(self) -> None:
        """Validation losses of every task, all samples of `valid/`."""
        for chunk in self.wrapped.chunks:
            chunk.eval()
        by_task = {}
        with torch.no_grad():
            for task, batches in self.valid.items():
                by_task[task] = self._metrics(*self._run(batches, forward_only=True))
        for chunk in self.wrapped.chunks:
            chunk.train()
        if self.grid.is_last_stage:
            self.journal.valid(self.step, by_task)

    def save(self, *, is_last: bool = False) -> None:
        """A checkpoint of the current step, after the one that may still be written; the last one is waited for.

        Raises:
            SaveError: the last one could not be written; of others it is said, and training goes on.
        """
        self.finish_save(blocking=True)
        self._save_started = time.perf_counter()
        self.store.save(state.run_state(self.wrapped, step=self.step), step=self.step)
        self.finish_save(blocking=is_last, is_last=is_last)

    def finish_save(self, *, blocking: bool = False, is_last: bool = False) -> None:
        """Say what has become of a checkpoint that was being written, once that is known."""
        try:
            saved = self.store.finish(blocking=blocking)
        except store.SaveError as error:
            if is_last:
                raise
            self.journal.say(f"step {self.step:>6}  NOT SAVED: {error}")
            return
        if saved is not None:
            seconds = time.perf_counter() - self._save_started
            self.journal.say("\n  ".join([f"step {self.step:>6}  saved {saved.path} in {seconds:.1f} s", *saved.notes]))

    def _run(self, batches: list[Batch], *, forward_only: bool) -> tuple[list[dict[str, Tensor]], Tensor]:
        totals = sum_over_data_parallel(
            torch.stack([batch.totals() for batch in batches]).sum(0).to(self.wrapped.device)
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

    def _build(self, vp_stage: int | None) -> SpeechTextModel:
        last = None if vp_stage is None else self.grid.num_chunks - 1
        return SpeechTextModel(
            self.config,
            pre_process=self.grid.is_first_stage and vp_stage in (None, 0),
            post_process=self.grid.is_last_stage and vp_stage == last,
            vp_stage=vp_stage,
        )

    def _initialise(self, model: SpeechTextModel) -> None:
        vectors = self.codec.codebook_vectors() if self.codec else None
        if vectors is not None:
            initialise_from_codebooks(model, vectors, streams=self.config.streams, seed=self.config.run.seed)

    def _resume(self) -> None:
        seed = self.config.checkpoint.seed_checkpoint
        latest, damaged = self.store.search()
        for line in damaged:
            self.journal.say(f"skipping a damaged checkpoint, {line}")
        if latest is not None:
            self.store.check(latest, going_on=True)
            wanted = state.run_state(self.wrapped, step=self.step, is_loading=True)
            loaded = store.load(latest, wanted, config=self.config)
            self.step = state.load_run_state(self.wrapped, loaded)
            self.journal.say(f"going on at step {self.step} from {latest}")
        elif seed:
            store.check_whole(seed)
            self.store.check(seed, going_on=False)
            loaded = store.load(seed, state.model_state(self.wrapped), config=self.config)
            state.load_model_state(self.wrapped, loaded)
            self.journal.say(f"starting from the weights of {seed}")
        self.journal.resume(self.step)

    def _announce(self) -> None:
        parallel, parameters = self.config.parallel, count_parameters(self.config)
        flops = count_flops(self.config, num_frames=self.config.data.num_frames)
        self.journal.say(
            f"{self.config.run.name}: {sum(parameters.values()):,} parameters ("
            + ", ".join(f"{part} {count:,}" for part, count in parameters.items())
            + f"), {3 * sum(flops.values()) / 1e6:.1f} MFLOP a frame; {parallel.describe(self.grid.dp_size)}"
        )

    def _log_sample(self) -> None:
        log_spoken_sample(
            self.journal,
            step=self.step,
            chunks=self.wrapped.chunks,
            batches=self.valid,
            codec=self.codec,
            config=self.config,
            grid=self.grid,
        )
