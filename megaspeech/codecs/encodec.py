"""EnCodec (Defossez et al., arXiv 2210.13438), the causal mono model of 24 kHz, by transformers.

Shapes: B batch, Q codebooks, K entries of a codebook, T frames, N samples, D width of a latent.
"""

import torch
from torch import Tensor, nn

from megaspeech.codecs.neural import NeuralCodec


class EncodecCodec(NeuralCodec):
    """75 frames a second, up to 32 codebooks of 1024.

    Its convolutions reflect the start of a waveform, so that the first frames depend on those up to ``min_frames``:
    shorter waveforms are padded to that, and are the only ones that transformers encodes otherwise. It cannot stream,
    for transformers gives no access to the LSTM's state.
    """

    name, kind, published = "encodec", "EncodecModel", "facebook/encodec_24khz"
    is_causal = True

    def __init__(self, model: nn.Module, *, num_codebooks: int | None = None, fingerprint: str = "random") -> None:
        """From an ``EncodecModel`` of transformers; see ``NeuralCodec``.

        Raises:
            ValueError: the model is not causal, in stereo, or normalises loudness (the one of 48 kHz is all this).
        """
        config = model.config
        if config.audio_channels != 1 or config.normalize or config.chunk_length_s or not config.use_causal_conv:
            raise ValueError(
                f"codec.path: only the causal mono model is supported, not {config.sampling_rate} Hz stereo"
            )
        self.min_frames = config.last_kernel_size
        super().__init__(
            model,
            sample_rate=config.sampling_rate,
            frame_size=config.hop_length,
            max_codebooks=config.num_quantizers,
            cardinality=config.codebook_size,
            num_codebooks=num_codebooks,
            fingerprint=fingerprint,
        )

    def latents(self, waveforms_B1N: Tensor) -> Tensor:
        """Latents ``[B, D, T]``."""
        return self.model.encoder(waveforms_B1N)

    def quantize(self, latents_BDT: Tensor) -> Tensor:
        """Codes ``[B, Q, T]``; one codebook after the other, because the model itself counts in kbit/s."""
        residual, codes = latents_BDT.float(), []
        for layer in self.model.quantizer.layers[: self.num_codebooks]:
            codes.append(layer.encode(residual))
            residual = residual - layer.decode(codes[-1])
        return torch.stack(codes, dim=1)

    def dequantize(self, codes_BQT: Tensor) -> Tensor:
        """Latents ``[B, D, T]``."""
        return self.model.quantizer.decode(codes_BQT.transpose(0, 1))

    def parts(self) -> dict[str, list[nn.Module]]:
        """The LSTM."""
        return {"LSTM": [layer for layer in self.model.encoder.layers if hasattr(layer, "lstm")]}

    def codebook_vectors(self) -> Tensor:
        """``[Q, K, D]``."""
        return torch.stack(
            [layer.codebook.embed for layer in self.model.quantizer.layers[: self.num_codebooks]]
        ).clone()
