"""Samples on disk: a megatron-core IndexedDataset of flattened codes `[T, S]`, and a JSON header beside it.

The header names everything the codes depend on, so that a trainer with another codec, tokenizer or stream layout
refuses the shard instead of learning nonsense.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megaspeech.config import Config

FORMAT = 1


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

    @classmethod
    def read(cls, prefix: str | Path) -> ShardHeader:
        """The header of `prefix`. Raises ValueError naming a file that is missing or not of this format."""
        path = Path(f"{prefix}.json")
        if not path.is_file():
            raise ValueError(f"data.mixture: there is no shard {prefix} ({path} is missing); run tools/prepare_data.py")
        values = json.loads(path.read_text(encoding="utf-8"))
        missing = [field.name for field in fields(cls) if field.name not in values]
        if values.get("format") != FORMAT or missing:
            raise ValueError(f"{path}: not a shard header of format {FORMAT}; prepare the shards again")
        sequences = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **sequences})

    def check_run(self, config: Config, *, prefix: str | Path) -> None:
        """Raises ValueError naming the first difference between the shard and the run's streams and delays."""
        for section, name in (
            ("streams", "cardinalities"),
            ("streams", "num_codebooks"),
            ("data", "task_delay"),
            ("data", "speech_lead"),
        ):
            mine, theirs = getattr(getattr(config, section), name), getattr(self, name)
            if mine != theirs:
                raise ValueError(
                    f"shard {prefix}: its {name} is {theirs}, that of [{section}] {mine}; "
                    f"prepare the shards with this config, or train with the one they were made for"
                )


def check_origins(
    prefixes: Sequence[str | Path], *, codec: tuple[str, str] | None, tokenizer: tuple[str, str] | None
) -> None:
    """See that shards that are trained on together were made with the run's codec and tokenizer, or at least with one.

    Args:
        prefixes: of the shards.
        codec, tokenizer: (name for the message, fingerprint) of the run's own; None where it has none to compare with.

    Raises:
        ValueError: names the first shard that differs, what in, and both values.
    """
    headers = {str(prefix): ShardHeader.read(prefix) for prefix in prefixes}
    first, header = next(iter(headers.items()))
    expected: dict[str, tuple[str, object]] = {
        "codec_fingerprint": codec or (f"shard {first}", header.codec_fingerprint),
        "tokenizer_fingerprint": tokenizer or (f"shard {first}", header.tokenizer_fingerprint),
        "frame_rate": (f"shard {first}", header.frame_rate),
    }
    for prefix, header in headers.items():
        for name, (whose, value) in expected.items():
            if getattr(header, name) != value:
                raise ValueError(
                    f"shard {prefix}: its {name} is {getattr(header, name)}, that of {whose} is {value}; "
                    f"prepare the shards again with one codec and tokenizer, or name those that they were made with"
                )


def write_shard(prefix: str | Path, samples: Iterable[np.ndarray], *, header: ShardHeader) -> ShardHeader:
    """Write samples `[S, T]` and the header; the header comes last, so a shard with one is whole.

    Returns:
        The header with the number of samples and frames filled in.
    """
    prefix = Path(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    # -1 and initial tokens included, int16 holds cardinalities up to 32,767.
    dtype = np.int16 if max(header.cardinalities) < np.iinfo(np.int16).max else np.int32
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    num_samples = num_frames = 0
    for codes_ST in samples:
        builder.add_item(torch.from_numpy(np.ascontiguousarray(codes_ST.T).reshape(-1)))
        builder.end_document()
        num_samples, num_frames = num_samples + 1, num_frames + codes_ST.shape[1]
    builder.finalize(f"{prefix}.idx")
    header = ShardHeader(**{**asdict(header), "num_samples": num_samples, "num_frames": num_frames})
    aside = Path(f"{prefix}.json.part")
    aside.write_text(json.dumps(asdict(header), indent=1), encoding="utf-8")
    os.replace(aside, f"{prefix}.json")
    return header


class Shard:
    """A shard opened for reading, memory mapped. `shard[i]` is sample i `[S, T]`."""

    def __init__(self, prefix: str | Path) -> None:
        self.header = ShardHeader.read(prefix)
        self.name = Path(prefix).name
        if len(self) == 0:  # checked first: an empty file cannot be memory mapped
            raise ValueError(f"shard {prefix} holds no samples; look into rejected.jsonl beside it, or drop it")
        self._codes = IndexedDataset(str(prefix), mmap=True)

    def __len__(self) -> int:
        return self.header.num_samples

    def __getitem__(self, index: int) -> np.ndarray:
        # A copy, because a view of the memory map would die with the shard.
        return self._codes[index].reshape(-1, len(self.header.cardinalities)).T.copy()
