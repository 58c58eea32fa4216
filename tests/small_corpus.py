"""Recordings with manifests, a small codec and a tokenizer: what a preparation needs, made in a second."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from rich.console import Console

from megaspeech.codecs import SpectralCodec, SpectralConfig
from megaspeech.config import Config, read_config
from megaspeech.data.tokenizer import Tokenizer, train_tokenizer

RATE, FRAME = 16000, 1280
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SUFFIXES = ("wav", "flac", "ogg")


def voice(seconds: float, *, pitch: float) -> np.ndarray:
    """Harmonics under a moving formant, with pauses `[N]`."""
    time = np.arange(round(seconds * RATE)) / RATE
    glide = 900 + 600 * np.sin(8 * time + pitch)
    tone = sum(np.exp(-(((n * pitch - glide) / 500) ** 2)) * np.sin(2 * np.pi * n * pitch * time) for n in range(1, 25))
    return (0.15 * tone * (np.sin(10 * time) > -0.3)).astype(np.float32)


def make_codec() -> SpectralCodec:
    """For the streams of the preset "tiny"."""
    voices = [torch.from_numpy(voice(4.1, pitch=pitch)) for pitch in (95.0, 130.0, 180.0, 240.0)]
    return SpectralCodec.fit(
        voices, config=SpectralConfig(num_codebooks=4, cardinality=32, latent_dim=24, fit_frames=400)
    )


def make_tokenizer() -> Tokenizer:
    """Likewise."""
    return train_tokenizer([" ".join(DIGITS[i:] + DIGITS[:i]) for i in range(10)], vocabulary_size=48, languages=["en"])


def record(folder: Path, name: str, *, seconds: float, pitch: float = 120.0) -> Path:
    """A recording; a name without suffix is a WAV."""
    path = folder / (name if "." in name else f"{name}.wav")
    soundfile.write(path, voice(seconds, pitch=pitch), RATE)
    return path


def line(name: str, *, seconds: float | None = None, task: str = "asr", **more: Any) -> dict[str, Any]:
    """Of a NeMo manifest: "three", heard or said at 0.3 to 0.5 s."""
    words = [{"word": "three", "start": 0.3, "end": 0.5}]
    languages = {"source_lang": "en", "target_lang": "en"}
    duration = {} if seconds is None else {"duration": seconds}
    return {"audio_filepath": name, "taskname": task, "text": "three", "words": words, **languages, **duration, **more}


def write_manifest(path: Path, lines: Iterable[dict[str, Any] | str]) -> Path:
    """Lines as JSON; strings as they are."""
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    return path


def make_project(folder: Path, *overrides: str, **sources: Iterable[dict[str, Any] | str]) -> Config:
    """A config of the preset "tiny" with a source for each keyword, of which the lines are those to train on.

    Codec, tokenizer and shards are in `folder`, and so is the config, as config.toml.
    """
    tables = [
        f'[[sources]]\nname = "{name}"\ntrain = "{write_manifest(folder / f"{name}.jsonl", lines)}"\n'
        for name, lines in sources.items()
    ]
    (folder / "config.toml").write_text(
        f'[model]\npreset = "tiny"\n[codec]\npath = "{folder}/codec"\n'
        f'[data]\nnum_frames = 40\ndirectory = "{folder}/shards"\ntokenizer = "{folder}/tokenizer.model"\n'
        + "".join(tables)
    )
    return read_config(folder / "config.toml", overrides)


def make_lines(folder: Path, count: int) -> list[dict[str, Any]]:
    """Lines with recordings of many lengths and formats, some faulty, some shared by two tasks."""
    lines: list[dict[str, Any]] = []
    for index in range(count):
        seconds = 0.6 + 0.1 * (index * 7 % 13)
        path = record(folder, f"{index}.{SUFFIXES[index % 3]}", seconds=seconds, pitch=100 + 5 * (index % 20))
        if index % 11 == 5:
            path.write_bytes(path.read_bytes()[:900])
        lines.append(line(path.name, task="tts" if index % 4 == 3 else "asr"))
        if index % 6 == 0:
            lines.append(line(path.name, task="tts"))
    return lines


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path within."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def prepare(config: Config, *, codec: SpectralCodec, tokenizer: Tokenizer) -> tuple[Any, list]:
    """(the preparation of all units, the units), finished."""
    from megaspeech.preparation.prepare import Preparation
    from megaspeech.preparation.sources import list_units

    preparation = Preparation(config, codec=codec, tokenizer=tokenizer)
    units = list_units(config.sources, lines_per_shard=config.preparation.lines_per_shard)
    preparation.run(units)
    assert preparation.store.finish(units)
    return preparation, units


def shown(renderable: object) -> str:
    """What a terminal would show."""
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def prepare_units(
    config_file: Path, overrides: tuple[str, ...] = (), *, share: tuple[int, int] = (0, 1), killed_at: int = 0
) -> bool:
    """Prepare a share (I, N) of a project's units with the codec and tokenizer in its folder; whether all are done.

    Args:
        config_file: written by `make_project`.
        overrides: of the config.
        share: which units.
        killed_at: which of the renamings ends this process at once, counted from 1; 0 is none.
    """
    from megaspeech.preparation.fitting import load_codec_and_tokenizer
    from megaspeech.preparation.prepare import Preparation
    from megaspeech.preparation.sources import list_units

    rename, renamed = os.replace, []

    def counted(*paths: Any) -> None:
        renamed.append(paths)
        if len(renamed) == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*paths)

    os.replace = counted
    try:
        config = read_config(config_file, overrides)
        codec, tokenizer = load_codec_and_tokenizer(config)
        preparation = Preparation(config, codec=codec, tokenizer=tokenizer)
        units = list_units(config.sources, lines_per_shard=config.preparation.lines_per_shard)
        preparation.run(units[share[0] :: share[1]])
        return preparation.store.finish(units)
    finally:
        os.replace = rename
