"""The one door to Kyutai's `moshi` package: load an exported model, make a generator for it."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from megaspeech.preparation.encoding import encoding_device

if TYPE_CHECKING:
    from moshi.models import LMGen, LMModel

    TokenHook = Callable[[torch.Tensor], None]

MOSHI_VERSION = "0.2.13"
"""As pinned in constraints.txt."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
NOT_ARGUMENTS = ("model_type", "moshi_name", "mimi_name", "tokenizer_name", "lora_name", "lm_gen_config")
"""Keys of a config.json that are no arguments of `LMModel`."""


def import_moshi(device: str | torch.device = "cpu") -> ModuleType:
    """The `moshi.models` module.

    Raises:
        ImportError: it is not installed; says how to.
    """
    if torch.device(device).type != "cuda":
        # Read once, when moshi is imported. Without it the runtime compiles its last norm with inductor even on a
        # CPU: some 27 s in the first step, again for every new batch size, and an error where there is no C++ compiler.
        os.environ.setdefault("NO_TORCH_COMPILE", "1")
    try:
        import moshi.models
        import moshi.models.loaders
    except ImportError as error:
        raise ImportError(
            f"streaming runs on Kyutai's moshi runtime, which cannot be imported ({error}). Install it with "
            f"`pip install --no-deps moshi=={MOSHI_VERSION}` (its own pins exclude our torch) and the packages it "
            f"imports with `pip install einops sphn tqdm huggingface_hub`"
        ) from error
    return moshi.models


def place_of(device: str, *, dtype: str | None = None) -> tuple[torch.device, torch.dtype]:
    """(where a model computes, in which precision) by the tools' `--device` and `--dtype`.

    Args:
        device: torch's name; "auto" is the accelerator where there is one.
        dtype: a key of `DTYPES`; None is BF16 on an accelerator, FP32 on a CPU.

    Raises:
        ValueError: there is no such device here.
    """
    try:
        place = encoding_device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device}: it is not here ({reason}); take cpu, or auto for what is") from error
    return place, DTYPES[dtype or ("fp32" if place.type == "cpu" else "bf16")]


def load_runtime(
    directory: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> LMModel:
    """Load `config.json` and `model.safetensors` (packed names) of an exported model with moshi's own loaders.

    Args:
        directory: holds both files; `moshi_name` in the config may name other weights.
        device: where the model goes.
        dtype: of the weights once loaded.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: a file is missing or unreadable, or the two do not fit each other; names it and the remedy.
        ImportError: moshi is not installed.
    """
    directory = Path(directory)
    config = read_runtime_config(directory)
    weights = named_file(directory, config.get("moshi_name", WEIGHTS_FILE))
    _require_file(weights)
    if config.get("quantize"):
        _require_int8(directory, dtype=dtype)
    loaders = import_moshi(device).loaders
    gc.collect()  # models that have streamed refer to themselves; their memory is wanted now
    try:
        # Explicit paths everywhere: a None would be looked for on the hub.
        info = loaders.CheckpointInfo.from_hf_repo(
            str(directory),
            moshi_weights=weights,
            mimi_weights=directory,
            tokenizer=directory,
            config_path=directory / CONFIG_FILE,
        )
        return info.get_moshi(device=device, dtype=dtype)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"{weights} does not fit the memory of {device} in {dtype}; take another device") from error
    except (RuntimeError, TypeError, KeyError, AssertionError, SafetensorError) as error:
        raise ValueError(
            f"{directory}: {CONFIG_FILE} and {weights.name} do not make a model that moshi {MOSHI_VERSION} can load "
            f"({type(error).__name__}: {error}); export the checkpoint again"
        ) from error


def random_runtime(
    values: Mapping[str, Any], *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> LMModel:
    """A model of the shape that a `config.json` describes, made where it is to lie, with random weights.

    Args:
        values: of the config; what the runtime's loader reads for itself is left out.
        device: where the model goes; the host holds no copy of its layers.
        dtype: of the weights.
    """
    arguments = {key: value for key, value in values.items() if key not in NOT_ARGUMENTS}
    return import_moshi(device).loaders.get_moshi_lm(None, lm_kwargs=arguments, device=device, dtype=dtype)


def make_generator(
    lm: LMModel,
    *,
    temperature: float | None = None,
    on_text_logits_hook: TokenHook | None = None,
    on_text_hook: TokenHook | None = None,
    on_audio_hook: TokenHook | None = None,
) -> LMGen:
    """A generator over `lm` that takes the most likely tokens, or draws them with a temperature.

    The hooks may change in place: text logits `[B, 1, 1, V]`, text tokens `[B]`, own codes `[B, Q]`, in this order
    at every step.
    """
    return import_moshi(lm.device).LMGen(
        lm,
        use_sampling=temperature is not None,
        temp=temperature or 0.0,
        temp_text=temperature or 0.0,
        on_text_logits_hook=on_text_logits_hook,
        on_text_hook=on_text_hook,
        on_audio_hook=on_audio_hook,
    )


def _require_int8(directory: Path, *, dtype: torch.dtype) -> None:
    """See that matrices in eight bits can be run: moshi's loader rounds their scales to `dtype`, and then refuses any
    but FP32."""
    if dtype is not torch.float32:
        raise ValueError(f"{directory}: matrices in eight bits, which moshi runs in FP32 alone: give --dtype fp32")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{directory}: its matrices are in eight bits, and moshi leaves their products to bitsandbytes, which "
            f'cannot be imported ({error}). Install it with `pip install "bitsandbytes>=0.45,<0.50"`'
        ) from error


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"there is no file {path}; export the checkpoint into this directory first")


def named_file(directory: Path, name: str) -> Path:
    """What a `config.json` in a folder names: a file of the folder, or after "file://" one anywhere."""
    return Path(name.removeprefix("file://")) if name.startswith("file://") else directory / name


def read_runtime_config(directory: str | Path) -> dict:
    """The `config.json` of an exported model.

    Raises:
        ValueError: it is missing or no JSON, or has no `context`, without which the runtime has no size for its cache
            and would fail at the first step.
    """
    path = Path(directory) / CONFIG_FILE
    _require_file(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); export the checkpoint again") from error
    if not isinstance(config, dict) or not config.get("context"):
        raise ValueError(f"{path}: the key context is missing; set it to the frames the temporal transformer sees")
    return config
