"""WavTokenizer's network (Ji et al., arXiv 2408.16532), in our own code, with the sizes that its weights have.

An EnCodec-like encoder that looks ahead, one codebook, a Vocos-like decoder (convolutions, attention, ConvNeXt blocks)
and an inverse Fourier transform. Attributes are named as the published weights are, with these differences, which
``read_weights`` makes: wrappers of convolutions are dropped, weight normalisation is multiplied out, of the layer norms
that are conditioned on a bandwidth the only one in use is kept. Learned from github.com/jishengpeng/WavTokenizer.

Shapes: B batch, K entries of the codebook, T frames, N samples, D width of a latent, C channels, H width of the
decoder, L samples of a window.
"""

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, fold, pad

EPSILON = 1e-6
NUM_GROUPS = 32
LOUDEST = 100.0  # spectra are clipped there
SAMPLE_RATE = 24000
PREFIXES = {
    "feature_extractor.encodec.encoder.model.": "encoder.",
    "feature_extractor.encodec.quantizer.vq.layers.0._codebook.embed": "codebook",
    "backbone.": "decoder.backbone.",
    "head.out.": "decoder.out.",
}
"""Published names, as far as they are used, and ours."""


@dataclass(frozen=True)
class WavTokenizerSizes:
    """Sizes of the network; the defaults are those of the published models of 40 frames a second.

    Attributes:
        ratios: strides of the encoder, first to last.
        num_filters: channels of the encoder's first convolution, doubled by every stride.
        num_lstm_layers: at the end of the encoder.
        latent_dim: width of a latent and of the codebook.
        cardinality: entries of the codebook.
        hidden_size, ffn_size, num_blocks: of the decoder's ConvNeXt blocks.
        window: samples of a synthesis window.
    """

    ratios: tuple[int, ...] = (4, 5, 5, 6)
    num_filters: int = 32
    num_lstm_layers: int = 2
    latent_dim: int = 512
    cardinality: int = 4096
    hidden_size: int = 768
    ffn_size: int = 2304
    num_blocks: int = 12
    window: int = 2400

    @property
    def frame_size(self) -> int:
        """Samples a frame."""
        return math.prod(self.ratios)


class MirroredConv1d(nn.Conv1d):
    """A convolution whose input is mirrored at both ends, so that the output has ``ceil(N / stride)`` steps."""

    def forward(self, steps_BCN: Tensor) -> Tensor:
        """``[B, C, N]`` to ``[B, C', N']``; N, a multiple of the stride, must exceed half the kernel."""
        (reach,), (stride,) = self.kernel_size, self.stride
        right = (reach - stride) // 2
        return super().forward(pad(steps_BCN, (reach - stride - right, right), mode="reflect"))


class ResidualUnit(nn.Module):
    """Two convolutions beside a third."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.block = nn.Sequential(nn.ELU(), MirroredConv1d(channels, half, 3), nn.ELU(), nn.Conv1d(half, channels, 1))
        self.shortcut = nn.Conv1d(channels, channels, 1)

    def forward(self, steps_BCN: Tensor) -> Tensor:
        """``[B, C, N]`` to the same."""
        return self.shortcut(steps_BCN) + self.block(steps_BCN)


class ResidualLSTM(nn.Module):
    """An LSTM whose output is added to its input."""

    def __init__(self, channels: int, *, num_layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(channels, channels, num_layers)

    def forward(self, steps_BCN: Tensor) -> Tensor:
        """``[B, C, N]`` to the same."""
        return self.lstm(steps_BCN.permute(2, 0, 1))[0].permute(1, 2, 0) + steps_BCN


class ResnetBlock(nn.Module):
    """Two normalised convolutions, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(NUM_GROUPS, channels, eps=EPSILON) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv1d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, steps_BHT: Tensor) -> Tensor:
        """``[B, H, T]`` to the same."""
        inner = self.conv1(nn.functional.silu(self.norm1(steps_BHT)))
        return steps_BHT + self.conv2(nn.functional.silu(self.norm2(inner)))


