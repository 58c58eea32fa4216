"""The job scripts under a real Slurm: a stopped run goes on, a broken node is named, an array shares, recipes fit."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import curve, write_tiny_run
from small_corpus import line, make_codec, make_project, make_tokenizer, record
from small_slurm import MISSING, NODES, ROOT, NoSlurmError, SmallSlurm, small_slurm

if MISSING:
    pytest.skip(f"no {', '.join(MISSING)}: apt-get install slurm-wlm", allow_module_level=True)
if os.geteuid() != 0:
    pytest.skip("only root starts Slurm's daemons", allow_module_level=True)

STEPS = 50
TRAIN = ("--nodes", "2", "--gpus-per-node", "1", "examples/slurm/train.sh")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallSlurm]:
    with contextlib.ExitStack() as stack:
        try:
            socket.gethostbyname(NODES[0])
            running = stack.enter_context(small_slurm(tmp_path_factory.mktemp("slurm")))
        except (OSError, NoSlurmError) as error:
            pytest.skip(f"Slurm does not run on this machine: {error}")
        yield running


def test_a_job_that_is_asked_to_stop_goes_on(slurm: SmallSlurm, tmp_path: Path) -> None:
    """By the signal that Slurm sends before the time limit."""
    run, config = tmp_path / "run", write_tiny_run(tmp_path)
    overrides = (f"data.directory={tmp_path}/shards", f"run.directory={run}", f"training.train_steps={STEPS}")
    job = slurm.submit(*TRAIN, str(config), *overrides)
    slurm.until(lambda: (run / "metrics.jsonl").is_file() and len(curve(run)) >= 3)
    slurm.run("scancel", "--signal", "USR1", job)
    assert slurm.end(job) == "COMPLETED" and slurm.field(job, "Restarts") == "1"
    assert [one["step"] for one in curve(run)] == list(range(1, STEPS + 1))
    logs = [(slurm.folder / f"logs/{job}/rank_{rank}.log").read_text() for rank in (0, 1)]
    assert "stopped by a signal" in logs[0] and "going on at step" in logs[0] and "loss" not in logs[1]


def test_a_broken_node_ends_the_job_and_is_named(slurm: SmallSlurm) -> None:
    (slurm.folder / "sick").write_text(NODES[1])
    job = slurm.submit(*TRAIN, "config.toml")
    assert slurm.end(job) == "FAILED"
    said = (slurm.folder / f"{job}.out").read_text()
    assert f"{NODES[1]}: nvidia-smi fails" in said and said.endswith(f"--exclude {NODES[1]}\n")


def test_an_array_shares_the_work(slurm: SmallSlurm, tmp_path: Path) -> None:
    make_project(tmp_path, few=[line(record(tmp_path, str(one), seconds=0.9).name) for one in range(4)])
    make_codec().save(tmp_path / "codec")
    (tmp_path / "tokenizer.model").write_bytes(make_tokenizer().model)
    array = ("--array", "0-1", "--cpus-per-task", "1", "examples/prepare/slurm_array.sh")
    job = slurm.submit(*array, str(tmp_path / "config.toml"), "preparation.lines_per_shard=1")
    slurm.until(lambda: not slurm.run("squeue", "-h", "-j", job))
    assert len(list((tmp_path / "shards/train/few/asr-en").glob("*.bin"))) == 4, (
        slurm.folder / f"{job}.out"
    ).read_text()


@pytest.mark.parametrize(
    "recipe, nodes",
    [("from_llama", 2), ("h100_40b", 32), ("h100_70b", 64), ("interpretation", 4), ("tsubame4_8b", 8)],
)
def test_what_recipes_ask_for_can_be_had(slurm: SmallSlurm, tmp_path: Path, recipe: str, nodes: int) -> None:
    (tmp_path / "sbatch").write_text('#!/bin/sh\nPATH=${PATH#*:} exec sbatch --test-only "$@"\n')
    (tmp_path / "sbatch").chmod(0o755)
    path = f"{tmp_path}:{slurm.variables['PATH']}"
    submit = (str(ROOT / "examples" / recipe / "submit.sh"), "tensor")
    answer = slurm.run(*submit, PATH=path, SBATCH_PARTITION="elsewhere")
    assert "to start at" in answer and f"{nodes * 112} processors" in answer
