"""Small codecs with random weights whose codebooks lie where their latents do, so that sounds have many codes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

RATE = 24000


def sounds(num_samples: int, *, batch: int = 2) -> Tensor:
    """Noise ``[B, N]`` whose loudness comes and goes."""
    generator = torch.Generator().manual_seed(7)
    swell = torch.sin(torch.linspace(0, 9, num_samples)).abs() + 0.05
    return 0.3 * swell * torch.randn(batch, num_samples, generator=generator)


def _mimi() -> nn.Module:
    from transformers import MimiConfig, MimiModel

    sizes = {"num_filters": 4, "hidden_size": 16, "upsampling_ratios": [4, 3, 2, 2], "upsample_groups": 16}
    books = {"codebook_size": 32, "codebook_dim": 8, "vector_quantization_hidden_dimension": 8, "num_quantizers": 6}
    layers = {"num_hidden_layers": 2, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = MimiModel(MimiConfig(**sizes, **books, **layers, sliding_window=8, layer_scale_initial_scale=0.5)).eval()
    latents = model.encoder(sounds(96 * 40)[:, None]).latents
    quantizer = model.quantizer
    for part in (quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer):
        near = part.input_proj(latents).transpose(1, 2).flatten(0, 1)
        for index, layer in enumerate(part.layers):
            _place(layer.codebook.embed_sum, near, level=index)
    return model


def _encodec() -> nn.Module:
    from transformers import EncodecConfig, EncodecModel

    sizes = {"num_filters": 4, "hidden_size": 16, "codebook_size": 32, "upsampling_ratios": [4, 3, 2, 2]}
    model = EncodecModel(EncodecConfig(**sizes, target_bandwidths=[2.5, 15.0])).eval()
    near = model.encoder(sounds(48 * 40)[:, None]).transpose(1, 2).flatten(0, 1)
    for index, layer in enumerate(model.quantizer.layers):
        _place(layer.codebook.embed, near, level=index)
    return model


def _dac() -> nn.Module:
    from transformers import DacConfig, DacModel

    sizes = {"encoder_hidden_size": 4, "decoder_hidden_size": 32, "downsampling_ratios": [2, 4, 5]}
    return DacModel(DacConfig(**sizes, n_codebooks=5, codebook_size=32, codebook_dim=4, sampling_rate=RATE)).eval()


def _place(entries_KD: Tensor, near_RD: Tensor, *, level: int) -> None:
    """Draw codebook entries as the rows are spread; those of later levels about zero, and nearer."""
    entries_KD.copy_(0.7**level * torch.randn_like(entries_KD) * near_RD.std(0))
    if level == 0:
        entries_KD.add_(near_RD.mean(0))


@torch.no_grad()
def small_model(kind: str) -> nn.Module:
    """A model of transformers: "mimi", "encodec" or "dac"; the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return {"mimi": _mimi, "encodec": _encodec, "dac": _dac}[kind]()


def save_small(kind: str, folder: Path) -> Path:
    """The same in transformers' format."""
    small_model(kind).save_pretrained(folder)
    return folder
