"""Where the bytes of shards are: files, or objects in S3 (megatron-core's object storage reader).

Of shards in S3 the indexes, 28 bytes a sample, are fetched once to `data.index_cache`, a folder on each node's own
disk; samples are read where they are. Credentials, region and endpoint are boto3's: from its environment variables and
files.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.object_storage_utils import ObjectStorageConfig, parse_s3_path

from megaspeech.config.schema import DataSection
from megaspeech.data.whole_files import replacing

S3 = "s3://"
ORIGIN = "origin"
"""File in a fetched folder that names the one in S3."""
REQUEST_BYTES = 1 << 16
"""Read at once, at least: about a sample. Shuffled samples are not neighbours."""
CONNECTIONS = 16


def shards_directory(data: DataSection, split: str, *, names: Iterable[str]) -> Path:
    """The local folder of a split's sets of shards; from S3 the indexes of `names` are fetched to it first.

    Raises:
        ValueError: `data.index_cache` or boto3 is missing, or S3 cannot be reached; names the remedy.
    """
    if not data.directory.startswith(S3):
        return Path(data.directory) / split
    if not data.index_cache:
        raise ValueError(f"data.index_cache: is empty, but data.directory = {data.directory}; name a local folder")
    location = f"{data.directory.rstrip('/')}/{split}"
    bucket, key = parse_s3_path(location)
    with _one_line_errors(location), _locked(Path(data.index_cache)):
        for name in names:
            _fetch(bucket, f"{key}/{name}/", cache=Path(data.index_cache))
    return Path(data.index_cache) / bucket / key


def _fetch(bucket: str, prefix: str, *, cache: Path) -> None:
    """All objects under `prefix` but samples; those that are here in their size, of their time, are left alone."""
    client = _client()
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    found = [entry for page in pages for entry in page.get("Contents", ()) if not entry["Key"].endswith(".bin")]

    def fetch(entry: dict[str, Any]) -> None:
        path, written = cache / bucket / entry["Key"], int(entry["LastModified"].timestamp())
        if path.is_file() and (path.stat().st_size, path.stat().st_mtime) == (entry["Size"], written):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as aside:
            client.download_file(bucket, entry["Key"], str(aside))
            os.utime(aside, (written, written))

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(fetch, found))
    for folder in {(cache / bucket / entry["Key"]).parent for entry in found}:
        (folder / ORIGIN).write_text(f"{S3}{folder.relative_to(cache).as_posix()}", encoding="utf-8")


class FileBytes:
    """The samples of a shard in files. A forked process may go on reading beside its parent.

    `index` is megatron-core's, of lengths and places. Samples are read, not memory mapped: of a file that is cut short
    or cannot be read any more, a map kills the process (SIGBUS), where a read says so.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.index = IndexedDataset(str(prefix), mmap=False).index
        self._file = open(f"{prefix}.bin", "rb", buffering=0)  # noqa: SIM115 (closed by close())

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on; fewer where the file ends before. Raises OSError."""
        return os.pread(self._file.fileno(), size, offset)

    def close(self) -> None:
        """Nothing can be read any more."""
        self._file.close()


class S3Bytes:
    """The samples of a shard in S3; `index` as in `FileBytes`.

    Args:
        prefix: local, of the fetched index.
        origin: of the folder, in S3.
    """

    def __init__(self, prefix: str | Path, *, origin: str) -> None:
        prefix = Path(prefix)
        self._location = f"{origin}/{prefix.name}"
        self._cache = prefix.parents[len(parse_s3_path(origin)[1].split("/")) + 1]
        dataset = self._open()
        self.index, self._reader, self._owner = dataset.index, dataset.bin_reader, os.getpid()

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on. Raises OSError, after boto3's own attempts."""
        import botocore.exceptions

        try:
            if self._owner != os.getpid():  # connections cannot be shared with a parent
                self._owner, self._reader = os.getpid(), self._open().bin_reader
            return self._reader.read(np.uint8, size, offset).tobytes()
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError, AssertionError) as error:
            raise OSError(0, f"S3: {error or 'the object is shorter'}") from error

    def _open(self) -> IndexedDataset:
        config = ObjectStorageConfig(path_to_idx_cache=str(self._cache), bin_chunk_nbytes=REQUEST_BYTES)
        return IndexedDataset(self._location, mmap=False, object_storage_config=config)

    def close(self) -> None:
        """Nothing can be read any more."""
        self._reader = None


def open_samples(prefix: str | Path) -> FileBytes | S3Bytes:
    """The samples of shard `prefix`, wherever they are."""
    origin = Path(prefix).parent / ORIGIN
    if origin.is_file():
        return S3Bytes(prefix, origin=origin.read_text(encoding="utf-8"))
    return FileBytes(prefix)


def has_samples_here(prefix: str | Path) -> bool:
    """Whether the samples of shard `prefix` lie beside its index."""
    return not (Path(prefix).parent / ORIGIN).is_file()


def _client() -> Any:
    try:
        import boto3
    except ImportError as error:
        raise ValueError("data.directory: reading from S3 needs boto3; pip install megaspeech[s3]") from error
    return boto3.client("s3")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One rank of a node fetches, the others find what it fetched."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _one_line_errors(location: str) -> Iterator[None]:
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        if not type(error).__module__.startswith(("botocore", "boto3", "s3transfer")):
            raise
        raise ValueError(
            f"data.directory: {location} cannot be read ({error}); check its name, and boto3's credentials, region and "
            f"AWS_ENDPOINT_URL"
        ) from error
