"""Mimi (Defossez et al., Moshi, arXiv 2410.00037) by transformers: 24 kHz, 12.5 frames a second, made to stream.

Shapes: B batch, Q codebooks, K entries of a codebook, T frames, N samples, D width of a latent, U steps of the
transformers (two a frame).
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megaspeech.codecs.moshi_mimi import KYUTAI_FILES, MoshiMimiCodec
from megaspeech.codecs.neural import NEEDS, NeuralCodec
from megaspeech.codecs.protocol import Codec
from megaspeech.codecs.weights import locate

PIECE_FRAMES = 750
"""Frames that are encoded at once, a minute of sound: attention takes the square of that in memory."""


class MimiCodec(NeuralCodec):
    """Up to 32 codebooks of 2048, the first of which is semantic."""

    name, kind, published = "mimi", "MimiModel", "kyutai/mimi"
    is_causal = can_stream = True

    def __init__(self, model: nn.Module, *, num_codebooks: int | None = None, fingerprint: str = "random") -> None:
        """From a ``MimiModel`` of transformers; see ``NeuralCodec``."""
        config = model.config
        super().__init__(
            model,
            sample_rate=config.sampling_rate,
            frame_size=round(config.sampling_rate / config.frame_rate),
            max_codebooks=config.num_quantizers,
            cardinality=config.codebook_size,
            num_codebooks=num_codebooks,
            fingerprint=fingerprint,
        )

    @classmethod
    def load(cls, path: str | Path, *, num_codebooks: int | None = None) -> Codec:
        """From a folder in transformers' format, the Hugging Face cache, Kyutai's own file or a folder with it.

        Kyutai's, which a folder holds as ``tokenizer-*.safetensors``, is opened by the moshi runtime. Raises as
        ``load_pretrained``.
        """
        if Path(path).is_file():
            return MoshiMimiCodec.load(path, num_codebooks=num_codebooks)
        needs = f"{NEEDS}, or Kyutai's {KYUTAI_FILES}"
        folder = locate(path, codec=cls.name, needs=needs, published=cls.published)
        if any(folder.glob(KYUTAI_FILES)):
            return MoshiMimiCodec.load(folder, num_codebooks=num_codebooks)
        return super().load(folder, num_codebooks=num_codebooks)

    def to(self, device: str | torch.device, *, dtype: torch.dtype = torch.float32) -> "MimiCodec":
        """See ``NeuralCodec``."""
        for layer in self._layers():
            layer.codebook._embed = None  # computed once and kept, where `Module.to` does not see it
        return super().to(device, dtype=dtype)

    def _layers(self) -> list[nn.Module]:
        quantizer = self.model.quantizer
        parts = (quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer)
        return [layer for part in parts for layer in part.layers]

    def latents(self, waveforms_B1N: Tensor) -> Tensor:
        """Latents ``[B, D, T]``; long waveforms in pieces that hand on the state of all layers."""
        pieces = waveforms_B1N.split(PIECE_FRAMES * self.frame_size, dim=-1)
        if len(pieces) == 1:
            return self.model.encoder(waveforms_B1N).latents
        state = EncoderState(self.model.encoder)
        return torch.cat([state.advance(piece) for piece in pieces], dim=-1)

    def quantize(self, latents_BDT: Tensor) -> Tensor:
        """Codes ``[B, Q, T]``."""
        return self.model.quantizer.encode(latents_BDT.float(), self.num_codebooks).transpose(0, 1)

    def dequantize(self, codes_BQT: Tensor) -> Tensor:
        """Latents ``[B, D, T]``."""
        return self.model.quantizer.decode(codes_BQT)

    def synthesise(self, latents_BDT: Tensor) -> Tensor:
        """Waveforms ``[B, 1, N]``; long ones in pieces, as ``latents``."""
        pieces = latents_BDT.split(PIECE_FRAMES, dim=-1)
        if len(pieces) == 1:
            return self.model.decoder(latents_BDT).audio_values
        state = DecoderState(self.model.decoder, batch_size=len(latents_BDT))
        return torch.cat([state.advance(piece) for piece in pieces], dim=-1)

    def parts(self) -> dict[str, list[nn.Module]]:
        """The transformer."""
        return {"transformer": [self.model.encoder.encoder_transformer]}

    @torch.no_grad()
    def codebook_vectors(self) -> Tensor:
        """``[Q, K, D]``: entries as they enter the sum, projected to the latents' width."""
        quantizer = self.model.quantizer
        vectors = []
        for part in (quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer):
            project = part.output_proj or nn.Identity()
            vectors += [project(layer.codebook.embed.T[None])[0].T for layer in part.layers]
        return torch.stack(vectors[: self.num_codebooks]).clone()

    def streaming_encoder(self, *, batch_size: int = 1) -> "MimiStreamingEncoder":
        """An encoder whose codes equal ``encode`` frame by frame, but for what rounding makes of near ties."""
        return MimiStreamingEncoder(self)

    def streaming_decoder(self, *, batch_size: int = 1) -> "MimiStreamingDecoder":
        """A decoder without look-ahead or delay."""
        return MimiStreamingDecoder(self, batch_size=batch_size)


