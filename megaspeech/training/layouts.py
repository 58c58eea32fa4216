"""Does a layout train the same model as one rank? A short run of each, from one seed checkpoint, held against it.

A plan is one run: a layout, or several, each going on from the checkpoint of the one before. Plans that take as many
ranks run one after the other in the same processes.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megaspeech.config import Config, read_config
from megaspeech.data.synthetic import write_synthetic_shards
from megaspeech.data.whole_files import replacing
from megaspeech.parallel import groups
from megaspeech.training.one_run import QUIET, curve, seed_checkpoint, train_here

SHORT = {
    "tp": "parallel.tensor_model_parallel_size",
    "sp": "parallel.sequence_parallel",
    "pp": "parallel.pipeline_model_parallel_size",
    "vp": "parallel.virtual_pipeline_model_parallel_size",
    "first": "parallel.num_layers_in_first_pipeline_stage",
    "last": "parallel.num_layers_in_last_pipeline_stage",
    "layout": "parallel.pipeline_model_parallel_layout",
    "cp": "parallel.context_parallel_size",
    "ep": "parallel.expert_model_parallel_size",
    "etp": "parallel.expert_tensor_parallel_size",
    "zero": "parallel.use_distributed_optimizer",
    "data": "parallel.data_parallel",
    "overlap": "parallel.overlap_grad_reduce",
    "gather": "parallel.overlap_param_gather",
    "recompute": "parallel.recompute_granularity",
    "micro": "training.micro_batch_size",
    "recipe": "precision.recipe",
    "kernels": "model.kernels",
    "pack": "data.pack",
    "row": "data.num_frames",
}
"""Short names of the keys that a layout is written with; any other `section.field` may stand beside them."""
BANDS = {"fp32": 1e-5, "bf16": 2e-2, "fp8": 5e-2}
"""Largest relative difference of a loss or gradient norm from one rank's in the same recipe, by kind of recipe. Sums in
another order differ by rounding: 2^-24 in FP32, and in BF16, whose weights and activations have 8 bits, by 2^-8 at a
time; in FP8 (a band not measured yet) by 2^-4."""

COMPUTATION = (
    *("parallel.", "training.micro_batch_size", "model.kernels", "model.embedding_gradient"),
    *("data.pack", "data.num_frames"),
)
"""Keys that leave the model and its losses as they are."""
FAULT, DONE = "fault.txt", "done"
RUN = (
    *("training.micro_batch_size=2", "training.global_batch_size=8"),
    *("optimizer.lr_warmup_steps=5", "optimizer.lr=3e-3", "loss.silence_fraction=0.5"),
    *("data.mixture={asr-en = 1.0, tts-en = 2.0}", "data.num_workers=0", "codec.path=", "data.tokenizer="),
    *(*QUIET, "checkpoint.keep_last=9"),
)
"""Of every run that is compared: synthetic shards, and nothing written beside what is compared."""


@dataclass(frozen=True)
class Layout:
    """One layout as it was asked for, `text`; `ranks` is the least number it runs on, `overrides` its config's."""

    text: str
    ranks: int
    overrides: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Layout:
        """From "tp=2,pp=2,sp=1". Raises ValueError naming an item that is not of the form name=value."""
        text, ranks, overrides = text.strip(), 1, []
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, equals, value = item.partition("=")
            if not equals or not (name == "dp" or name in SHORT or "." in name):
                raise ValueError(
                    f"layout {text!r}: {item!r} is not understood; write dp or one of {', '.join(SHORT)}, or "
                    f"section.field, then = and a value"
                )
            if name in ("dp", "tp", "pp", "cp"):
                ranks *= int(value)
            if name in ("sp", "zero", "overlap", "pack"):
                value = "true" if value in ("1", "true") else "false"
            if name != "dp":
                overrides.append(f"{SHORT.get(name, name)}={value}")
        return cls(text, ranks, tuple(overrides))


@dataclass(frozen=True)
class Plan:
    """Layouts of one run in turn; each but the last does an equal share of the steps."""

    layouts: tuple[Layout, ...]

    @classmethod
    def parse(cls, text: str) -> Plan:
        """From "pp=2 > dp=2". Raises ValueError naming what is not understood."""
        return cls(tuple(Layout.parse(layout) for layout in text.split(">")))

    @property
    def name(self) -> str:
        """As it was asked for; `parse` takes it."""
        return " > ".join(layout.text for layout in self.layouts)

    @property
    def ranks(self) -> int:
        """Ranks that it runs on: the most that one of its layouts needs."""
        return max(layout.ranks for layout in self.layouts)

    @property
    def model(self) -> str:
        """What it asks for besides a layout and kernels, written as one: the reference, on one rank, has it too."""
        return ",".join(one for one in self.layouts[0].overrides if not one.startswith(COMPUTATION))

    @property
    def kind(self) -> str:
        """Kind of its recipe, a key of `BANDS`."""
        return next((kind for kind in ("fp8", "bf16") if re.search(f"precision.recipe=\\w*{kind}", self.model)), "fp32")


