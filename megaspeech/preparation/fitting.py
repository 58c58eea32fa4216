"""What preparation needs first and does not find: the `spectral` codec, fitted, and a tokenizer, trained.

Both are made from some units of the training split, by one process: two that made them by themselves might not agree in
every bit, and then their shards would not go together. Array tasks find both, or say how to make them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from megaspeech.codecs.registry import load_codec
from megaspeech.codecs.spectral import CODEC_FILE, TABLES_FILE, SpectralCodec, SpectralConfig
from megaspeech.config import Config
from megaspeech.data.tokenizer import Tokenizer, train_tokenizer
from megaspeech.data.whole_files import replacing
from megaspeech.preparation.decode import Decoder, Rejection
from megaspeech.preparation.encoding import encoding_device
from megaspeech.preparation.prepare import limits_of
from megaspeech.preparation.reading import read_utterances, recordings_of
from megaspeech.preparation.sources import Unit, evenly_spread
from megaspeech.preparation.utterance import Utterance

SPECTRAL_FRAME_RATE = SpectralConfig.sample_rate / (SpectralConfig.hop * SpectralConfig.hops_per_frame)
MOST_UNITS = 20
"""That are read, spread over the sources: some 100,000 lines."""


def what_is_missing(config: Config) -> list[str]:
    """The keys of the config that name what is still to be made."""
    has_codec = config.codec.name != SpectralCodec.name or (Path(config.codec.path) / CODEC_FILE).is_file()
    has_tokenizer = Path(config.data.tokenizer).is_file()
    return ["codec.path"] * (not has_codec) + ["data.tokenizer"] * (not has_tokenizer)


def make_what_is_missing(config: Config, units: Sequence[Unit], *, say: Callable[[str], None]) -> None:
    """Fit the codec, train the tokenizer: those of the two that are not there.

    Raises:
        ValueError: no recording or no text can be used, or too few for what `[streams]` asks for.
    """
    missing = what_is_missing(config)
    if not missing:
        return
    utterances: list[Utterance] = []
    for unit in _some(units):
        utterances += read_utterances(unit, config=config, frame_rate=SPECTRAL_FRAME_RATE)[0]
    if "codec.path" in missing:
        say(_fit_codec(config, utterances))
    if "data.tokenizer" in missing:
        say(_train_tokenizer(config, utterances, units=units))


def load_codec_and_tokenizer(config: Config) -> tuple:
    """(codec, tokenizer) of the config, the codec on `preparation.device`."""
    codec = load_codec(config.codec.path, name=config.codec.name, num_codebooks=config.streams.num_codec_codebooks)
    return codec.to(encoding_device(config.preparation.device)), Tokenizer.load(config.data.tokenizer)


def frame_rate_of(config: Config) -> float:
    """Frames a second of the config's codec; those of `spectral` where there is no codec yet."""
    try:
        return load_codec(config.codec.path, name=config.codec.name).frame_rate
    except (ValueError, ImportError):
        return SPECTRAL_FRAME_RATE


def _some(units: Sequence[Unit]) -> list[Unit]:
    """Training units evenly spread over every source."""
    of_source: dict[str, list[Unit]] = {}
    for unit in units:
        if unit.split == "train":
            of_source.setdefault(unit.source.name, []).append(unit)
    share = max(1, MOST_UNITS // max(1, len(of_source)))
    return [unit for several in of_source.values() for unit in evenly_spread(several, most=share)]


def _fit_codec(config: Config, utterances: Sequence[Utterance]) -> str:
    sizes = SpectralConfig(num_codebooks=config.streams.num_codec_codebooks, cardinality=config.streams.cardinality)
    # As they are, whatever [augmentation] makes of them: a codec of clean speech.
    recordings = list(dict.fromkeys(replace(one, plan=None) for one in recordings_of(utterances)))
    chosen = np.random.default_rng(config.run.seed).permutation(len(recordings))[: config.preparation.fit_recordings]
    decoder = Decoder(
        sample_rate=sizes.sample_rate,
        num_threads=config.preparation.num_threads,
        limits=limits_of(config, frame_rate=SPECTRAL_FRAME_RATE),
        loudness=config.preparation.loudness,
    )
    results = [result for _, result in decoder.decode([recordings[index] for index in chosen])]
    waveforms = [result for result in results if not isinstance(result, Rejection)]
    if not waveforms:
        first = f"{results[0].path}: {results[0].reason}; and " if results else ""
        raise ValueError(f"{first}no {'other ' * bool(first)}recording of the train manifests can be used")
    codec = SpectralCodec.fit(waveforms, config=sizes)
    path = Path(config.codec.path)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path) as aside:
        codec.save(aside)
        for name in (TABLES_FILE, CODEC_FILE):  # the last one says that it is whole
            os.replace(Path(aside) / name, path / name)
    return (
        f"spectral codec fitted on {sum(map(len, waveforms)) / codec.sample_rate / 60:.0f} minutes: "
        f"{codec.num_codebooks} codebooks of {codec.cardinality} at {codec.frame_rate} frames a second"
    )


def _train_tokenizer(config: Config, utterances: Sequence[Utterance], *, units: Sequence[Unit]) -> str:
    texts = [utterance.text for utterance in utterances]
    languages = {utterance.task.target for utterance in utterances}
    languages |= {unit.source.target_lang for unit in units} - {""}
    tokenizer = train_tokenizer(texts, vocabulary_size=config.streams.text_cardinality, languages=languages)
    path = Path(config.data.tokenizer)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        aside.write_bytes(tokenizer.model)
    return f"tokenizer of {tokenizer.vocabulary_size} pieces trained on {len(texts):,} texts"
