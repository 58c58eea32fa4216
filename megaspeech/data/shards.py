"""Samples on disk: a megatron-core IndexedDataset of flattened codes `[T, S]`, a checksum of each, and a JSON header.

The header names everything the codes depend on, so that a trainer with another codec, tokenizer or stream layout
refuses the shard instead of learning nonsense. Nor is damage learned from: `PREFIX.bin` holds the samples, and
`PREFIX.xxh64` the checksum of each, compared whenever it is read; `PREFIX.idx` and `PREFIX.xxh64` are 28 bytes a sample
and compared whole, with a checksum in the header, when the shard is opened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megaspeech.config import Config
from megaspeech.data.storage import has_samples_here, open_samples
from megaspeech.data.tasks import ZERO_TOKEN
from megaspeech.data.whole_files import replacing

FORMAT = 3
READ_SIZE = 1 << 24  # bytes
REMEDY = "copy the shard again from where it is whole, or remove its directory and prepare the shards again"


class DamagedSampleError(ValueError):
    """A sample is not what was written; says which one, of which shard, and what is wrong."""


@dataclass(frozen=True)
class ShardHeader:
    """What a shard's codes mean. `silence` `[Q]` is the codec's codes for silence, `task` a `Task.key`."""

    format: int
    task: str
    codec: str
    codec_fingerprint: str
    tokenizer_fingerprint: str
    frame_rate: float
    cardinalities: tuple[int, ...]
    num_codebooks: int
    silence: tuple[int, ...]
    task_delay: int
    speech_lead: int
    num_samples: int = 0
    num_frames: int = 0
    num_bytes: dict[str, int] = field(default_factory=dict)
    """Size of each file beside the header, by suffix."""
    checksums: dict[str, str] = field(default_factory=dict)
    """xxh64 of the files that are compared whole, by suffix."""

    @classmethod
    def read(cls, prefix: str | Path) -> ShardHeader:
        """The header of `prefix`. Raises ValueError naming a file that is missing or not of this format."""
        path = Path(f"{prefix}.json")
        if not path.is_file():
            raise ValueError(f"data.mixture: there is no shard {prefix} ({path} is missing); run tools/prepare_data.py")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"shard {prefix}: {path} is not JSON any more ({error}); {REMEDY}") from error
        return cls.of(values, path=path)

    @classmethod
    def of(cls, values: dict[str, Any], *, path: Path) -> ShardHeader:
        """From JSON read from `path`. Raises ValueError naming it where it is no header of this format."""
        missing = [field.name for field in fields(cls) if field.name not in values]
        if values.get("format") != FORMAT or missing:
            raise ValueError(
                f"{path}: not a shard header of format {FORMAT}; remove {path.parent} and prepare the shards again"
            )
        sequences = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **sequences})

    @property
    def token_type(self) -> type[np.integer]:
        """Of the samples on disk."""
        return token_type(self.cardinalities)

    def check_files(self, prefix: str | Path) -> None:
        """Raises ValueError naming a file beside the header that is missing, cut short or damaged, and the remedy."""
        for suffix, expected in self.num_bytes.items():
            if suffix == "bin" and not has_samples_here(prefix):
                continue
            path = Path(f"{prefix}.{suffix}")
            if not path.is_file():
                raise ValueError(f"shard {prefix}: {path} is missing; {REMEDY}")
            if path.stat().st_size != expected:
                raise ValueError(
                    f"shard {prefix}: {path} has {path.stat().st_size:,} bytes instead of the {expected:,} that were "
                    f"written; {REMEDY}"
                )
        for suffix, expected in self.checksums.items():
            if _checksum_of(Path(f"{prefix}.{suffix}")) != expected:
                raise ValueError(f"shard {prefix}: the bytes of {prefix}.{suffix} are not those written; {REMEDY}")

    def check_run(self, config: Config, *, prefix: str | Path) -> None:
        """Raises ValueError naming the first difference between the shards and the run's streams and delays."""
        for section, name in (
            ("streams", "cardinalities"),
            ("streams", "num_codebooks"),
            ("data", "task_delay"),
            ("data", "speech_lead"),
        ):
            mine, theirs = getattr(getattr(config, section), name), getattr(self, name)
            if mine != theirs:
                raise ValueError(
                    f"shards {prefix}: their {name} is {theirs}, that of [{section}] {mine}; "
                    f"prepare the shards with this config, or train with the one they were made for"
                )


def token_type(cardinalities: Sequence[int]) -> type[np.integer]:
    """Of tokens of streams of `cardinalities` on disk: the shortest that holds the zero token and initial tokens.

    A vocabulary of 48,000 fits uint16, whose largest number then stands for the zero token: half the bytes of int32.
    """
    largest = max(cardinalities)
    return next(kind for kind in (np.int16, np.uint16, np.int32) if largest < np.iinfo(kind).max)