@dataclass(frozen=True)
class Job:
    """A plan, the directories of its run and of the one it is held against, and overrides that come before its own."""

    plan: Plan
    directory: Path
    reference: Path
    overrides: tuple[str, ...]

    @staticmethod
    def write_all(jobs: Iterable[Job], path: Path) -> None:
        """Hand jobs to other processes."""
        values = [(job.plan.name, str(job.directory), str(job.reference), job.overrides) for job in jobs]
        with replacing(path) as aside:
            aside.write_text(json.dumps(values), encoding="utf-8")

    @classmethod
    def read_all(cls, path: Path) -> list[Job]:
        """What `write_all` wrote."""
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [cls(Plan.parse(plan), Path(own), Path(other), tuple(rest)) for plan, own, other, rest in rows]


@dataclass(frozen=True)
class Verdict:
    """How far a plan's losses and gradient norms lie from one rank's, relative, at most over all steps and streams.

    `frames_per_second` is the median over the steps but the first two; `fault` tells in words why there is nothing to
    compare, else it is empty.
    """

    plan: str
    ranks: int
    loss: float
    grad_norm: float
    band: float
    frames_per_second: float
    fault: str = ""

    @property
    def holds(self) -> bool:
        """Whether the plan ran and stayed within its band."""
        return not self.fault and self.loss <= self.band and self.grad_norm <= self.band


def prepare_jobs(
    plans: Sequence[Plan], *, config_path: Path, directory: Path, num_frames: int, train_steps: int
) -> tuple[list[Job], list[Job]]:
    """(a one-rank reference of every model that is asked for, which also saves the seed; the plans' jobs).

    Args:
        plans: what to run.
        config_path: whose model and optimizer to take.
        directory: where to; synthetic shards are written there.
        num_frames: length of their samples.
        train_steps: of every run.

    Raises:
        ValueError: the config, or what a plan makes of its model, has faults.
    """
    references, jobs = [], []
    for number, model in enumerate(dict.fromkeys(plan.model for plan in plans)):
        sizes = (f"data.num_frames={num_frames}", f"training.train_steps={train_steps}")
        common = (*RUN, *sizes, f"data.directory={directory}/shards{number}")
        config = read_config(config_path, [*common, *filter(None, model.split(","))])
        write_synthetic_shards(directory / f"shards{number}", streams=config.streams, num_frames=num_frames)
        reference = directory / f"reference{number}"
        references.append(Job(Plan.parse(model), reference, reference, (*common, "checkpoint.save_seed=true")))
        seed = f"checkpoint.seed_checkpoint={seed_checkpoint(reference)}"
        mine = [(place, plan) for place, plan in enumerate(plans) if plan.model == model]
        jobs += [Job(plan, directory / f"plan{place}", reference, (*common, seed)) for place, plan in mine]
    return references, jobs


def run_jobs(jobs: Iterable[Job], *, config_path: Path) -> Iterator[Job]:
    """Train each job in these processes, and hand it back when it is done; all ranks of the process group call this.

    A plan that cannot run with the config leaves its reason in `fault.txt` of its directory; one that fails raises.
    """
    for job in jobs:
        try:
            configs = list(_configs(job, config_path=config_path))
        except ValueError as error:  # every rank reads the same and finds the same
            job.directory.mkdir(parents=True, exist_ok=True)
            (job.directory / FAULT).write_text(str(error), encoding="utf-8")
            configs = []
        for config in configs:
            train_here(config)
        (job.directory / DONE).touch()
        yield job


def _configs(job: Job, *, config_path: Path) -> Iterator[Config]:
    for place, layout in enumerate(job.plan.layouts):
        own = [*job.overrides, *layout.overrides, f"run.directory={job.directory}"]
        config = read_config(config_path, own, world_size=groups.world_size_from_environment())
        share = config.training.train_steps * (place + 1) // len(job.plan.layouts)
        yield config.model_copy(update={"training": config.training.model_copy(update={"exit_step": share})})


def compare(job: Job) -> Verdict:
    """Hold a job's run against its reference."""
    plan, directory = job.plan, job.directory
    band = BANDS[plan.kind]
    verdict = Verdict(plan.name, plan.ranks, 0.0, 0.0, band, 0.0)
    if (directory / FAULT).is_file():
        return replace(verdict, fault=(directory / FAULT).read_text(encoding="utf-8"))
    if not (directory / DONE).is_file():
        return replace(verdict, fault="it did not run to its end; the error stands above")
    expected, actual = curve(job.reference), curve(directory)
    assert [record["step"] for record in actual] == [record["step"] for record in expected]
    losses = [key for key in expected[0] if key.endswith("loss") or key.startswith("loss/")]
    return replace(
        verdict,
        loss=max(_largest_difference(expected, actual, key) for key in losses),
        grad_norm=_largest_difference(expected, actual, "grad_norm"),
        frames_per_second=statistics.median(record["frames_per_second"] for record in actual[2:]),
    )


def _largest_difference(expected: list[dict], actual: list[dict], key: str) -> float:
    pairs = [(ours[key], theirs[key]) for ours, theirs in zip(expected, actual, strict=True)]
    # The audio of a model that writes text alone has a loss of 0.
    return max(abs(theirs - ours) / (abs(ours) or 1.0) for ours, theirs in pairs)
