"""What a run writes while it trains: a console line, JSONL, TensorBoard. Only the main rank writes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from megaspeech.config import Config
from megaspeech.training.metrics import StreamMetrics


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
        path = directory / "metrics.jsonl"
        if path.is_file():
            _drop_after(path, step)
        self._jsonl = path.open("a", encoding="utf-8")
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
        record = {"grad_norm": grad_norm, "learning_rate": learning_rate, **speed}
        self._scalars("train", step, {**_flat(metrics), **record})
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
            self._scalars(f"valid/{task}", step, _flat(metrics))
        shown = "  ".join(f"{task} {metrics.text:.3f}+{metrics.audio:.3f}" for task, metrics in by_task.items())
        self.say(f"step {step:>6}  validation (text + audio loss)  {shown}")

    def audio(self, step: int, name: str, samples_N: Tensor, *, sample_rate: int, spectrogram: np.ndarray) -> None:
        """Sound for TensorBoard and its picture, `[height, width, 3]` in [0, 1]."""
        if self._writer:
            self._writer.add_audio(name, samples_N[None], step, sample_rate=sample_rate)
            self._writer.add_image(f"{name}/spectrogram", spectrogram, step, dataformats="HWC")

    def close(self) -> None:
        """Flush everything."""
        if self.is_main:
            self._jsonl.close()
        if self._writer:
            self._writer.close()

    def _scalars(self, kind: str, step: int, values: dict[str, float]) -> None:
        if not self.is_main:
            return
        record: dict[str, Any] = {"kind": kind, "step": step, "time": time.time(), **values}
        self._jsonl.write(json.dumps(record) + "\n")
        self._jsonl.flush()
        if self._writer:
            for key, value in values.items():
                self._writer.add_scalar(f"{kind}/{key}", value, step)


def _drop_after(path: Path, step: int) -> None:
    """Keep the records up to `step`, written aside and renamed; a last line that a kill cut short is dropped too."""
    aside = path.with_suffix(".part")
    with path.open(encoding="utf-8") as lines, aside.open("w", encoding="utf-8") as kept:
        kept.writelines(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step)
    os.replace(aside, path)


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
