"""Opens a codec by its name; a kind of codec is imported when it is first asked for."""

import importlib
from pathlib import Path

from megaspeech.codecs.protocol import Codec
from megaspeech.config import Config

LOADERS = {
    "spectral": "megaspeech.codecs.spectral:SpectralCodec",
    "mimi": "megaspeech.codecs.mimi:MimiCodec",
    "encodec": "megaspeech.codecs.encodec:EncodecCodec",
    "dac": "megaspeech.codecs.dac:DacCodec",
    "wavtokenizer": "megaspeech.codecs.wavtokenizer:WavTokenizerCodec",
}


def load_codec(path: str | Path, *, name: str = "spectral", num_codebooks: int | None = None) -> Codec:
    """The codec in a folder, on the CPU.

    Args:
        path: the folder; for codecs with published weights also their name in the Hugging Face cache, such as
            ``kyutai/mimi``. Nothing is downloaded.
        name: the kind of codec (``codec.name`` of a config).
        num_codebooks: how many to use, the first ones (``streams.num_codebooks``); all if None. ``spectral`` has as
            many as it was fitted with.

    Raises:
        ValueError: there is no codec of this name, its files are missing or damaged, or it has fewer codebooks.
        ImportError: the package that reads it is not installed.
    """
    if name not in LOADERS:
        raise ValueError(f"codec.name = {name!r} is no known codec; known: {', '.join(LOADERS)}")
    module, kind = LOADERS[name].split(":")
    return getattr(importlib.import_module(module), kind).load(path, num_codebooks=num_codebooks)


def codec_of(config: Config) -> Codec | None:
    """The codec that a config names, with as many codebooks as its model speaks, or hears; None without `codec.path`.

    Raises:
        ValueError, ImportError: as `load_codec`.
    """
    if not config.codec.path:
        return None
    return load_codec(config.codec.path, name=config.codec.name, num_codebooks=config.streams.num_codec_codebooks)
