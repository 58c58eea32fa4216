"""Compiles every kernel for Hopper at every production shape, on any machine, and keeps the table of what came out.

    python -m megaspeech.kernels.benchmarks.machine_code [--write]

Without `--write` it fails where the committed table differs, naming what. Another version of Triton than the table's
makes other code, and is not compared; spilled registers and narrow loads are a fault in any case.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megaspeech.kernels.benchmarks.hopper import compile_for_hopper
from megaspeech.kernels.benchmarks.shapes import MODELS, NUM_FRAMES, ModelShape
from megaspeech.kernels.codebook_cross_entropy import function as codebook_cross_entropy
from megaspeech.kernels.depth_attention import function as depth_attention
from megaspeech.kernels.launching import triton
from megaspeech.kernels.stream_embedding import function as stream_embedding

TABLE = Path(__file__).parents[2] / "docs/measurements/hopper_machine_code.json"
SAMPLES = 4
"""Samples that the frames are spread over."""


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _stream_embedding(model: ModelShape, num_frames: int) -> None:
    streams = len(model.cardinalities)
    codes = _empty(SAMPLES, streams, num_frames // SAMPLES, dtype=torch.int64)
    lookup = stream_embedding.Lookup(codes, *(_empty(streams, dtype=torch.int64) for _ in range(3)), None, None, 0)
    table = _empty(model.num_rows, model.hidden_size)
    grad = stream_embedding.launch_forward(lookup, table, batch_first=False)
    for target, add, atomic in ((table, False, False), (table.float(), True, False), (table.float(), True, True)):
        stream_embedding.launch_backward(lookup, grad, target, batch_first=False, add=add, atomic=atomic)


def _packed_embedding(model: ModelShape, num_frames: int) -> None:
    """The depth transformer's: every codebook's tokens a sample of one stream."""
    codes = _empty(model.num_codebooks, 1, num_frames, dtype=torch.int64)
    lookup = stream_embedding.Lookup(codes, None, None, _empty(1, dtype=torch.int64), None, None, 0)
    rows = model.text_cardinality + (model.num_codebooks - 1) * (model.cardinality + 1) + 1
    table = _empty(rows + -rows % 128, model.depth_hidden_size)
    grad = stream_embedding.launch_forward(lookup, table, batch_first=True)
    stream_embedding.launch_backward(lookup, grad, table.float(), batch_first=True, add=True, atomic=False)


def _depth_attention(model: ModelShape, num_frames: int) -> None:
    heads, width = model.depth_heads, model.depth_hidden_size // model.depth_heads
    qkv = _empty(model.num_codebooks, num_frames, 3 * heads, width)
    out = depth_attention.launch_forward(qkv, heads)
    depth_attention.launch_backward(out, qkv, heads)


def _codebook_cross_entropy(model: ModelShape, num_frames: int) -> None:
    hidden = _empty(model.num_codebooks, num_frames, model.depth_hidden_size)
    heads = _empty(model.num_codebooks, model.depth_hidden_size, model.cardinality)
    targets = _empty(model.num_codebooks, num_frames, dtype=torch.int64)
    losses, _, *saved = codebook_cross_entropy.launch_forward(hidden, heads, targets)
    codebook_cross_entropy.launch_backward(losses, hidden, heads, targets, *saved)


NARROW = {"rows_kernel", "combine_tiles"}
"""Kernels that read no large tensor, and so need no wide loads."""
OPERATIONS: dict[str, Callable[[ModelShape, int], None]] = {
    "stream_embedding": _stream_embedding,
    "packed_embedding": _packed_embedding,
    "depth_attention": _depth_attention,
    "codebook_cross_entropy": _codebook_cross_entropy,
}
"""Launches forward and backward on meta tensors of a model's shape and so many frames."""


def compiled_rows() -> Iterator[dict[str, Any]]:
    """One row a kernel that differs from those before it: what it is, where it is used, its machine code."""
    for operation, launches in OPERATIONS.items():
        rows: dict[str, dict[str, Any]] = {}
        for model in MODELS:
            for num_frames in NUM_FRAMES:
                for code in compile_for_hopper(lambda: launches(model, num_frames)):  # noqa: B023, called at once
                    found = {"operation": operation, **asdict(code)}
                    row = rows.setdefault(json.dumps(found), {**found, "models": []})
                    if model.name not in row["models"]:
                        row["models"].append(model.name)
        yield from rows.values()


def faults(rows: list[dict[str, Any]], *, committed: list[dict[str, Any]]) -> Iterator[str]:
    """What is wrong with `rows`, a line each: spilled registers, no load of 128 bits, or not the committed table."""
    for row in rows:
        if row["spilled_bytes"]:
            yield f"{row['operation']}, {row['kernel']}: spills {row['spilled_bytes']} bytes"
        if "128" not in row["loads"] and row["kernel"] not in NARROW:
            yield f"{row['operation']}, {row['kernel']}: no loads of 128 bits, only {row['loads']}"
        if row not in committed:
            yield f"{row['operation']}, {row['kernel']}: not in the committed table: {json.dumps(row)}"
    for row in committed:
        if row not in rows:
            yield f"{row['operation']}, {row['kernel']}: in the committed table only: {json.dumps(row)}"


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table for people."""
    head = [
        "kernel",
        "models",
        "constants",
        "registers",
        "spilled bytes",
        "shared bytes",
        "global loads, by bits",
        "products",
    ]
    lines = []
    for operation in OPERATIONS:
        lines += ["", f"## {operation}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for row in (row for row in rows if row["operation"] == operation):
            loads = ", ".join(f"{count} x {bits}" for bits, count in row["loads"].items())
            products = ", ".join(f"{count} x {kind}" for kind, count in row["products"].items())
            constants = ", ".join(
                f"{name} {value if isinstance(value, bool) else format(value, '.4g')}"
                for name, value in row["constants"].items()
            )
            figures = (row["registers"], row["spilled_bytes"], f"{row['shared_bytes']:,}", loads, products)
            cells = (row["kernel"], ", ".join(row["models"]), constants, *figures)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


TITLE = """# What Triton makes for Hopper

Every kernel at every production shape (Moshi 7B, 8B, 40B; 4,096 to 65,536 frames; BF16), compiled for sm_90 without a
GPU by `python -m megaspeech.kernels.benchmarks.machine_code --write`, Triton {triton}. A test compiles them again and
fails on any difference. Nothing here is a measurement of speed."""


def main() -> None:
    """Compile, compare; with `--write` put the table down instead."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="replace the committed table")
    write = parser.parse_args().write
    rows = list(tqdm(compiled_rows(), desc="kernels compiled", disable=None))
    committed = json.loads(TABLE.read_text())
    is_comparable = committed["triton"] == triton.__version__ and not write
    found = list(faults(rows, committed=committed["rows"] if is_comparable else rows))
    if write:
        lines = ",\n".join(json.dumps(row) for row in rows)
        TABLE.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')
        title = TITLE.format(triton=triton.__version__)
        TABLE.with_suffix(".md").write_text(f"{title}\n{markdown(rows)}\n")
    elif not is_comparable:
        print(f"the table is of Triton {committed['triton']}, this is {triton.__version__}: not compared")
    if found:
        sys.exit("\n".join([*found, "if this is meant, run it again with --write and commit the table"]))


if __name__ == "__main__":
    main()
