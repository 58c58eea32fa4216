"""The tokenizer and the codec that go with a model: found, checked against it, and put beside it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from megaspeech.checkpoint.origin import StreamManifest
from megaspeech.codecs.registry import load_codec
from megaspeech.codecs.weights import locate
from megaspeech.config import Config
from megaspeech.conversion.stored import Companions, StoredModel
from megaspeech.data.tokenizer import Tokenizer


def named(config: Config) -> Companions:
    """The files that a run's config names, as far as they are here."""
    tokenizer = Path(config.data.tokenizer)
    return Companions(tokenizer=tokenizer if tokenizer.is_file() else None, codec=codec_at(config.codec.path))


def codec_at(path: str | Path) -> Path | None:
    """Where a codec lies that is told by its path, or by its name in the Hugging Face cache; None if nowhere here."""
    if str(path) and Path(path).exists():
        return Path(path)
    try:
        return locate(path, codec="any", needs="its files", published="NAME")
    except ValueError:
        return None


def with_companions(model: StoredModel, *, tokenizer: Path | None, codec: Path | None) -> StoredModel:
    """The model with the companions that the user names, else its own.

    Raises:
        ValueError: the tokenizer is of another size than the model.
    """
    known = model.companions
    found = replace(known, tokenizer=tokenizer or known.tokenizer, codec=codec or known.codec)
    if found.tokenizer is not None:
        _check_size(found.tokenizer, model=model)
    return replace(model, companions=found)


def _check_size(tokenizer: Path, *, model: StoredModel) -> None:
    found, wanted = Tokenizer.load(tokenizer).vocabulary_size, model.config.streams.text_cardinality
    if found != wanted:
        raise ValueError(
            f"{tokenizer} has {found:,} pieces, and the model's text has {wanted:,} (streams.text_cardinality); "
            f"give the model's own by --tokenizer, or, to change its vocabulary, name it by --old-tokenizer"
        )


def missing(model: StoredModel) -> list[str]:
    """A line for each companion that is not known."""
    found, config = model.companions, model.config
    return [
        f"no {name} goes with the model ({key} = {value!r} is not here), and it cannot be run without: give --{name}"
        for name, path, key, value in (
            ("tokenizer", found.tokenizer, "data.tokenizer", config.data.tokenizer),
            ("codec", found.codec or found.model_with_mimi, "codec.path", config.codec.path),
        )
        if path is None
    ]


def num_bytes(places: Mapping[str, Path]) -> int:
    """That copies take."""
    files = [file for path in places.values() for file in (path.rglob("*") if path.is_dir() else [path])]
    return sum(file.stat().st_size for file in files if file.is_file())


def copy(places: Mapping[str, Path], folder: Path) -> None:
    """Put copies into a folder."""
    for name, path in places.items():
        if path.is_dir():
            shutil.copytree(path, folder / name, dirs_exist_ok=True)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


def manifest(model: StoredModel) -> StreamManifest:
    """What a native checkpoint says of its streams: of codec and tokenizer what their files tell, if they are there."""
    config, found = model.config, model.companions
    codec = None
    if found.codec is not None:
        codec = load_codec(found.codec, name=config.codec.name, num_codebooks=config.streams.num_codec_codebooks)
    return StreamManifest.of_streams(
        config,
        codec=codec and codec.name,
        codec_fingerprint=codec and codec.fingerprint,
        tokenizer_fingerprint=found.tokenizer and Tokenizer.load(found.tokenizer).fingerprint,
        frame_rate=codec and codec.frame_rate,
    )
