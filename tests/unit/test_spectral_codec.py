"""The spectral codec: codes that do not depend on how sound arrives, sound that comes back in time, checked files.

A tiny codec (2 x 16) is fitted on seconds of synthetic voices: harmonics under a moving formant, with pauses.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megaspeech.codecs import Codec, SpectralCodec, SpectralConfig, load_codec
from megaspeech.codecs.quantizer import dequantize, quantize
from megaspeech.codecs.spectrogram import Framing, StreamingPhases, griffin_lim, magnitudes, mel_weights

RATE = 16000
TINY = SpectralConfig(num_codebooks=2, cardinality=16, latent_dim=24, fit_frames=400)
FRAMING = SpectralConfig().framing


def voice(*, seconds: float, pitch: float, seed: int) -> Tensor:
    """A synthetic voice ``[N]``: syllables of about 0.3 s with a gliding formant, pauses between them."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(int(seconds * RATE)) / RATE
    glide = 900 + 600 * torch.sin(2 * math.pi * 1.3 * time + seed)
    partials = torch.arange(1, 30)[:, None] * pitch
    gains = torch.exp(-((partials - glide) / 500).square()) + 0.1 * torch.exp(-((partials - 2600) / 600).square())
    tone = (gains * torch.sin(2 * math.pi * partials * time)).sum(0)
    syllables = (torch.sin(2 * math.pi * 1.7 * time + seed) > -0.3).float()
    envelope = torch.nn.functional.avg_pool1d(syllables[None], 401, stride=1, padding=200)[0]
    noise = 1e-4 * torch.randn(len(time), generator=generator)
    return 0.15 * tone * envelope + noise


@pytest.fixture(scope="module")
def voices() -> list[Tensor]:
    return [voice(seconds=4.1, pitch=pitch, seed=seed) for seed, pitch in enumerate((95.0, 130.0, 180.0, 240.0))]


@pytest.fixture(scope="module")
def codec(voices: list[Tensor]) -> SpectralCodec:
    return SpectralCodec.fit(voices, config=TINY)


@pytest.fixture(scope="module")
def fine_codec(voices: list[Tensor]) -> SpectralCodec:
    """As many codebooks as the default has, so that what comes back is close to what went in."""
    return SpectralCodec.fit(voices, config=SpectralConfig(cardinality=32, latent_dim=48))


def frames_of(waveforms_BN: Tensor, *, frame_size: int) -> list[Tensor]:
    missing = -waveforms_BN.shape[1] % frame_size
    return list(torch.nn.functional.pad(waveforms_BN, (0, missing)).split(frame_size, dim=1))


def stream_decode(codec: SpectralCodec, codes_BQT: Tensor) -> Tensor:
    decoder = codec.streaming_decoder(batch_size=len(codes_BQT))
    return torch.cat([decoder.step(codes) for codes in codes_BQT.unbind(-1)], dim=1)


