"""What is in a checkpoint, read from its small files; and what is in a run's folder of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megaspeech.checkpoint.checksums import CHECKSUMS, find_damage, read_checksums
from megaspeech.checkpoint.folders import REMOVED, UNFINISHED, named_latest, step_of
from megaspeech.checkpoint.origin import CONFIG, StreamManifest
from megaspeech.config import Config, read_config
from megaspeech.model.counting import count_parameters

OPTIMIZER = "optimizer."
LEFT = {UNFINISHED: "half-written, never read", REMOVED: "half-removed, never read"}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a checkpoint, whole; or, grouped, `count` tensors of equal names but for layer numbers."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    count: int = 1


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds.

    Attributes:
        step: training steps done; 0 where the folder has another name than a run gives.
        written: when, in ISO 8601.
        num_ranks: that wrote it.
        config: of the run.
        manifest: what the streams mean.
        parameters: of the model, by part.
        sizes: bytes on the disk, by part.
        tensors: of the model, then of the optimizer.
    """

    step: int
    written: str
    num_ranks: int
    config: Config
    manifest: StreamManifest
    parameters: dict[str, int]
    sizes: dict[str, int]
    tensors: tuple[TensorEntry, ...]

    @property
    def layout(self) -> str:
        """The layout it was written on, in words."""
        parallel = self.config.parallel
        described = parallel.describe(self.num_ranks // parallel.model_parallel_size)
        return f"{described}; {self.num_ranks} rank{'s' * (self.num_ranks > 1)}"


@dataclass(frozen=True)
class Found:
    """A folder beside others in a run's `checkpoints`. `damage` is None where nothing is wrong, or was looked for."""

    path: Path
    damage: str | None
    num_bytes: int
    is_latest: bool

    @property
    def is_finished(self) -> bool:
        """Whether it was written to the end."""
        return self.path.suffix not in LEFT


def read_contents(path: Path) -> Contents:
    """What the checkpoint folder `path` holds, weights unread.

    Raises:
        ValueError: a file that says so is missing or unreadable.
    """
    try:
        checksums, config = read_checksums(path), read_config(path / CONFIG)
        index = FileSystemReader(path).read_metadata()
        manifest = StreamManifest.read(path)
    except Exception as error:  # what unpickling torn bytes raises is anyone's guess
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    sizes = {"model": 0, "optimizer": 0}
    for place, stored in index.storage_data.items():
        sizes["optimizer" if place.fqn.startswith(OPTIMIZER) else "model"] += stored.length
    everything = sum(entry.num_bytes for entry in checksums.values()) + (path / CHECKSUMS).stat().st_size
    return Contents(
        step=step_of(path) if path.name.startswith("step_") else 0,
        written=datetime.fromtimestamp((path / CHECKSUMS).stat().st_mtime, tz=timezone.utc).isoformat(
            timespec="seconds"
        ),
        num_ranks=sum(name.endswith("_0.distcp") for name in checksums),
        config=config,
        manifest=manifest,
        parameters=count_parameters(config),
        sizes={**sizes, "index and rest": everything - sum(sizes.values())},
        tensors=tuple(sorted(_tensors(index), key=lambda entry: entry.name.startswith(OPTIMIZER))),
    )


def _tensors(index: Metadata) -> Iterator[TensorEntry]:
    for name, stored in index.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            dtype = stored.properties.dtype
            yield TensorEntry(
                name, tuple(stored.size), str(dtype).removeprefix("torch."), stored.size.numel() * dtype.itemsize
            )


def grouped(tensors: tuple[TensorEntry, ...]) -> list[TensorEntry]:
    """Tensors that differ in their layer's number alone as one, and the optimizer's by kind and part of the model."""
    groups: dict[tuple[str, tuple[int, ...], str], list[TensorEntry]] = {}
    for tensor in tensors:
        name, shape = re.sub(r"\.\d+\.", ".*.", tensor.name), tensor.shape
        if name.startswith(OPTIMIZER):
            name, shape = ".".join([*name.split(".")[:4], "*"]), ()
        groups.setdefault((name, shape, tensor.dtype), []).append(tensor)
    return [
        TensorEntry(*key, num_bytes=sum(tensor.num_bytes for tensor in group), count=len(group))
        for key, group in groups.items()
    ]


def checkpoint_folders(path: Path) -> list[Path]:
    """The checkpoints, also half-written ones, of a run, of its `checkpoints`, or `path` itself where it is one.

    Raises:
        ValueError: there are none.
    """
    if (path / CHECKSUMS).is_file():
        return [path]
    for directory in (path / "checkpoints", path):
        if folders := sorted(folder for folder in directory.glob("step_*") if folder.is_dir()):
            return folders
    raise ValueError(f"there is no checkpoint at {path}; name a run's directory, or a folder step_...")


def look_at(path: Path, *, verify: bool, progress: Callable[[int], object] = lambda _: None) -> Found:
    """The state of one of `checkpoint_folders`; with `verify` its files are read and their checksums compared."""
    damage = LEFT.get(path.suffix)
    if damage is None and verify:
        damage = find_damage(path, progress=progress)
    num_bytes = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return Found(path, damage, num_bytes, is_latest=named_latest(path.parent) == path)
