"""What is in shards: `python tools/inspect_shards.py SHARDS [--sample N --config CONFIG.toml [--output DIR] [--play]]`.

SHARDS is one shard (any of its files, or their name without suffix) or a directory of them: its header and totals are
shown, and how long its samples are. `--sample N` takes the N-th apart, with the codec and tokenizer of the config: its
text with times, its streams frame by frame. `--output` writes what each party says as WAV and a picture of it all,
`--play` plays it (package sounddevice).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from megaspeech.preparation.inspection import Inspected, Summary

BINS, BAR = 12, 40
MOST_LINES = 120


def main(arguments: list[str]) -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", metavar="SHARDS", type=Path)
    parser.add_argument("--sample", metavar="N", type=int, help="counted from 0")
    parser.add_argument("--config", metavar="CONFIG.toml", help="that the shards were prepared with")
    parser.add_argument("--output", metavar="DIR", type=Path)
    parser.add_argument("--play", action="store_true")
    options = parser.parse_args(arguments)
    if options.sample is not None and options.config is None:
        parser.error("--sample needs --config: the codec and the tokenizer are named there")
    warnings.filterwarnings("ignore")
    try:
        _inspect(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"inspect_shards: {error}", file=sys.stderr)
        return 1
    return 0


def _inspect(options: argparse.Namespace) -> None:
    from rich.console import Console

    from megaspeech.preparation.inspection import find_shards, summarise

    console = Console(soft_wrap=True, highlight=False)
    prefixes = find_shards(options.shards)
    _print_summary(console, summarise(prefixes), title=str(options.shards))
    if options.sample is not None:
        _print_sample(console, prefixes, options)


def _print_summary(console: Console, summary: Summary, *, title: str) -> None:
    from rich.table import Table

    header, lengths = summary.header, summary.lengths
    given = len(header.cardinalities) - 1 - header.num_codebooks
    table = Table("", "", box=None, show_header=False, title=title, title_justify="left")
    seconds = [f"{value / header.frame_rate:.1f}" for value in (lengths.min(), lengths.mean(), lengths.max())]
    for key, value in {
        "task": header.task,
        "samples": f"{summary.num_samples:,} in {summary.num_shards:,} shards",
        "hours": f"{summary.hours:,.2f} ({summary.num_frames:,} frames, {summary.num_tokens:,} tokens)",
        "streams": f"text ({header.cardinalities[0]} tokens), {header.num_codebooks} predicted and {given} given "
        f"codebooks ({header.cardinalities[-1]} codes), {header.frame_rate:g} frames/s",
        "delays": f"task {header.task_delay} frames, speech lead {header.speech_lead}",
        "codec": f"{header.codec}, fingerprint {header.codec_fingerprint}",
        "tokenizer": f"fingerprint {header.tokenizer_fingerprint}",
        "seconds": f"{seconds[0]} to {seconds[2]}, mean {seconds[1]}"
        + (f" (of {summary.num_measured} shards)" if summary.num_measured < summary.num_shards else ""),
        "padding": f"{summary.padding:.1%}, if samples were not packed but filled up to the longest",
    }.items():
        table.add_row(f"[bold]{key}[/]", value)
    console.print(table)
    _print_histogram(console, summary)


def _print_histogram(console: Console, summary: Summary) -> None:
    import numpy as np

    counts, edges = np.histogram(summary.lengths, bins=min(BINS, int(np.ptp(summary.lengths)) + 1))
    console.print("\nframes       samples")
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        bar = "█" * round(BAR * count / counts.max())
        console.print(f"{int(np.ceil(low)):>5}-{int(high):<5} {count:>9,} {bar}")


def _print_sample(console: Console, prefixes: list[Path], options: argparse.Namespace) -> None:
    from rich.markup import escape
    from rich.table import Table

    from megaspeech.config import read_config
    from megaspeech.preparation.fitting import load_codec_and_tokenizer
    from megaspeech.preparation.inspection import check_made_with, inspect_sample, read_sample, stream_lines

    config = read_config(options.config, [])
    codec, tokenizer = load_codec_and_tokenizer(config)
    codes_ST, header, name = read_sample(prefixes, options.sample)
    check_made_with(header, codec=codec, tokenizer=tokenizer)
    sample = inspect_sample(codes_ST, header=header, codec=codec, tokenizer=tokenizer)
    frames = codes_ST.shape[1]
    title = f"\nsample {options.sample} ({name}): {frames} frames, {frames / sample.frame_rate:.2f} s"
    console.print(f"[bold]{title}[/]")
    for word in sample.words:
        console.print(
            f"{word.first_frame / sample.frame_rate:>8.2f} s  frame {word.first_frame:>5}  {escape(word.word)}"
        )
    table = Table("frames", "text", "says", "hears", box=None, title="streams", title_justify="left")
    lines = list(stream_lines(codes_ST, header=header, tokenizer=tokenizer))
    for line in lines[:MOST_LINES]:
        table.add_row(*map(escape, line))
    console.print(table)
    if len(lines) > MOST_LINES:
        console.print(f"and {len(lines) - MOST_LINES} lines more; --output has them all in the picture")
    if options.output:
        _write(console, sample, options.output / f"sample_{options.sample:06d}")
    if options.play:
        _play(sample)


def _write(console: Console, sample: Inspected, prefix: Path) -> None:
    from megaspeech.preparation.sample_picture import draw_sample
    from megaspeech.preparation.sample_sound import write_waves

    prefix.parent.mkdir(parents=True, exist_ok=True)
    draw_sample(sample, f"{prefix}.png")
    for path in (Path(f"{prefix}.png"), *write_waves(sample, prefix)):
        console.print(f"written: {path}")


def _play(sample: Inspected) -> None:
    from megaspeech.preparation.sample_sound import play

    play(sample)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