def envelope(waveform_N: Tensor, *, hop: int = 320, width: int = 641) -> Tensor:
    """Root mean square of ``width`` samples (some pitch periods), every ``hop`` samples."""
    power = waveform_N.square()[None]
    return torch.nn.functional.avg_pool1d(power, width, stride=hop, padding=width // 2)[0].sqrt()


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def lag(a_N: Tensor, b_N: Tensor, *, reach: int) -> int:
    """Samples by which ``b`` trails ``a``: where the cross-correlation is largest."""
    size = 1 << (2 * len(a_N)).bit_length()
    cross = torch.fft.irfft(torch.fft.rfft(b_N, n=size) * torch.fft.rfft(a_N, n=size).conj(), n=size)
    return int(torch.cat([cross[-reach:], cross[: reach + 1]]).argmax()) - reach


def spectra_of(waveform_N: Tensor) -> Tensor:
    return magnitudes(FRAMING.contexts(waveform_N[None])[0], framing=FRAMING)


def test_codec_meets_the_protocol(codec: SpectralCodec) -> None:
    assert isinstance(codec, Codec)
    assert (codec.name, codec.sample_rate, codec.frame_size, codec.frame_rate) == ("spectral", RATE, 1280, 12.5)
    codes = codec.encode(torch.randn(3, 1280 * 4 + 1))
    assert codes.shape == (3, 2, 5) and codes.dtype == torch.int64
    assert set(codes.flatten().tolist()) <= set(range(16))
    sound = codec.decode(codes)
    assert sound.shape == (3, 5 * 1280) and sound.dtype == torch.float32


def test_streaming_encoder_equals_encode(codec: SpectralCodec, voices: list[Tensor]) -> None:
    waveforms = torch.stack([wave[:60001] for wave in voices])
    codes = codec.encode(waveforms)
    encoder = codec.streaming_encoder(batch_size=len(waveforms))
    streamed = [encoder.step(part) for part in frames_of(waveforms, frame_size=1280)]
    assert torch.equal(torch.stack(streamed, dim=-1), codes)
    assert len(codes.unique()) > 8, "a codec that says the same of everything would pass too"


def test_codes_of_a_row_do_not_depend_on_its_batch(codec: SpectralCodec, voices: list[Tensor]) -> None:
    waveforms = torch.stack([wave[:60001] for wave in voices])
    alone = torch.cat([codec.encode(row[None]) for row in waveforms])
    assert torch.equal(codec.encode(waveforms), alone)


def test_codes_do_not_depend_on_what_follows(codec: SpectralCodec, voices: list[Tensor]) -> None:
    past = voices[0][: 1280 * 20]
    other = torch.cat([past, torch.randn(1280 * 5)])
    assert torch.equal(codec.encode(other[None])[..., :20], codec.encode(past[None]))


def test_silence_is_one_code_row_and_decodes_to_silence(fine_codec: SpectralCodec) -> None:
    codes = fine_codec.encode(torch.zeros(2, 1280 * 10))
    expected = fine_codec.silence_codes[None, :, None].expand_as(codes)
    assert torch.equal(codes, expected)
    assert fine_codec.decode(codes).abs().max() < 1e-3
    assert stream_decode(fine_codec, codes).abs().max() < 1e-3


def test_decode_is_deterministic_and_in_time(fine_codec: SpectralCodec, voices: list[Tensor]) -> None:
    wave = voices[1]
    sound = fine_codec.decode(fine_codec.encode(wave[None]))[0]
    assert torch.equal(sound, fine_codec.decode(fine_codec.encode(wave[None]))[0])
    loud, back = envelope(wave, hop=16), envelope(sound[: len(wave)], hop=16)
    assert correlation(loud, back) > 0.8
    assert abs(lag(loud - loud.mean(), back - back.mean(), reach=300)) * 16 <= 160, "more than 10 ms off"


def test_phase_retrieval_keeps_magnitudes_and_time(voices: list[Tensor]) -> None:
    target = spectra_of(voices[2])
    sound = griffin_lim(target.flatten(0, 1)[None], framing=FRAMING, iterations=32, momentum=0.99)[0]
    error = (spectra_of(sound) - target).norm() / target.norm()
    assert error < 0.15
    shifted = torch.nn.functional.pad(sound, (160, 0))[: len(sound)]
    assert (spectra_of(shifted) - target).norm() / target.norm() > 1.5 * error


@pytest.mark.parametrize("delay", [320, 704])
def test_streamed_phases_keep_magnitudes(voices: list[Tensor], delay: int) -> None:
    target = spectra_of(voices[2])
    phases = StreamingPhases(framing=FRAMING, batch_size=1, iterations=8, delay=delay)
    sound = torch.cat([phases.step(frame[None]) for frame in target], dim=1)[0]
    whole = torch.nn.functional.pad(sound[delay:], (0, delay))
    assert (spectra_of(whole)[:-1] - target[:-1]).norm() / target.norm() < 0.3


def test_streaming_decoder_follows_decode(fine_codec: SpectralCodec, voices: list[Tensor]) -> None:
    codes = fine_codec.encode(torch.stack([wave[:51200] for wave in voices]))
    offline, streamed = fine_codec.decode(codes), stream_decode(fine_codec, codes)
    assert streamed.shape == offline.shape
    delay = fine_codec.streaming_decoder().delay
    for a, b in zip(offline, streamed, strict=True):
        assert correlation(envelope(a[:-delay]), envelope(b[delay:])) > 0.9


def test_streaming_decoder_does_not_look_ahead_nor_mix_rows(fine_codec: SpectralCodec, voices: list[Tensor]) -> None:
    codes = fine_codec.encode(torch.stack([wave[:25600] for wave in voices]))
    changed = codes.clone()
    changed[:, :, 12:] = 0
    past = slice(0, 12 * 1280)
    assert torch.equal(stream_decode(fine_codec, codes)[:, past], stream_decode(fine_codec, changed)[:, past])
    neighbours = codes.clone()
    neighbours[[0, 2, 3]] = 0
    assert torch.equal(stream_decode(fine_codec, codes)[1], stream_decode(fine_codec, neighbours)[1])


def test_sum_of_codebook_vectors_is_the_quantised_latent(fine_codec: SpectralCodec, voices: list[Tensor]) -> None:
    vectors = fine_codec.codebook_vectors()
    assert vectors.shape == (8, 32, 48)
    codes = fine_codec.encode(voices[0][None])[0]
    total = sum(vectors[q][codes[q]] for q in range(8))
    spread = vectors.sum(0).std()
    assert total.std() > 0.1 * spread
    again = quantize(total.double(), codebooks_QKD=vectors.double(), beam=TINY.beam)
    rebuilt = dequantize(again, codebooks_QKD=vectors)
    assert (rebuilt - total).norm() < 0.2 * total.norm()


def test_wider_beams_are_nearer() -> None:
    generator = torch.Generator().manual_seed(0)
    books = torch.randn(4, 16, 8, generator=generator, dtype=torch.float64)
    rows = torch.randn(200, 8, generator=generator, dtype=torch.float64)

    def error(beam: int) -> float:
        codes = quantize(rows, codebooks_QKD=books, beam=beam)
        return float((dequantize(codes, codebooks_QKD=books) - rows).square().mean())

    assert error(8) < error(1)
    exhaustive = (books[0][:, None] + books[1][None]).flatten(0, 1)
    nearest = torch.cdist(rows, exhaustive).argmin(1)
    codes = quantize(rows, codebooks_QKD=books[:2], beam=16)
    assert torch.equal(codes[:, 0] * 16 + codes[:, 1], nearest)


def test_mel_filters_cover_every_bin_once() -> None:
    weights = mel_weights(num_mels=40, window=512, sample_rate=RATE)
    assert torch.allclose(weights.sum(1), torch.ones(40, dtype=torch.float64))
    assert torch.equal(weights.argmax(1), weights.argmax(1).sort().values)


def test_a_full_scale_sine_has_magnitude_one() -> None:
    sine = torch.sin(2 * math.pi * 1000 * torch.arange(1280 * 3) / RATE)
    assert abs(float(spectra_of(sine)[2].max()) - 1) < 0.01


def test_fit_is_deterministic(codec: SpectralCodec, voices: list[Tensor]) -> None:
    again = SpectralCodec.fit((wave.numpy() for wave in voices), config=TINY)
    waveforms = torch.stack([wave[:60001] for wave in voices])
    assert torch.equal(again.encode(waveforms), codec.encode(waveforms))
    assert again.fingerprint == codec.fingerprint


def test_saved_codec_comes_back(codec: SpectralCodec, voices: list[Tensor], tmp_path: Path) -> None:
    codec.save(tmp_path / "codec")
    assert {path.stat().st_mode & 0o044 for path in (tmp_path / "codec").iterdir()} == {0o044}  # for others to read
    back = load_codec(tmp_path / "codec")
    assert back.fingerprint == codec.fingerprint
    codes = codec.encode(voices[0][None])
    assert torch.equal(back.encode(voices[0][None]), codes)
    assert torch.equal(back.decode(codes), codec.decode(codes))


def test_load_refuses_what_it_cannot_trust(codec: SpectralCodec, voices: list[Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"codec\.json: no such file.*fit"):
        load_codec(tmp_path)
    codec.save(tmp_path)
    description, tables = tmp_path / "codec.json", tmp_path / "codec.safetensors"
    facts = json.loads(description.read_text(encoding="utf-8"))

    description.write_text(json.dumps(facts | {"name": "mimi2"}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"codec\.json.*'mimi2'.*spectral"):
        load_codec(tmp_path)
    with pytest.raises(ValueError, match=r"codec\.json.*'mimi2'"):
        SpectralCodec.load(tmp_path)

    description.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"codec\.json: not a codec"):
        load_codec(tmp_path)

    codec.save(tmp_path)
    SpectralCodec.fit(voices[:2], config=TINY).save(tmp_path / "other")
    tables.write_bytes((tmp_path / "other" / "codec.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"codec\.safetensors: fingerprint .* is not .*fit the codec again"):
        load_codec(tmp_path)

    tables.write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"codec\.safetensors: cannot be read"):
        load_codec(tmp_path)
    tables.unlink()
    with pytest.raises(ValueError, match=r"codec\.safetensors: no such file"):
        load_codec(tmp_path)


def test_fit_refuses_too_little_audio() -> None:
    with pytest.raises(ValueError, match="cardinality = 16.*the audio has 4"):
        SpectralCodec.fit([torch.zeros(1280 * 4)], config=TINY)


@pytest.mark.parametrize(
    ("key", "value"), [("cardinality", 100), ("latent_dim", 1000), ("hop", 600), ("streaming_delay", 705)]
)
def test_config_refuses_sizes_that_do_not_fit(key: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{key} = {value}: must be"):
        SpectralConfig(**{key: value})


def test_framing_ends_windows_with_the_frame() -> None:
    framing = Framing(window=1024, hop=320, hops=4)
    contexts = framing.contexts(torch.arange(1.0, 2561.0)[None])
    assert contexts.shape == (1, 2, 1984)
    assert contexts[0, 0, :704].abs().max() == 0 and contexts[0, 0, -1] == 1280 and contexts[0, 1, -1] == 2560
