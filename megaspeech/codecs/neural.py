"""What codecs made of a network share: padding, devices and precision, loading from transformers' format.

Such a codec is an encoder (waveform to latents), a residual quantiser and a decoder. Encoder and decoder compute in
the dtype given to ``to``; the quantiser stays in FP32, for in BF16 the distances to two entries are often equal.
Memory grows with the length of what is encoded at once: ``preparation.max_seconds`` bounds it.

Shapes: B batch, Q codebooks, K entries of a codebook, T frames, N samples, D width of a latent.
"""

import math
from abc import abstractmethod
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from megaspeech.codecs.protocol import Codec, StreamingDecoder, StreamingEncoder
from megaspeech.codecs.weights import CONFIG_FILE, WEIGHTS_FILES, fingerprint, locate, only_file, read_config

SILENCE_SECONDS = 2
NEEDS = f"{CONFIG_FILE} and {' or '.join(WEIGHTS_FILES)}"


class NeuralCodec(Codec):
    """A codec whose ``model`` has an ``encoder``, a ``quantizer`` and a ``decoder``; see ``protocol.Codec``.

    A waveform is padded to at least ``min_frames``: a network that reflects its input at the edges reads that much of
    it for the first frame. ``kind`` is the class of transformers that ``load`` opens, ``published`` a name to download.
    """

    kind: str
    published: str

    can_stream = False
    min_frames = 1
    dtype = torch.float32

    def __init__(
        self,
        model: nn.Module,
        *,
        sample_rate: int,
        frame_size: int,
        max_codebooks: int,
        cardinality: int,
        num_codebooks: int | None = None,
        fingerprint: str = "random",
    ) -> None:
        """On the CPU, in FP32.

        Args:
            model: with weights.
            sample_rate, frame_size, cardinality: see ``protocol.Codec``.
            max_codebooks: codebooks of the model.
            num_codebooks: how many of them to use, the first ones; all if None.
            fingerprint: of the weights; the default is for weights that were never trained.

        Raises:
            ValueError: ``num_codebooks`` is not what the model has.
        """
        self.num_codebooks = max_codebooks if num_codebooks is None else num_codebooks
        if not 1 <= self.num_codebooks <= max_codebooks:
            raise ValueError(
                f"streams.num_codebooks = {num_codebooks}: this {self.name!r} codec has {max_codebooks} codebooks; "
                f"choose 1 to {max_codebooks}"
            )
        self.model = model.eval().requires_grad_(False)
        self.sample_rate, self.frame_size = sample_rate, frame_size
        self.frame_rate = sample_rate / frame_size
        self.cardinality, self.fingerprint = cardinality, fingerprint
        self.to("cpu")
        silence = self.encode(torch.zeros(1, SILENCE_SECONDS * sample_rate))[0]
        self.silence_codes = silence[:, silence.shape[1] // 2].clone()  # far from the edges, which sound different

    @classmethod
    def load(cls, path: str | Path, *, num_codebooks: int | None = None) -> Codec:
        """From a folder in transformers' format or the Hugging Face cache; raises as ``load_pretrained``."""
        model, found = load_pretrained(path, kind=cls.kind, codec=cls.name, published=cls.published)
        return cls(model, num_codebooks=num_codebooks, fingerprint=found)

    def to(self, device: str | torch.device, *, dtype: torch.dtype = torch.float32) -> "NeuralCodec":
        """Compute on ``device`` from now on, encoder and decoder in ``dtype``; returns the codec itself."""
        assert dtype == self.dtype or self.dtype == torch.float32, "rounded weights do not come back"
        self.device, self.dtype = torch.device(device), dtype
        self.model.to(device)
        cast(self.model.encoder, dtype)
        cast(self.model.decoder, dtype)
        return self

    @torch.no_grad()
    def encode(self, waveforms_BN: Tensor) -> Tensor:
        """Waveforms ``[B, N]`` to codes ``[B, Q, T]`` int64, ``T = ceil(N / frame_size)``."""
        batch, num_samples = waveforms_BN.shape
        num_frames = math.ceil(num_samples / self.frame_size)
        if not batch or not num_frames:
            return torch.zeros(batch, self.num_codebooks, num_frames, dtype=torch.long, device=self.device)
        padded = max(num_frames, self.min_frames) * self.frame_size
        waveforms = nn.functional.pad(waveforms_BN.to(self.device), (0, padded - num_samples))
        return self.quantize(self.latents(waveforms[:, None].to(self.dtype)))[..., :num_frames]

    @torch.no_grad()
    def decode(self, codes_BQT: Tensor) -> Tensor:
        """Codes ``[B, Q, T]`` to waveforms ``[B, T * frame_size]`` float32."""
        batch, _, num_frames = codes_BQT.shape
        if not batch or not num_frames:
            return torch.zeros(batch, num_frames * self.frame_size, device=self.device)
        latents_BDT = self.dequantize(codes_BQT.to(self.device))
        waveforms = self.synthesise(latents_BDT.to(self.dtype))[:, 0].float()
        # Transposed convolutions of odd stride give a few samples less than whole frames.
        return nn.functional.pad(waveforms, (0, num_frames * self.frame_size - waveforms.shape[1]))

    @abstractmethod
    def latents(self, waveforms_B1N: Tensor) -> Tensor:
        """Waveforms ``[B, 1, N]`` of whole frames, on the codec's device in its dtype, to latents ``[B, D, T]``."""

    @abstractmethod
    def quantize(self, latents_BDT: Tensor) -> Tensor:
        """Latents of any dtype to codes ``[B, Q, T]`` int64."""

    @abstractmethod
    def dequantize(self, codes_BQT: Tensor) -> Tensor:
        """Codes to latents ``[B, D, T]`` float32."""

    def synthesise(self, latents_BDT: Tensor) -> Tensor:
        """Latents in the codec's dtype to waveforms ``[B, 1, N]``."""
        return self.model.decoder(latents_BDT)

    def parts(self) -> dict[str, list[nn.Module]]:
        """Modules within the encoder whose time is told apart from that of its convolutions, by name."""
        return {}

    def streaming_encoder(self, *, batch_size: int = 1) -> StreamingEncoder:
        """See the protocol; this codec has none.

        Raises:
            ValueError: always, unless a kind of codec knows better.
        """
        raise ValueError(f"codec.name = {self.name!r}: it encodes whole waveforms alone; use 'mimi' or 'spectral'")

    def streaming_decoder(self, *, batch_size: int = 1) -> StreamingDecoder:
        """See the protocol; this codec has none.

        Raises:
            ValueError: always, unless a kind of codec knows better.
        """
        raise ValueError(f"codec.name = {self.name!r}: it decodes whole waveforms alone; use 'mimi' or 'spectral'")


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Bring weights to a dtype; buffers keep theirs, for frequencies of rotary embeddings must not be rounded."""
    buffers = [(owner, *named) for owner in module.modules() for named in owner.named_buffers(recurse=False)]
    module.to(dtype=dtype)
    for owner, name, buffer in buffers:
        setattr(owner, name, buffer)


def import_transformers() -> ModuleType:
    """The transformers package.

    Raises:
        ImportError: it is not installed; says how to.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"Mimi, EnCodec and DAC are read by transformers ({error}): pip install megaspeech[codecs]"
        ) from None
    return transformers


