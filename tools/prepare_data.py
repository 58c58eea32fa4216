"""Audio people have to shards: `python tools/prepare_data.py CONFIG.toml [section.field=value ...]`.

The config's `[[sources]]` name manifests, or folders of audio; `data.directory`/{train,valid}/SOURCE/TASK get the
samples, in units of `preparation.lines_per_shard` lines. What cannot be used is set aside in
`data.directory`/rejected.jsonl with its reason. Killed at any moment and started again, it goes on; units that are done
are kept.

The `spectral` codec is fitted and the tokenizer trained first, where they are missing: `--fit` does that and no more.
Array tasks (`--array I/N`, or those of a Slurm job array) share the units out by themselves, and need both to be there.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    options = _parse(arguments)
    warnings.filterwarnings("ignore")
    from megaspeech.config import read_config

    try:
        return _prepare(read_config(options.config, options.overrides), options)
    except (ValueError, ImportError, OSError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 1


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--array", metavar="I/N", help="do every N-th unit, from I on (0 <= I < N)")
    parser.add_argument("--fit", action="store_true", help="make codec and tokenizer where they are missing, no shards")
    parser.add_argument("--dry-run", action="store_true", help="print what would be made, and what it would cost")
    parser.add_argument("--encode-rate", type=float, metavar="X", help="of one GPU, times real time, for --dry-run")
    parser.add_argument("--timeline", type=Path, help="when decoder and encoder worked: a .png or a Chrome trace .json")
    return parser.parse_intermixed_args(arguments)


def _prepare(config, options: argparse.Namespace) -> int:
    from rich.console import Console

    from megaspeech.preparation import fitting
    from megaspeech.preparation.job_array import share_of
    from megaspeech.preparation.prepare import Preparation
    from megaspeech.preparation.report import report
    from megaspeech.preparation.sources import list_units

    if not config.sources:
        raise ValueError(f"{options.config}: there are no [[sources]]; name the manifests, or folders, to prepare")
    index, count = share_of(options.array, os.environ)
    console = Console(width=None if sys.stdout.isatty() else 120)
    planned = [one for one in config.sources if options.dry_run and one.hours and not one.train]
    sources = [one for one in config.sources if one not in planned]
    kept = None if options.dry_run else Path(config.data.directory) / "manifests"
    units = list_units(sources, lines_per_shard=config.preparation.lines_per_shard, kept=kept)
    if options.dry_run:
        return _estimate(config, units, planned, encode_rate=options.encode_rate, console=console)
    missing = fitting.what_is_missing(config)
    if count > 1 and not options.fit and missing:
        raise ValueError(
            f"{missing[0]}: there is nothing in {_value(config, missing[0])!r} yet; run tools/prepare_data.py "
            f"{options.config} --fit once, before the array"
        )
    fitting.make_what_is_missing(config, units, say=console.print)
    if options.fit:
        if not missing:
            console.print(f"nothing is to be fitted: {config.codec.path} and {config.data.tokenizer} are there")
        return 0
    codec, tokenizer = fitting.load_codec_and_tokenizer(config)
    preparation = Preparation(config, codec=codec, tokenizer=tokenizer, say=console.print)
    mine = units[index::count]
    with _Progress(num_lines=sum(unit.num_lines for unit in mine)) as progress:
        preparation.run(mine, advance=progress.advance)
    if options.timeline:
        preparation.timeline.write(options.timeline)
    is_finished = preparation.store.finish(units)
    console.print(report(preparation.store, mine, frame_rate=codec.frame_rate, timeline=preparation.timeline))
    left = 0 if is_finished else len(preparation.store.missing(units))
    console.print(f"{left} units are left for other tasks" if left else f"all {len(units)} units are done")
    return 0


def _value(config, key: str) -> str:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _estimate(config, units, planned, *, encode_rate, console) -> int:
    from megaspeech.preparation.estimate import estimate, estimate_planned, estimate_table
    from megaspeech.preparation.fitting import frame_rate_of

    rate = frame_rate_of(config)
    estimates = estimate(config, units, frame_rate=rate)
    estimates += [estimate_planned(config, source, frame_rate=rate) for source in planned]
    console.print(estimate_table(estimates, encode_rate=encode_rate))
    return 0


class _Progress:
    """A bar by hours of audio; how many there are in all is guessed from the lines done."""

    def __init__(self, *, num_lines: int) -> None:
        from tqdm import tqdm

        self._num_lines, self._lines = num_lines, 0.0
        shown = "{desc}: {n:.2f} of about {total:.2f} h |{bar}| {elapsed}<{remaining}"
        self._bar = tqdm(desc="audio prepared", total=0.0, bar_format=shown)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, lines: float, seconds: float) -> None:
        """So much more is done."""
        self._lines += lines
        hours = self._bar.n + seconds / 3600
        self._bar.total = hours * self._num_lines / self._lines if self._lines else hours
        self._bar.update(seconds / 3600)


if __name__ == "__main__":
    sys.exit(main())
