"""What is in a checkpoint: `python tools/inspect_checkpoint.py PATH [--tensors] [--json] [--no-verify]`.

PATH is a run's directory, its `checkpoints`, or one folder `step_...`; of a run all are listed, and the one that
`latest` names, or the newest, is shown. `--tensors` lists every tensor, else layers are grouped. Every file is read and
its checksum compared, unless `--no-verify`; the exit status is 1 where a checkpoint is damaged.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from megaspeech.checkpoint.inspection import Contents, Found

UNITS = ("B", "kB", "MB", "GB", "TB")


def main(arguments: list[str]) -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="PATH", type=Path)
    for option in ("--tensors", "--json", "--no-verify"):
        parser.add_argument(option, action="store_true")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    try:
        return _inspect(options)
    except (ValueError, OSError) as error:
        print(f"inspect_checkpoint: {error}", file=sys.stderr)
        return 1


def _inspect(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megaspeech.checkpoint.inspection import checkpoint_folders, read_contents

    found = _look(checkpoint_folders(options.path), verify=not options.no_verify)
    damaged = [folder for folder in found if folder.is_finished and folder.damage]
    readable = [folder for folder in found if folder.is_finished and not folder.damage]
    chosen = next((folder for folder in readable if folder.is_latest), readable[-1] if readable else None)
    contents = read_contents(chosen.path) if chosen else None
    if options.json:
        print(json.dumps(_as_json(found, contents, verified=not options.no_verify), indent=1))
    else:
        console = Console(soft_wrap=True)
        _print_folders(console, found, verified=not options.no_verify)
        if contents:
            _print_contents(console, contents, name=chosen.path.name)
            _print_tensors(console, contents, every=options.tensors)
    return 1 if damaged else 0


def _look(folders: list[Path], *, verify: bool) -> list[Found]:
    from tqdm import tqdm

    from megaspeech.checkpoint.inspection import look_at

    total = sum(file.stat().st_size for folder in folders for file in folder.iterdir())
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="verifying", leave=False, disable=None if verify else True
    ) as bar:
        return [look_at(folder, verify=verify, progress=bar.update) for folder in folders]


def _as_json(found: list[Found], contents: Contents | None, *, verified: bool) -> dict:
    folders = [{**asdict(folder), "path": str(folder.path), "verified": verified} for folder in found]
    if contents is None:
        return {"checkpoints": folders}
    values = {**vars(contents), "layout": contents.layout, "config": contents.config.model_dump(mode="json")}
    values["manifest"] = asdict(contents.manifest)
    values["tensors"] = [asdict(tensor) for tensor in contents.tensors]
    return {"checkpoints": folders, "contents": values}


def _size(num_bytes: float) -> str:
    for unit in UNITS:
        if num_bytes < 1000 or unit == UNITS[-1]:
            return f"{num_bytes:,.0f} {unit}" if unit == "B" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000


def _print_folders(console: Console, found: list[Found], *, verified: bool) -> None:
    from rich import box
    from rich.table import Table

    table = Table(
        "checkpoint", "size", "state", box=box.SIMPLE_HEAD, title=str(found[0].path.parent), title_justify="left"
    )
    table.columns[1].justify = "right"
    for folder in found:
        state = folder.damage or ("whole" if verified else "not verified")
        if folder.is_finished and folder.damage:
            state = f"[bold red]DAMAGED[/]: {state}"
        name = f"[bold]{folder.path.name}[/] (latest)" if folder.is_latest else folder.path.name
        table.add_row(name, _size(folder.num_bytes), state)
    console.print(table)


def _print_contents(console: Console, contents: Contents, *, name: str) -> None:
    from rich import box
    from rich.table import Table

    manifest, config = contents.manifest, contents.config
    parts = ", ".join(f"{part} {count:,}" for part, count in contents.parameters.items())
    rate = "unknown" if manifest.frame_rate is None else f"{manifest.frame_rate:g}"
    given = len(manifest.cardinalities) - 1 - manifest.num_codebooks
    table = Table("", "", box=box.SIMPLE, show_header=False, title=name, title_justify="left")
    for key, value in {
        "step": f"{contents.step} of {config.training.train_steps}",
        "written": contents.written,
        "layout": contents.layout,
        "model": f"{config.model.preset}: {sum(contents.parameters.values()):,} parameters ({parts})",
        "precision": config.precision.recipe,
        "streams": f"text ({manifest.cardinalities[0]} tokens), {manifest.num_codebooks} predicted and {given} given "
        f"codebooks ({config.streams.cardinality} codes), delays {manifest.delays}, {rate} frames/s",
        "codec": f"{manifest.codec or 'not known'}, fingerprint {manifest.codec_fingerprint or 'not known'}",
        "tokenizer": f"fingerprint {manifest.tokenizer_fingerprint or 'not known'}",
        "on disk": ", ".join(f"{part} {_size(size)}" for part, size in contents.sizes.items()),
    }.items():
        table.add_row(f"[bold]{key}[/]", value)
    console.print(table)


def _print_tensors(console: Console, contents: Contents, *, every: bool) -> None:
    from rich import box
    from rich.table import Table

    from megaspeech.checkpoint.inspection import grouped

    table = Table("tensor", "count", "shape", "dtype", "MB", box=box.SIMPLE_HEAD)
    table.columns[0].overflow = "fold"
    for column in (1, 4):
        table.columns[column].justify = "right"
    for tensor in contents.tensors if every else grouped(contents.tensors):
        shape = " x ".join(map(str, tensor.shape))
        table.add_row(tensor.name, str(tensor.count), shape, tensor.dtype, f"{tensor.num_bytes / 1e6:,.3f}")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
