"""Convert a model: `python tools/convert_checkpoint.py --from FORMAT --to FORMAT SRC DST [options]`.

`native` is a checkpoint folder of any layout; DST is one that a run takes as `checkpoint.seed_checkpoint`. `moshi` is
Kyutai's runtime, `transformers` its Moshi and speech-to-text classes, `llama` a Llama, Qwen2, Qwen3 or Mistral to start
from, `random` a config whose weights are drawn. Tensors go through one at a time; what was killed goes on by the same
command; DST is there once it was compared with SRC. See docs/conversion.md.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megaspeech.conversion.convert import Conversion, Report


def main(arguments: list[str]) -> int:
    """Run; returns the exit status."""
    warnings.filterwarnings("ignore")
    conversion = _read(arguments)
    try:
        report = _convert(conversion)
    except (ValueError, ImportError) as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"convert_checkpoint: {error}; the same command goes on where it was", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("convert_checkpoint: stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    _show(report, destination=conversion.destination)
    return 0


def _read(arguments: list[str]) -> Conversion:
    from megaspeech.conversion.convert import DTYPES, Conversion
    from megaspeech.conversion.formats import FORMATS, TARGETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--from", dest="source_format", choices=tuple(FORMATS), required=True)
    add("--to", dest="target_format", choices=TARGETS, required=True)
    add("source", metavar="SRC", type=Path)
    add("destination", metavar="DST", type=Path)
    add("--dtype", choices=tuple(DTYPES), help="precision of the numbers; as they are, if not given")
    add("--tokenizer", type=Path, metavar="FILE", help="sentencepiece model to go with it; another changes vocabulary")
    add("--old-tokenizer", type=Path, metavar="FILE", help="the model's own, .model or tokenizer.json, if not in SRC")
    add(
        "--codec",
        type=Path,
        metavar="PATH",
        help="the codec to go with it: a folder, a name in the cache, Kyutai's Mimi file",
    )
    add("--num-codebooks", type=int, metavar="N", help="that the model is to predict; new ones start from its own")
    add("--num-given-codebooks", type=int, metavar="N", help="that the model is to hear, likewise")
    add("--config", type=Path, metavar="FILE", help="of the run that starts from a text model: its streams and depth")
    add("--drop", default="", metavar="NAME,...", help="what may be left out of the source, as its error names it")
    add("--lora", type=Path, metavar="FILE", help="low-rank changes to fold in")
    add("--int8", action="store_true", help="matrices in eight bits: see docs/conversion_moshi.md for who runs them")
    add("--max-shard-size", type=float, metavar="GB", help="write several safetensors files, none larger")
    add("--no-verify", action="store_true", help="compare nothing at the end")
    options = vars(parser.parse_args(arguments))
    size = options.pop("max_shard_size")
    options["drop"] = tuple(name for name in options["drop"].split(",") if name)
    options["verify"] = not options.pop("no_verify")
    return Conversion(**options, max_shard_bytes=int(size * 1e9) if size else None)


def _convert(conversion: Conversion) -> Report:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from megaspeech.conversion.convert import convert
    from megaspeech.parallel import groups

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    try:
        with Progress(
            TextColumn("converting"), *columns, console=console, transient=True, disable=not console.is_terminal
        ) as bar:
            task = bar.add_task("", total=None)
            return convert(
                conversion,
                progress=lambda num_bytes: bar.advance(task, num_bytes),
                total=lambda num_bytes: bar.update(task, total=num_bytes),
            )
    finally:
        groups.shut_down()


def _show(report: Report, *, destination: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    table = Table("file", "bytes", "xxh3 (128 bits)", box=box.SIMPLE_HEAD, title=str(destination), title_justify="left")
    table.columns[1].justify = "right"
    for name, found in report.files.items():
        table.add_row(name, f"{found.num_bytes:,}", found.xxh3_128)
    console.print(table)
    console.print(
        f"{report.num_tensors:,} tensors, {report.num_bytes:,} bytes in {report.seconds_of_converting:,.1f} s "
        f"({report.gigabytes_per_second:.2f} GB/s), verified in {report.seconds_of_verifying:,.1f} s; "
        f"at most {report.peak_memory_bytes / 2**30:.2f} GiB of memory"
    )
    for line in (*report.notes, *report.agreements):
        console.print(str(line), markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