class EncoderState:
    """What the encoder's layers remember between pieces of one waveform."""

    def __init__(self, encoder: nn.Module) -> None:
        self._encoder = encoder
        self._caches: dict[str, Any] = {}

    def advance(self, waveforms_B1N: Tensor) -> Tensor:
        """The next whole frames of the waveforms to latents ``[B, D, T]``."""
        found = self._encoder(waveforms_B1N, use_streaming=True, **self._caches)
        self._caches = {"past_key_values": found.past_key_values, "padding_cache": found.padding_cache}
        return found.latents


class DecoderState:
    """What the decoder's layers remember between pieces of one waveform.

    transformers keeps no state for the decoder's convolutions, so those are computed again over the steps that they
    reach back to: the same samples, for a frame in about five times the time.
    """

    def __init__(self, decoder: nn.Module, *, batch_size: int) -> None:
        config, weight = decoder.config, next(decoder.parameters())
        self._decoder, self._cache = decoder, None
        self._stride = round(config.encodec_frame_rate / config.frame_rate)
        self._samples = math.prod(config.upsampling_ratios)  # of a step
        self._reach = _reach(config)
        self._before_BD1 = weight.new_zeros(batch_size, config.hidden_size, 1)
        self._past_BDU = weight.new_zeros(batch_size, config.hidden_size, 0)

    def advance(self, latents_BDT: Tensor) -> Tensor:
        """The next frames' latents to their samples ``[B, 1, N]``."""
        both = torch.cat([self._before_BD1, latents_BDT], dim=-1)
        self._before_BD1 = latents_BDT[..., -1:]
        steps_BDU = self._decoder.upsample(both)[..., self._stride :]
        found = self._decoder.decoder_transformer(
            steps_BDU.transpose(1, 2), past_key_values=self._cache, use_cache=True
        )
        self._cache = found.past_key_values
        steps_BDU = torch.cat([self._past_BDU, found.last_hidden_state.transpose(1, 2)], dim=-1)
        fresh = (steps_BDU.shape[-1] - self._past_BDU.shape[-1]) * self._samples
        self._past_BDU = steps_BDU[..., -self._reach :]
        return self._decoder.decoder_seanet(steps_BDU)[..., -fresh:]


def _reach(config: Any) -> int:
    """Steps before its own that a sample depends on, by the decoder's convolutions, counted from the last one."""
    steps = config.last_kernel_size - 1
    for ratio in reversed(config.upsampling_ratios):
        for layer in range(config.num_residual_layers):
            steps += (config.residual_kernel_size - 1) * config.dilation_growth_rate**layer
        steps = math.ceil(steps / ratio) + 1  # a transposed convolution of twice its stride reads one input more
    return steps + config.kernel_size - 1


class MimiStreamingEncoder:
    """Samples of one frame in, its codes out."""

    def __init__(self, codec: MimiCodec) -> None:
        self._codec, self._state = codec, EncoderState(codec.model.encoder)

    @torch.no_grad()
    def step(self, samples_BN: Tensor) -> Tensor:
        """The next samples ``[B, frame_size]`` to codes ``[B, Q]``."""
        codec = self._codec
        latents_BD1 = self._state.advance(samples_BN[:, None].to(codec.device, codec.dtype))
        return codec.quantize(latents_BD1)[..., 0]


class MimiStreamingDecoder:
    """Codes of one frame in, its samples out."""

    delay = 0

    def __init__(self, codec: MimiCodec, *, batch_size: int) -> None:
        self._codec, self._state = codec, DecoderState(codec.model.decoder, batch_size=batch_size)

    @torch.no_grad()
    def step(self, codes_BQ: Tensor) -> Tensor:
        """Codes ``[B, Q]`` to the next samples ``[B, frame_size]``."""
        codec = self._codec
        latents_BD1 = codec.dequantize(codes_BQ[..., None].to(codec.device)).to(codec.dtype)
        return self._state.advance(latents_BD1)[:, 0].float()
