"""Every recipe: its config against the ranks that its script starts, its README's commands and figures, and a
rehearsal of every rank, cut down to a layer a stage."""

from __future__ import annotations

import importlib
import re
import shlex
import warnings
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from megaspeech.config import Config, read_config
from megaspeech.planning.gpus import GPUS
from megaspeech.planning.nodes import find_node
from megaspeech.planning.rehearsal import faults_between, ranks_of_a_replica, rehearse, without_gpu
from megaspeech.planning.search import Machine, Plan, plan_of
from tools import plan_layout

ROOT = Path(__file__).parents[2]
NO_RECIPES = {"quickstart", "reference"}
"""Folders with a config that is no recipe: a run on the CPU with tests of its own, and data to reckon with."""


@dataclass(frozen=True)
class Recipe:
    """A config of a recipe, and the README beside it."""

    path: Path

    @property
    def name(self) -> str:
        """Of the folder, and of the config where it is not the only one."""
        return self.path.parent.name + ("" if self.path.stem == "config" else f" {self.path.stem}")

    @property
    def readme(self) -> str:
        """As it is written."""
        return (self.path.parent / "README.md").read_text(encoding="utf-8")

    @property
    def scripts(self) -> dict[str, str]:
        """What starts it, by file name."""
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(self.path.parent.glob("*.sh"))}

    @property
    def asked(self) -> Namespace:
        """The planner's options in the README."""
        (command,) = (words for words in commands(self.readme) if words[1] == "tools/plan_layout.py")
        return plan_layout._parse(command[2:])

    def config(self, *overrides: str) -> Config:
        """As the run reads it."""
        return read_config(self.path, overrides, world_size=self.asked.gpus)

    def plan(self) -> Plan:
        """What it takes, each row full."""
        gpu = next(gpu for gpu in GPUS if gpu.key == self.asked.gpu)
        rows = self.config(f"training.global_batch_size={self.asked.global_batch}")
        return plan_of(rows, Machine(gpu, find_node(self.asked.gpus_per_node), self.asked.gpus))


def commands(readme: str) -> list[list[str]]:
    """The words of every command of a README's blocks that runs one of our tools; `\\` goes on on the next line."""
    lines = readme.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if re.match(r"    \S*python tools/", line)]


def figures(recipe: Recipe) -> str:
    """The row of the README that says what a recipe takes."""
    plan, hours = recipe.plan(), recipe.asked.audio_hours
    gpu, time = plan.machine.gpu, plan.time
    takes = time.hours(hours, frame_rate=12.5)
    row = (
        f"{plan.machine.num_gpus} x {gpu.name}",
        plan.config.parallel.describe(plan.data_parallel_size),
        f"{plan.fullest.total_gb:.0f} of {gpu.memory_gb:.0f} GB",
        f"{time.seconds:.1f} s",
        f"{time.frames_per_second:,.0f}",
        f"{hours:,.0f} h in {takes:,.{0 if takes > 9 else 1}f} h",
        f"{takes * plan.machine.num_gpus:,.0f}",
    )
    return f"| {' | '.join(row)} |"


def ranks_of(script: str) -> int | None:
    """Ranks that a launch script starts; None where it starts none."""
    for pattern in (r"--nodes (\d+) --gpus-per-node (\d+)", r"(?s)-l node_f=(\d+).*--nproc-per-node (\d+)"):
        if found := re.search(pattern, script):
            return int(found[1]) * int(found[2])
    found = re.search(r"--standalone --nproc-per-node (\d+)", script)
    return int(found[1]) if found else None


FOLDERS = {path.parent for path in ROOT.glob("examples/*/*.toml")}
RECIPES = [Recipe(path) for path in sorted(ROOT.glob("examples/*/*.toml")) if path.parent.name not in NO_RECIPES]
each = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)


def test_every_recipe_is_listed() -> None:
    index = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"\]\((\w+)/", index))
    assert {folder.name for folder in FOLDERS} - {"reference"} <= listed
    assert all((ROOT / "examples" / name).is_dir() for name in listed)


