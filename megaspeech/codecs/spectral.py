"""The ``spectral`` codec: log-mel frames, principal components, residual vector quantisation; no weights to download.

It is fitted on the user's own audio in seconds. 80 mel bands every 20 ms, four of them stacked to a frame of 80 ms,
standardised, projected on their principal components and quantised; back by mel inversion and phase retrieval.

Shapes: B batch, Q codebooks, K entries of a codebook, T frames, N samples, R rows (frames of any waveform),
J windows of a frame, M mel bands, F frequency bins, C samples a frame depends on, X stacked features (J * M), D latent.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megaspeech.codecs.quantizer import dequantize, fit_codebooks, quantize
from megaspeech.codecs.spectrogram import Framing, StreamingPhases, griffin_lim, magnitudes, mel_weights

CODEC_FILE = "codec.json"
TABLES_FILE = "codec.safetensors"
ROWS_AT_ONCE = 512  # frames whose windows are transformed together


@dataclass(frozen=True)
class SpectralConfig:
    """Sizes and parameters of a spectral codec.

    Attributes:
        sample_rate: Hz.
        window, hop: of the short-time transform, in samples.
        hops_per_frame: windows stacked to one frame; ``frame_size = hop * hops_per_frame``.
        num_mels: mel bands of a window.
        mel_floor: magnitude (a full-scale sine is 1) below which differences count little; -80 dB is 1e-4.
        latent_dim: principal components kept.
        num_codebooks, cardinality: of the quantiser; ``cardinality`` a power of two.
        beam: candidates kept while assigning codes; 1 is greedy.
        phase_iterations, momentum: of the whole-utterance phase retrieval.
        streaming_iterations: of the frame-by-frame phase retrieval.
        streaming_delay: samples by which streamed sound trails, at most ``window - hop``.
        fit_frames: frames drawn for fitting.
        fit_iterations: of k-means.
        seed: of the draw and of k-means.
    """

    sample_rate: int = 16000
    window: int = 1024
    hop: int = 320
    hops_per_frame: int = 4
    num_mels: int = 80
    mel_floor: float = 1e-4
    latent_dim: int = 64
    num_codebooks: int = 8
    cardinality: int = 256
    beam: int = 4
    phase_iterations: int = 32
    momentum: float = 0.99
    streaming_iterations: int = 8
    streaming_delay: int = 320
    fit_frames: int = 40000
    fit_iterations: int = 15
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together.

        Raises:
            ValueError: naming the key, its value and what it may be.
        """
        if self.cardinality < 2 or self.cardinality & (self.cardinality - 1):
            raise ValueError(f"cardinality = {self.cardinality}: must be a power of two, at least 2")
        if not 1 <= self.latent_dim <= self.num_mels * self.hops_per_frame:
            most = self.num_mels * self.hops_per_frame
            raise ValueError(f"latent_dim = {self.latent_dim}: must be 1 to num_mels * hops_per_frame = {most}")
        if not 0 < 2 * self.hop <= self.window:
            raise ValueError(f"hop = {self.hop}: must be positive and at most half of window = {self.window}")
        if not 0 <= self.streaming_delay <= self.window - self.hop:
            most = self.window - self.hop
            raise ValueError(f"streaming_delay = {self.streaming_delay}: must be 0 to window - hop = {most} samples")

    @property
    def framing(self) -> Framing:
        """How a waveform is cut into windows."""
        return Framing(window=self.window, hop=self.hop, hops=self.hops_per_frame)