class Attention(nn.Module):
    """Attention of one head over all frames, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(NUM_GROUPS, channels, eps=EPSILON)
        self.q, self.k, self.v, self.proj_out = (nn.Conv1d(channels, channels, 1) for _ in range(4))

    def forward(self, steps_BHT: Tensor) -> Tensor:
        """``[B, H, T]`` to the same."""
        normal = self.norm(steps_BHT)
        query, key, value = (part(normal).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return steps_BHT + self.proj_out(mixed.transpose(1, 2))


class ConvNeXtBlock(nn.Module):
    """A convolution by channel and a feed-forward layer, scaled and added to the input."""

    def __init__(self, channels: int, *, ffn_size: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv1d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=EPSILON)
        self.pwconv1, self.pwconv2 = nn.Linear(channels, ffn_size), nn.Linear(ffn_size, channels)
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, steps_BHT: Tensor) -> Tensor:
        """``[B, H, T]`` to the same."""
        inner = self.norm(self.dwconv(steps_BHT).transpose(1, 2))
        inner = self.gamma * self.pwconv2(nn.functional.gelu(self.pwconv1(inner)))
        return steps_BHT + inner.transpose(1, 2)


class Backbone(nn.Module):
    """Latents to what the spectra are read from."""

    def __init__(self, sizes: WavTokenizerSizes) -> None:
        super().__init__()
        width = sizes.hidden_size
        self.embed = nn.Conv1d(sizes.latent_dim, width, 7, padding=3)
        inner = [ResnetBlock(width), ResnetBlock(width), Attention(width), ResnetBlock(width), ResnetBlock(width)]
        self.pos_net = nn.Sequential(*inner, nn.GroupNorm(NUM_GROUPS, width, eps=EPSILON))
        self.norm = nn.LayerNorm(width, eps=EPSILON)
        self.convnext = nn.Sequential(*(ConvNeXtBlock(width, ffn_size=sizes.ffn_size) for _ in range(sizes.num_blocks)))
        self.final_layer_norm = nn.LayerNorm(width, eps=EPSILON)

    def forward(self, latents_BDT: Tensor) -> Tensor:
        """``[B, D, T]`` to ``[B, T, H]``."""
        steps = self.norm(self.pos_net(self.embed(latents_BDT)).transpose(1, 2))
        return self.final_layer_norm(self.convnext(steps.transpose(1, 2)).transpose(1, 2))


class Decoder(nn.Module):
    """Latents to waveforms: one spectrum a frame, overlapping windows added."""

    def __init__(self, sizes: WavTokenizerSizes) -> None:
        super().__init__()
        self.window, self.hop = sizes.window, sizes.frame_size
        self.backbone = Backbone(sizes)
        self.out = nn.Linear(sizes.hidden_size, sizes.window + 2)

    def forward(self, latents_BDT: Tensor) -> Tensor:
        """``[B, D, T]`` to ``[B, 1, N]``, N = T x frame size, float32: there is no Fourier transform in BF16."""
        loudness, phases = self.out(self.backbone(latents_BDT)).float().transpose(1, 2).chunk(2, dim=1)
        spectra_BFT = torch.polar(loudness.exp().clamp(max=LOUDEST), phases)
        taper_L = torch.hann_window(self.window, device=latents_BDT.device)
        windows_BLT = torch.fft.irfft(spectra_BFT, n=self.window, dim=1) * taper_L[:, None]
        envelope_1LT = taper_L.square()[None, :, None].expand(1, -1, windows_BLT.shape[-1])
        return self._overlap(windows_BLT) / self._overlap(envelope_1LT)

    def _overlap(self, windows_BLT: Tensor) -> Tensor:
        """The sum ``[B, 1, N]`` of windows that start a hop apart, cut so that each is centred on its frame."""
        length = (windows_BLT.shape[-1] - 1) * self.hop + self.window
        sound = fold(windows_BLT, output_size=(1, length), kernel_size=(1, self.window), stride=(1, self.hop))
        margin = (self.window - self.hop) // 2
        return sound[:, 0, :, margin : length - margin]


class WavTokenizerModel(nn.Module):
    """Encoder, codebook, decoder."""

    def __init__(self, sizes: WavTokenizerSizes) -> None:
        super().__init__()
        self.sizes = sizes
        channels = sizes.num_filters
        layers: list[nn.Module] = [MirroredConv1d(1, channels, 7)]
        for ratio in sizes.ratios:
            down = MirroredConv1d(channels, 2 * channels, 2 * ratio, stride=ratio)
            layers += [ResidualUnit(channels), nn.ELU(), down]
            channels *= 2
        layers += [ResidualLSTM(channels, num_layers=sizes.num_lstm_layers), nn.ELU()]
        self.encoder = nn.Sequential(*layers, MirroredConv1d(channels, sizes.latent_dim, 7))
        self.quantizer = Codebook(sizes)
        self.decoder = Decoder(sizes)


class Codebook(nn.Module):
    """The one codebook."""

    def __init__(self, sizes: WavTokenizerSizes) -> None:
        super().__init__()
        self.register_buffer("codebook", torch.zeros(sizes.cardinality, sizes.latent_dim))

    def encode(self, latents_BDT: Tensor) -> Tensor:
        """The nearest entries ``[B, T]``."""
        entries = self.codebook
        near_BTK = 2 * latents_BDT.transpose(1, 2) @ entries.T - entries.square().sum(1)
        return near_BTK.argmax(-1)

    def decode(self, codes_BT: Tensor) -> Tensor:
        """Latents ``[B, D, T]``."""
        return embedding(codes_BT, self.codebook).transpose(1, 2)


def read_weights(published: dict[str, Tensor]) -> tuple[WavTokenizerSizes, dict[str, Tensor]]:
    """Sizes and weights of a ``WavTokenizerModel`` from a published state dict; others' weights in it are left.

    Raises:
        KeyError: a weight that tells a size is missing.
    """
    weights = {}
    for key, value in published.items():
        for prefix, ours in PREFIXES.items():
            if key.startswith(prefix):
                name = ours + key[len(prefix) :].replace(".conv.conv.", ".").replace("conv.conv.", "")
                weights[name] = value.float()
    weights["quantizer.codebook"] = weights.pop("codebook")
    weights.pop("codebook_avg", None)
    for name in [name for name in weights if name.endswith("weight_v")]:
        direction, size = weights.pop(name), weights.pop(name[:-1] + "g")
        weights[name[:-2]] = direction * (size / direction.norm(dim=(1, 2), keepdim=True))
    for name in [name for name in weights if name.endswith(("norm.scale.weight", "norm.shift.weight"))]:
        kind = "weight" if ".scale." in name else "bias"
        weights[re.sub(r"(scale|shift)\.weight$", kind, name)] = weights.pop(name)[0]
    return _sizes(weights), weights


def _sizes(weights: dict[str, Tensor]) -> WavTokenizerSizes:
    """What the shapes say: a strided convolution is twice as wide as its stride."""
    strided = [f"encoder.{3 * place}.weight" for place in range(1, len(weights))]
    strided = [name for name in strided if name in weights][:-1]
    lstm = f"encoder.{3 * len(strided) + 1}.lstm.weight_ih_l"
    filters, _, _ = weights["encoder.0.weight"].shape
    cardinality, latent_dim = weights["quantizer.codebook"].shape
    hidden_size = weights["decoder.out.weight"].shape[1]
    return WavTokenizerSizes(
        ratios=tuple(weights[name].shape[-1] // 2 for name in strided),
        num_filters=filters,
        num_lstm_layers=sum(name.startswith(lstm) for name in weights),
        latent_dim=latent_dim,
        cardinality=cardinality,
        hidden_size=hidden_size,
        ffn_size=weights["decoder.backbone.convnext.0.pwconv1.weight"].shape[0],
        num_blocks=sum(name.endswith(".gamma") for name in weights),
        window=weights["decoder.out.weight"].shape[0] - 2,
    )