@each
def test_config_script_and_readme_agree(recipe: Recipe) -> None:
    config, asked = recipe.config(), recipe.asked
    numbers = {name: ranks_of(script) for name, script in recipe.scripts.items()}
    assert numbers and set(numbers.values()) == {asked.gpus}
    assert all(f"examples/{recipe.path.parent.name}/" in script for script in recipe.scripts.values())
    assert config.run.directory == f"runs/{config.run.name}" and config.run.name == recipe.name.replace(" ", "_")
    assert (ROOT / asked.model).parent == recipe.path.parent and not asked.overrides
    hours_a_step = asked.global_batch * config.data.num_frames / 12.5 / 3600
    assert config.training.train_steps * hours_a_step == pytest.approx(asked.audio_hours, rel=0.02)


@each
def test_it_fits_as_the_readme_says(recipe: Recipe) -> None:
    plan = recipe.plan()
    assert plan.fullest.total_gb < 0.95 * plan.machine.gpu.memory_gb
    assert figures(recipe) in recipe.readme.splitlines(), f"the planner says now: {figures(recipe)}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*/README.md")), ids=lambda path: path.parent.name)
def test_commands_of_readmes_name_tools_and_options_that_exist(path: Path) -> None:
    readme = path.read_text(encoding="utf-8")
    for words in commands(readme):
        tool = importlib.import_module(words[1].removesuffix(".py").replace("/", "."))
        parsed = mock.Mock(side_effect=_Parsed)
        arguments = [word for word in words[2:] if word != "..."]
        with mock.patch.multiple("argparse.ArgumentParser", **_stopping_at(parsed)), pytest.raises(_Parsed):
            tool.main(arguments)
    for named in re.findall(r"(?:examples|docs|tools)/[\w/]+\.(?:sh|py|md|toml)", readme):
        assert (ROOT / named).is_file(), f"{path}: {named} is missing"
    for linked in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (path.parent / linked).exists(), f"{path}: {linked} is missing"


class _Parsed(Exception):
    """Raised when a tool's parser has taken all of the arguments, in place of what the tool would do then."""


def _stopping_at(parsed: mock.Mock) -> dict[str, object]:
    from argparse import ArgumentParser

    def stopping(original: object) -> object:
        def parse(self: ArgumentParser, arguments: list[str], *rest: object) -> None:
            original(self, arguments, *rest)  # SystemExit where it does not know an option
            parsed()

        return parse

    names = ("parse_args", "parse_intermixed_args")
    return {name: stopping(getattr(ArgumentParser, name)) for name in names}


def cut_down(recipe: Recipe) -> Config:
    """The same layout of a model that has a layer a stage, narrow ones, two short samples for each replica."""
    config = recipe.config()
    stages, replicas = config.parallel.pipeline_model_parallel_size, recipe.plan().data_parallel_size
    shape = {"hidden_size": 1024, "ffn_hidden_size": 1024}
    last = {"num_layers_in_last_pipeline_stage": None}
    changes = {
        "temporal": {"num_layers": stages, **shape},
        "depth": {"num_layers": 1, "hidden_size": 512, "ffn_hidden_size": 512},
        "parallel": last if stages > 1 else {},
        "data": {"num_frames": 128, "length_multiple": 128},
        "training": {"global_batch_size": 2 * replicas},
    }
    sections = {name: getattr(config, name).model_copy(update=keys) for name, keys in changes.items()}
    return config.model_copy(update=sections)


@each
def test_every_rank_that_differs_runs(recipe: Recipe) -> None:
    config, _ = without_gpu(cut_down(recipe))
    world_size = recipe.asked.gpus
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verdicts = [
            rehearse(config, world_size=world_size, rank=rank)
            for rank in ranks_of_a_replica(config, world_size=world_size)
        ]
    assert [verdict.fault for verdict in verdicts if verdict.fault] == []
    assert faults_between(verdicts, config=config, world_size=world_size) == []
