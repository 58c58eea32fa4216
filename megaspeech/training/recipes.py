"""Do the precision recipes train the same model? A run of each from one seed checkpoint, and their losses compared.

Batches are a function of the step, so every recipe meets the same samples in the same order, and the noise of the
batches is the same in all curves. A final loss is the mean over the last tenth of the steps; a smoothed curve is that
mean after every step, so that its last point is the final loss.

Training amplifies rounding: the same recipe with its sums in another order ends elsewhere too. A control shows by how
much, and a difference that is no larger says nothing about a recipe.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megaspeech.config import Config, read_config
from megaspeech.parallel import groups
from megaspeech.parallel.requirements import require_machine
from megaspeech.training.one_run import QUIET, curve, seed_checkpoint, train_here

RUN = (*QUIET, "checkpoint.keep_last=2", "checkpoint.async_save=false")
"""Of every run that is compared."""
JUDGED = ("loss", "text_loss", "audio_loss")
"""Losses that must lie within the band: what is minimised, and its two parts. The streams' own are reported; a codebook
that is all but learned has a few hundredths of a nat left, of which a hundredth means nothing."""
CONTROL = "control"
"""In place of a recipe: the first one that ran, once more, in microbatches of half the size."""


@dataclass(frozen=True)
class Trained:
    """What became of a recipe's run.

    `losses` has one value a step of every loss: "loss", "text_loss", "audio_loss", and "loss/STREAM" of the streams
    that every step has tokens of. `fault` tells in a line why there is no run, or why it stopped.
    """

    recipe: str
    losses: dict[str, list[float]]
    fault: str = ""

    @property
    def has_run(self) -> bool:
        """Whether it made a step."""
        return bool(self.losses)

    @property
    def finals(self) -> dict[str, float]:
        """Final loss of each kind, nats a token."""
        return {name: smooth(values)[-1] for name, values in self.losses.items()}


@dataclass(frozen=True)
class Verdict:
    """A recipe's final losses, and by how much of the reference's they lie above (below: negative) the reference's."""

    recipe: str
    reference: str
    band: float
    finals: dict[str, float]
    differences: dict[str, float]
    fault: str = ""

    @property
    def has_run(self) -> bool:
        """Whether there is anything to judge."""
        return bool(self.finals)

    @property
    def worst_stream(self) -> str | None:
        """The stream whose loss differs most; one that is not a number differs more than any."""
        streams = [name for name in self.differences if name not in JUDGED]
        return max(streams, key=lambda name: _size(self.differences[name]), default=None)

    @property
    def holds(self) -> bool:
        """Whether it came to its end with the losses that are judged within the band; false of NaN too."""
        judged = [_size(difference) for name, difference in self.differences.items() if name in JUDGED]
        return bool(judged) and not self.fault and max(judged) <= self.band


def _size(difference: float) -> float:
    return math.inf if math.isnan(difference) else abs(difference)


def train_recipes(
    recipes: Sequence[str], *, config_path: Path, overrides: Sequence[str], directory: Path, train_steps: int
) -> Iterator[Trained]:
    """Train the config in each recipe and hand back what became of it; all ranks of the process group call this.

    The first recipe that can run saves the seed checkpoint that all others start from. A recipe that cannot run here,
    or whose run stops by a fault, is handed back with the reason.

    Args:
        recipes: values of `precision.recipe`, or `CONTROL`.
        config_path: the run's TOML.
        overrides: `section.field=value`, which come before what the comparison sets itself.
        directory: where the runs go, DIRECTORY/RECIPE each; what is there of an earlier comparison is removed.
        train_steps: of every run; the learning rate's schedule is over as many.

    Raises:
        ValueError: a recipe is named twice.
    """
    if len(set(recipes)) < len(recipes):
        raise ValueError(f"recipes: {', '.join(recipes)} names one twice; name each once")
    first = None
    for recipe in recipes:
        own = directory / recipe
        settings = [*overrides, *RUN, f"training.train_steps={train_steps}", f"run.directory={own}"]
        try:
            config = _runnable([*settings, *_own_settings(recipe, first=first)], config_path=config_path)
        except ValueError as error:
            yield Trained(recipe, {}, fault=_one_line(error))
            continue
        _remove(own)
        fault = _train(config)
        if first is None and not fault:
            first = config
        yield Trained(recipe, _losses(own), fault=fault)


