"""Text models of transformers (Llama, Mistral, Qwen2, Qwen3) as the start of a speech-text model.

The temporal transformer is the text model's, and so are the text rows of the embedding and the text head; where the
text model ties the two, both get the same rows. What it cannot have is made by these rules:

- A token of audio: its row is drawn from a normal so narrow that the audio of a frame, summed over all codebooks, is as
  large (root mean square) as a row of text: the text model neither drowns in audio nor overlooks it.
- Before the first frame: text has the row of the token that the text model's documents begin with (`bos_token_id`, else
  `eos_token_id`, else the mean of all rows), audio has rows of zeros. So before anything is heard the model sees what
  the text model saw at the start of a document.
- The depth transformer is a new one (`new_weights`).

So the text logits are the text model's: at position t, which reads the token of frame t - 1, and at position 0 the
initial token, they are those that the text model has after [first token, text 0, ..., text t - 1], where no stream but
text holds anything (zero tokens).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megaspeech.config import Config
from megaspeech.config.schema import StreamsSection, TemporalSection
from megaspeech.conversion.companions import named
from megaspeech.conversion.deferred import IN_FP16, Deferred, Weights
from megaspeech.conversion.layouts import Cut, GroupedQueries, Same, halves_of_pairs, pairs_of_halves
from megaspeech.conversion.new_weights import generator, mean_row, new_depth, root_mean_square
from megaspeech.conversion.rules import Layout, Rule, to_native
from megaspeech.conversion.safetensors_files import open_safetensors
from megaspeech.conversion.stored import StoredModel
from megaspeech.conversion.text_config import DROPPABLE, TextModel, config_of_text_model, read_text_model
from megaspeech.model.counting import padded_rows
from megaspeech.model.embedding import table_offsets
from megaspeech.model.speech_text_model import ZERO_TOKEN, SpeechTextModel
from megaspeech.streaming.folder import TOKENIZER_FILE

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UNNEEDED = "rotary_emb.inv_freq"
"""RoPE's frequencies, which old files hold though they follow from the config."""


def open_text_model(path: str | Path, *, config: Config | None = None, drop: Sequence[str] = ()) -> StoredModel:
    """A new speech-text model that starts from a text model, its weights unread.

    Args:
        path: folder with config.json and safetensors, single or sharded.
        config: that of the run to come, whose `[temporal]` must be the text model's; its streams, depth transformer,
            codec and `run.seed`, from which follows what is drawn, are taken. None: those of the preset "moshi-7b" with
            the codec "mimi".
        drop: what may be left out of the model: see `text_config.DROPPABLE`.

    Raises:
        ValueError: the model cannot be held, or is not the config's; names the key or tensor.
        ImportError: transformers is not installed.
    """
    path = Path(path)
    stored = {name: one for name, one in open_safetensors(path).items() if not name.endswith(UNNEEDED)}
    dtype = torch.bfloat16 if all(one.dtype is torch.bfloat16 for one in stored.values()) else torch.float32
    text = read_text_model(path, drop=drop)
    config = config_of_text_model(text, config=config, recipe="bf16" if dtype is torch.bfloat16 else "fp32")
    theirs = {name: one.to(dtype) for name, one in stored.items()}
    table, seed = _rules(config.temporal, text=text), config.run.seed
    _check_names(theirs, text=text, rules=table)
    weights = {"embedding.weight": _embedding(theirs, text=text, streams=config.streams, seed=seed)}
    weights |= to_native(theirs, table) | new_depth(config, seed=seed, dtype=dtype)
    tokenizer = path / TOKENIZER_FILE
    companions = replace(named(config), tokenizer=tokenizer if tokenizer.is_file() else None)
    return StoredModel(config, weights, companions, _notes(text, config=config, stored=stored))


def _rules(shape: TemporalSection, *, text: TextModel) -> list[Rule]:
    """Which of the text model's tensors hold the numbers of which native ones."""
    rules = [_one("text_head.weight", EMBEDDING if text.is_tied else HEAD, Same())]
    for layer in range(shape.num_layers):
        rules += _layer(f"temporal.block.layers.{layer}", f"model.layers.{layer}", shape)
    return [*rules, _one("temporal.block.final_layernorm.weight", "model.norm.weight", Same())]


def _one(native: str, foreign: str, layout: Layout) -> Rule:
    """A rule of one tensor on either side."""
    return Rule((native,), (foreign,), layout)


