"""Two layer specs of one model side by side: weights by the names that checkpoints know, logits and gradients."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megaspeech.checkpoint.state import metadata
from megaspeech.config import Config
from megaspeech.data.batch import depth_frames
from megaspeech.model.speech_text_model import SpeechTextModel
from megaspeech.parallel.wrap import Wrapped, wrap

Batch = tuple[Tensor, Tensor, Tensor]
"""codes `[B, S, T]`; weights `[B, P, T]`, which sum to about 1; on the host, which frames have codebooks that weigh."""


def draw_batch(config: Config, *, samples: int, frames: int, device: torch.device) -> Batch:
    """Random tokens; a tenth of the predicted ones weighs nothing. The same arguments draw the same."""
    generator, streams = torch.Generator().manual_seed(1), config.streams
    codes = [torch.randint(size, (samples, frames), generator=generator) for size in streams.cardinalities]
    weights = (torch.rand(samples, 1 + streams.num_codebooks, frames, generator=generator) > 0.1).float()
    share = 2.0 ** -round(math.log2(weights.numel()))  # which BF16 holds exactly
    frames_BT = torch.from_numpy(depth_frames(weights.numpy(), streams=streams))
    return torch.stack(codes, dim=1).to(device), (weights * share).to(device), frames_BT


def build(config: Config, *, like: Wrapped | None = None) -> Wrapped:
    """The whole model on one rank, wrapped as for training; with the weights of `like`, rounded."""
    torch.manual_seed(1)

    def take_weights(model: MegatronModule) -> None:
        if like is None:
            return
        own, other = by_checkpoint_name(model), by_checkpoint_name(like.models[0])
        assert own.keys() == other.keys()
        with torch.no_grad():
            for name in own:
                own[name].copy_(other[name])

    return wrap(
        config,
        num_chunks=1,
        build=lambda _: SpeechTextModel(config, pre_process=True, post_process=True),
        initialise=take_weights,
    )


def by_checkpoint_name(model: MegatronModule) -> dict[str, torch.nn.Parameter]:
    """All parameters by a name that both specs know: TransformerEngine fuses the norms into the linear layers."""
    found = {}
    for name, place in model.sharded_state_dict(metadata=metadata()).items():
        if isinstance(place, (ShardedTensor, ShardedTensorFactory)):
            layer = re.search(r"temporal\.block\.layers\.(\d+)\.", name)
            found[f"layer {layer.group(1)}: {place.key}" if layer else place.key] = place.data
    assert {id(parameter) for parameter in found.values()} == {id(parameter) for parameter in model.parameters()}
    return found


def outcome(wrapped: Wrapped, batch: Batch, *, warm_ups: int = 0) -> dict[str, Tensor]:
    """Logits, and the gradient of every parameter, of a batch; after some passes that are thrown away."""
    for _ in range(warm_ups + 1):
        wrapped.chunks[0].zero_grad_buffer()
        forward_backward(wrapped, batch)
    with torch.no_grad():
        text_BTV, audio_BQTV = wrapped.chunks[0](batch[0])
    gradients = {
        f"gradient of {name}": x.main_grad.clone() for name, x in by_checkpoint_name(wrapped.models[0]).items()
    }
    return {"text logits": text_BTV, "audio logits": audio_BQTV, **gradients}


def forward_backward(wrapped: Wrapped, batch: Batch) -> None:
    """As a training step does it, for one microbatch."""
    weighted, _ = wrapped.chunks[0](*batch)
    weighted.sum().backward()


def relative_error(x: Tensor, truth: Tensor) -> float:
    """|x - truth| / |truth|, Euclidean norms."""
    return float((x.float() - truth.float()).norm() / truth.float().norm().clamp(min=1e-30))


def assert_as_exact(ours: dict[str, Tensor], own: dict[str, Tensor], truth: dict[str, Tensor], *, slack: float) -> None:
    """`ours` is off the truth by at most twice as much as `own`, of the same precision, and a slack."""
    assert ours.keys() == own.keys() == truth.keys()
    for name in truth:
        error, allowed = relative_error(ours[name], truth[name]), 2 * relative_error(own[name], truth[name]) + slack
        assert error <= allowed, f"{name}: off by {error:.2e}, {allowed:.2e} allowed"


@contextmanager
def tensor_float_32() -> Iterator[None]:
    """FP32 products in TF32, as TransformerEngine's always are (common/gemm/cublaslt_gemm.cu)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)
