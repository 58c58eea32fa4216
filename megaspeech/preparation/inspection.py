"""Looking into shards: their totals, and one sample taken apart into text, times, streams and sound.

Axes: Q codebooks, S streams (text, the model's own codebooks, the heard codebooks), T frames, N samples of a waveform.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megaspeech.codecs.protocol import Codec
from megaspeech.data.shard_set import CATALOGUE, Catalogue
from megaspeech.data.shards import Shard, ShardHeader
from megaspeech.data.tasks import ZERO_TOKEN, Task, Timing, take_apart
from megaspeech.data.tokenizer import Tokenizer
from megaspeech.data.transcript import WrittenWord, written_words

SUFFIXES = (".bin", ".idx", ".json", ".xxh64")
MEASURED_SHARDS = 64
"""Of a larger set, so many are opened to see how long samples are."""


@dataclass(frozen=True, eq=False)
class Summary:
    """What a shard or a set of shards holds.

    `header` is that of the first shard; the totals are over all of them. `lengths` `[N]` are frames of samples, those
    of `num_measured` shards.
    """

    header: ShardHeader
    num_shards: int
    num_samples: int
    num_frames: int
    num_measured: int
    lengths: np.ndarray

    @property
    def hours(self) -> float:
        """Of samples, prompts and silence among them."""
        return self.num_frames / self.header.frame_rate / 3600

    @property
    def num_tokens(self) -> int:
        """In all streams."""
        return self.num_frames * len(self.header.cardinalities)

    @property
    def padding(self) -> float:
        """Share of padding if every sample were filled up to the longest, as where samples are not packed."""
        return float(1 - self.lengths.mean() / self.lengths.max())


@dataclass(frozen=True, eq=False)
class Party:
    """What one party says in a sample: its codes `[Q, T]` and their sound `[N]` float32, both from frame 0 on."""

    codes: np.ndarray
    waveform: np.ndarray


@dataclass(frozen=True, eq=False)
class Inspected:
    """A sample, understood. `words` are those of its text stream; `parties` are "heard" and "said", those there are."""

    task: Task
    codes_ST: np.ndarray
    words: list[WrittenWord]
    parties: dict[str, Party]
    num_codebooks: int
    frame_rate: float
    sample_rate: int


def find_shards(path: str | Path) -> list[Path]:
    """Prefixes of the shards that `path` names: one shard, by any of its files or without suffix, or a directory's.

    Raises:
        ValueError: there is none; names the directories below that hold some.
    """
    path = Path(path)
    if not path.is_dir():
        prefix = path.with_suffix("") if path.suffix in SUFFIXES else path
        return [prefix]
    if (path / CATALOGUE).is_file():
        catalogue = Catalogue.read(path)
        return [catalogue.prefix(place) for place in range(len(catalogue.names))]
    prefixes = [file.with_suffix("") for file in sorted(path.glob("*.idx"))]
    if not prefixes:
        below = sorted({str(file.parent) for file in path.rglob("*.idx")})
        remedy = f"name one of {', '.join(below[:8])}" if below else "run tools/prepare_data.py"
        raise ValueError(f"{path}: there is no shard in it; {remedy}")
    return prefixes


def summarise(prefixes: Sequence[Path]) -> Summary:
    """Totals of shards. Raises ValueError where one is damaged, or holds another task than the first."""
    headers = [ShardHeader.read(prefix) for prefix in prefixes]
    for prefix, header in zip(prefixes, headers, strict=True):
        if header.task != headers[0].task:
            raise ValueError(f"shard {prefix}: holds {header.task}, the first one {headers[0].task}; name one of them")
    filled = [prefix for prefix, header in zip(prefixes, headers, strict=True) if header.num_samples]
    if not filled:
        raise ValueError(f"shard {prefixes[0]}: holds no samples; look into rejected.jsonl")
    measured = filled[:: -(-len(filled) // MEASURED_SHARDS)]
    lengths: list[int] = []
    for prefix in measured:
        shard = Shard(prefix)
        lengths.extend(shard.lengths(np.arange(len(shard))).tolist())
    return Summary(
        headers[0],
        num_shards=len(headers),
        num_samples=sum(header.num_samples for header in headers),
        num_frames=sum(header.num_frames for header in headers),
        num_measured=len(measured),
        lengths=np.asarray(lengths),
    )


def read_sample(prefixes: Sequence[Path], index: int) -> tuple[np.ndarray, ShardHeader, str]:
    """Sample `index`, counted over all shards: its codes `[S, T]`, its shard's header, and its name "shard:index".

    Raises:
        ValueError: there are not so many, or it is damaged.
    """
    first = 0
    for prefix in prefixes:
        header = ShardHeader.read(prefix)
        if 0 <= index - first < header.num_samples:
            return Shard(prefix)[index - first], header, f"{prefix.name}:{index - first}"
        first += header.num_samples
    raise ValueError(f"sample {index}: there are {first}, counted from 0")


def check_made_with(header: ShardHeader, *, codec: Codec, tokenizer: Tokenizer) -> None:
    """Raises ValueError where a shard was made with another codec or tokenizer: its codes would be noise."""
    for what, theirs, mine in (
        ("codec", header.codec_fingerprint, codec.fingerprint),
        ("tokenizer", header.tokenizer_fingerprint, tokenizer.fingerprint),
    ):
        if theirs != mine:
            raise ValueError(
                f"the shard was made with a {what} of fingerprint {theirs}, that of the config has {mine}; name the "
                f"config that it was prepared with"
            )


def inspect_sample(codes_ST: np.ndarray, *, header: ShardHeader, codec: Codec, tokenizer: Tokenizer) -> Inspected:
    """Take a sample apart and decode it. Codebooks that a party's streams leave out are taken to be silent."""
    task = Task.parse(header.task)
    timing = Timing(task_delay=header.task_delay, speech_lead=header.speech_lead)
    parts = take_apart(codes_ST, task=task, timing=timing, num_codebooks=header.num_codebooks)
    origin = timing.speech_origin(task)
    parties = {}
    for name, codes in (("heard", parts.heard), ("said", parts.spoken)):
        if codes is not None and len(codes):
            whole_QT = np.repeat(np.asarray(header.silence)[:, None], origin + codes.shape[1], axis=1)
            whole_QT[: len(codes), origin:] = codes
            waveform_N = codec.decode(torch.from_numpy(whole_QT)[None])[0].clamp(-1, 1)
            parties[name] = Party(whole_QT[: len(codes)], waveform_N.float().cpu().numpy())
    return Inspected(
        task,
        codes_ST,
        words=written_words(codes_ST[0], tokenizer=tokenizer),
        parties=parties,
        num_codebooks=header.num_codebooks,
        frame_rate=header.frame_rate,
        sample_rate=codec.sample_rate,
    )


