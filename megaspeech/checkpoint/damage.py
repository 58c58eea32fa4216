"""Is a checkpoint whole? Checks that read no weights: every file is there, readable or as long as it should be."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader

from megaspeech.config import read_config

CONFIG = "config.toml"
FORMAT_FILE, COMMON_FILE, INDEX_FILE = "metadata.json", "common.pt", ".metadata"
"""megatron-core's: the format's name, what is not sharded, and where in which data file each tensor lies."""


def find_damage(path: str | Path) -> str | None:
    """What is wrong with the checkpoint folder `path`, in words; None where it is whole."""
    path = Path(path)
    for name in (CONFIG, FORMAT_FILE, COMMON_FILE, INDEX_FILE):
        if not (path / name).is_file():
            return f"{name} is missing"
    checked = COMMON_FILE
    try:
        with zipfile.ZipFile(path / COMMON_FILE) as common:
            if common.testzip() is not None:
                return f"{COMMON_FILE} is corrupt"
        checked = FORMAT_FILE
        json.loads((path / FORMAT_FILE).read_text(encoding="utf-8"))
        checked = CONFIG
        read_config(path / CONFIG)
        checked = INDEX_FILE
        sizes = _data_files(path)
    except Exception as error:  # what unpickling torn bytes raises is anyone's guess
        return f"{checked} is unreadable ({' '.join(str(error).split())})"
    return _damaged_data_file(path, sizes)


def _data_files(path: Path) -> dict[str, int]:
    """Least size in bytes of every data file, by name, as the index has it."""
    sizes: dict[str, int] = {}
    for place in FileSystemReader(path).read_metadata().storage_data.values():
        sizes[place.relative_path] = max(sizes.get(place.relative_path, 0), place.offset + place.length)
    return sizes


def _damaged_data_file(path: Path, sizes: dict[str, int]) -> str | None:
    for name, size in sizes.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (path / name).stat().st_size < size:
            return f"{name} has {(path / name).stat().st_size:,} bytes of {size:,}"
    return None
