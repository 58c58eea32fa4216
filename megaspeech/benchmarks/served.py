"""What is measured by `tools/measure_latency.py`: a converted folder, or a preset with random weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megaspeech.benchmarks.figures import FRAME_RATE
from megaspeech.benchmarks.sessions import Coding, of_codec, of_random_mimi
from megaspeech.benchmarks.sessions_run import BY_ANSWERS, Report, waited
from megaspeech.config import PRESETS, Config, read_config
from megaspeech.conversion.moshi_config import moshi_config
from megaspeech.preparation.encoding import encode_recordings
from megaspeech.preparation.reading import recordings_of
from megaspeech.streaming.evaluation import Evaluator, first_of_each_task
from megaspeech.streaming.folder import ServedFolder, open_folder
from megaspeech.streaming.manifests import read_manifests
from megaspeech.streaming.runtime import random_runtime
from megaspeech.streaming.session import Clock

if TYPE_CHECKING:
    from moshi.models import LMModel


@dataclass(frozen=True, eq=False)
class Model:
    """A model to serve; `served` is its folder, None for a preset."""

    lm: LMModel
    config: Config
    served: ServedFolder | None

    @property
    def frame_rate(self) -> float:
        """Frames a second; Mimi's for a preset."""
        return self.served.codec.frame_rate if self.served else FRAME_RATE

    @property
    def codec_name(self) -> str:
        """Of the codec that may be put in the loop."""
        return self.served.codec.name if self.served else "mimi"

    def coding(self) -> Coding:
        """That codec; a random Mimi of full size for a preset."""
        if self.served:
            return of_codec(self.served.codec)
        streams = self.config.streams
        return of_random_mimi(max(streams.num_codebooks, streams.num_given_codebooks), device=self.lm.device)


def open_model(name: str, overrides: Sequence[str], *, device: torch.device, dtype: torch.dtype) -> Model:
    """A converted folder, or a preset.

    Raises:
        ValueError: there is neither, or the overrides are faulty or a folder's.
    """
    if name not in PRESETS:
        if not Path(name).is_dir():
            raise ValueError(f"{name}: there is no such folder, and no such preset; presets: {', '.join(PRESETS)}")
        if overrides:
            raise ValueError(f"{overrides[0]}: overrides are for presets; a folder is measured as it is")
        served = open_folder(name, device=device, dtype=dtype)
        return Model(served.lm, served.config, served)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "config.toml"
        file.write_text(f'[model]\npreset = "{name}"\n')
        config = read_config(file, overrides)
    return Model(random_runtime(moshi_config(config), device=device, dtype=dtype), config, None)


def add_answers(
    report: Report,
    model: Model,
    *,
    manifests: Sequence[Path],
    num_utterances: int,
    batches: Sequence[int],
    clock: Clock,
    advance: Callable[[str], None],
) -> None:
    """Latencies of real answers to manifests; nothing where there is no manifest.

    Args:
        report: gets the latencies; its rows tell how many sessions fit the memory.
        model: that answers.
        manifests: to ask; without any, the validation manifests of the run, as far as they are here.
        num_utterances: of each task.
        batches: numbers of sessions.
        clock: gives seconds.
        advance: told what is begun.

    Raises:
        ValueError: a preset is to be asked, or a manifest cannot be read.
    """
    if model.served is None:
        if manifests:
            raise ValueError(f"--manifest {manifests[0]}: random weights give no answers; name a converted folder")
        return
    if not model.served.knows_tasks:
        return
    if not manifests:
        names = [source.valid for source in model.config.sources if source.format == "nemo"]
        manifests = [Path(name) for name in names if name and Path(name).is_file()]
    read, _ = read_manifests(manifests)
    codes, _ = encode_recordings(recordings_of(read), codec=model.served.codec)
    evaluator = Evaluator(model.served, clock=clock)
    asked = first_of_each_task(evaluator.requests(read, codes), num_utterances)
    fitting = {row.batch_size for row in report.rows if row.step_ms}
    for batch_size in filter(fitting.__contains__, batches if asked else ()):
        advance(f"answers to {len(asked)} utterances, {batch_size} at a time")
        found = evaluator.latencies(asked, batch_size=batch_size)
        report.latencies.extend(
            waited(task, value, batch_size=batch_size, whence=BY_ANSWERS) for task, value in found.items()
        )
