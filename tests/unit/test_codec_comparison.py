"""Codecs compared and timed: figures of known sounds, files that cannot be read, what the two tools write."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from megaspeech.benchmarks.codec_comparison import compare, fit_sizes, label_of, read_sounds
from megaspeech.benchmarks.codec_quality import codebook_use, judge, mean, si_sdr
from megaspeech.benchmarks.codec_speed import Case, measure

ROOT = Path(__file__).parents[2]
RATE = 22050
soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")


def load_tool(path: Path) -> ModuleType:
    """A command as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def voice(seed: int, *, seconds: float = 2.0) -> np.ndarray:
    """Harmonics with pauses, float32 `[N]`, up to Nyquist."""
    generator = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE)) / RATE
    pitch = (110 + 40 * seed) * (1 + 0.1 * np.sin(3 * time))
    tone = sum(np.sin(2 * np.pi * k * np.cumsum(pitch) / RATE) / k for k in range(1, 30))
    wave = 0.1 * tone * (np.sin(9 * time + seed) > -0.5) + 0.002 * generator.standard_normal(len(time))
    return wave.astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audio")
    (folder / "below").mkdir()
    for seed in range(5):
        soundfile.write(folder / "below" / f"{seed}.wav", np.stack([voice(seed)] * 2, axis=1), RATE)
    (folder / "9_torn.flac").write_bytes(b"fLaC torn")
    (folder / "notes.txt").write_text("no audio")
    return folder


def test_si_sdr_is_that_of_the_paper() -> None:
    time = np.arange(16000) / 16000
    tone, other = np.sin(2 * np.pi * 100 * time), np.sin(2 * np.pi * 300 * time)
    assert si_sdr(tone, tone + 0.1 * other) == pytest.approx(20.0, abs=1e-6)
    assert si_sdr(tone, 7 * tone + 0.7 * other) == pytest.approx(20.0, abs=1e-6)
    assert si_sdr(tone, other) < -60


def test_the_same_sound_is_best() -> None:
    pytest.importorskip("pystoi")
    pytest.importorskip("pesq")
    found = judge(voice(1), voice(1), sample_rate=RATE)
    assert found.mel == 0 and found.stoi == pytest.approx(1) and found.pesq > 4.6
    assert set(found.band_db.values()) == {0.0} and max(found.band_db) == 12000
    noisy = judge(voice(1), voice(1) + 0.05 * voice(3), sample_rate=RATE)
    assert noisy.mel > 0.1 and noisy.stoi < 0.99 and noisy.pesq < 4 and noisy.si_sdr_db < 40


def test_what_is_lost_is_seen_in_its_band() -> None:
    wave = voice(2)
    spectrum = np.fft.rfft(wave)
    spectrum[np.fft.rfftfreq(len(wave), 1 / RATE) > 4000] = 0
    errors = judge(wave, np.fft.irfft(spectrum, len(wave)).astype(np.float32), sample_rate=RATE).band_db
    assert max(errors[edge] for edge in (500, 1000, 2000, 3000)) < 1 < min(errors[6000], errors[8000], errors[10000])


def test_silence_is_judged_without_speech() -> None:
    silence = np.zeros(RATE, dtype=np.float32)
    found = judge(silence, silence, sample_rate=RATE)
    assert (found.stoi, found.pesq, found.mel) == (None, None, 0)
    both = mean([found, judge(voice(1), voice(1), sample_rate=RATE)])
    assert both.mel == 0 and (both.stoi is None or both.stoi > 0.99)


def test_use_of_codebooks() -> None:
    use = codebook_use(torch.tensor([[5.0, 5, 5, 5], [9, 0, 0, 0], [8, 4, 4, 0], [0, 0, 0, 0]]))
    assert use.share == [1, 0.25, 0.75, 0] and use.entropy_bits == pytest.approx([2, 0, 1.5, 0])


def test_recordings_are_drawn_and_bad_ones_named(folder: Path, tmp_path: Path) -> None:
    left_out, *sounds = read_sounds(folder, most=10, seconds=1.5)
    assert left_out[0].name == "9_torn.flac" and left_out[1]
    assert [sound.path.name for sound in sounds] == [f"{seed}.wav" for seed in range(5)]
    assert {len(sound.samples_N) for sound in sounds} == {int(1.5 * RATE)} and sounds[0].at(16000).shape == (1, 24000)
    drawn = [sound for sound in read_sounds(folder / "below", most=3, seconds=1)]
    assert [sound.path.name for sound in drawn] == ["0.wav", "2.wav", "4.wav"]
    with pytest.raises(ValueError, match="holds no audio"):
        next(read_sounds(tmp_path, most=3, seconds=1))


