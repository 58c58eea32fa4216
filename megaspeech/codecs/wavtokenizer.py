"""WavTokenizer: one codebook of 4096, 40 or 75 frames a second, from its published Lightning checkpoints.

Shapes: B batch, Q codebooks (1), K entries of the codebook, T frames, N samples, D width of a latent.
"""

import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from megaspeech.codecs.neural import NeuralCodec
from megaspeech.codecs.wavtokenizer_model import SAMPLE_RATE, ResidualLSTM, WavTokenizerModel, read_weights
from megaspeech.codecs.weights import fingerprint, locate, only_file

PUBLISHED = "novateur/WavTokenizer-large-unify-40token"
NEEDS = "one of its *.ckpt"


class WavTokenizerCodec(NeuralCodec):
    """Its encoder looks ahead, and its decoder attends to all frames."""

    name = "wavtokenizer"
    is_causal = False
    min_frames = 4  # the last convolution mirrors three

    def __init__(
        self, model: WavTokenizerModel, *, num_codebooks: int | None = None, fingerprint: str = "random"
    ) -> None:
        """From a model with weights; see ``NeuralCodec``."""
        super().__init__(
            model,
            sample_rate=SAMPLE_RATE,
            frame_size=model.sizes.frame_size,
            max_codebooks=1,
            cardinality=model.sizes.cardinality,
            num_codebooks=num_codebooks,
            fingerprint=fingerprint,
        )

    @classmethod
    def load(cls, path: str | Path, *, num_codebooks: int | None = None) -> "WavTokenizerCodec":
        """From a checkpoint, a folder with one, or the Hugging Face cache; sizes are read from the weights' shapes.

        Raises:
            ValueError: there is none, or several, or it is damaged or not WavTokenizer's.
        """
        file = Path(path)
        if not file.is_file():
            folder = locate(path, codec=cls.name, needs=NEEDS, published=PUBLISHED)
            file = only_file(folder, ("*.ckpt",), codec=cls.name, needs=NEEDS)
        try:
            sizes, weights = read_weights(read_checkpoint(file)["state_dict"])
            model = WavTokenizerModel(sizes)
            model.load_state_dict(weights)
        except (KeyError, ValueError, RuntimeError, OSError, pickle.UnpicklingError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{file}: not a checkpoint of WavTokenizer ({reason}); fetch it again") from error
        return cls(model, num_codebooks=num_codebooks, fingerprint=fingerprint(file))

    def latents(self, waveforms_B1N: Tensor) -> Tensor:
        """Latents ``[B, D, T]``."""
        return self.model.encoder(waveforms_B1N)

    def quantize(self, latents_BDT: Tensor) -> Tensor:
        """Codes ``[B, 1, T]``."""
        return self.model.quantizer.encode(latents_BDT.float())[:, None]

    def dequantize(self, codes_BQT: Tensor) -> Tensor:
        """Latents ``[B, D, T]``."""
        return self.model.quantizer.decode(codes_BQT[:, 0])

    def parts(self) -> dict[str, list[nn.Module]]:
        """The LSTM."""
        return {"LSTM": [layer for layer in self.model.encoder if isinstance(layer, ResidualLSTM)]}

    def codebook_vectors(self) -> Tensor:
        """``[1, K, D]``."""
        return self.model.quantizer.codebook[None].clone()


def read_checkpoint(path: Path) -> dict:
    """A checkpoint of Lightning, without running any code that it names.

    Beside weights it holds settings and optimizer states, whose classes need not be installed: an empty stand-in takes
    the place of each.
    """
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    stand_ins = [(type("StandIn", (_StandIn,), {}), name) for name in names]
    with torch.serialization.safe_globals(stand_ins):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


class _StandIn(dict):
    """Takes whatever an object of another class would be made of."""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    def __setstate__(self, _: object) -> None:
        return
