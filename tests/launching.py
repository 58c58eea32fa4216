"""Starts training as a user does, by torchrun, and reads back what a run wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

TIMEOUT = 300  # seconds


def command(config: Path, *overrides: str, ranks: int = 1) -> list[str]:
    """`torchrun -m megaspeech.train`; `-m torch.distributed.run` is torchrun of this very interpreter."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*torchrun, "-m", "megaspeech.train", str(config), *overrides]


def environment() -> dict[str, str]:
    """One thread a rank: several ranks that spin on few cores are up to 200 times slower."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def train(
    config: Path, *overrides: str, ranks: int = 1, variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Train to the end, with environment `variables` set, and hand back exit status, stdout and stderr."""
    return subprocess.run(
        command(config, *overrides, ranks=ranks),
        env={**environment(), **(variables or {})},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def curve(run: Path) -> list[dict]:
    """The training records of a run, in the order they were written."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == "train"]
