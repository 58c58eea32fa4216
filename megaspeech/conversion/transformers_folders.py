"""Folders that transformers' `from_pretrained` opens, as stored models, and the files of such a folder.

A model with codebooks of its own is `MoshiForConditionalGeneration` there (`transformers_moshi`), one without
`KyutaiSpeechToTextForConditionalGeneration` (`transformers_stt`). A Mimi is part of both.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megaspeech.codecs.neural import import_transformers
from megaspeech.codecs.weights import CONFIG_FILE
from megaspeech.config import Config, as_toml
from megaspeech.conversion.deferred import IN_FP16, Weights
from megaspeech.conversion.mimi_files import INSIDE, Mimi, first_codebooks, open_mimi
from megaspeech.conversion.rules import Rule, to_foreign, to_native
from megaspeech.conversion.safetensors_files import open_safetensors
from megaspeech.conversion.stored import Companions, ForeignFiles, StoredModel, kept_in, overlaid
from megaspeech.conversion.transformers_moshi import moshi_config, moshi_generation, moshi_rules, moshi_sections
from megaspeech.conversion.transformers_stt import stt_config, stt_generation, stt_rules, stt_sections
from megaspeech.conversion.transformers_text import fast_tokenizer, saved
from megaspeech.data.tasks import PROMPT_FRAMES, prompt_symbols
from megaspeech.streaming.folder import RUN_FILE, TOKENIZER_FILE, run_of

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig

TEXT_HEAD = "text_head.weight"


@dataclass(frozen=True)
class _Kind:
    """One of transformers' two classes."""

    rules: Callable[[Config], list[Rule]]
    sections: Callable[[PretrainedConfig], dict[str, dict[str, Any]]]
    config: Callable[..., PretrainedConfig]
    generation: Callable[[Config], GenerationConfig]


KINDS = {
    "moshi": _Kind(moshi_rules, moshi_sections, moshi_config, moshi_generation),
    "kyutai_speech_to_text": _Kind(stt_rules, stt_sections, stt_config, stt_generation),
}
"""By `model_type`."""


def kind_of(config: Config) -> str:
    """The `model_type` that a native model has in transformers."""
    return "moshi" if config.streams.num_codebooks else "kyutai_speech_to_text"


def open_transformers(path: str | Path) -> StoredModel:
    """The model of a folder that `from_pretrained` opens; the Mimi inside is left there (`mimi_files` opens it).

    Raises:
        ValueError: it is another kind of model, or has what the native model has not; names file, key and value.
        ImportError: transformers is not installed; says how to.
    """
    path = Path(path)
    found = _read_config(path)
    kind, weights = KINDS[found.model_type], open_safetensors(path)
    try:
        sections = kind.sections(found)
    except ValueError as error:
        raise ValueError(f"{path / CONFIG_FILE}: {error}") from error
    run = run_of(path)
    extractor = _extractor(path) if run is None else {}
    if delay := extractor.get("audio_delay_seconds"):
        sections["data"] = {"task_delay": round(delay * found.codec_config.frame_rate)}
    config = overlaid(run, sections, source=path / CONFIG_FILE)
    rules = kind.rules(config)
    _check_names(path, weights, rules, inside=INSIDE[found.model_type][1])
    native = to_native(weights, rules)
    notes = [IN_FP16] if native[TEXT_HEAD].dtype is torch.float16 else []
    native = {name: one.held() for name, one in native.items()}
    config = kept_in(config, native[TEXT_HEAD].dtype)
    tokenizer = path / TOKENIZER_FILE
    if (initial := config.streams.text_cardinality) != (found.bos_token_id or initial):  # as Kyutai's 2.6B has it
        notes.append(f"bos_token_id = {found.bos_token_id} is no text token; the native model starts with {initial}")
    if silence := extractor.get("audio_silence_prefix_seconds"):
        notes.append(f"audio_silence_prefix_seconds = {silence} is not kept: that much silence goes before the audio")
    if not tokenizer.is_file():
        notes.append(f"{path} holds no {TOKENIZER_FILE}, the sentencepiece model: name it by --tokenizer")
    companions = Companions(tokenizer=tokenizer if tokenizer.is_file() else None, model_with_mimi=path)
    return StoredModel(config, native, companions, tuple(notes))


def _read_config(path: Path) -> PretrainedConfig:
    if not (path / CONFIG_FILE).is_file():
        raise ValueError(f"{path}: there is no {CONFIG_FILE}; name a folder that transformers has saved")
    try:
        config = import_transformers().AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # of json, huggingface_hub and transformers, which share no base
        raise ValueError(
            f"{path / CONFIG_FILE}: transformers cannot read it ({error}); save the model again"
        ) from error
    if config.model_type not in KINDS:
        raise ValueError(
            f"{path / CONFIG_FILE}: model_type = {config.model_type!r} is none of {', '.join(KINDS)}; text models are "
            f"read by --from llama"
        )
    return config


