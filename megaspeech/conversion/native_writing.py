"""A native checkpoint written a tensor at a time, as one rank would save it that has no optimizer."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from megaspeech.checkpoint.checksums import CHECKSUMS, write_checksums
from megaspeech.checkpoint.origin import CONFIG, StreamManifest
from megaspeech.checkpoint.state import metadata
from megaspeech.checkpoint.writing import Snapshot, write_format
from megaspeech.config import write_config
from megaspeech.config.computation import ParallelSection
from megaspeech.conversion.deferred import Deferred
from megaspeech.conversion.native import check_native, chunk_of, pieces, whole_model
from megaspeech.conversion.stored import StoredModel
from megaspeech.conversion.writing import Aside, Progress, Segment, check_finite

FILE_BYTES = 4 << 30
"""About as long as a file gets: ranks that look for damage read a share of the files each."""


@dataclass(frozen=True)
class _Item:
    """What is kept under a name of its own: a piece of a tensor, or an object."""

    place: MetadataIndex
    tensor: TensorStorageMetadata | None
    segment: Segment


def write_native(
    model: StoredModel, folder: Aside, *, manifest: StreamManifest, progress: Progress = lambda _: None
) -> None:
    """Write what a run takes as `checkpoint.seed_checkpoint` into a folder.

    Raises:
        ValueError: the tensors are not those of the config, or hold numbers that are not finite.
    """
    check_native(model)
    config = model.config.model_copy(update={"parallel": ParallelSection()})
    state = whole_model(config, device="meta").sharded_state_dict(metadata=metadata())
    index, results, checksums = Metadata(state_dict_metadata={}), [], {}
    for number, items in enumerate(_files(state, model)):
        name, start = f"__0_{number}.distcp", 0
        written = folder.write(name, [item.segment for item in items], progress=progress)
        checksums[name] = written.checksum
        for item, end in zip(items, written.ends, strict=True):
            _note(index, item)
            results.append(WriteResult(item.place, end - start, _StorageInfo(name, start, end - start)))
            start = end
    _write_index(folder.path, index, results)
    common = save_preprocess({"model": {"chunk0": state}})[1]
    buffer = io.BytesIO()
    torch.save(common, buffer)
    write_format(Snapshot({}, buffer.getvalue(), 0), folder.path)
    write_config(config, folder.path / CONFIG)
    manifest.write(folder.path)
    (folder.path / CHECKSUMS).unlink(missing_ok=True)  # of a conversion that was killed after it
    write_checksums(folder.path, folder.checksums(checksums))


def _files(state: dict[str, ShardedBase], model: StoredModel) -> Iterator[list[_Item]]:
    """The items of each file: objects first, then the tensors in the model's order, so that equal models make equal
    files wherever they come from."""
    items, num_bytes = [_object(place) for place in state.values() if isinstance(place, ShardedObject)], 0
    for name, one in ((name, model.weights[name]) for name in state if name in model.weights):
        if num_bytes and num_bytes + one.num_bytes > FILE_BYTES:
            yield items
            items, num_bytes = [], 0
        items += _pieces_of(name, one, place=state[name])
        num_bytes += one.num_bytes
    yield items


def _object(place: ShardedObject) -> _Item:
    """What layers keep beside their weights (`_extra_state`): nothing, in megatron-core's own layers."""
    data = io.BytesIO()
    torch.save([place.data], data)  # a list, as megatron-core has it
    segment = Segment(0, lambda stream: stream.write(data.getbuffer()))
    return _Item(MetadataIndex(place.unique_key), None, segment)


def _pieces_of(name: str, one: Deferred, *, place: ShardedBase) -> list[_Item]:
    reading, items = _HeldReading(name, one, place=place), []
    for number, piece in enumerate(pieces(place, torch.empty(one.shape, dtype=one.dtype, device="meta"))):
        chunk = chunk_of(piece)
        stored = TensorStorageMetadata(TensorProperties(dtype=one.dtype), torch.Size(piece.global_shape), [chunk])
        num_bytes = chunk.sizes.numel() * one.dtype.itemsize
        write = reading.writer(number, sizes=chunk.sizes)
        items.append(_Item(MetadataIndex(piece.key, chunk.offsets), stored, Segment(num_bytes, write)))
    return items


class _HeldReading:
    """A tensor that is read for its first piece, and held until its last is written."""

    def __init__(self, name: str, one: Deferred, *, place: ShardedBase) -> None:
        self.name, self.one, self.place = name, one, place
        self.left: list[Tensor] = []

    def writer(self, number: int, *, sizes: torch.Size) -> Any:
        def write(stream: IO[bytes]) -> None:
            if not self.left:
                tensor = self.one.read()
                check_finite(tensor, name=self.name)
                self.left = [piece.data for piece in pieces(self.place, tensor)][number:]
            # A view is saved with all that lies behind it, so it must be no view.
            torch.save(_alone(self.left.pop(0)).view(sizes), stream)

        return write


def _alone(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def _note(index: Metadata, item: _Item) -> None:
    """Put an item into the index; the chunks of one tensor are gathered."""
    known = index.state_dict_metadata
    if item.tensor is None:
        known[item.place.fqn] = BytesStorageMetadata()
    elif item.place.fqn in known:
        known[item.place.fqn].chunks.extend(item.tensor.chunks)
    else:
        known[item.place.fqn] = item.tensor


def _write_index(directory: Path, index: Metadata, results: list[WriteResult]) -> None:
    writer = FileSystemWriter(directory)
    writer.save_id = ""  # drawn anew each time; a conversion twice gives equal bytes
    writer.finish(index, [results])
