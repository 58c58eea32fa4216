"""The quickstart's data stages: corpus, codec, tokenizer, shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from corpus import CorpusSettings, make_corpus
from tqdm import tqdm

from megaspeech.codecs.registry import load_codec
from megaspeech.codecs.spectral import SpectralCodec, SpectralConfig
from megaspeech.config import Config
from megaspeech.data.decode import Rejection, decode_files
from megaspeech.data.manifest import read_manifest
from megaspeech.data.prepare import prepare_shards
from megaspeech.data.tokenizer import Tokenizer, train_tokenizer

FIT_RECORDINGS = 1500
SPLITS = ("train", "valid")


def corpus(directory: Path) -> None:
    """Synthesise the spoken digits."""
    make_corpus(directory, settings=CorpusSettings())


def codec(corpus: Path, config: Config) -> None:
    """Fit the spectral codec on a share of the training recordings."""
    utterances = read_manifest(corpus / "train.jsonl")
    recordings = list(dict.fromkeys(path for utterance in utterances for path in utterance.recordings))
    chosen = np.random.default_rng(config.run.seed).permutation(len(recordings))[:FIT_RECORDINGS]
    decoded = decode_files([recordings[index] for index in chosen], sample_rate=SpectralConfig().sample_rate)
    waveforms = [wave for _, wave in tqdm(decoded, "decoded by DALI", len(chosen)) if not isinstance(wave, Rejection)]
    fitted = SpectralCodec.fit(waveforms)
    seconds = sum(map(len, waveforms)) / fitted.sample_rate
    fitted.save(config.codec.path)
    print(
        f"   fitted on {seconds / 60:.0f} minutes: {fitted.num_codebooks} codebooks of {fitted.cardinality} at "
        f"{fitted.frame_rate} frames a second"
    )


def shards(corpus: Path, config: Config) -> None:
    """Train the tokenizer, encode every recording, write one shard a task."""
    fitted = load_codec(config.codec.path)
    utterances = read_manifest(corpus / "train.jsonl")
    tokenizer = train_tokenizer(
        [utterance.text for utterance in utterances], vocabulary_size=config.streams.text_cardinality
    )
    Path(config.data.tokenizer).write_bytes(tokenizer.model)
    for split in SPLITS:
        utterances = read_manifest(corpus / f"{split}.jsonl")
        headers = prepare_shards(
            utterances,
            Path(config.data.directory) / split,
            config=config,
            codec=fitted,
            tokenizer=tokenizer,
            progress=lambda recordings, split=split: tqdm(recordings, f"{split}: recordings encoded"),
        )
        hours = sum(header.num_frames for header in headers.values()) / fitted.frame_rate / 3600
        samples = sum(header.num_samples for header in headers.values())
        print(f"   {split}: {samples:,} samples of {len(headers)} tasks, {hours:.1f} h")


def shards_exist(config: Config) -> bool:
    """True when every split is whole: a split's folder appears only then."""
    return Path(config.data.tokenizer).is_file() and all(
        (Path(config.data.directory) / split).is_dir() for split in SPLITS
    )


def tokenizer_of(config: Config) -> Tokenizer:
    """The run's tokenizer."""
    return Tokenizer.load(config.data.tokenizer)
