"""From a manifest to shards: decode, encode, lay the samples out, one shard a task.

Nothing is lost silently: every sample that is left out, because a recording of its cannot be read or it is longer than
a training sample, is written to `rejected.jsonl` with its reason, and the rest goes on.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from megaspeech.codecs.protocol import Codec
from megaspeech.config import Config
from megaspeech.config.schema import StreamsSection
from megaspeech.data.shards import ShardHeader, write_shard
from megaspeech.data.tokenizer import Tokenizer
from megaspeech.preparation.compose import compose, shard_header
from megaspeech.preparation.decode import Rejection, decode_files
from megaspeech.preparation.utterance import Recording, Utterance

ENCODE_BATCH = 64
Progress = Callable[[Iterable, int], Iterable]


def prepare_shards(
    utterances: Sequence[Utterance],
    directory: str | Path,
    *,
    config: Config,
    codec: Codec,
    tokenizer: Tokenizer,
    progress: Progress | None = None,
) -> dict[str, ShardHeader]:
    """Write one shard a task into `directory`, which appears when all of it is written.

    Args:
        utterances: a manifest's lines.
        directory: replaced if it exists.
        config: names streams, delays and the longest sample.
        codec, tokenizer: what the codes and the text are made with.
        progress: wraps the iteration over recordings, of which there are so many: a progress bar.

    Returns:
        Headers by shard name.

    Raises:
        ValueError: codec or tokenizer are not those that `[streams]` describes, or no sample is left.
    """
    check_sizes(config.streams, codec=codec, tokenizer=tokenizer)
    directory = Path(directory)
    aside = directory.with_name(directory.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    codes, unreadable = encode_recordings(recordings_of(utterances), codec=codec, progress=progress)
    samples: dict[str, list[np.ndarray]] = defaultdict(list)
    rejected: list[dict[str, str]] = []
    for utterance in utterances:
        faults = {one.path: unreadable[one] for one in utterance.recordings if one in unreadable}
        if not faults:
            sample = compose(utterance, codes, config=config, codec=codec, tokenizer=tokenizer).codes_ST
            if sample.shape[1] <= config.data.num_frames:
                samples[utterance.task.key].append(sample)
                continue
            length = f"{sample.shape[1]} frames with prompt and delays"
            faults = {utterance.recordings[0].path: f"{length}, more than data.num_frames = {config.data.num_frames}"}
        for path, reason in faults.items():
            rejected.append({"path": str(path), "task": utterance.task.key, "reason": reason})
    if not samples:
        reasons = sorted({line["reason"] for line in rejected})
        raise ValueError(f"{directory}: no sample is left; the reasons: {reasons[:3]}")
    headers = {}
    for key, rows in samples.items():
        header = shard_header(key, config=config, codec=codec, tokenizer=tokenizer)
        headers[key] = write_shard(aside / key, rows, header=header)
    with (aside / "rejected.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in rejected)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(aside, directory)
    return headers


def check_sizes(streams: StreamsSection, *, codec: Codec, tokenizer: Tokenizer) -> None:
    """See that codes and text fit the streams. Fewer codebooks may be heard than the codec has: the first ones.

    Raises:
        ValueError: names the key of `[streams]`, its value and what it should be.
    """
    for key, size, what in (
        ("num_codebooks", codec.num_codebooks, f"codec {codec.name!r} has {codec.num_codebooks} codebooks"),
        ("cardinality", codec.cardinality, f"codec {codec.name!r} has codebooks of {codec.cardinality}"),
        ("text_cardinality", tokenizer.vocabulary_size, f"tokenizer has {tokenizer.vocabulary_size} pieces"),
    ):
        if getattr(streams, key) != size:
            raise ValueError(
                f"streams.{key} = {getattr(streams, key)}, but the {what}; set streams.{key} = {size}, "
                f"or make codec and tokenizer anew for these streams"
            )
    if streams.num_given_codebooks > codec.num_codebooks:
        raise ValueError(
            f"streams.num_given_codebooks = {streams.num_given_codebooks}, but the codec {codec.name!r} has "
            f"{codec.num_codebooks} codebooks; set it to {codec.num_codebooks} or less"
        )


def encode_recordings(
    recordings: Sequence[Recording], *, codec: Codec, progress: Progress | None = None
) -> tuple[dict[Recording, np.ndarray], dict[Recording, str]]:
    """(codes `[Q, T]` int64, reasons of rejection) by recording."""
    codes: dict[Recording, np.ndarray] = {}
    rejected: dict[Recording, str] = {}
    decoded = decode_files([one.path for one in recordings], sample_rate=codec.sample_rate)
    for batch in _batched(progress(decoded, len(recordings)) if progress else decoded, ENCODE_BATCH):
        good = [(recordings[index], samples) for index, samples in batch if not isinstance(samples, Rejection)]
        rejected.update({recordings[index]: item.reason for index, item in batch if isinstance(item, Rejection)})
        if good:
            codes.update(_encode(good, codec=codec))
    return codes, rejected


def recordings_of(utterances: Iterable[Utterance]) -> list[Recording]:
    """Every recording once, in order: many samples share one."""
    return list(dict.fromkeys(one for utterance in utterances for one in utterance.recordings))


def _encode(items: Sequence[tuple[Recording, np.ndarray]], *, codec: Codec) -> Iterator[tuple[Recording, np.ndarray]]:
    """Codes of recordings padded to one length; a codec is causal, so the padding changes nothing before it."""
    longest = max(len(samples) for _, samples in items)
    waveforms = torch.zeros(len(items), longest)
    for row, (_, samples) in enumerate(items):
        waveforms[row, : len(samples)] = torch.from_numpy(samples)
    codes_BQT = codec.encode(waveforms)
    for row, (recording, samples) in enumerate(items):
        yield recording, codes_BQT[row, :, : -(-len(samples) // codec.frame_size)].numpy()


def _batched(items: Iterable, size: int) -> Iterator[list]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
