"""A converted folder, opened: the model on Kyutai's runtime, its config, its codec and its tokenizer.

    config.json, model.safetensors    the runtime's; `moshi_name`, `mimi_name` and `tokenizer_name` name other files
    tokenizer.model                   or what `tokenizer_name` names
    codec/                            as `codecs.registry.load_codec` reads it, or Kyutai's Mimi in the file `mimi_name`
    megaspeech.toml                   config of the run; what others converted has none

Without `megaspeech.toml` nothing is known of tasks and their delays; the rest of the config is read off the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from megaspeech.codecs.protocol import Codec
from megaspeech.codecs.registry import load_codec
from megaspeech.config import Config, read_config
from megaspeech.config.schema import (
    SECTIONS,
    CodecSection,
    DepthSection,
    Section,
    StreamsSection,
    TemporalSection,
    TransformerSection,
)
from megaspeech.data.tokenizer import Tokenizer
from megaspeech.streaming.runtime import load_runtime, named_file, read_runtime_config
from megaspeech.streaming.session import check_streams

if TYPE_CHECKING:
    from moshi.models import LMModel

RUN_FILE, TOKENIZER_FILE, CODEC_FOLDER = "megaspeech.toml", "tokenizer.model", "codec"
KYUTAI_TOKENIZER, KYUTAI_MIMI = "tokenizer_spm_32k_3.model", "tokenizer-e351c8d8-checkpoint125.safetensors"
"""What moshi takes them to be called (moshi/models/loaders.py) where a config.json does not say."""
CONVERT = "tools/convert_checkpoint.py"


@dataclass(frozen=True, eq=False)
class ServedFolder:
    """A model with everything that a session needs.

    Attributes:
        lm: see `runtime.load_runtime`.
        config: of the run, or of the model alone; `codec.path` and `data.tokenizer` name the files of this folder.
        codec: with as many codebooks as the model hears or says, whichever is more.
        tokenizer: of the text stream.
        knows_tasks: whether it was trained on the prompts of tasks, with the delays of `config.data`: there is a run's
            config, and the tokenizer has prompts. Moshi itself has none.
    """

    lm: LMModel
    config: Config
    codec: Codec
    tokenizer: Tokenizer
    knows_tasks: bool


def open_folder(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> ServedFolder:
    """Open a converted folder.

    Args:
        path: see the module's docstring.
        device: where model and codec compute.
        dtype: of the model's weights.

    Raises:
        ValueError: a file is missing, damaged or does not fit the others; names it and the remedy.
        ImportError: moshi, or the codec's package, is not installed.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such folder; make it with {CONVERT} --to moshi")
    values = read_runtime_config(path)
    tokenizer_file, codec_path = files_beside(path, values)
    _check_there(tokenizer_file, codec_path)
    run = run_of(path)
    name = run.codec.name if run and codec_path.is_dir() else "mimi"
    lm = load_runtime(path, device=device, dtype=dtype)
    config = run or _config_of(lm, source=path)
    data = config.data.model_copy(update={"tokenizer": str(tokenizer_file)})
    config = config.model_copy(update={"codec": CodecSection(name=name, path=str(codec_path)), "data": data})
    tokenizer = Tokenizer.load(tokenizer_file)
    try:
        check_streams(lm, config.streams)
        tokenizer.check_streams(config.streams)
        codec = _open_codec(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    knows_tasks = run is not None and tokenizer.knows_tasks
    return ServedFolder(lm, config, codec.to(device), tokenizer, knows_tasks=knows_tasks)


def run_of(path: Path) -> Config | None:
    """The config of the run that a converted folder's model comes from, if it is told."""
    return read_config(path / RUN_FILE) if (path / RUN_FILE).is_file() else None


def files_beside(path: Path, values: Mapping[str, Any]) -> tuple[Path, Path]:
    """(tokenizer, codec) of a folder with the `config.json` of these values, whether they are there or not."""
    return (
        _beside(path, values.get("tokenizer_name"), TOKENIZER_FILE, KYUTAI_TOKENIZER),
        _beside(path, values.get("mimi_name"), CODEC_FOLDER, KYUTAI_MIMI),
    )


def _beside(path: Path, name: str | None, ours: str, kyutais: str) -> Path:
    """What a config.json names, else what lies there under our name, or under the one that moshi takes."""
    if name is None:
        name = kyutais if (path / kyutais).is_file() and not (path / ours).exists() else ours
    return named_file(path, name)


def _check_there(tokenizer: Path, codec: Path) -> None:
    if not tokenizer.is_file():
        raise ValueError(f"{tokenizer}: there is no such file; convert with {CONVERT} --tokenizer, or put it there")
    if not codec.exists():
        raise ValueError(f"{codec}: there is no codec; convert with {CONVERT} --codec PATH, or put the codec there")


def _open_codec(config: Config) -> Codec:
    streams = config.streams
    codec = load_codec(
        config.codec.path,
        name=config.codec.name,
        num_codebooks=max(streams.num_codebooks, streams.num_given_codebooks),
    )
    if codec.cardinality != streams.cardinality:
        raise ValueError(
            f"{config.codec.path}: its codebooks have {codec.cardinality} entries, those of the model "
            f"{streams.cardinality}; convert with the codec that the model was trained on"
        )
    return codec


def _config_of(lm: LMModel, *, source: Path) -> Config:
    """What a model says of itself; all else as it is where a config says nothing."""
    try:
        known = {
            "streams": StreamsSection(
                text_cardinality=lm.text_card,
                text_pad_id=lm.text_padding_token_id,
                text_end_pad_id=lm.end_of_text_padding_id,
                num_codebooks=lm.dep_q,
                num_given_codebooks=lm.n_q - lm.dep_q,
                cardinality=lm.card,
                delays=tuple(lm.delays),
            ),
            "temporal": TemporalSection(
                **_shape(lm.transformer), context=lm.context, rotary_base=int(lm.transformer.max_period)
            ),
            "depth": _depth_of(lm),
        }
    except ValidationError as error:
        (fault, *_) = error.errors()
        raise ValueError(
            f"{source}: a model with {error.title} {'.'.join(map(str, fault['loc']))} = {fault['input']!r} cannot be "
            f"served here ({fault['msg']})"
        ) from error
    sections: dict[str, Section] = {name: known.get(name) or section() for name, section in SECTIONS.items()}
    return Config(**sections)


def _depth_of(lm: LMModel) -> DepthSection:
    if lm.depformer is None:  # a shape that nothing is made of
        return DepthSection(**dict.fromkeys(TransformerSection.model_fields, 1))
    return DepthSection(
        **_shape(lm.depformer),
        multi_linear=lm.depformer_multi_linear,
        weights_per_step_schedule=lm.depformer_weights_per_step_schedule,
    )


def _shape(transformer: torch.nn.Module) -> dict[str, int]:
    """Of one of the runtime's transformers, which may have weights for each codebook."""
    layer = transformer.layers[0]
    gating = layer.gating[0] if isinstance(layer.gating, torch.nn.ModuleList) else layer.gating
    widest = layer.linear2 if gating is None else gating.linear_out
    return {
        "num_layers": len(transformer.layers),
        "hidden_size": layer.self_attn.embed_dim,
        "ffn_hidden_size": widest.in_features,
        "num_attention_heads": layer.self_attn.num_heads,
        "num_query_groups": layer.self_attn.num_heads // layer.self_attn.kv_repeat,
    }
