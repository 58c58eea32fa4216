"""Opens a saved codec: ``codec.json`` names the class, the class reads the rest."""

import json
from collections.abc import Callable
from pathlib import Path

from megaspeech.codecs.protocol import Codec
from megaspeech.codecs.spectral import CODEC_FILE, SpectralCodec

LOADERS: dict[str, Callable[[Path], Codec]] = {SpectralCodec.name: SpectralCodec.load}


def load_codec(directory: str | Path) -> Codec:
    """The codec saved in ``directory``.

    Raises:
        ValueError: ``codec.json`` is missing, unreadable, or names a codec that is not known, or the codec's own
            loader refuses its tables.
    """
    path = Path(directory) / CODEC_FILE
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["name"]
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; fit a codec and save it there, or name its directory") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a codec description ({error!r}); save the codec again") from error
    if name not in LOADERS:
        raise ValueError(f"{path}: name = {name!r} is no known codec; known: {', '.join(sorted(LOADERS))}")
    return LOADERS[name](Path(directory))
