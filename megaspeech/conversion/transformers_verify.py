"""Do the native model and transformers' agree? Logits of both on the same random codes.

transformers takes codes that are delayed already, and knows no zero token, so none is among them. Two traps are gone
round: a whole sequence at once sees all that came before it whatever the context, so frames come one by one, as
`generate` has them; and without a mask the depth decoder's eager attention sees later codebooks, so it gets one.

Axes: B samples, S streams, T frames, Q codebooks, V vocabulary, N = B * T.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megaspeech.codecs.neural import import_transformers
from megaspeech.config import Config
from megaspeech.config.schema import StreamsSection
from megaspeech.model.speech_text_model import SpeechTextModel
from megaspeech.streaming.agreement import random_codes

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel
    from transformers.utils import ModelOutput


def load_transformers(path: str | Path) -> PreTrainedModel:
    """The model of a folder in FP32, in evaluation mode, by the class that its config.json names.

    Raises:
        ValueError: weights are missing or of another shape, for which transformers would take random ones.
        ImportError: transformers is not installed; says how to.
    """
    transformers = import_transformers()
    transformers.utils.logging.disable_progress_bar()
    (name,) = transformers.AutoConfig.from_pretrained(path, local_files_only=True).architectures
    model, found = getattr(transformers, name).from_pretrained(
        path, local_files_only=True, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
    )
    for fault in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if odd := sorted(map(str, found[fault])):
            raise ValueError(f"{path}: {fault.replace('_', ' ')} of {name}: {odd[0]} ({len(odd)} such)")
    return model.eval()


def transformers_difference(native: SpeechTextModel, path: Path, config: Config) -> float:
    """From the logits that transformers computes of a folder, both in FP32."""
    return largest_difference(native, load_transformers(path), streams=config.streams)


@torch.no_grad()
def largest_difference(
    native: SpeechTextModel, model: PreTrainedModel, *, streams: StreamsSection, num_frames: int = 32, seed: int = 0
) -> float:
    """Largest absolute difference of text and audio logits.

    Args:
        native: the whole native model on one rank.
        model: transformers'.
        streams: of both.
        num_frames: length of the codes; beyond the context, the window is compared too.
        seed: of the codes.
    """
    codes_BST = random_codes(streams, least=0, num_frames=num_frames, seed=seed)
    text_BTV, audio_BQTV = native.eval()(codes_BST)
    theirs_BTV, hidden_BTH = temporal_outputs(model, delayed(codes_BST, streams=streams, more=1))
    differences = [(text_BTV - theirs_BTV).abs().max()]
    if streams.num_codebooks:
        read_BQT = delayed(codes_BST, streams=streams, more=0)[:, : streams.num_codebooks]
        differences.append((audio_BQTV - depth_logits(model, hidden_BTH, read_BQT)).abs().max())
    return float(torch.stack(differences).max())


def delayed(codes_BST: Tensor, *, streams: StreamsSection, more: int) -> Tensor:
    """Every stream moved right by its acoustic delay and `more`, its initial token in front; `[B, S, T]`."""
    moved_BST = torch.empty_like(codes_BST)
    for stream, (delay, initial) in enumerate(zip(streams.delays, streams.cardinalities, strict=True)):
        moved_BST[:, stream] = initial
        moved_BST[:, stream, delay + more :] = codes_BST[:, stream, : codes_BST.shape[-1] - delay - more]
    return moved_BST


@torch.no_grad()
def temporal_outputs(model: PreTrainedModel, inputs_BST: Tensor) -> tuple[Tensor, Tensor | None]:
    """Text logits `[B, T, V]`, and what the depth decoder reads, `[B, T, H]`, if there is one; a frame at a time."""
    cache = import_transformers().DynamicCache(config=model.config)
    outputs = [_step(model, inputs_BST[..., frame : frame + 1], cache) for frame in range(inputs_BST.shape[-1])]
    logits_BTV = torch.cat([one.logits for one in outputs], dim=1)
    # A model that speaks has as many outputs as it has pieces, one that does not has one for the initial token too.
    if not hasattr(model, "depth_decoder"):
        return logits_BTV[..., :-1], None
    return logits_BTV, torch.cat([one.last_hidden_state for one in outputs], dim=1)


def _step(model: PreTrainedModel, inputs_BS1: Tensor, cache: Cache) -> ModelOutput:
    if not hasattr(model, "depth_decoder"):
        return model(input_ids=inputs_BS1.transpose(1, 2), past_key_values=cache, use_cache=True)
    own_BQ1, given_BQ1 = inputs_BS1[:, 1:].chunk(2, dim=1)
    codes = {"moshi_audio_codes": own_BQ1, "user_audio_codes": given_BQ1}
    return model(input_ids=inputs_BS1[:, 0], **codes, past_key_values=cache, use_cache=True)


@torch.no_grad()
def depth_logits(model: PreTrainedModel, hidden_BTH: Tensor, read_BQT: Tensor) -> Tensor:
    """Audio logits `[B, Q, T, V]`; `read_BQT` is what each codebook reads: text, then the codebook before."""
    ids_NQ = read_BQT.transpose(1, 2).flatten(0, 1)
    logits_NQV = model.depth_decoder(
        input_ids=ids_NQ,
        last_hidden_state=hidden_BTH.flatten(0, 1)[:, None],
        attention_mask=torch.ones_like(ids_NQ),
        use_cache=False,
    ).logits
    return logits_NQV.unflatten(0, hidden_BTH.shape[:2]).transpose(1, 2)
