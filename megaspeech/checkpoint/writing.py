"""A sharded state to files: megatron-core's torch_dist format, written by torch's distributed checkpoint.

megatron-core's own writer starts processes that outlive a killed rank and go on writing into the folder of the next
start, needs seconds to start them, shares the storages of CPU tensors with them while the training changes those, and
leaves the other ranks waiting when one cannot write its part. torch's writes in this process, or a thread of it, and
tells every rank of a failure. What is written is the same: megatron-core plans it, and loads it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_checkpoint
import xxhash
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem

from megaspeech.checkpoint.checksums import Checksum
from megaspeech.checkpoint.ranks import RankFailure, Ranks, reason
from megaspeech.parallel.precision import without_scales

FORMAT = CheckpointingConfig("torch_dist", 1)
COMMON_FILE = "common.pt"
BYTES_AN_ITEM = 2048
"""Rounded up: what `torch.save` and the index add to every tensor."""


@dataclass
class Snapshot:
    """What this rank has to write.

    Attributes:
        sharded: tensors and objects by name, as torch's distributed checkpoint takes them.
        common: what is not sharded, serialised on the first rank; empty elsewhere.
        num_bytes: about how much that makes on the disk.
    """

    sharded: dict[str, Any]
    common: bytes
    num_bytes: int


def take_snapshot(state: dict[str, Any], *, rank: int, copy: bool) -> Snapshot:
    """This rank's part of a megatron-core sharded state dict; all ranks call this.

    Args:
        state: the sharded state dict; used up.
        rank: this rank.
        copy: copy the tensors, so that training may go on while they are written.
    """
    sharded, common = save_preprocess(state)
    mine: dict[str, list[ShardedTensor | ShardedObject]] = {}
    num_bytes = num_items = 0
    for item in nested_values(sharded):
        if not is_main_replica(item.replica_id):
            continue
        if isinstance(item, ShardedTensor):
            item.data = without_scales(item.data.detach())
            item.data = item.data.to("cpu", copy=True) if copy else item.data
            num_bytes += item.data.numel() * item.data.element_size()
        mine.setdefault(item.unique_key if isinstance(item, ShardedObject) else item.key, []).append(item)
        num_items += 1
    written = mcore_to_pyt_state_dict(mine)
    num_bytes += sum(len(value.getbuffer()) for value in written.values() if isinstance(value, io.BytesIO))
    buffer = io.BytesIO()
    if rank == 0:
        torch.save(common, buffer)
    return Snapshot(written, buffer.getvalue(), num_bytes + len(buffer.getbuffer()) + num_items * BYTES_AN_ITEM)


def write_snapshots(snapshot: Snapshot, directory: Path, *, ranks: Ranks) -> dict[str, Checksum]:
    """Write every rank's snapshot into a folder that is there; all ranks call this.

    Returns:
        Checksums, by file name, of the files that this rank wrote: of the bytes that were meant, counted on their way.

    Raises:
        RankFailure: on every rank, where one could not write.
    """
    writer, planner = _Writer(directory), MCoreSavePlanner(flatten_state_dict=False)
    try:
        torch_checkpoint.save(snapshot.sharded, storage_writer=writer, planner=planner, process_group=ranks.group)
    except CheckpointException as error:  # a BaseException
        raise RankFailure({rank: reason(failure) for rank, (failure, _) in error.failures.items()}) from None
    return writer.fs.checksums


def write_format(snapshot: Snapshot, directory: Path) -> None:
    """The first rank's part that is nobody else's: what is not sharded, and the format's name."""
    (directory / COMMON_FILE).write_bytes(snapshot.common)
    save_config(FORMAT, str(directory))


class _Writer(FileSystemWriter):
    """One file a rank: with more, torch loses the errors of all threads but one."""

    def __init__(self, directory: Path) -> None:
        # Tensors lie on the host, or are fetched one by one: torch's copying ahead opens streams on the wrong device.
        super().__init__(directory, thread_count=1, per_thread_copy_ahead=0)
        self.fs = _HashingFileSystem()

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except Exception as error:  # torch.save hides the system's error behind one of its own; chains are not gathered
            raise ValueError(reason(error)) from None


class _HashingFileSystem(FileSystem):
    """Takes the checksum of every file that is written."""

    def __init__(self) -> None:
        self.checksums: dict[str, Checksum] = {}

    @contextmanager
    def create_stream(self, path: Path, mode: str) -> Iterator[_HashedStream]:
        with super().create_stream(path, mode) as stream:
            hashed = _HashedStream(stream)
            yield hashed
        self.checksums[path.name] = Checksum(hashed.num_bytes, hashed.digest.hexdigest())

    def rename(self, path: Path, new_path: Path) -> None:
        super().rename(path, new_path)
        self.checksums[new_path.name] = self.checksums.pop(path.name)


class _HashedStream:
    """A file that is written from its start to its end."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.digest, self.num_bytes = stream, xxhash.xxh3_128(), 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.num_bytes += memoryview(data).nbytes
        return self.stream.write(data)

    def tell(self) -> int:
        return self.num_bytes

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        self.stream.flush()  # torch asks for it to have the file synced, and forgets what is still in the buffer
        return self.stream.fileno()

    def close(self) -> None:
        self.stream.close()
