"""Measure how fast Mimi, EnCodec, DAC and WavTokenizer of full size encode here, with random weights.

    python tools/measure_codecs.py --device auto --dtypes fp32,bf16 --batches 1,8,32 --json F

By codec, precision and batch: seconds of sound a second, peak memory, and where the time goes (copy, convolutions,
transformer or LSTM, quantiser). A codec is NAME or NAME@N, N of its codebooks. --size tiny is for trying it out.
Writes JSON, and Markdown and a chart beside it. Returns 1 where nothing could be measured, 2 for a fault of the
arguments.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path

import torch
from rich.console import Console

from megaspeech.benchmarks import codec_speed_report
from megaspeech.benchmarks.codec_report import describe
from megaspeech.benchmarks.codec_speed import DTYPES, MEASURED, SIZES, Case, measure


def main(arguments: list[str] | None = None) -> int:
    """Run; see the module."""
    options = _parse(arguments)
    console, progress = Console(width=None if sys.stdout.isatty() else 200), Console(stderr=True)
    try:
        cases = _cases(options)
        device = _device(options.device)
        with progress.status("") as status:
            rows = measure(cases, device=device, size=options.size, repeats=options.repeats, hear=status.update)
    except (ValueError, ImportError) as error:
        print(f"measure_codecs: {error}", file=sys.stderr)
        return 2
    codec_speed_report.show(rows, console)
    if options.json:
        machine = {**describe(device), "size": options.size}
        codec_speed_report.write(rows, machine, options.json)
        console.print(f"written: {options.json}, .md and .png")
    return int(all(row.status != MEASURED for row in rows))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codecs", default="mimi@8,encodec@8,dac@9,wavtokenizer", metavar="NAME[@N],...")
    parser.add_argument("--size", choices=SIZES, default="full", help="of the networks")
    parser.add_argument("--dtypes", default="fp32,bf16", metavar="NAME,...", help=" or ".join(DTYPES))
    parser.add_argument("--batches", default="1,8,32", metavar="N,...", help="sounds encoded at once")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each sound")
    parser.add_argument("--repeats", type=int, default=5, help="timed, after one that is not")
    parser.add_argument("--device", default="auto", help="auto is the accelerator where there is one")
    parser.add_argument("--json", type=Path, help="write the figures here, Markdown and a chart beside them")
    return parser.parse_args(arguments)


def _cases(options: argparse.Namespace) -> list[Case]:
    cases = []
    for codec, dtype, batch in product(
        *(text.split(",") for text in (options.codecs, options.dtypes, options.batches))
    ):
        name, _, books = codec.partition("@")
        if dtype not in DTYPES:
            raise ValueError(f"--dtypes {dtype}: must be {' or '.join(DTYPES)}")
        if not (books or "1").isdigit() or not batch.isdigit() or not int(batch):
            raise ValueError(f"--codecs {codec}, --batches {batch}: N must be a positive whole number")
        cases.append(Case(name, int(books) if books else None, dtype, int(batch), options.seconds))
    return cases


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    return torch.device(name)


if __name__ == "__main__":
    sys.exit(main())
