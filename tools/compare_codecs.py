"""Compare codecs on a folder of audio: bits, nearness, use of the codebooks, speed.

    python tools/compare_codecs.py AUDIO --codecs mimi=kyutai/mimi@8,dac=FOLDER,spectral=FOLDER --output DIR
    python tools/compare_codecs.py AUDIO --fit 4x256,8x256,8x1024 --json docs/measurements/codecs.json

A codec is NAME=PATH, with @N the first N of its codebooks. --fit fits `spectral` codecs of so many codebooks x entries
on every other recording, and then all codecs are compared on the rest. STOI needs pystoi, PESQ pesq; without them
these columns are empty. Writes JSON, and Markdown, a chart and spectrograms beside it. Files that cannot be read are
left out and named. Returns 2 for a fault of the arguments.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from megaspeech.benchmarks import codec_report
from megaspeech.benchmarks.codec_comparison import Sound, compare, fit_sizes, read_sounds
from megaspeech.benchmarks.codec_speed import DTYPES
from megaspeech.codecs import Codec, load_codec


def main(arguments: list[str] | None = None) -> int:
    """Run; see the module."""
    options = _parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        _compare(options, console)
    except (ValueError, ImportError) as error:
        print(f"compare_codecs: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of audio, searched with all below it")
    parser.add_argument("--codecs", default="", metavar="NAME=PATH[@N],...")
    parser.add_argument("--fit", default="", metavar="QxK,...", help="spectral codecs to fit")
    parser.add_argument("--recordings", type=int, default=200, help="at most, evenly drawn")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each, from its start")
    parser.add_argument("--device", default="cpu", help="where networks run")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of networks; their quantisers keep fp32")
    parser.add_argument("--output", type=Path, default=Path("runs/codecs"), help="folder for codecs.json and the rest")
    parser.add_argument("--json", type=Path, help="if not OUTPUT/codecs.json")
    parser.add_argument("--remark", action="append", default=[], help="a sentence to keep with the figures")
    return parser.parse_args(arguments)


def _compare(options: argparse.Namespace, console: Console) -> None:
    sizes = [_size(text) for text in options.fit.split(",") if text]
    codecs = [_open(text) for text in options.codecs.split(",") if text]
    if not sizes and not codecs:
        raise ValueError("--codecs: nothing to compare; give NAME=PATH, or --fit 8x256")
    read = list(read_sounds(options.folder, most=options.recordings, seconds=options.seconds))
    sounds = [one for one in read if isinstance(one, Sound)]
    left_out = [(one[0].name, one[1]) for one in read if not isinstance(one, Sound)]
    if len(sounds) < 1 + bool(sizes):
        raise ValueError(
            f"{options.folder}: {len(sounds)} of {len(read)} recordings can be read; the first: {left_out[:1]}"
        )
    if sizes:
        fitted_on, sounds = sounds[::2], sounds[1::2]
        codecs += fit_sizes(fitted_on, sizes)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("recordings", total=len(codecs) * len(sounds))
        rows, heard = compare(
            [codec.to(device, dtype=dtype) for codec in codecs], sounds, hear=lambda: progress.advance(task)
        )
    seconds = sum(sound.seconds for sound in sounds)
    machine = {**codec_report.describe(device), "dtype": options.dtype}
    found = codec_report.Comparison(rows, len(sounds), seconds, left_out, machine, options.remark)
    codec_report.show(found, console)
    path = options.json or options.output / "codecs.json"
    codec_report.write(found, path, sound=sounds[0], heard=heard)
    console.print(f"written: {path}, .md, .png and {path.stem}_spectrograms.png")


def _open(text: str) -> Codec:
    """The codec of NAME=PATH[@N]."""
    name, is_named, path = text.partition("=")
    path, _, books = path.rpartition("@") if text.rpartition("@")[2].isdigit() else (path, "", "")
    if not is_named or not path:
        raise ValueError(f"--codecs {text}: is not NAME=PATH, such as mimi=kyutai/mimi@8")
    return load_codec(path, name=name, num_codebooks=int(books) if books else None)


def _size(text: str) -> tuple[int, int]:
    """(8, 256) of "8x256"."""
    try:
        books, entries = map(int, text.split("x"))
    except ValueError:
        raise ValueError(f"--fit {text}: is not QxK, such as 8x256") from None
    return books, entries


if __name__ == "__main__":
    sys.exit(main())
