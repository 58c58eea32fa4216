"""DAC, the Descript Audio Codec (Kumar et al., arXiv 2306.06546), at 16, 24 or 44.1 kHz, by transformers.

Shapes: B batch, Q codebooks, K entries of a codebook, T frames, N samples, D width of a latent.
"""

import torch
from torch import Tensor, nn

from megaspeech.codecs.neural import NeuralCodec


class DacCodec(NeuralCodec):
    """50 to 86 frames a second, up to 9 codebooks of 1024 (44.1 kHz), 12 (16 kHz) or 32 (24 kHz).

    Its convolutions look ahead: what follows a waveform changes the codes of its last frames.
    """

    name, kind, published = "dac", "DacModel", "descript/dac_24khz"
    is_causal = False

    def __init__(self, model: nn.Module, *, num_codebooks: int | None = None, fingerprint: str = "random") -> None:
        """From a ``DacModel`` of transformers; see ``NeuralCodec``."""
        config = model.config
        super().__init__(
            model,
            sample_rate=config.sampling_rate,
            frame_size=config.hop_length,
            max_codebooks=config.n_codebooks,
            cardinality=config.codebook_size,
            num_codebooks=num_codebooks,
            fingerprint=fingerprint,
        )

    def latents(self, waveforms_B1N: Tensor) -> Tensor:
        """Latents ``[B, D, T]``."""
        return self.model.encoder(waveforms_B1N)

    def quantize(self, latents_BDT: Tensor) -> Tensor:
        """Codes ``[B, Q, T]``."""
        return self.model.quantizer(latents_BDT.float(), self.num_codebooks)[1]

    def dequantize(self, codes_BQT: Tensor) -> Tensor:
        """Latents ``[B, D, T]``."""
        return self.model.quantizer.from_codes(codes_BQT)[0]

    @torch.no_grad()
    def codebook_vectors(self) -> Tensor:
        """``[Q, K, D]``: entries as they enter the sum, projected to the latents' width."""
        layers = self.model.quantizer.quantizers[: self.num_codebooks]
        return torch.stack([layer.out_proj(layer.codebook.weight.T[None])[0].T for layer in layers])
