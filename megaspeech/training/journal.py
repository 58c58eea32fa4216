"""What a run writes while it trains: a console line, JSONL, TensorBoard. Only the main rank writes."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from megaspeech.config import Config
from megaspeech.training.metrics import StreamMetrics
from megaspeech.training.record_file import RecordFile

SAMPLES_SHOWN = 8


class Journal:
    """The records of a run, from `resume` to `close`; on every rank but the main one its methods do nothing."""

    def __init__(self, config: Config, *, is_main: bool, frame_rate: float) -> None:
        self.config, self.is_main, self.frame_rate = config, is_main, frame_rate
        self._writer = None

    def resume(self, step: int) -> None:
        """Go on after `step`: records of later steps, which the run is about to do again, are dropped."""
        if not self.is_main:
            return
        directory = Path(self.config.run.directory)
        self._metrics = RecordFile(directory / "metrics.jsonl", step=step, complain=self.say)
        self._refusals = RecordFile(directory / "skipped_steps.jsonl", step=step, complain=self.say)
        if self.config.logging.tensorboard:
            self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1, flush_secs=10)

    def say(self, text: str) -> None:
        """A line for the human at the console."""
        if self.is_main:
            print(text, flush=True)

    def step(
        self, step: int, metrics: StreamMetrics, *, grad_norm: float, learning_rate: float, seconds: float
    ) -> None:
        """One optimizer step, the `step`-th counted from 1, that took `seconds`."""
        if not self.is_main:
            return
        training = self.config.training
        frames = metrics.num_frames / seconds
        speed = {"frames_per_second": frames, "x_real_time": frames / self.frame_rate}
        record = {"grad_norm": grad_norm, "learning_rate": learning_rate, **speed, "padding": metrics.padding}
        self.scalars("train", step, {**_flat(metrics), **record})
        if step % self.config.logging.log_interval == 0 or step == 1:
            left = (training.train_steps - step) * seconds
            self.say(
                f"step {step:>6}/{training.train_steps}  loss {metrics.loss:.3f} (text {metrics.text:.3f}, audio "
                f"{metrics.audio:.3f})  right {_percent(metrics.accuracies)}  grad {grad_norm:.2f}  "
                f"lr {learning_rate:.1e}  {frames:,.0f} frames/s = {speed['x_real_time']:,.0f}x real time  "
                f"{left / 60:.1f} min left"
            )

    def valid(self, step: int, by_task: dict[str, StreamMetrics]) -> None:
        """Validation losses after `step`, by task."""
        for task, metrics in by_task.items():
            self.scalars(f"valid/{task}", step, _flat(metrics))
        shown = "  ".join(f"{task} {metrics.text:.3f}+{metrics.audio:.3f}" for task, metrics in by_task.items())
        self.say(f"step {step:>6}  validation (text + audio loss)  {shown}")

    def refused(self, step: int, *, action: str, reason: str, samples: list[str], grad_norm: float) -> None:
        """A gradient that was not used for step `step`; the step was then "replayed" or "skipped"."""
        if not self.is_main:
            return
        record = {"step": step, "action": action, "reason": reason, "samples": samples, "time": time.time()}
        self._refusals.add({**record, "grad_norm": grad_norm if math.isfinite(grad_norm) else None})
        meaning = {
            "replayed": "replayed with the same batches it is sound: a passing fault of the hardware",
            "skipped": "skipped, for it is so again when replayed",
        }
        self.say(f"step {step:>6}  {reason}; {meaning[action]}; samples {shorten(samples)}")

    def audio(self, step: int, name: str, samples_N: Tensor, *, sample_rate: int, spectrogram: np.ndarray) -> None:
        """Sound for TensorBoard and its picture, `[height, width, 3]` in [0, 1]."""
        if self._writer:
            with self._tensorboard() as writer:
                writer.add_audio(name, samples_N[None], step, sample_rate=sample_rate)
                writer.add_image(f"{name}/spectrogram", spectrogram, step, dataformats="HWC")

    def scalars(self, kind: str, step: int, values: dict[str, float], *, record: dict[str, Any] | None = None) -> None:
        """Figures of `step`: curves KIND/KEY in TensorBoard, a line of metrics.jsonl, perhaps of another `record`."""
        if not self.is_main:
            return
        self._metrics.add({"kind": kind, "step": step, "time": time.time(), **(values if record is None else record)})
        if self._writer:
            with self._tensorboard() as writer:
                for key, value in values.items():
                    writer.add_scalar(f"{kind}/{key}", value, step)

    def close(self) -> None:
        """Flush everything."""
        if self._writer:
            with self._tensorboard() as writer:
                writer.close()

    @contextlib.contextmanager
    def _tensorboard(self) -> Iterator[SummaryWriter]:
        """The writer; it is given up, and that is said, when its disk is full or its folder gone."""
        try:
            yield self._writer
        except OSError as error:
            self._writer = None
            self.say(f"TensorBoard's events cannot be written ({error}); training goes on without them")


def shorten(samples: list[str]) -> str:
    """The first few of them."""
    return ", ".join(samples[:SAMPLES_SHOWN]) + (", ..." if len(samples) > SAMPLES_SHOWN else "")


def _flat(metrics: StreamMetrics) -> dict[str, float]:
    return {
        "loss": metrics.loss,
        "text_loss": metrics.text,
        "audio_loss": metrics.audio,
        **{f"loss/{name}": value for name, value in metrics.losses.items()},
        **{f"accuracy/{name}": value for name, value in metrics.accuracies.items()},
    }


def _percent(accuracies: dict[str, float]) -> str:
    text = accuracies.get("text", 0.0)
    audio = [value for name, value in accuracies.items() if name != "text"]
    return f"{100 * text:.1f}%, {100 * sum(audio) / max(1, len(audio)):.1f}%"