def _layer(ours: str, theirs: str, shape: TemporalSection) -> Iterator[Rule]:
    queries = GroupedQueries.of(shape, half_split=True)
    parts = [f"{theirs}.self_attn.{letter}_proj" for letter in "qkv"]
    yield _one(f"{ours}.input_layernorm.weight", f"{theirs}.input_layernorm.weight", Same())
    for kind in ["weight", "bias"] if shape.add_qkv_bias else ["weight"]:
        yield Rule((f"{ours}.self_attention.linear_qkv.{kind}",), tuple(f"{part}.{kind}" for part in parts), queries)
    for letter in "qk" if shape.qk_layernorm else "":
        norm = f"{ours}.self_attention.{letter}_layernorm.weight"
        yield _one(norm, f"{theirs}.self_attn.{letter}_norm.weight", _HeadNorm())
    yield _one(f"{ours}.self_attention.linear_proj.weight", f"{theirs}.self_attn.o_proj.weight", Same())
    yield _one(f"{ours}.pre_mlp_layernorm.weight", f"{theirs}.post_attention_layernorm.weight", Same())
    halves = (f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight")
    yield Rule((f"{ours}.mlp.linear_fc1.weight",), halves, Cut(2))
    yield _one(f"{ours}.mlp.linear_fc2.weight", f"{theirs}.mlp.down_proj.weight", Same())


class _HeadNorm:
    """The weight of a norm over a head's width, which RoPE turns in halves there and in neighbours here."""

    def to_foreign(self, native: Sequence[Tensor]) -> Sequence[Tensor]:
        return [halves_of_pairs(native[0][None])[0]]

    def to_native(self, foreign: Sequence[Tensor]) -> Sequence[Tensor]:
        return [pairs_of_halves(foreign[0][None])[0]]


def _check_names(theirs: Weights, *, text: TextModel, rules: Sequence[Rule]) -> None:
    """Raises ValueError where the text model has a tensor that no rule reads: it would be lost."""
    read = {EMBEDDING, *(name for rule in rules for name in rule.foreign)}
    unneeded = {HEAD} if text.is_tied else set()
    odd = [name for name in theirs if name not in read | unneeded]
    if odd:
        raise ValueError(
            f"{text.path}: tensor {odd[0]} is none of a {text.family} model with its config.json ({len(odd)} such); "
            f"give the model itself, without adapters or quantisation"
        )
    if EMBEDDING not in theirs:
        raise ValueError(f"{text.path}: tensor {EMBEDDING} is missing; give the folder of a whole text model")
    wanted = (text.vocabulary_size, text.shape["hidden_size"])
    if theirs[EMBEDDING].shape != wanted:
        raise ValueError(
            f"{text.path}: tensor {EMBEDDING} has shape {list(theirs[EMBEDDING].shape)}, and config.json makes it "
            f"{list(wanted)} (vocab_size, hidden_size); give the config.json of this very model"
        )


def _embedding(theirs: Weights, *, text: TextModel, streams: StreamsSection, seed: int) -> Deferred:
    """The packed table: their rows, and the drawn ones."""
    source = theirs[EMBEDDING]
    width = source.shape[1]
    shape = (padded_rows(streams.cardinalities), width)

    def read() -> Tensor:
        rows_VH = source.read()
        table_RH = torch.zeros(shape, dtype=source.dtype)
        table_RH[: len(rows_VH)] = rows_VH
        first = text.first_token
        table_RH[len(rows_VH)] = mean_row(rows_VH) if first is None else rows_VH[first]
        std = root_mean_square(rows_VH) / max(1, streams.num_streams - 1) ** 0.5
        source_of_noise = generator("embedding", seed=seed)
        for offset in table_offsets(streams.cardinalities)[1:]:
            drawn_VH = torch.empty(streams.cardinality, width).normal_(std=std, generator=source_of_noise)
            table_RH[offset : offset + streams.cardinality] = drawn_VH
        return table_RH

    return Deferred(shape, source.dtype, read)


def _notes(text: TextModel, *, config: Config, stored: Weights) -> tuple[str, ...]:
    streams = config.streams
    notes = [
        f"temporal transformer, text embedding and text head are those of {text.path}; drawn anew: rows of "
        f"{streams.num_streams - 1} audio streams, and the depth transformer",
        *text.notes,
    ]
    if any(one.dtype is torch.float16 for one in stored.values()):
        notes.append(IN_FP16)
    return tuple(notes)


@torch.no_grad()
def text_difference(native: SpeechTextModel, path: Path, config: Config) -> float:
    """Largest difference of the text logits from those that transformers has of the text model at `path`, in FP32.

    Text alone, drawn at random, beyond a sliding window of up to 64; every other stream holds zero tokens. What was
    left out of the native model is left out on the other side too.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    text, streams = read_text_model(path, drop=tuple(DROPPABLE)), config.streams
    values = AutoConfig.from_pretrained(path, local_files_only=True)
    values.rope_parameters = {"rope_type": "default", "rope_theta": config.temporal.rotary_base}
    values.rms_norm_eps = config.model.layernorm_epsilon
    theirs = AutoModelForCausalLM.from_pretrained(path, config=values, dtype=torch.float32).eval()
    num_frames = min(config.temporal.context + (8 if text.is_windowed else 0), 72)
    codes_BST = torch.full((2, streams.num_streams, num_frames), ZERO_TOKEN)
    drawn_BT = torch.randint(text.vocabulary_size, (2, num_frames), generator=generator("text", seed=0))
    codes_BST[:, 0] = drawn_BT
    rows_VH = theirs.get_input_embeddings().weight
    first_H = rows_VH.mean(0) if text.first_token is None else rows_VH[text.first_token]
    num_first = 1 + streams.delays[0]  # positions that read the initial token
    read_BTH = torch.cat([first_H.expand(2, num_first, -1), rows_VH[drawn_BT]], dim=1)[:, :num_frames]
    ours_BTV, _ = native.eval()(codes_BST)
    return float((ours_BTV - theirs(inputs_embeds=read_BTH).logits).abs().max())