def _extractor(path: Path) -> dict[str, Any]:
    """What the folder says of its feature extractor, by itself (transformers 4) or within its processor."""
    for name, inner in (("processor_config.json", "feature_extractor"), ("preprocessor_config.json", None)):
        if (path / name).is_file():
            values = json.loads((path / name).read_text(encoding="utf-8"))
            if found := values.get(inner) if inner else values:
                return found
    return {}


def _check_names(path: Path, weights: Weights, rules: list[Rule], *, inside: str) -> None:
    known = {name for rule in rules for name in rule.foreign}
    if odd := [name for name in weights if name not in known and not name.startswith(inside)]:
        raise ValueError(f"{path}: tensor {odd[0]} is none of the model that {CONFIG_FILE} tells of ({len(odd)} such)")
    if lacking := known - weights.keys():
        raise ValueError(
            f"{path}: tensor {min(lacking)} is missing ({len(lacking)} such); fetch or save the model again"
        )


def transformers_files(model: StoredModel) -> ForeignFiles:
    """What `from_pretrained` opens and `generate` needs: weights, a Mimi among them, configs, tokenizer and processor.

    Raises:
        ValueError: the model has what transformers' has not, or no Mimi or tokenizer goes with it; says what to do.
        ImportError: transformers is not installed; says how to.
    """
    name, notes = kind_of(model.config), []
    kind, mimi, tokenizer = KINDS[name], _mimi(model), _tokenizer(model)
    dtype = str(model.weights[TEXT_HEAD].dtype).removeprefix("torch.")
    rules = kind.rules(model.config)
    config = kind.config(model.config, mimi=mimi, dtype=dtype)
    if model.config.temporal.num_extra_heads:
        notes.append("the extra heads are left out: transformers has none")
    weights = to_foreign(model.weights, rules)
    weights |= {INSIDE[name][1] + part: one for part, one in mimi.weights.items()}
    small_files = {
        CONFIG_FILE: config.to_json_string().encode(),
        "generation_config.json": kind.generation(model.config).to_json_string().encode(),
        TOKENIZER_FILE: tokenizer.read_bytes(),
        RUN_FILE: as_toml(model.config).encode(),
        **_processor_files(model.config, tokenizer=tokenizer, mimi=mimi),
    }
    return ForeignFiles(weights, small_files, notes=tuple(notes))


def _mimi(model: StoredModel) -> Mimi:
    """The Mimi that goes inside: all of it for a model that speaks, what a model hears of it for one that does not."""
    path, streams = model.companions.codec or model.companions.model_with_mimi, model.config.streams
    if path is None:
        raise ValueError("no codec goes with the model, and transformers keeps a Mimi inside it: name it by --codec")
    mimi = open_mimi(path)
    heard = streams.num_given_codebooks
    if streams.num_codebooks or not 2 <= heard < mimi.config.num_quantizers:
        return mimi
    return first_codebooks(mimi, heard)


def _tokenizer(model: StoredModel) -> Path:
    if model.companions.tokenizer is None:
        raise ValueError("no tokenizer goes with the model: name its sentencepiece model by --tokenizer")
    return model.companions.tokenizer


def _processor_files(config: Config, *, tokenizer: Path, mimi: Mimi) -> dict[str, bytes]:
    """Of tokenizer and feature extractor.

    Where a model that writes was trained on our tasks, a prompt of PROMPT_FRAMES comes before the audio, as silence
    here, for which it writes the prompt itself; and its last words come `data.task_delay` after the audio's end.
    """
    transformers, fast = import_transformers(), fast_tokenizer(tokenizer)
    rate = mimi.config.sampling_rate
    if kind_of(config) == "moshi":
        return saved(fast) | saved(transformers.EncodecFeatureExtractor(feature_size=1, sampling_rate=rate))
    frame_seconds = mimi.config.frame_size / rate
    is_prompted = all(symbol in fast.get_vocab() for symbol in prompt_symbols(()))
    extractor = transformers.KyutaiSpeechToTextFeatureExtractor(
        feature_size=1,
        sampling_rate=rate,
        audio_delay_seconds=config.data.task_delay * frame_seconds,
        audio_silence_prefix_seconds=is_prompted * PROMPT_FRAMES * frame_seconds,
    )
    return saved(transformers.KyutaiSpeechToTextProcessor(extractor, fast))
