"""The formats that models come in and go out to, and who reads, writes and runs each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ROOM = "megaspeech.conversion"


@dataclass(frozen=True)
class Format:
    """A format; functions are named `module:function` and imported when they are first asked for.

    Attributes:
        opens: `(path, **options) -> StoredModel`.
        options: of the command, which `opens` takes too.
        files: `(model, **writer_options) -> ForeignFiles`; empty where nothing is written so, and for our own.
        writer_options: of the command, which `files` takes too.
        difference: `(native model, path, config) -> float`, the largest difference of logits from those of the
            format's own runtime, both in FP32; empty for our own.
        takes_shards: whether its runtime reads weights in several files.
    """

    opens: str
    options: tuple[str, ...] = ()
    files: str = ""
    difference: str = ""
    writer_options: tuple[str, ...] = ()
    takes_shards: bool = False


FORMATS = {
    "native": Format(opens="native:open_native"),
    "moshi": Format(
        opens="moshi:open_moshi",
        options=("drop", "lora"),
        files="moshi:moshi_files",
        difference="verify:moshi_difference",
        writer_options=("int8",),
    ),
    "transformers": Format(
        opens="transformers_folders:open_transformers",
        files="transformers_folders:transformers_files",
        difference="transformers_verify:transformers_difference",
        takes_shards=True,
    ),
    "llama": Format(
        opens="text_models:open_text_model", options=("config", "drop"), difference="text_models:text_difference"
    ),
    "random": Format(opens="random_model:open_random"),
}
NATIVE = "native"
TARGETS = tuple(name for name, form in FORMATS.items() if form.files or name == NATIVE)


def function(name: str) -> Callable[..., Any]:
    """The function of this room that a format names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(f"{ROOM}.{module}"), attribute)