def check_origins(
    headers: Mapping[str, ShardHeader], *, codec: tuple[str, str] | None, tokenizer: tuple[str, str] | None
) -> None:
    """See that shards that are trained on together were made with the run's codec and tokenizer, or at least with one.

    Args:
        headers: of the shards, or sets of them, by name for the message.
        codec, tokenizer: (name for the message, fingerprint) of the run's own; None where it has none to compare with.

    Raises:
        ValueError: names the first one that differs, what in, and both values.
    """
    first, header = next(iter(headers.items()))
    expected: dict[str, tuple[str, object]] = {
        "codec_fingerprint": codec or (f"shards {first}", header.codec_fingerprint),
        "tokenizer_fingerprint": tokenizer or (f"shards {first}", header.tokenizer_fingerprint),
        "frame_rate": (f"shards {first}", header.frame_rate),
    }
    for prefix, header in headers.items():
        for name, (whose, value) in expected.items():
            if getattr(header, name) != value:
                raise ValueError(
                    f"shards {prefix}: their {name} is {getattr(header, name)}, that of {whose} is {value}; "
                    f"prepare the shards again with one codec and tokenizer, or name those that they were made with"
                )


def write_shard(prefix: str | Path, samples: Iterable[np.ndarray], *, header: ShardHeader) -> ShardHeader:
    """Write samples `[S, T]` and the header; the header comes last, so a shard with one is whole.

    Returns:
        The header with the number of samples and frames, sizes and checksums filled in.
    """
    prefix = Path(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.json").unlink(
        missing_ok=True
    )  # a kill shall not leave the old header beside half of the new samples
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=header.token_type)
    checksums, num_frames = [], 0
    for codes_ST in samples:
        tokens = np.ascontiguousarray(codes_ST.T).astype(header.token_type).reshape(-1)
        builder.add_item(torch.from_numpy(tokens))
        builder.end_document()
        checksums.append(xxhash.xxh64_intdigest(tokens.tobytes()))
        num_frames += codes_ST.shape[1]
    builder.finalize(f"{prefix}.idx")
    return finish_shard(
        prefix, header=replace(header, num_samples=len(checksums), num_frames=num_frames), checksums=checksums
    )


def finish_shard(prefix: str | Path, *, header: ShardHeader, checksums: Sequence[int]) -> ShardHeader:
    """Write the samples' checksums, and last the header with sizes and checksums of the files; returns it."""
    np.asarray(checksums, dtype=np.uint64).tofile(f"{prefix}.xxh64")
    header = replace(
        header,
        num_bytes={suffix: os.path.getsize(f"{prefix}.{suffix}") for suffix in ("bin", "idx", "xxh64")},
        checksums={suffix: _checksum_of(Path(f"{prefix}.{suffix}")) for suffix in ("idx", "xxh64")},
    )
    with replacing(f"{prefix}.json") as aside:
        aside.write_text(json.dumps(asdict(header), indent=1), encoding="utf-8")
    return header


def _checksum_of(path: Path) -> str:
    state = xxhash.xxh64()
    with path.open("rb") as file:
        while block := file.read(READ_SIZE):
            state.update(block)
    return state.hexdigest()


class Shard:
    """A shard opened for reading. `shard[i]` is sample i `[S, T]`; raises DamagedSampleError if it is not whole."""

    def __init__(self, prefix: str | Path) -> None:
        self.header, self.prefix, self.name = ShardHeader.read(prefix), str(prefix), Path(prefix).name
        if len(self) == 0:  # checked first: an empty file cannot be memory mapped
            raise ValueError(f"shard {prefix} holds no samples; look into rejected.jsonl beside it, or drop it")
        self.header.check_files(prefix)
        self._checksums = np.fromfile(f"{prefix}.xxh64", dtype=np.uint64)
        self._samples = open_samples(prefix)
        self._index = self._samples.index

    def close(self) -> None:
        """Give back its files; nothing can be read any more."""
        self._samples.close()

    def __len__(self) -> int:
        return self.header.num_samples

    def lengths(self, indexes: np.ndarray) -> np.ndarray:
        """Frames of samples `indexes`, without reading them."""
        return self._index.sequence_lengths[indexes] // len(self.header.cardinalities)

    def __getitem__(self, index: int) -> np.ndarray:
        size = int(self._index.sequence_lengths[index]) * np.dtype(self.header.token_type).itemsize
        try:
            content = self._samples.read(int(self._index.sequence_pointers[index]), size)
        except OSError as error:
            raise DamagedSampleError(f"sample {index} of shard {self.prefix}: unreadable: {error.strerror}") from error
        if len(content) < size:
            raise DamagedSampleError(
                f"sample {index} of shard {self.prefix}: {len(content):,} of its {size:,} bytes are left"
            )
        if xxhash.xxh64_intdigest(content) != self._checksums[index]:
            raise DamagedSampleError(f"sample {index} of shard {self.prefix}: its checksum is not the one written")
        codes_TS = np.frombuffer(content, dtype=self.header.token_type).reshape(-1, len(self.header.cardinalities))
        if self.header.token_type is not np.uint16:
            return codes_TS.T.copy()
        return np.where(codes_TS == np.iinfo(np.uint16).max, ZERO_TOKEN, codes_TS.astype(np.int32)).T.copy()