class SpectralCodec:
    """Waveform to codes and back by a fitted mel spectrogram quantiser; see ``protocol.Codec``."""

    name = "spectral"

    def __init__(self, config: SpectralConfig, *, tables: dict[str, Tensor]) -> None:
        """From fitted tables (float32): ``mean`` and ``scale`` [X], ``basis`` [X, D], ``codebooks`` [Q, K, D]."""
        self.config, self.framing = config, config.framing
        self.sample_rate, self.frame_size = config.sample_rate, self.framing.frame_size
        self.frame_rate = config.sample_rate / self.frame_size
        self.num_codebooks, self.cardinality = config.num_codebooks, config.cardinality
        self._tables = {key: value.float().contiguous() for key, value in tables.items()}
        self._double = {key: value.double() for key, value in self._tables.items()}
        mel_MF = _mel(config)
        self._mel_FM, self._inverse_MF = mel_MF.T, torch.linalg.pinv(mel_MF).T.float()
        self.fingerprint = _fingerprint(config, self._tables)
        self.silence_codes = self.encode(torch.zeros(1, self.frame_size))[0, :, 0]

    @classmethod
    def fit(cls, waveforms: Iterable[np.ndarray | Tensor], *, config: SpectralConfig | None = None) -> "SpectralCodec":
        """A codec fitted on mono waveforms ``[N]`` at ``config.sample_rate`` in [-1, 1]; deterministic.

        Raises:
            ValueError: the audio has fewer frames than a codebook has entries.
        """
        config = config or SpectralConfig()
        contexts_RC = _draw(waveforms, config=config)
        features_RX = torch.cat([_features(rows, config=config) for rows in contexts_RC.split(ROWS_AT_ONCE)])
        mean, scale, basis = _principal(features_RX, latent_dim=config.latent_dim)
        codebooks = fit_codebooks(
            (features_RX - mean) / scale @ basis,
            num_codebooks=config.num_codebooks,
            cardinality=config.cardinality,
            beam=config.beam,
            iterations=config.fit_iterations,
            seed=config.seed,
        )
        return cls(config, tables={"mean": mean, "scale": scale, "basis": basis, "codebooks": codebooks})

    def encode(self, waveforms_BN: Tensor) -> Tensor:
        """Waveforms ``[B, N]`` to codes ``[B, Q, T]`` int64, ``T = ceil(N / frame_size)``; a row's codes are its own."""
        contexts_BTC = self.framing.contexts(waveforms_BN)
        batch, frames, _ = contexts_BTC.shape
        rows = [self._encode_contexts(part) for part in contexts_BTC.flatten(0, 1).split(ROWS_AT_ONCE)]
        return torch.cat(rows).view(batch, frames, -1).transpose(1, 2).contiguous()

    def _encode_contexts(self, contexts_RC: Tensor) -> Tensor:
        """Codes ``[R, Q]`` of frames with the samples before them."""
        tables = self._double
        features_RX = _features(contexts_RC, config=self.config, mel_FM=self._mel_FM)
        latents_RD = (features_RX - tables["mean"]) / tables["scale"] @ tables["basis"]
        return quantize(latents_RD, codebooks_QKD=tables["codebooks"], beam=self.config.beam)

    def _decode_magnitudes(self, codes_RQ: Tensor) -> Tensor:
        """Magnitude spectra ``[R, J, F]`` that the codes ask for."""
        tables, config = self._tables, self.config
        latents_RD = dequantize(codes_RQ, codebooks_QKD=tables["codebooks"])
        features_RX = latents_RD @ tables["basis"].T * tables["scale"] + tables["mean"]
        mel_RJM = features_RX.view(-1, config.hops_per_frame, config.num_mels).exp() - config.mel_floor
        return (mel_RJM.clamp(min=0) @ self._inverse_MF).clamp(min=0)

    def decode(self, codes_BQT: Tensor) -> Tensor:
        """Codes ``[B, Q, T]`` to waveforms ``[B, T * frame_size]`` float32, in time with the encoded ones."""
        batch, _, frames = codes_BQT.shape
        spectra = self._decode_magnitudes(codes_BQT.transpose(1, 2).flatten(0, 1))
        spectra = spectra.view(batch, frames * self.config.hops_per_frame, -1)
        iterations, momentum = self.config.phase_iterations, self.config.momentum
        return griffin_lim(spectra, framing=self.framing, iterations=iterations, momentum=momentum)

    def streaming_encoder(self, *, batch_size: int = 1) -> "SpectralStreamingEncoder":
        """An encoder whose codes equal ``encode`` frame by frame."""
        return SpectralStreamingEncoder(self, batch_size=batch_size)

    def streaming_decoder(self, *, batch_size: int = 1) -> "SpectralStreamingDecoder":
        """A decoder without look-ahead; its sound trails ``decode`` by ``config.streaming_delay`` samples."""
        return SpectralStreamingDecoder(self, batch_size=batch_size)

    def codebook_vectors(self) -> Tensor:
        """``[Q, K, D]`` float32; their sum over the codebooks is the quantised latent (of zero mean over the data)."""
        return self._tables["codebooks"].clone()

    def save(self, directory: str | Path) -> None:
        """Write ``codec.json`` and ``codec.safetensors``."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_file(self._tables, directory / TABLES_FILE)
        facts = {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "frame_size": self.frame_size,
            "frame_rate": self.frame_rate,
            "num_codebooks": self.num_codebooks,
            "cardinality": self.cardinality,
            "silence_codes": self.silence_codes.tolist(),
            "config": asdict(self.config),
        }
        (directory / CODEC_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> "SpectralCodec":
        """The codec that ``save`` wrote.

        Raises:
            ValueError: a file is missing or unreadable, it is another codec's, or the tables are not those that
                ``codec.json`` was written with.
        """
        description, tables_path = Path(directory) / CODEC_FILE, Path(directory) / TABLES_FILE
        remedy = "fit the codec again and save it there"
        for path in (description, tables_path):
            if not path.is_file():
                raise ValueError(f"{path}: no such file; {remedy}, or name the directory that holds it")
        try:
            facts = json.loads(description.read_text(encoding="utf-8"))
            name, fingerprint, config = facts["name"], facts["fingerprint"], SpectralConfig(**facts["config"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{description}: not a spectral codec's description ({error!r}); {remedy}") from error
        if name != cls.name:
            raise ValueError(f"{description}: name = {name!r}, expected {cls.name!r}; open it with load_codec")
        try:
            tables = load_file(tables_path)
        except Exception as error:  # safetensors has no common base that is exported
            raise ValueError(f"{tables_path}: cannot be read ({error}); {remedy}") from error
        found = _fingerprint(config, tables)
        if found != fingerprint:
            raise ValueError(
                f"{tables_path}: fingerprint {found} is not {fingerprint} of {description}; "
                f"the two files do not belong together: {remedy}"
            )
        return cls(config, tables=tables)


class SpectralStreamingEncoder:
    """Feeds ``SpectralCodec.encode`` one frame at a time, remembering the samples that its windows reach back to."""

    def __init__(self, codec: SpectralCodec, *, batch_size: int) -> None:
        self._codec = codec
        self._past_BN = torch.zeros(batch_size, codec.framing.overlap)

    def step(self, samples_BN: Tensor) -> Tensor:
        """The next samples ``[B, frame_size]`` to codes ``[B, Q]``."""
        context_BC = torch.cat([self._past_BN, samples_BN], dim=1)
        self._past_BN = context_BC[:, self._codec.frame_size :]
        return self._codec._encode_contexts(context_BC)


class SpectralStreamingDecoder:
    """Codes of one frame in, one frame of sound out, ``delay`` samples behind ``SpectralCodec.decode``."""

    def __init__(self, codec: SpectralCodec, *, batch_size: int) -> None:
        config = codec.config
        self._codec, self.delay = codec, config.streaming_delay
        self._phases = StreamingPhases(
            framing=codec.framing, batch_size=batch_size, iterations=config.streaming_iterations, delay=self.delay
        )

    def step(self, codes_BQ: Tensor) -> Tensor:
        """Codes ``[B, Q]`` to the next samples ``[B, frame_size]``."""
        return self._phases.step(self._codec._decode_magnitudes(codes_BQ))


def _mel(config: SpectralConfig) -> Tensor:
    return mel_weights(num_mels=config.num_mels, window=config.window, sample_rate=config.sample_rate)


def _features(contexts_RC: Tensor, *, config: SpectralConfig, mel_FM: Tensor | None = None) -> Tensor:
    """Stacked log-mel ``[R, X]`` (float64) of frames; double precision for the reason given in ``quantize``."""
    mel_FM = _mel(config).T if mel_FM is None else mel_FM
    spectra_RJF = magnitudes(contexts_RC.double(), framing=config.framing)
    return (spectra_RJF @ mel_FM + config.mel_floor).log().flatten(1)


def _draw(waveforms: Iterable[np.ndarray | Tensor], *, config: SpectralConfig) -> Tensor:
    """``[R, C]``: up to ``fit_frames`` frames drawn from the waveforms, and some of silence, which must have its codes."""
    rows = [config.framing.contexts(torch.as_tensor(wave)[None].float())[0] for wave in waveforms]
    total = sum(len(part) for part in rows)
    if total < config.cardinality:
        raise ValueError(
            f"cardinality = {config.cardinality}: fitting needs at least as many frames and the audio has {total}; "
            f"give more audio or a smaller cardinality"
        )
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.randperm(total, generator=generator)[: config.fit_frames].sort().values
    firsts = np.cumsum([0] + [len(part) for part in rows])
    drawn = [
        part[chosen[(chosen >= first) & (chosen < first + len(part))] - first] for part, first in zip(rows, firsts)
    ]
    silence = torch.zeros(max(1, len(chosen) // 64), config.framing.context)
    return torch.cat([*drawn, silence])


def _principal(features_RX: Tensor, *, latent_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and scale ``[X]`` and the first principal directions ``[X, D]`` of the standardised features."""
    mean = features_RX.mean(0)
    scale = features_RX.std(0).clamp(min=1e-3)
    standard = (features_RX - mean) / scale
    _, vectors = torch.linalg.eigh(standard.T @ standard / len(standard))
    basis = vectors.flip(1)[:, :latent_dim]
    signs = basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    return mean, scale, basis * signs


def _fingerprint(config: SpectralConfig, tables: dict[str, Tensor]) -> str:
    """16 hexadecimal digits over the parameters and the tables."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for key in sorted(tables):
        digest.update(key.encode() + str(tuple(tables[key].shape)).encode() + tables[key].numpy().tobytes())
    return digest.hexdigest()[:16]