def load_pretrained(path: str | Path, *, kind: str, codec: str, published: str) -> tuple[nn.Module, str]:
    """A model in transformers' format, and the fingerprint of its weights.

    Args:
        path: a folder, or a name in the Hugging Face cache.
        kind: the class of transformers that it is.
        codec: its ``model_type``, which is what we call the codec too.
        published: a name to download, for the message.

    Raises:
        ValueError: files are missing or damaged, or another model's; weights are missing or of other shapes.
        ImportError: transformers is not installed.
    """
    folder = locate(path, codec=codec, needs=NEEDS, published=published)
    config = read_config(folder, model_type=codec, needs=NEEDS)
    weights = only_file(folder, WEIGHTS_FILES, codec=codec, needs=NEEDS)
    transformers = import_transformers()
    transformers.utils.logging.disable_progress_bar()  # for it takes no time
    try:
        model, found = getattr(transformers, kind).from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # of safetensors, torch and transformers, which share no base
        raise ValueError(f"{weights}: cannot be read ({_first_line(error)}); fetch the files again") from error
    # transformers would go on with random numbers in their place.
    if lacking := sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}):
        raise ValueError(
            f"{weights}: {lacking[0]} and {len(lacking) - 1} other weights are missing or of another shape than "
            f"{CONFIG_FILE} says; fetch the files again"
        )
    return model, fingerprint(weights, config=config)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
