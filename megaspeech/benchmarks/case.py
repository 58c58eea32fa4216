"""What is measured: one model at one depth in one recipe, by this library or by a peer."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from megaspeech.config import Config, read_config
from megaspeech.data.synthetic import write_synthetic_shards
from megaspeech.training.one_run import QUIET

OURS, MOSHI = "megaspeech", "moshi"
PEERS = (MOSHI,)
TASK = "s2st-ja-en"
"""A task in which the model writes text and speech: no stream is given alone, nothing is left out of the losses."""
WARM_UP = 3
"""Steps before the clock starts: they compile, choose algorithms, and make the optimizer's state."""
BASE = (
    *(f"data.mixture={{{TASK} = 1.0}}", "data.num_workers=0", "codec.path=", "data.tokenizer="),
    *QUIET,
)


@dataclass(frozen=True)
class Case:
    """`num_layers` of the temporal transformer, None for all; `frames` a step in all, in samples of `sample_frames`.

    `overrides` of the config come last; `precision.fp8_...` are for the FP8 recipes, and left out of others. `steps`
    are timed whole, and half as many again by part.
    """

    provider: str
    model: str
    num_layers: int | None
    recipe: str
    frames: int
    sample_frames: int
    micro_batch_size: int
    overrides: tuple[str, ...] = ()
    steps: int = 8

    @property
    def steps_by_part(self) -> int:
        """Steps in which device events take the time of the parts."""
        return max(1, self.steps // 2)

    @property
    def num_steps(self) -> int:
        """Of all kinds."""
        return WARM_UP + self.steps + self.steps_by_part

    @property
    def name(self) -> str:
        """For the human."""
        layers = "all layers" if self.num_layers is None else f"{self.num_layers} layers"
        return f"{self.model}, {layers}, {self.provider} {self.recipe}"

    def config(self, directory: Path) -> Config:
        """The run in `directory`, where its shards are too. Raises ValueError where the config has faults."""
        if self.frames % self.sample_frames:
            raise ValueError(
                f"--frames: {self.frames} is not divisible by --sample-frames = {self.sample_frames}; choose a multiple"
            )
        path = directory / "case.toml"
        path.write_text(f'[model]\npreset = "{self.model}"\n', encoding="utf-8")
        layers = () if self.num_layers is None else (f"temporal.num_layers={self.num_layers}",)
        own = (
            *(f"run.directory={directory}/run", f"data.directory={directory}/shards"),
            *(f"precision.recipe={self.recipe}", f"data.num_frames={self.sample_frames}"),
            f"training.micro_batch_size={self.micro_batch_size}",
            f"training.global_batch_size={self.frames // self.sample_frames}",
        )
        is_fp8 = "fp8" in self.recipe
        overrides = [each for each in self.overrides if is_fp8 or not each.startswith("precision.fp8_")]
        return read_config(path, [*BASE, *own, *layers, *overrides], world_size=1)

    def prepare(self, directory: Path) -> Config:
        """The config, its shards written: samples of `sample_frames` each."""
        config = self.config(directory)
        write_synthetic_shards(
            Path(config.data.directory),
            streams=config.streams,
            names=tuple(config.data.mixture),
            num_frames=config.data.num_frames,
            shorter=0,
        )
        return config


def config_of(case: Case) -> Config:
    """The config of a case, for counting; its directories are gone. Raises ValueError where it has faults."""
    with tempfile.TemporaryDirectory() as directory:
        return case.config(Path(directory))
