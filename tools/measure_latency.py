"""Measure how soon a model answers, and how many sessions a machine serves.

    python tools/measure_latency.py MODEL [section.field=value ...] [--manifest FILE ...] [--json F] [...]

MODEL is a converted folder (docs/serving.md), or a preset such as 8b, made with random weights on the device. With
--manifest (NeMo's JSONL), or for a folder whose run's validation manifests are here, its utterances are asked and
latencies are those of real answers; else they follow from the delays, which overrides of a preset may change. `--codec`
puts the folder's codec in the loop, or for a preset a Mimi of full size with random weights. With --json it writes F,
and Markdown and a chart beside it; with --chart the chart alone.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console

PACKAGES = ("moshi", "transformers", "triton")


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    options = _parse(arguments)
    warnings.filterwarnings("ignore")
    try:
        _measure(options)
    except (ValueError, ImportError, OSError) as error:
        print(f"measure_latency: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--manifest", type=Path, action="append", default=[])
    parser.add_argument("--utterances", type=int, default=8, help="of each task that are asked (default 8)")
    parser.add_argument("--batches", default="1,2,4,8,16,32", help="numbers of sessions (default 1,2,4,8,16,32)")
    parser.add_argument("--frames", type=int, default=200, help="that are timed for each number (default 200)")
    parser.add_argument("--codec", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default bf16 on an accelerator, fp32 on a CPU")
    parser.add_argument("--cpu-time", action="store_true", help="of this process, on a CPU that is shared with others")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--chart", type=Path)
    parser.add_argument("--note", default="", help="a sentence for the report, such as what else the machine did")
    return parser.parse_args(arguments)


def _measure(options: argparse.Namespace) -> None:
    from megaspeech.benchmarks import sessions, sessions_report, sessions_run
    from megaspeech.benchmarks.served import add_answers, open_model
    from megaspeech.kernels.benchmarks.machine import describe_machine
    from megaspeech.streaming.runtime import DTYPES, place_of

    device, dtype = place_of(options.device, dtype=options.dtype)
    on_cpu = device.type == "cpu"
    if options.cpu_time and not on_cpu:
        raise ValueError(f"--cpu-time: is no measure of what {device} does; leave it out")
    if on_cpu:
        torch.set_num_threads(1)  # as sessions would be served; small matrices gain nothing from a second one
    batches = [int(number) if number.isdecimal() else 0 for number in options.batches.split(",")]
    if min(batches) < 1:
        raise ValueError(f"--batches {options.batches}: write numbers with commas, such as 1,8,32")
    if options.frames < 1:
        raise ValueError(f"--frames {options.frames}: time 1 or more, better 200")
    torch.manual_seed(1)
    model = open_model(options.model, options.overrides, device=device, dtype=dtype)
    report = sessions_run.Report(
        model=Path(options.model).name,
        dtype=next(name for name, one in DTYPES.items() if one is dtype),
        frame_rate=model.frame_rate,
        machine=describe_machine(device.type, packages=PACKAGES),
        bandwidth=sessions.memory_bandwidth(device),
        note=" ".join(filter(None, ("Times are CPU time, not the clock's." * options.cpu_time, options.note))),
    )
    codings = {"": None} | ({model.codec_name: model.coding()} if options.codec else {})
    clock = time.process_time if options.cpu_time else time.perf_counter
    shared = {"batches": batches, "clock": clock, "advance": lambda what: print(what, file=sys.stderr)}
    sessions_run.measure(report, model.lm, config=model.config, num_frames=options.frames, codings=codings, **shared)
    add_answers(report, model, manifests=options.manifest, num_utterances=options.utterances, **shared)
    report.aims.extend(sessions_run.judge(report, is_gpu=not on_cpu))
    sessions_report.show(report, Console(width=None if sys.stdout.isatty() else 160))
    if options.json:
        sessions_report.write(report, options.json)
        print(f"written: {options.json}, .md and .png")
    if options.chart:
        sessions_report.draw(report, options.chart)


if __name__ == "__main__":
    sys.exit(main())
