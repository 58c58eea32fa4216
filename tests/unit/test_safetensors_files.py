"""safetensors files, a tensor at a time: those of the library and ours are the same; what is wrong is named."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megaspeech.checkpoint.checksums import checksum
from megaspeech.conversion.deferred import Deferred
from megaspeech.conversion.safetensors_files import INDEX, WEIGHTS, open_safetensors, write_safetensors
from megaspeech.conversion.writing import aside

TENSORS = {
    "b.weight": torch.arange(12, dtype=torch.bfloat16).view(3, 4),
    "a.weight": torch.randn(5, 7),
    "ids": torch.arange(4),
    "nothing": torch.zeros(0, 2),
    "one": torch.tensor(2.5, dtype=torch.float64),
    "half": torch.randn(3).half(),
    "eight": torch.randn(3).to(torch.float8_e4m3fn),
    "turned": torch.randn(4, 6).T,
}


def write(tensors: dict[str, Tensor], path: Path, *, max_shard_bytes: int | None = None) -> dict:
    weights = {name: Deferred.of(tensor) for name, tensor in tensors.items()}
    with aside(path, request={}, num_bytes=0) as folder:
        written = write_safetensors(weights, folder, max_shard_bytes=max_shard_bytes)
        folder.finish(path)
    assert written == {file.name: checksum(file) for file in path.iterdir()}
    return written


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype and torch.equal(found[name].double(), tensor.double()), name


def test_what_is_written_the_library_reads(tmp_path: Path) -> None:
    assert list(write(TENSORS, tmp_path / "model")) == [WEIGHTS]
    assert_same(load_file(tmp_path / "model" / WEIGHTS), TENSORS)
    content = (tmp_path / "model" / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert all(header[name]["data_offsets"][0] % tensor.itemsize == 0 for name, tensor in TENSORS.items())  # aligned


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "any.safetensors")
    for path in (tmp_path, tmp_path / "any.safetensors"):
        found = open_safetensors(path)
        assert {name: (one.shape, one.dtype) for name, one in found.items()} == {
            name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()
        }
        assert_same({name: one.read() for name, one in found.items()}, TENSORS)


def test_shards(tmp_path: Path) -> None:
    written = write(TENSORS, tmp_path / "model", max_shard_bytes=170)
    assert len(written) == 3 and INDEX in written
    index = json.loads((tmp_path / "model" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    assert all(name in load_file(tmp_path / "model" / file) for name, file in index["weight_map"].items())
    for path in (tmp_path / "model", tmp_path / "model" / INDEX):
        assert_same({name: one.read() for name, one in open_safetensors(path).items()}, TENSORS)


def _cut(folder: Path) -> None:
    (file,) = folder.glob("*2-of-*")
    file.write_bytes(file.read_bytes()[:-1])


def _unknown_precision(folder: Path) -> None:
    (file,) = folder.glob("*1-of-*")
    file.write_bytes(file.read_bytes().replace(b'"BF16"', b'"U16" ', 1))


def _index(folder: Path, change: Callable[[dict], object]) -> None:
    values = json.loads((folder / INDEX).read_text())
    change(values["weight_map"])
    (folder / INDEX).write_text(json.dumps(values))


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    "damage, words",
    [
        (_cut, f"{SECOND} is cut short, or no safetensors file .*; fetch or write it again"),
        (lambda folder: (folder / SECOND).unlink(), f"{SECOND} is missing, and {INDEX} puts . tensors there; fetch it"),
        (_unknown_precision, f"{FIRST}: tensor b.weight is in U16, which is not one of"),
        (
            lambda folder: _index(folder, lambda places: places.update(odd=FIRST)),
            f"{FIRST} is not of this model: {INDEX} puts there tensor odd; fetch both again",
        ),
        (
            lambda folder: _index(folder, lambda places: places.pop("b.weight")),
            f"{FIRST} is not of this model: {INDEX} does not know tensor b.weight; fetch both again",
        ),
        (lambda folder: (folder / INDEX).write_text("{"), f"{INDEX} is no index of shards"),
        (lambda folder: (folder / INDEX).unlink(), "holds .*; name the one to read"),
    ],
)
def test_what_is_wrong_is_named(damage: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    write(TENSORS, tmp_path / "model", max_shard_bytes=170)
    damage(tmp_path / "model")
    with pytest.raises(ValueError, match=words) as raised:
        open_safetensors(tmp_path / "model")
    assert str(tmp_path / "model") in str(raised.value) and "\n" not in str(raised.value)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"there is no file {tmp_path}/{WEIGHTS}; give a safetensors file"):
        open_safetensors(tmp_path)


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    late = torch.zeros(3, 1 << 20, dtype=torch.bfloat16)
    late[2, -1] = float("-inf")
    with pytest.raises(ValueError, match="tensor late holds -inf"):
        write({"fine": torch.ones(3), "late": late}, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_no_more_than_a_tensor_is_held(tmp_path: Path) -> None:
    """Sixteen tensors of 16 MB go through this process, and it holds three at most at any time."""
    save_file({f"w{index}": torch.full((1 << 22,), float(index)) for index in range(16)}, tmp_path / WEIGHTS)
    before, held = _resident(), []
    weights = open_safetensors(tmp_path)
    with aside(tmp_path / "model", request={}, num_bytes=0) as folder:
        written = write_safetensors(weights, folder, progress=lambda _: held.append(_resident()))
        folder.finish(tmp_path / "model")
    assert max(held) - before < 3 * (16 << 20)
    assert written[WEIGHTS].num_bytes > 256 << 20


def _resident() -> int:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
