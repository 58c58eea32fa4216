"""Folders that transformers opens, written from native models with random weights; and what the runtime answers."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megaspeech.config import Config
from megaspeech.conversion.native import load_weights, whole_model
from megaspeech.conversion.rules import forget
from megaspeech.conversion.stored import Companions, StoredModel
from megaspeech.conversion.transformers_folders import transformers_files
from megaspeech.data.tokenizer import train_tokenizer
from megaspeech.model.speech_text_model import SpeechTextModel

TEXT = ["zero one two three four five six seven eight nine", "to be, or not to be"]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    """transformers warns of its own ways; the tests see to ours."""
    logging.getLogger("transformers").setLevel(logging.ERROR)


def companions(folder: Path, *, num_quantizers: int = 6) -> Companions:
    """A tokenizer of 48 pieces and a small Mimi of cardinality 32, in `folder`."""
    from small_codecs import save_small

    tokenizer, codec = folder / "tokenizer.model", folder / f"mimi{num_quantizers}"
    if not tokenizer.is_file():
        tokenizer.write_bytes(train_tokenizer(TEXT, vocabulary_size=48, languages=["en"]).model)
    if not codec.is_dir():
        save_small("mimi", codec) if num_quantizers == 6 else _save_larger(codec, num_quantizers=num_quantizers)
    return Companions(tokenizer=tokenizer, codec=codec)


def _save_larger(folder: Path, *, num_quantizers: int) -> None:
    from transformers import MimiConfig, MimiModel

    sizes = {"num_filters": 4, "hidden_size": 16, "upsampling_ratios": [4, 3, 2, 2], "upsample_groups": 16}
    books = {"codebook_size": 32, "codebook_dim": 8, "vector_quantization_hidden_dimension": 8}
    layers = {"num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MimiConfig(**sizes, **books, **layers, num_quantizers=num_quantizers, sliding_window=8)
    torch.manual_seed(5)
    MimiModel(config).save_pretrained(folder)


def native_model(config: Config, *, seed: int = 2) -> SpeechTextModel:
    """A whole model whose norms are no ones."""
    torch.manual_seed(seed)
    model = whole_model(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape).to(parameter.dtype))
    return model


def stored(model: SpeechTextModel, *, config: Config, beside: Companions) -> StoredModel:
    """A model in memory, as a conversion reads it."""
    from moshi_folders import stored as without_companions

    return StoredModel(config, without_companions(model.state_dict(), config=config).weights, beside)


def write_transformers(model: StoredModel, folder: Path) -> Path:
    """The folder that `from_pretrained` opens."""
    folder.mkdir(parents=True)
    files = transformers_files(model)
    tensors = {name: one.read().contiguous().clone() for name, one in files.weights.items()}
    forget()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in files.small_files.items():
        (folder / name).write_bytes(content)
    return folder


def as_native(model: StoredModel) -> SpeechTextModel:
    """The weights of a stored model in a native one, in FP32."""
    from megaspeech.config.computation import PrecisionSection

    native = whole_model(model.config.model_copy(update={"precision": PrecisionSection(recipe="fp32")}))
    load_weights(native, model.weights)
    forget()
    return native.eval()


def unequal(one: StoredModel, other: StoredModel) -> list[str]:
    """Names of the tensors whose bits or precisions differ."""
    assert one.weights.keys() == other.weights.keys()
    pairs = [(name, left.read(), other.weights[name].read()) for name, left in one.weights.items()]
    forget()
    return [name for name, left, right in pairs if left.dtype is not right.dtype or not torch.equal(left, right)]


def runtime_answer(folder: Path, heard_BQT: Tensor) -> Tensor:
    """Greedy tokens `[1 + Q, T]` of the moshi runtime, a frame of codes a step."""
    from megaspeech.streaming.runtime import load_runtime, make_generator

    generator, found = make_generator(load_runtime(folder)), []
    with generator.streaming(len(heard_BQT)):
        # What step 0 is given is ignored: step s hears frame s - 1.
        for frame in [0, *range(heard_BQT.shape[-1])]:
            tokens = generator.step(heard_BQT[..., frame : frame + 1])
            if tokens is not None:
                found.append(tokens)
    return torch.cat(found, dim=-1)[0]
