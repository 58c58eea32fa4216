"""Manifests to shards: `python tools/prepare_data.py CONFIG.toml TRAIN.jsonl VALID.jsonl [section.field=value ...]`.

Reads NeMo JSONL (megaspeech/preparation/manifests/nemo.py), decodes with DALI, and writes `data.directory`/train and
/valid, one shard a task. What is missing is made from the training manifest first: the `spectral` codec is fitted and
saved in `codec.path`, the tokenizer trained and saved in `data.tokenizer`. What is there is kept, so a killed run goes
on.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

FIT_RECORDINGS = 1500


def main(arguments: list[str]) -> int:
    """Run; returns the exit status."""
    if len(arguments) < 3:
        print(__doc__)
        return 2
    warnings.filterwarnings("ignore")
    from megaspeech.config import read_config

    try:
        config = read_config(arguments[0], arguments[3:])
        _prepare(config, train=Path(arguments[1]), valid=Path(arguments[2]))
    except (ValueError, ImportError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 1
    return 0


def _prepare(config, *, train: Path, valid: Path) -> None:
    from megaspeech.codecs.registry import load_codec
    from megaspeech.data.tokenizer import Tokenizer
    from megaspeech.preparation.manifests.nemo import read_manifest

    manifests = {"train": read_manifest(train), "valid": read_manifest(valid)}
    if not (Path(config.codec.path) / "codec.json").is_file():
        _fit_codec(config, manifests["train"])
    if not Path(config.data.tokenizer).is_file():
        _train_tokenizer(config, manifests["train"])
    codec, tokenizer = load_codec(config.codec.path), Tokenizer.load(config.data.tokenizer)
    for split, utterances in manifests.items():
        if not (Path(config.data.directory) / split).is_dir():  # it appears when all of it is written
            _write_shards(config, split, utterances, codec=codec, tokenizer=tokenizer)


def _fit_codec(config, utterances) -> None:
    """Fit the spectral codec on a share of the recordings."""
    import numpy as np
    from tqdm import tqdm

    from megaspeech.codecs.spectral import SpectralCodec, SpectralConfig
    from megaspeech.preparation.decode import Rejection, decode_files
    from megaspeech.preparation.prepare import recordings_of

    if config.codec.name != SpectralCodec.name:
        raise ValueError(
            f"codec.path: there is no codec in {config.codec.path!r}, and {config.codec.name!r} is not fitted"
        )
    sizes = SpectralConfig(num_codebooks=config.streams.num_codebooks, cardinality=config.streams.cardinality)
    recordings = recordings_of(utterances)
    chosen = np.random.default_rng(config.run.seed).permutation(len(recordings))[:FIT_RECORDINGS]
    decoded = decode_files([recordings[index].path for index in chosen], sample_rate=sizes.sample_rate)
    results = [result for _, result in tqdm(decoded, "decoded by DALI", len(chosen))]
    waveforms = [result for result in results if not isinstance(result, Rejection)]
    if not waveforms:
        raise ValueError(f"{results[0].path}: {results[0].reason}; and no other recording of the manifest can be read")
    codec = SpectralCodec.fit(waveforms, config=sizes)
    codec.save(config.codec.path)
    minutes = sum(map(len, waveforms)) / codec.sample_rate / 60
    print(
        f"spectral codec fitted on {minutes:.0f} minutes: {codec.num_codebooks} codebooks of {codec.cardinality} at "
        f"{codec.frame_rate} frames a second"
    )


def _train_tokenizer(config, utterances) -> None:
    from megaspeech.data.tokenizer import train_tokenizer

    texts = [utterance.text for utterance in utterances]
    languages = {utterance.task.target for utterance in utterances}
    tokenizer = train_tokenizer(texts, vocabulary_size=config.streams.text_cardinality, languages=languages)
    path = Path(config.data.tokenizer)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tokenizer.model)
    print(f"tokenizer of {tokenizer.vocabulary_size} pieces trained on {len(texts):,} texts")


def _write_shards(config, split: str, utterances, *, codec, tokenizer) -> None:
    from tqdm import tqdm

    from megaspeech.preparation.prepare import prepare_shards

    headers = prepare_shards(
        utterances,
        Path(config.data.directory) / split,
        config=config,
        codec=codec,
        tokenizer=tokenizer,
        progress=lambda recordings, total: tqdm(recordings, f"{split}: recordings encoded", total),
    )
    hours = sum(header.num_frames for header in headers.values()) / codec.frame_rate / 3600
    samples = sum(header.num_samples for header in headers.values())
    lost = len(utterances) - samples
    print(
        f"{split}: {samples:,} samples of {len(headers)} tasks, {hours:.1f} h"
        + (f"; {lost} left out, see {config.data.directory}/{split}/rejected.jsonl" if lost else "")
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
