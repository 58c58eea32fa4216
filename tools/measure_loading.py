"""Measure what a million hours of shards cost to open, and how fast batches come off them.

    python tools/measure_loading.py --directory D [--hours 1000000] [--json F] [section.field=value ...]

Simulates a set of shards of that size in D, which is kept and used again: its index is real (7 GB for a million hours),
its samples are holes. The model is the 8b, whose rows are packed; overrides go to its config.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from tqdm import tqdm

from megaspeech.benchmarks import loader_report
from megaspeech.benchmarks.loader import measure_index, measure_loader
from megaspeech.benchmarks.simulated_shards import simulate_shards
from megaspeech.config import read_config
from megaspeech.kernels.benchmarks.machine import describe_machine
from megaspeech.planning.gpus import GPUS

SET = "simulated"
SAMPLES_A_RANK = 256
RANKS = (1, 64)


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=1e6)
    parser.add_argument("--samples-per-shard", type=int, default=20_000)
    parser.add_argument("--draws", type=int, default=80_000)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(arguments)
    options.directory.mkdir(parents=True, exist_ok=True)
    try:
        index, loader = _measure(options)
    except ValueError as error:
        print(f"measure_loading: {error}", file=sys.stderr)
        return 2
    loader_report.show(index, loader, Console(width=None if sys.stdout.isatty() else 160))
    if options.json:
        machine = describe_machine("cpu", packages=("megatron-core", "numpy"))
        loader_report.write(index, loader, options.json, machine=machine)
        print(f"written: {options.json} and .md")
    return 0


def _measure(options: argparse.Namespace):
    config = _config(options, ranks=1)
    simulate_shards(
        options.directory / "train" / SET,
        config=config,
        hours=options.hours,
        samples_per_shard=options.samples_per_shard,
        progress=lambda shards, count: tqdm(shards, "shards simulated", count),
    )
    index = measure_index(
        options.directory / "train" / SET,
        num_drawn=options.draws,
        shuffle_shards=config.data.shuffle_shards,
        say=lambda what: print(what, file=sys.stderr),
    )
    gpu = next(gpu for gpu in GPUS if gpu.name == "H200 SXM")
    loader = [
        measure_loader(
            _config(options, ranks=ranks),
            dp_size=ranks,
            num_steps=options.steps,
            gpu=gpu,
            say=lambda what, ranks=ranks: print(f"batches of {ranks} ranks, {what}", file=sys.stderr),
        )
        for ranks in RANKS
    ]
    return index, loader


def _config(options: argparse.Namespace, *, ranks: int):
    path = options.directory / "config.toml"
    path.write_text('[model]\npreset = "8b"\n', encoding="utf-8")
    overrides = (
        f"data.directory={options.directory}",
        f"data.mixture={{{SET} = 1}}",
        *("data.pack=true", "data.num_frames=4096", "data.length_multiple=128"),
        *("training.micro_batch_size=1", f"training.global_batch_size={SAMPLES_A_RANK * ranks}"),
    )
    return read_config(path, [*overrides, *options.overrides])


if __name__ == "__main__":
    sys.exit(main())
