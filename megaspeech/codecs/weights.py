"""Where a codec's published weights lie, which they are, and what to do where they lack; nothing is downloaded."""

import hashlib
import json
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.json"
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")  # the order in which transformers looks for them
VOLATILE = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
"""Keys of a config.json that say how the weights were saved, not what they are."""


def locate(path: str | Path, *, codec: str, needs: str, published: str) -> Path:
    """The folder that ``path`` means: itself, or the newest snapshot of that name in the Hugging Face cache.

    Args:
        path: ``codec.path`` of a config.
        codec: the kind of codec, for the message.
        needs: the files that such a folder holds, for the message.
        published: a name to download, for the message.

    Raises:
        ValueError: there is neither; says which files to put where.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if str(path) and Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(str(path), local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        raise ValueError(
            f"codec.path = {str(path)!r}: no such folder, and not in the Hugging Face cache; for {codec!r} name a "
            f"folder with {needs}, or run `hf download {published}` once and set codec.path = {published!r}"
        ) from None


def only_file(folder: Path, patterns: tuple[str, ...], *, codec: str, needs: str) -> Path:
    """The file of ``folder`` that matches the first pattern that any matches.

    Raises:
        ValueError: none or several match.
    """
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise ValueError(f"{folder}: {names} all match {pattern}; leave the one to use in a folder of its own")
        if found:
            return found[0]
    raise ValueError(f"{folder}: holds no {' or '.join(patterns)}; {codec!r} needs {needs} there")


def read_config(folder: Path, *, model_type: str, needs: str) -> dict[str, Any]:
    """The config.json of a folder in transformers' format.

    Raises:
        ValueError: it is missing, damaged, or another model's.
    """
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        found = config.get("model_type")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; {model_type!r} needs {needs} there") from None
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); fetch it again") from error
    if found != model_type:
        raise ValueError(f"{path}: model_type = {found!r}, expected {model_type!r}; name another folder in codec.path")
    return config


def fingerprint(weights: Path, *, config: dict[str, Any] | None = None) -> str:
    """16 hexadecimal digits over a file of weights as it was published, and over what matters of its config."""
    facts = {key: value for key, value in (config or {}).items() if key not in VOLATILE}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    with weights.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()[:16]
