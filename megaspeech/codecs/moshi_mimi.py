"""Mimi from Kyutai's own file, ``tokenizer-*.safetensors``, by the moshi runtime, which also streams it.

Shapes: B batch, Q codebooks, K entries of a codebook, T frames, N samples, D width of a latent.
"""

import copy
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from megaspeech.codecs.neural import NeuralCodec, cast
from megaspeech.codecs.weights import fingerprint, only_file

KYUTAI_FILES = "tokenizer-*.safetensors"
MAX_CODEBOOKS = 32


class MoshiMimiCodec(NeuralCodec):
    """Up to 32 codebooks of 2048, the first of which is semantic.

    The codes are those of transformers' Mimi with the same weights, up to rounding; the two files have two
    fingerprints. Attention takes the square of a recording's length in memory.
    """

    name = "mimi"
    is_causal = can_stream = True

    def __init__(self, model: nn.Module, *, num_codebooks: int | None = None, fingerprint: str = "random") -> None:
        """From a ``MimiModel`` of moshi with all its codebooks; see ``NeuralCodec``."""
        super().__init__(
            model,
            sample_rate=model.sample_rate,
            frame_size=model.frame_size,
            max_codebooks=model.total_codebooks,
            cardinality=model.cardinality,
            num_codebooks=num_codebooks,
            fingerprint=fingerprint,
        )

    @classmethod
    def load(cls, path: str | Path, *, num_codebooks: int | None = None) -> "MoshiMimiCodec":
        """From a folder with one ``tokenizer-*.safetensors``, or from such a file, whatever its name.

        Raises:
            ValueError: there is none, or several, or it cannot be read.
            ImportError: moshi is not installed; says how to.
        """
        file = Path(path)
        if not file.is_file():
            file = only_file(file, (KYUTAI_FILES,), codec=cls.name, needs=KYUTAI_FILES)
        os.environ.setdefault(
            "NO_TORCH_COMPILE", "1"
        )  # read once, when moshi is imported: else it compiles on CPUs too
        try:
            from moshi.models.loaders import get_mimi
        except ImportError as error:
            raise ImportError(
                f"{file.name} is read by Kyutai's moshi runtime ({error}): pip install --no-deps moshi"
            ) from None
        try:
            model = get_mimi(file, device="cpu", num_codebooks=MAX_CODEBOOKS)
        except Exception as error:  # of safetensors and torch, which share no base
            reason = str(error).splitlines()[0]
            raise ValueError(f"{file}: not Mimi's weights ({reason}); fetch the file again") from error
        return cls(model, num_codebooks=num_codebooks, fingerprint=fingerprint(file))

    def to(self, device: str | torch.device, *, dtype: torch.dtype = torch.float32) -> "MoshiMimiCodec":
        """See ``NeuralCodec``; everything but the quantiser takes the dtype."""
        super().to(device, dtype=dtype)
        for name, part in self.model.named_children():
            if name != "quantizer":
                cast(part, dtype)
        return self

    def latents(self, waveforms_B1N: Tensor) -> Tensor:
        """Latents ``[B, D, T]``."""
        return self.model.encode_to_latent(waveforms_B1N, quantize=False)

    def quantize(self, latents_BDT: Tensor) -> Tensor:
        """Codes ``[B, Q, T]``."""
        self.model.quantizer.set_num_codebooks(self.num_codebooks)
        return self.model.quantizer.encode(latents_BDT.float())

    def dequantize(self, codes_BQT: Tensor) -> Tensor:
        """Latents ``[B, D, T]``."""
        return self.model.decode_latent(codes_BQT)

    def synthesise(self, latents_BDT: Tensor) -> Tensor:
        """Waveforms ``[B, 1, N]``."""
        return _synthesise(self.model, latents_BDT)

    def parts(self) -> dict[str, list[nn.Module]]:
        """The transformer."""
        return {"transformer": [self.model.encoder_transformer]}

    @torch.no_grad()
    def codebook_vectors(self) -> Tensor:
        """``[Q, K, D]``: what one code alone decodes to, for the sum over the codebooks is linear."""
        quantizer = self.model.quantizer
        vectors = []
        for part in (quantizer.rvq_first, quantizer.rvq_rest):
            for layer in part.vq.layers:
                vectors.append(part.output_proj(layer.embedding.T[None])[0].T)
        return torch.stack(vectors[: self.num_codebooks]).clone()

    def _streaming_model(self, batch_size: int) -> nn.Module:
        """The model with a state of its own; the weights are shared."""
        shared = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        model = copy.deepcopy(self.model, shared)
        model.streaming_forever(batch_size)
        return model

    def streaming_encoder(self, *, batch_size: int = 1) -> "MoshiStreamingEncoder":
        """An encoder whose codes equal ``encode`` frame by frame, but for what rounding makes of near ties."""
        return MoshiStreamingEncoder(self, self._streaming_model(batch_size))

    def streaming_decoder(self, *, batch_size: int = 1) -> "MoshiStreamingDecoder":
        """A decoder without look-ahead or delay."""
        return MoshiStreamingDecoder(self, self._streaming_model(batch_size))


def _synthesise(model: nn.Module, latents_BDT: Tensor) -> Tensor:
    """Waveforms ``[B, 1, N]``, whole, or the next ones where ``model`` streams."""
    (steps,) = model.decoder_transformer(model.upsample(latents_BDT))
    return model.decoder(steps)


class MoshiStreamingEncoder:
    """Samples of one frame in, its codes out."""

    def __init__(self, codec: MoshiMimiCodec, model: nn.Module) -> None:
        self._codec, self._model = codec, model

    @torch.no_grad()
    def step(self, samples_BN: Tensor) -> Tensor:
        """The next samples ``[B, frame_size]`` to codes ``[B, Q]``."""
        codec = self._codec
        latents = self._model.encode_to_latent(samples_BN[:, None].to(codec.device, codec.dtype), quantize=False)
        return codec.quantize(latents)[..., 0]


class MoshiStreamingDecoder:
    """Codes of one frame in, its samples out."""

    delay = 0

    def __init__(self, codec: MoshiMimiCodec, model: nn.Module) -> None:
        self._codec, self._model = codec, model

    @torch.no_grad()
    def step(self, codes_BQ: Tensor) -> Tensor:
        """Codes ``[B, Q]`` to the next samples ``[B, frame_size]``."""
        codec = self._codec
        latents_BD1 = codec.dequantize(codes_BQ[..., None].to(codec.device)).to(codec.dtype)
        return _synthesise(self._model, latents_BD1)[:, 0].float()