def stream_lines(codes_ST: np.ndarray, *, header: ShardHeader, tokenizer: Tokenizer) -> Iterator[tuple[str, ...]]:
    """(frames, text, own codes, heard codes) of a sample, frames that follow each other and hold the same in one."""
    own = slice(1, 1 + header.num_codebooks)
    silence = np.asarray(header.silence)
    previous, first = None, 0
    for frame in range(codes_ST.shape[1] + 1):
        current = None
        if frame < codes_ST.shape[1]:
            column = codes_ST[:, frame]
            parties = (_party(column[own], silence=silence), _party(column[own.stop :], silence=silence))
            current = (_piece(int(column[0]), tokenizer=tokenizer), *parties)
        if current != previous:
            if previous is not None:
                yield (str(first) if first == frame - 1 else f"{first}-{frame - 1}", *previous)
            previous, first = current, frame


def _piece(token: int, *, tokenizer: Tokenizer) -> str:
    if token == ZERO_TOKEN:
        return "-"
    return tokenizer.processor.id_to_piece(token) if 0 <= token < tokenizer.vocabulary_size else f"id {token}"


def _party(codes: np.ndarray, *, silence: np.ndarray) -> str:
    if (codes == ZERO_TOKEN).all():
        return "-"
    return "silence" if (codes == silence[: len(codes)]).all() else " ".join(map(str, codes.tolist()))
