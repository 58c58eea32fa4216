"""Converted folders with random weights, as `open_folder` takes them, made in a second."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from small_corpus import make_codec, make_tokenizer

from megaspeech.checkpoint.moshi import moshi_config
from megaspeech.config import read_config, write_config
from megaspeech.streaming.folder import CODEC_FOLDER, RUN_FILE, TOKENIZER_FILE
from megaspeech.streaming.runtime import CONFIG_FILE, WEIGHTS_FILE, import_moshi


def make_served_folder(folder: Path, *overrides: str, preset: str = "tiny", is_ours: bool = True) -> Path:
    """A model of a preset that writes and says something else in every frame, the spectral codec, a tokenizer.

    Args:
        folder: is made.
        overrides: of the config.
        preset: its streams must be those of the small codec and tokenizer, as those of "tiny" are.
        is_ours: whether `megaspeech.toml` lies beside it.
    """
    folder.mkdir(parents=True)
    file = folder / RUN_FILE
    file.write_text(f'[model]\npreset = "{preset}"\n')
    config = read_config(file, overrides)
    values = {**moshi_config(config), "tokenizer_name": TOKENIZER_FILE}
    (folder / CONFIG_FILE).write_text(json.dumps(values))
    torch.manual_seed(1)
    lm = import_moshi().loaders.get_moshi_lm(None, lm_kwargs=_arguments(values), dtype=torch.float32)
    with torch.no_grad():
        for name, weight in lm.named_parameters():
            if "emb" in name or ("depformer" in name and weight.dim() == 2):
                weight.mul_(3.0)  # or greedy tokens hardly vary from frame to frame
    save_file(lm.state_dict(), folder / WEIGHTS_FILE)
    (folder / TOKENIZER_FILE).write_bytes(make_tokenizer().model)
    make_codec().save(folder / CODEC_FOLDER)
    if is_ours:
        write_config(config, file)
    else:
        file.unlink()
    return folder


def _arguments(values: dict) -> dict:
    """Those of `LMModel` in a config.json."""
    return {key: value for key, value in values.items() if key not in ("model_type", "moshi_name", "tokenizer_name")}
