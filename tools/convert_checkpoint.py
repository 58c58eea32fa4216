"""Convert a model: `python tools/convert_checkpoint.py --from FORMAT --to FORMAT SRC DST [options]`.

Formats are `native` (a folder step_... of any layout; DST is one of one rank, for `checkpoint.seed_checkpoint`),
`moshi` (Kyutai's runtime: config.json, model.safetensors, tokenizer and codec), `transformers` (its Moshi and its
speech to text), and, to start from, `llama` (Llama, Mistral, Qwen2 and Qwen3 of transformers). Streams and vocabulary
may change on the way. Tensors are read and written one at a time; what was killed goes on where it was by the same
command; DST is there once it was compared with SRC, in logits of both sides or, where two models do not fit the memory,
tensor by tensor. What it was and what came out stands in DST/conversion.json. See docs/conversion.md.
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
    add("--tokenizer", type=Path, metavar="FILE", help="the sentencepiece model that goes with it")
    add("--codec", type=Path, metavar="PATH", help="the codec that goes with it: a folder, or Kyutai's Mimi file")
    add("--drop", default="", metavar="NAME,...", help="what may be left out of the source, as its error names it")
    add("--lora", type=Path, metavar="FILE", help="low-rank changes to fold in")
    add("--config", type=Path, metavar="FILE", help="of the run that is to start from a text model (--from llama)")
    add("--num-codebooks", type=int, metavar="N", help="codebooks that the model is to speak")
    add("--num-given-codebooks", type=int, metavar="N", help="codebooks that it is to hear")
    add("--new-tokenizer", type=Path, metavar="FILE", help="the sentencepiece model that its text is to be of")
    add("--old-tokenizer", type=Path, metavar="FILE", help="what its text is of: a .model or tokenizer.json")
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
        f"{report.num_tensors:,} tensors, {report.num_bytes:,} bytes in {report.seconds:,.1f} s "
        f"({report.gigabytes_per_second:.2f} GB/s), at most {report.peak_memory_bytes / 2**30:.2f} GiB of memory"
    )
    for line in (*report.notes, *report.agreements):
        console.print(str(line), markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