def test_rows_hold_what_was_encoded(folder: Path) -> None:
    sounds = list(read_sounds(folder / "below", most=5, seconds=30))
    codecs = fit_sizes(sounds, [(1, 8), (4, 32)])
    heard = []
    rows, firsts = compare(codecs, sounds, hear=lambda: heard.append(1))
    coarse, fine = rows
    assert (
        [row.label for row in rows]
        == [label_of(codec) for codec in codecs]
        == [
            "spectral, 12.5 x 1 of 8",
            "spectral, 12.5 x 4 of 32",
        ]
    )
    assert (fine.bitrate, fine.tokens_per_second, fine.compression) == (12.5 * 20, 50, 16000 * 16 / 250)
    assert fine.num_frames == 5 * 25 and len(heard) == 10
    assert fine.quality.mel < coarse.quality.mel and len(fine.use.share) == 4
    assert coarse.use.entropy_bits[0] <= 3 and fine.encode_x_real_time > 0 < fine.decode_x_real_time
    assert len(firsts) == 2 and firsts[0].shape == (2 * RATE,)
    codes = torch.cat([codecs[0].encode(sound.at(16000)).flatten() for sound in sounds])
    assert coarse.use.share == [len(codes.unique()) / 8]


def test_compare_codecs_writes_all(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tool = load_tool(ROOT / "tools/compare_codecs.py")
    codec = fit_sizes([one for one in read_sounds(folder / "below", most=2, seconds=2)], [(2, 16)])[0]
    codec.save(tmp_path / "codec")
    options = ["--fit", "1x8", "--codecs", f"spectral={tmp_path}/codec", "--output", str(tmp_path / "out")]
    assert tool.main([str(folder), *options, "--remark", "Voices are made up."]) == 0
    shown = capsys.readouterr().out
    assert "spectral, 12.5 x 2 of 16" in shown and "9_torn.flac" in shown
    found = json.loads((tmp_path / "out" / "codecs.json").read_text())
    assert [row["label"] for row in found["rows"]] == ["spectral, 12.5 x 2 of 16", "spectral, 12.5 x 1 of 8"]
    assert found["num_recordings"] == 2 and found["left_out"][0][0] == "9_torn.flac"
    text = (tmp_path / "out" / "codecs.md").read_text()
    assert "Voices are made up." in text and "| spectral, 12.5 x 1 of 8 |" in text and str(tmp_path) not in text
    for picture in ("codecs.png", "codecs_spectrograms.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--codecs: nothing to compare"),
        (["--codecs", "mimi"], "--codecs mimi: is not NAME=PATH"),
        (["--codecs", "opus=x"], "codec.name = 'opus' is no known codec"),
        (["--codecs", "mimi=nowhere@8"], "codec.path = 'nowhere': no such folder"),
        (["--fit", "8"], "--fit 8: is not QxK"),
        (["--fit", "1x8", "--recordings", "1"], "0 of 1 recordings can be read"),
    ],
)
def test_compare_codecs_refuses(folder: Path, capsys: pytest.CaptureFixture, options: list[str], message: str) -> None:
    assert load_tool(ROOT / "tools/compare_codecs.py").main([str(folder), *options]) == 2
    assert message in capsys.readouterr().err


def test_measure_codecs_tells_parts_apart(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("transformers")
    tool = load_tool(ROOT / "tools/measure_codecs.py")
    options = ["--size", "tiny", "--seconds", "0.5", "--repeats", "1", "--batches", "1,2", "--device", "cpu"]
    assert tool.main([*options, "--dtypes", "bf16", "--json", str(tmp_path / "speed.json")]) == 0
    assert "wavtokenizer, 24 kHz, 1 codebooks" in capsys.readouterr().out
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [(row["case"]["name"], row["case"]["batch_size"]) for row in rows] == [
        (name, batch) for name in ("mimi", "encodec", "dac", "wavtokenizer") for batch in (1, 2)
    ]
    within = {"mimi": ["transformer"], "encodec": ["LSTM"], "dac": [], "wavtokenizer": ["LSTM"]}
    for row in rows:
        names = ["copy to the device", "convolutions", *within[row["case"]["name"]], "quantiser"]
        assert list(row["parts_ms"]) == names and min(row["parts_ms"].values()) >= 0
        assert row["encode_x_real_time"] > 0 and row["status"] == "measured"
    assert "| mimi, 24 kHz, 8 codebooks |" in (tmp_path / "speed.md").read_text()
    assert (tmp_path / "speed.png").is_file()
    for wrong in (["--codecs", "opus"], ["--codecs", "mimi@99"], ["--dtypes", "fp8"], ["--batches", "0"]):
        assert tool.main([*options, *wrong]) == 2


def test_what_does_not_fit_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from megaspeech.codecs.dac import DacCodec

    quantize = DacCodec.quantize

    def run_out(codec: DacCodec, latents: torch.Tensor) -> torch.Tensor:
        if len(latents) > 2:
            raise torch.OutOfMemoryError("no more")
        return quantize(codec, latents)

    monkeypatch.setattr(DacCodec, "quantize", run_out)
    cases = [Case("dac", 2, "fp32", batch, 0.3) for batch in (1, 4, 2)]
    rows = measure(cases, device=torch.device("cpu"), size="tiny", repeats=1)
    assert [row.status for row in rows] == ["measured", "out of memory", "measured"]
    assert math.isnan(rows[1].encode_x_real_time)