def _own_settings(recipe: str, *, first: Config | None) -> list[str]:
    """What one recipe has and the others do not; `first` is the run that the others start like."""
    if first is None:
        if recipe == CONTROL:
            raise ValueError(f"recipes: {CONTROL} repeats a recipe that has run; name one before it")
        return [f"precision.recipe={recipe}", "checkpoint.save_seed=true"]
    seed = f"checkpoint.seed_checkpoint={seed_checkpoint(Path(first.run.directory))}"
    if recipe != CONTROL:
        return [f"precision.recipe={recipe}", seed]
    half, odd = divmod(first.training.micro_batch_size, 2)
    if odd:
        raise ValueError(f"training.micro_batch_size: {2 * half + odd} has no half for the {CONTROL}; make it even")
    return [f"precision.recipe={first.precision.recipe}", f"training.micro_batch_size={half}", seed]


def _runnable(settings: Sequence[str], *, config_path: Path) -> Config:
    config = read_config(config_path, settings, world_size=groups.world_size_from_environment())
    require_machine(config)
    return config


def _remove(directory: Path) -> None:
    """An earlier run, which would be gone on with; before any rank begins the new one."""
    if dist.get_rank() == 0 and directory.is_dir():
        shutil.rmtree(directory)
    dist.barrier()


def _train(config: Config) -> str:
    """Train; returns the fault that ended the run, in a line, or nothing."""
    try:
        train_here(config)
        return ""
    except ValueError as error:  # all ranks have agreed on it, as where steps had to be skipped
        fault = _one_line(error)
    groups.remove_grid()
    return fault


def _one_line(error: ValueError) -> str:
    """A config's faults come one a line below the file's name."""
    lines = str(error).splitlines()
    return "; ".join(line.strip() for line in lines[1:] or lines)


def _losses(directory: Path) -> dict[str, list[float]]:
    if not (directory / "metrics.jsonl").is_file():
        return {}
    records = curve(directory)
    names = [key for key in (records or [{}])[0] if key.endswith("loss") or key.startswith("loss/")]
    return {name: [record[name] for record in records] for name in names if all(name in record for record in records)}


def smooth(values: Sequence[float], *, share: float = 0.1) -> list[float]:
    """Mean of each value and those before it, over `share` of all; NaN where one of them is NaN."""
    width = max(1, round(share * len(values)))
    parts = (values[max(0, end - width) : end] for end in range(1, len(values) + 1))
    return [math.fsum(part) / len(part) for part in parts]


def judge(trained: Sequence[Trained], *, band: float) -> list[Verdict]:
    """Hold every recipe against the first one that ran to its end.

    Args:
        trained: what `train_recipes` gave.
        band: largest difference of a final loss, as a share of the reference's.
    """
    reference = next((run for run in trained if run.has_run and not run.fault), None)
    expected = reference.finals if reference else {}
    verdicts = []
    for run in trained:
        finals = run.finals
        differences = {name: finals[name] / expected[name] - 1 for name in finals if name in expected}
        verdicts.append(
            Verdict(run.recipe, reference.recipe if reference else "", band, finals, differences, fault=run.fault)
        )
    return verdicts


def exit_status(verdicts: Sequence[Verdict]) -> int:
    """0 where all recipes that ran are within the band, 1 where one is not, or none ran."""
    have_run = [verdict for verdict in verdicts if verdict.has_run]
    return 0 if have_run and all(verdict.holds for verdict in have_run) else 1
