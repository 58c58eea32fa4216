"""safetensors files, single or sharded, read and written a tensor at a time.

A file is eight bytes of length, a header in JSON (name, precision, shape and place of every tensor) and the tensors
(https://huggingface.co/docs/safetensors). Of a sharded model an index says which file holds which tensor. Reading goes
through the safetensors library, which maps the file: it is opened anew for every tensor, so that no more of it stays in
memory. Writing does not, because the library wants all tensors at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megaspeech.checkpoint.checksums import Checksum
from megaspeech.conversion.deferred import Deferred, Weights
from megaspeech.conversion.writing import Aside, Progress, Segment, check_finite

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def open_safetensors(path: str | Path) -> dict[str, Deferred]:
    """The tensors of a file, of an index, or of a folder that holds either, unread, in the order of the files.

    Raises:
        ValueError: a file is missing, cut short, or not what the index says; names it and the remedy.
    """
    path = Path(path)
    file = _file_in(path) if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"there is no file {file}; give a safetensors file, or a folder with {WEIGHTS} or {INDEX}")
    return _sharded(file) if file.suffix == ".json" else _single(file)


def _file_in(folder: Path) -> Path:
    for name in (WEIGHTS, INDEX):
        if (folder / name).is_file():
            return folder / name
    others = sorted([*folder.glob("*.safetensors.index.json")] or folder.glob("*.safetensors"))
    if len(others) > 1:
        raise ValueError(f"{folder} holds {', '.join(file.name for file in others)}; name the one to read")
    return others[0] if others else folder / WEIGHTS


def _single(file: Path) -> dict[str, Deferred]:
    found = {}
    try:
        with safe_open(file, "pt") as opened:
            for name in opened.offset_keys():
                tensor = opened.get_slice(name)
                found[name] = _deferred(file, name, shape=tuple(tensor.get_shape()), dtype=tensor.get_dtype())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is cut short, or no safetensors file ({error}); fetch or write it again") from error
    return found


def _deferred(file: Path, name: str, *, shape: tuple[int, ...], dtype: str) -> Deferred:
    if dtype not in DTYPES:
        raise ValueError(f"{file}: tensor {name} is in {dtype}, which is not one of {', '.join(DTYPES)}; convert it")

    def read() -> Tensor:
        with safe_open(file, "pt") as opened:
            return opened.get_tensor(name)

    return Deferred(shape, DTYPES[dtype], read)


def _sharded(index: Path) -> dict[str, Deferred]:
    try:
        places = json.loads(index.read_bytes())["weight_map"]
        names_of: dict[str, list[str]] = {}
        for name, file in places.items():
            names_of.setdefault(file, []).append(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of shards ({error!r}); fetch it again") from error
    found: dict[str, Deferred] = {}
    for file, names in sorted(names_of.items()):
        if not (index.parent / file).is_file():
            words = f"{index.name} puts {len(names)} tensors there"
            raise ValueError(f"{index.parent / file} is missing, and {words}; fetch it")
        held = _single(index.parent / file)
        for tensors, others, what in ((names, held, "puts there"), (held, names, "does not know")):
            if odd := [name for name in tensors if name not in others]:
                words = f"{index.name} {what} tensor {odd[0]}"
                raise ValueError(f"{index.parent / file} is not of this model: {words}; fetch both again")
        found |= held
    return found


def write_safetensors(
    weights: Weights,
    folder: Aside,
    *,
    name: str = WEIGHTS,
    max_shard_bytes: int | None = None,
    progress: Progress = lambda _: None,
) -> dict[str, Checksum]:
    """Write one file, or shards of at most so many bytes (or one tensor) and their index; checksums by file.

    Raises:
        ValueError: a number is not finite, or a precision is none that safetensors has.
    """
    shards = _shards(weights, max_bytes=max_shard_bytes)
    if len(shards) == 1:
        return {name: folder.write(name, _segments(shards[0]), progress=progress).checksum}
    stem, places, checksums = Path(name).stem, {}, {}
    for number, shard in enumerate(shards):
        file = f"{stem}-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        places |= dict.fromkeys(shard, file)
        checksums[file] = folder.write(file, _segments(shard), progress=progress).checksum
    total = sum(one.num_bytes for one in weights.values())
    content = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}, indent=1)
    segment = Segment(0, lambda stream: stream.write(content.encode()))
    index = f"{name}.index.json"
    checksums[index] = folder.write(index, [segment], progress=progress).checksum
    return checksums


def _shards(weights: Weights, *, max_bytes: int | None) -> list[dict[str, Deferred]]:
    shards: list[dict[str, Deferred]] = [{}]
    num_bytes = 0
    for name, one in weights.items():
        if max_bytes is not None and shards[-1] and num_bytes + one.num_bytes > max_bytes:
            shards.append({})
            num_bytes = 0
        shards[-1][name] = one
        num_bytes += one.num_bytes
    return shards


def _segments(weights: Mapping[str, Deferred]) -> list[Segment]:
    """Header and tensors. Wide numbers first, so that all are aligned to their width, as the library has them."""
    names = sorted(weights, key=lambda name: -weights[name].dtype.itemsize)
    header = _header({name: weights[name] for name in names})
    segments = [Segment(len(header), lambda stream: stream.write(header))]
    return segments + [Segment(weights[name].num_bytes, _writing(name, weights[name])) for name in names]


def _header(weights: Mapping[str, Deferred]) -> bytes:
    spelled = {dtype: name for name, dtype in DTYPES.items()}
    values: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, one in weights.items():
        if one.dtype not in spelled:
            raise ValueError(f"tensor {name} is in {one.dtype}, which safetensors has no name for; give --dtype")
        end = start + one.num_bytes
        values[name] = {"dtype": spelled[one.dtype], "shape": list(one.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(values, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _writing(name: str, one: Deferred) -> Callable[[IO[bytes]], None]:
    def write(stream: IO[bytes]) -> None:
        tensor = one.read()
        assert tuple(tensor.shape) == one.shape and tensor.dtype is one.dtype, (name, tensor.shape, tensor.dtype, one)
        check_finite(tensor, name=name)
        stream.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())

    return write
