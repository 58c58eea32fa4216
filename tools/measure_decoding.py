"""Measure hours of audio per CPU-second, from file to waveform and to codes, beside other decoders.

    python tools/measure_decoding.py [--hours 1] [--rounds 3] [--json F] [--note TEXT]

Makes so much speech in all, in WAV, FLAC, Ogg Vorbis, Opus and MP3, and has our pipeline, soundfile with soxr, librosa,
torchcodec and Lhotse decode it in turn; those that are not installed are said to be so. With --json it writes F and
Markdown beside it, in which TEXT stands, such as what else ran on the machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from rich.console import Console

from megaspeech.benchmarks import decoding_report
from megaspeech.benchmarks.decoding import measure_decoding
from megaspeech.kernels.benchmarks.machine import describe_machine

PACKAGES = ("nvidia-dali-cuda130", "soundfile", "soxr", "librosa", "torchcodec", "lhotse")


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--note", default="")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)  # threads that wait for each other use CPU time too
    try:
        with tempfile.TemporaryDirectory() as directory:
            figures = measure_decoding(
                Path(directory),
                hours=options.hours,
                num_rounds=options.rounds,
                say=lambda what: print(what, file=sys.stderr),
            )
    except (ImportError, ValueError) as error:
        print(f"measure_decoding: {error}", file=sys.stderr)
        return 2
    decoding_report.show(figures, Console(width=None if sys.stdout.isatty() else 160))
    if options.json:
        machine = describe_machine("cpu", packages=PACKAGES)
        decoding_report.write(figures, options.json, machine=machine, note=options.note)
        print(f"written: {options.json} and .md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
