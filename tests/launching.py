"""Starts training as a user does, by torchrun, and reads back what a run wrote."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from megaspeech.config import read_config
from megaspeech.data.synthetic import write_synthetic_shards

TIMEOUT = 300  # seconds
STEPS = 20


def write_tiny_run(directory: Path, *, eval_interval: int = 0, save_interval: int = 0) -> Path:
    """`config.toml` of 20 steps and synthetic shards in `directory/shards`; returns the config's path."""
    config = directory / "config.toml"
    config.write_text(f"""
[model]
preset = "tiny"
[data]
mixture = {{ asr-en = 1.0, tts-en = 2.0 }}
num_frames = 16
num_workers = 0
[loss]
silence_fraction = 0.5
[optimizer]
lr = 3e-3
lr_warmup_steps = 5
[training]
train_steps = {STEPS}
micro_batch_size = 2
global_batch_size = 8
eval_interval = {eval_interval}
[checkpoint]
save_interval = {save_interval}
[logging]
tensorboard = false
""")
    write_synthetic_shards(directory / "shards", streams=read_config(config).streams)
    return config


ENTRY = ("-m", "megaspeech.train")


def command(
    config: Path, *overrides: str, ranks: int = 1, max_restarts: int = 0, entry: tuple[str, ...] = ENTRY
) -> list[str]:
    """`torchrun -m megaspeech.train`; `-m torch.distributed.run` is torchrun of this very interpreter."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*torchrun, "--max-restarts", str(max_restarts), *entry, str(config), *overrides]


def environment() -> dict[str, str]:
    """One thread a rank: several ranks that spin on few cores are up to 200 times slower."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def train(
    config: Path,
    *overrides: str,
    ranks: int = 1,
    variables: dict[str, str] | None = None,
    entry: tuple[str, ...] = ENTRY,
) -> subprocess.CompletedProcess:
    """Train to the end, with environment `variables` set, and hand back exit status, stdout and stderr."""
    return subprocess.run(
        command(config, *overrides, ranks=ranks, entry=entry),
        env={**environment(), **(variables or {})},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def start_as_srun(
    config: Path, *overrides: str, ranks: int, log: Path, entry: tuple[str, ...] = ENTRY
) -> list[subprocess.Popen]:
    """The ranks themselves, with Slurm's variables in place of torchrun; stdout and stderr go to `log`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {**environment(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SLURM_NTASKS": str(ranks)}
    processes = []
    with log.open("a") as output:
        for rank in range(ranks):
            own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
            arguments = [sys.executable, *entry, str(config), *overrides]
            processes.append(subprocess.Popen(arguments, env={**variables, **own}, stdout=output, stderr=output))
    return processes


def wait_until(condition: Callable[[], bool], *, process: subprocess.Popen) -> None:
    """Return as soon as `condition` holds; `process` must still run until then."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None, "the run ended before"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill_family(process: subprocess.Popen) -> None:
    """SIGKILL for torchrun and its ranks, which are sessions of their own."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family)


def curve(run: Path) -> list[dict]:
    """The training records of a run, in the order they were written."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == "train"]


LAYOUT_TOOL = Path(__file__).resolve().parents[1] / "tools" / "check_layouts.py"


def check_layouts(
    layouts: Iterable[str], *options: str, figures: Path, timeout: float, variables: dict[str, str] | None = None
) -> dict[str, dict]:
    """What `tools/check_layouts.py` finds, by layout; `figures` is where it may write them."""
    command = [sys.executable, str(LAYOUT_TOOL), "--layouts", ";".join(layouts), "--json", str(figures), *options]
    subprocess.run(command, env={**environment(), **(variables or {})}, timeout=timeout)
    return {verdict["plan"]: verdict for verdict in json.loads(figures.read_text())}
