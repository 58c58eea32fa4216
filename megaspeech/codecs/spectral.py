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
from safetensors.torch import load_file, save
from torch import Tensor

from megaspeech.codecs.protocol import Codec
from megaspeech.codecs.quantizer import dequantize, fit_codebooks, quantize
from megaspeech.codecs.spectrogram import Framing, StreamingPhases, griffin_lim, invert_mel, magnitudes, mel_weights

CODEC_FILE = "codec.json"
TABLES_FILE = "codec.safetensors"
ROWS_AT_ONCE = 512  # frames whose windows are transformed together
RUN_FRAMES = 64  # frames in a row that are drawn together for fitting
PRIOR_FRAMES = 500  # how many frames of evidence the readout of fit_tables needs to leave the plain inverse


@dataclass(frozen=True)
class SpectralConfig:
    """Sizes and parameters of a spectral codec.

    Attributes:
        sample_rate: Hz.
        window, hop: of the short-time transform, in samples.
        hops_per_frame: windows stacked to one frame; ``frame_size = hop * hops_per_frame``.
        num_mels: mel bands of a window.
        mel_floor: magnitude (a full-scale sine is 1) below which differences count little; -66 dB is 5e-4.
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
    mel_floor: float = 5e-4
    latent_dim: int = 96
    num_codebooks: int = 8
    cardinality: int = 256
    beam: int = 4
    phase_iterations: int = 32
    momentum: float = 0.99
    streaming_iterations: int = 8
    streaming_delay: int = 320
    fit_frames: int = 25000
    fit_iterations: int = 10
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


class SpectralCodec(Codec):
    """Waveform to codes and back by a fitted mel spectrogram quantiser; see ``protocol.Codec``."""

    name = "spectral"
    is_causal = can_stream = True
    device = torch.device("cpu")

    def __init__(self, config: SpectralConfig, *, tables: dict[str, Tensor]) -> None:
        """From the tables of ``fit_tables``."""
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
        return cls(config, tables=fit_tables(waveforms, config=config))

    def to(self, device: str | torch.device, *, dtype: torch.dtype = torch.float32) -> "SpectralCodec":
        """Stays on the CPU in its own precision, in which the same sound has the same codes on every machine."""
        return self

    def encode(self, waveforms_BN: Tensor) -> Tensor:
        """Waveforms ``[B, N]`` to codes ``[B, Q, T]`` int64, ``T = ceil(N / frame_size)``."""
        contexts_BTC = self.framing.contexts(waveforms_BN.cpu())
        batch, frames, _ = contexts_BTC.shape
        rows = [self._encode_contexts(part) for part in contexts_BTC.flatten(0, 1).split(ROWS_AT_ONCE)]
        return torch.cat(rows).view(batch, frames, -1).transpose(1, 2).contiguous()

    def _encode_contexts(self, contexts_RC: Tensor) -> Tensor:
        """Codes ``[R, Q]`` of frames with the samples before them."""
        tables = self._double
        features_RX = _features(contexts_RC, config=self.config, mel_FM=self._mel_FM)
        latents_RD = (features_RX - tables["mean"]) / tables["scale"] @ tables["basis"]
        return quantize(latents_RD, codebooks_QKD=tables["codebooks"], beam=self.config.beam)

    def _magnitudes(self, codes_BQT: Tensor, *, before_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Spectra ``[B, T, J, F]`` that the codes ask for, given the latent before them; and the last latent."""
        tables, config = self._tables, self.config
        latents_BTD = dequantize(codes_BQT.transpose(1, 2), codebooks_QKD=tables["codebooks"])
        earlier_BTD = torch.cat([before_BD[:, None], latents_BTD[:, :-1]], dim=1)
        features_BTX = torch.cat([earlier_BTD, latents_BTD], dim=-1) @ tables["readout"] + tables["offset"]
        mel_BTJM = features_BTX.unflatten(-1, (config.hops_per_frame, config.num_mels)).exp() - config.mel_floor
        mel_BTJM = mel_BTJM.clamp(0, 1)  # a full-scale sine is 1: no choice of codes is louder than a waveform can be
        spectra = invert_mel(mel_BTJM, mel_FM=self._mel_FM.float(), inverse_MF=self._inverse_MF)
        return spectra, latents_BTD[:, -1]

    def _silence(self, batch_size: int) -> Tensor:
        """The latent ``[B, D]`` of the frame before the first."""
        codes_BQ = self.silence_codes.expand(batch_size, -1)
        return dequantize(codes_BQ, codebooks_QKD=self._tables["codebooks"])

    def decode(self, codes_BQT: Tensor) -> Tensor:
        """Codes ``[B, Q, T]`` to waveforms ``[B, T * frame_size]`` float32, in time with the encoded ones."""
        codes_BQT = codes_BQT.cpu()
        if codes_BQT.shape[-1] == 0:
            return torch.zeros(len(codes_BQT), 0)
        spectra, _ = self._magnitudes(codes_BQT, before_BD=self._silence(len(codes_BQT)))
        iterations, momentum = self.config.phase_iterations, self.config.momentum
        return griffin_lim(spectra.flatten(1, 2), framing=self.framing, iterations=iterations, momentum=momentum)

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
        (directory / TABLES_FILE).write_bytes(save(self._tables))  # others may not read what `save_file` writes
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
    def load(cls, directory: str | Path, *, num_codebooks: int | None = None) -> "SpectralCodec":
        """The codec that ``save`` wrote; ``num_codebooks`` was settled by ``fit``.

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
            raise ValueError(f"{description}: not a codec's description ({error!r}); {remedy}") from error
        if name != cls.name:
            raise ValueError(f"{description}: name = {name!r}, expected {cls.name!r}; set codec.name to it")
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
        self._before_BD = codec._silence(batch_size)
        self._phases = StreamingPhases(
            framing=codec.framing, batch_size=batch_size, iterations=config.streaming_iterations, delay=self.delay
        )

    def step(self, codes_BQ: Tensor) -> Tensor:
        """Codes ``[B, Q]`` to the next samples ``[B, frame_size]``."""
        spectra, self._before_BD = self._codec._magnitudes(codes_BQ[..., None], before_BD=self._before_BD)
        return self._phases.step(spectra[:, 0])


def _mel(config: SpectralConfig) -> Tensor:
    return mel_weights(num_mels=config.num_mels, window=config.window, sample_rate=config.sample_rate)


def _features(contexts_RC: Tensor, *, config: SpectralConfig, mel_FM: Tensor) -> Tensor:
    """Stacked log-mel ``[R, X]`` (float64) of frames; double precision for the reason given in ``quantize``, from the
    first matrix product on: the transform before it computes each window by itself."""
    spectra_RJF = magnitudes(contexts_RC.float(), framing=config.framing).double()
    return (spectra_RJF @ mel_FM + config.mel_floor).log().flatten(1)


def fit_tables(waveforms: Iterable[np.ndarray | Tensor], *, config: SpectralConfig) -> dict[str, Tensor]:
    """What a codec is made of, float32.

    Returns:
        ``mean``, ``scale`` [X] and ``basis`` [X, D] take features to latents; ``codebooks`` [Q, K, D];
        ``readout`` [2D, X] and ``offset`` [X] take the latents of the frame before and of this one to features.
    """
    mel_FM = _mel(config).T
    runs = [_features(run, config=config, mel_FM=mel_FM) for run in _draw(waveforms, config=config)]
    features_RX = torch.cat(runs)
    mean, scale, basis = _principal(features_RX, latent_dim=config.latent_dim)
    latents_RD = (features_RX - mean) / scale @ basis
    codebooks = fit_codebooks(
        latents_RD,
        num_codebooks=config.num_codebooks,
        cardinality=config.cardinality,
        iterations=config.fit_iterations,
        seed=config.seed,
    )
    codes_RQ = quantize(latents_RD, codebooks_QKD=codebooks, beam=config.beam)
    heard_RD, lengths = dequantize(codes_RQ, codebooks_QKD=codebooks), [len(run) for run in runs]
    inverse_DX = basis.T * scale
    missing_RX = features_RX - heard_RD @ inverse_DX - mean
    readout, offset = _readout(heard_RD.split(lengths), missing_RX.split(lengths))
    readout[config.latent_dim :] += inverse_DX
    tables = {"mean": mean, "scale": scale, "basis": basis, "codebooks": codebooks}
    tables |= {"readout": readout, "offset": mean + offset}
    return {key: value.float().contiguous() for key, value in tables.items()}


def _draw(waveforms: Iterable[np.ndarray | Tensor], *, config: SpectralConfig) -> list[Tensor]:
    """Runs of frames ``[R, C]``: about ``fit_frames`` of the audio, and some silence, which must have its codes."""
    framing = config.framing
    waves = (torch.as_tensor(wave).float()[None] for wave in waveforms)
    runs = [run for wave in waves for run in framing.contexts(wave)[0].split(RUN_FRAMES)]
    total = sum(len(run) for run in runs)
    if total < config.cardinality:
        raise ValueError(
            f"cardinality = {config.cardinality}: fitting needs at least as many frames and the audio has {total}; "
            f"give more audio or a smaller cardinality"
        )
    drawn, count = [], 0
    for index in torch.randperm(len(runs), generator=torch.Generator().manual_seed(config.seed)).tolist():
        if count < config.fit_frames:
            drawn.append(runs[index])
            count += len(runs[index])
    return [*drawn, torch.zeros(2 + count // 64, framing.context)]


def _principal(features_RX: Tensor, *, latent_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and scale ``[X]`` and the first principal directions ``[X, D]`` of the standardised features."""
    mean = features_RX.mean(0)
    scale = features_RX.std(0).clamp(min=1e-3)
    standard = (features_RX - mean) / scale
    _, vectors = torch.linalg.eigh(standard.T @ standard / len(standard))
    basis = vectors.flip(1)[:, :latent_dim]
    signs = basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()  # eigh leaves them open
    return mean, scale, basis * signs


def _readout(latents: Iterable[Tensor], errors: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Ridge regression of what is missing ``[R, X]`` on the latents ``[R, D]`` of two frames: ``[2D, X]`` and ``[X]``.

    It takes back a part of what quantising one frame alone loses, because neighbours share their spectra.
    """
    inputs = torch.cat([torch.cat([part[:-1], part[1:]], dim=1) for part in latents])
    outputs = torch.cat([part[1:] for part in errors])
    means = inputs.mean(0), outputs.mean(0)
    centred = inputs - means[0]
    ridge = PRIOR_FRAMES * centred.square().mean() * torch.eye(inputs.shape[1], dtype=inputs.dtype)
    readout = torch.linalg.solve(centred.T @ centred + ridge, centred.T @ (outputs - means[1]))
    return readout, means[1] - means[0] @ readout


def _fingerprint(config: SpectralConfig, tables: dict[str, Tensor]) -> str:
    """16 hexadecimal digits over the parameters and the tables."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for key in sorted(tables):
        digest.update(key.encode() + str(tuple(tables[key].shape)).encode() + tables[key].numpy().tobytes())
    return digest.hexdigest()[:16]
