"""What a checkpoint was made with, and whether this run may go on from it: model, streams, codec, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaspeech.config import Config, read_config

if TYPE_CHECKING:
    from megaspeech.data.shards import ShardHeader

CONFIG, MANIFEST = "config.toml", "manifest.json"
SHAPE_SECTIONS = ("streams", "temporal", "depth")
NO_SHAPE = {"moe_aux_loss_coeff", "moe_token_dispatcher_type"}
"""Keys of those sections that may change in the course of a run."""


@dataclass(frozen=True)
class StreamManifest:
    """What the streams of a checkpoint's model mean, in the words of `data.shards.ShardHeader` and `[streams]`.

    `cardinalities` and `delays` are `[S]`; the first stream is text, then come `num_codebooks` predicted ones. What a
    conversion from another format cannot know is None.
    """

    codec: str | None
    codec_fingerprint: str | None
    tokenizer_fingerprint: str | None
    frame_rate: float | None
    cardinalities: tuple[int, ...]
    num_codebooks: int
    delays: tuple[int, ...]
    text_pad_id: int
    text_end_pad_id: int

    @classmethod
    def of(cls, header: ShardHeader, config: Config) -> StreamManifest:
        """That of a run that trains on shards with this header, which has been checked against the config."""
        names = ("codec", "codec_fingerprint", "tokenizer_fingerprint", "frame_rate")
        return cls.of_streams(config, **{name: getattr(header, name) for name in names})

    @classmethod
    def of_streams(
        cls,
        config: Config,
        *,
        codec: str | None = None,
        codec_fingerprint: str | None = None,
        tokenizer_fingerprint: str | None = None,
        frame_rate: float | None = None,
    ) -> StreamManifest:
        """That of a model whose codec and tokenizer are told as far as they are known."""
        streams = config.streams
        return cls(
            codec=codec,
            codec_fingerprint=codec_fingerprint,
            tokenizer_fingerprint=tokenizer_fingerprint,
            frame_rate=frame_rate,
            cardinalities=streams.cardinalities,
            num_codebooks=streams.num_codebooks,
            delays=streams.delays,
            text_pad_id=streams.text_pad_id,
            text_end_pad_id=streams.text_end_pad_id,
        )

    @classmethod
    def read(cls, directory: str | Path) -> StreamManifest:
        """That of a whole checkpoint's folder."""
        values = json.loads((Path(directory) / MANIFEST).read_text(encoding="utf-8"))
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})

    def write(self, directory: Path) -> None:
        """Put `manifest.json` into a folder."""
        (directory / MANIFEST).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def check_shape(path: str | Path, *, config: Config) -> None:
    """Raises ValueError where the checkpoint's model is not the config's, naming the keys and both values."""
    saved = read_config(Path(path) / CONFIG)
    differences = []
    for section in SHAPE_SECTIONS:
        theirs, mine = getattr(saved, section).model_dump(), getattr(config, section).model_dump()
        differences += _differences(
            {f"{section}.{key}": value for key, value in theirs.items() if key not in NO_SHAPE},
            {f"{section}.{key}": value for key, value in mine.items()},
        )
    _refuse(path, differences, remedy="train with the checkpoint's shape, or from another directory")


def check_origin(path: str | Path, *, config: Config, manifest: StreamManifest, going_on: bool) -> None:
    """Raises ValueError where a run may not start from a checkpoint, naming what differs and both values.

    What the checkpoint does not know (None in its manifest) is not compared.

    Args:
        path: a whole checkpoint's folder.
        config: the run.
        manifest: what the run's shards hold.
        going_on: with the optimizer's state, not from the weights alone.
    """
    check_shape(path, config=config)
    theirs, mine = asdict(StreamManifest.read(path)), asdict(manifest)
    theirs = {key: value for key, value in theirs.items() if value is not None}
    remedy = "train on shards that were prepared with the checkpoint's codec and tokenizer, or from another directory"
    _refuse(path, list(_differences(theirs, mine)), remedy=remedy)
    if going_on:
        key, saved = "precision of parameters (precision.recipe)", read_config(Path(path) / CONFIG).precision
        remedy = "go on in its precision, or start from it as checkpoint.seed_checkpoint in another run.directory"
        _refuse(
            path,
            list(_differences({key: saved.params_dtype}, {key: config.precision.params_dtype})),
            remedy=remedy,
        )


def _differences(theirs: dict[str, Any], mine: dict[str, Any]) -> Iterator[str]:
    for key, value in theirs.items():
        if value != mine[key]:
            yield f"{key} is {value} there and {mine[key]} in this run"


def _refuse(path: str | Path, differences: list[str], *, remedy: str) -> None:
    if differences:
        raise ValueError(f"checkpoint {path}: {', '.join(differences)}; {remedy}")
