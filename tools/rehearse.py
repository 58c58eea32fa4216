"""Rehearse a run on this machine: every rank that differs builds its stage and runs a step, without a GPU.

    python tools/rehearse.py CONFIG.toml --world-size 256 [section.field=value ...]

The real modules, wrapper and pipeline schedule, with tensors that have shapes and no numbers: a rank of the 40B model
takes a few hundred MB and less than a minute. Proven are shapes, what stages send each other, and that the ranks' parts
make up one checkpoint; not what needs a GPU (FP8, TransformerEngine's layers, kernels), which is named. Returns 1 where
a rank fails or ranks do not fit together, 2 for a fault of the config.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

from megaspeech.config import Config, read_config


def main(arguments: list[str] | None = None) -> int:
    """Run; see the module."""
    options = _parse(arguments)
    try:
        config = read_config(options.config, options.overrides, world_size=options.world_size)
    except ValueError as error:
        print(f"rehearse: {error}", file=sys.stderr)
        return 2
    if refusal := _refusal(config):
        print(f"rehearse: {refusal}", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore")
    # After the arguments are known to be good: these take seconds.
    from megaspeech.planning.rehearsal import faults_between, ranks_of_a_replica, rehearse, without_gpu

    config, changes = without_gpu(config)
    for words in changes:
        print(f"note: {words}")
    ranks = ranks_of_a_replica(config, world_size=options.world_size)
    layout = config.parallel.describe(options.world_size // config.parallel.model_parallel_size)
    print(f"{layout}: {len(ranks)} ranks differ", flush=True)
    verdicts = []
    for rank in ranks:
        began = time.monotonic()
        verdict = rehearse(config, world_size=options.world_size, rank=rank)
        verdicts.append(verdict)
        print(_line(verdict, time.monotonic() - began, is_sharded=config.parallel.data_parallel != "ddp"), flush=True)
    failed = any(verdict.fault for verdict in verdicts)
    faults = [] if failed else faults_between(verdicts, config=config, world_size=options.world_size)
    for fault in faults:
        print(fault)
    if not failed and not faults:
        print("stages send what the next ones wait for; the ranks' parts make up one checkpoint")
    return int(failed or bool(faults))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--world-size", type=_positive, required=True, help="ranks of the run")
    return parser.parse_intermixed_args(arguments)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _refusal(config: Config) -> str:
    """Why it cannot be rehearsed; nothing where it can."""
    if config.parallel.data_parallel == "megatron_fsdp":
        return 'parallel.data_parallel: "megatron_fsdp" needs a GPU; take "ddp" or "fsdp2"'
    if config.temporal.num_moe_experts:
        return "temporal.num_moe_experts: frames go to experts by numbers, which a rehearsal has not; leave them out"
    return ""


def _line(verdict: object, seconds: float, *, is_sharded: bool) -> str:
    where = f"rank {verdict.rank}, stage {verdict.stage}, tensor rank {verdict.tensor_rank}"
    if verdict.fault:
        return f"{where}: FAILS: {verdict.fault}"
    kept, rest = "weights and gradients", "activations"
    if is_sharded:
        kept, rest = "weights", "gathered weights, gradients and activations"
    return (
        f"{where}: runs: {verdict.parameters:,} parameters, {verdict.state_gb:.1f} GB of {kept}, "
        f"{rest} at most {verdict.peak_gb:.1f} GB with the local layers ({seconds:.0f} s)"
    )


if __name__ == "__main__":
    sys.exit(main())
