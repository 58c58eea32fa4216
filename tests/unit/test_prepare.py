"""From recordings to shards with a small real codec: nothing is lost silently, and batching changes no code."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from one_rank import make_config

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("nvidia.dali")
pytest.importorskip("faiss")

from megaspeech.codecs import SpectralCodec, SpectralConfig  # noqa: E402
from megaspeech.config import Config  # noqa: E402
from megaspeech.data.samples import ShardSamples  # noqa: E402
from megaspeech.data.shards import Shard  # noqa: E402
from megaspeech.data.tasks import Task  # noqa: E402
from megaspeech.data.tokenizer import Tokenizer, train_tokenizer  # noqa: E402
from megaspeech.preparation.compose import compose  # noqa: E402
from megaspeech.preparation.prepare import encode_recordings, prepare_shards  # noqa: E402
from megaspeech.preparation.utterance import Recording, Utterance, Word  # noqa: E402

RATE, FRAME = 16000, 1280
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ASR, TTS, S2ST = Task("asr", "en", "en"), Task("tts", "en", "en"), Task("s2st", "ja", "en")


def voice(seconds: float, *, pitch: float) -> np.ndarray:
    """Harmonics under a moving formant, with pauses `[N]`."""
    time = np.arange(round(seconds * RATE)) / RATE
    glide = 900 + 600 * np.sin(8 * time + pitch)
    tone = sum(np.exp(-(((n * pitch - glide) / 500) ** 2)) * np.sin(2 * np.pi * n * pitch * time) for n in range(1, 25))
    return (0.15 * tone * (np.sin(10 * time) > -0.3)).astype(np.float32)


@pytest.fixture(scope="module")
def codec() -> SpectralCodec:
    voices = [torch.from_numpy(voice(4.1, pitch=pitch)) for pitch in (95.0, 130.0, 180.0, 240.0)]
    config = SpectralConfig(num_codebooks=4, cardinality=32, latent_dim=24, fit_frames=400)
    return SpectralCodec.fit(voices, config=config)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([" ".join(DIGITS[i:] + DIGITS[:i]) for i in range(10)], vocabulary_size=48, languages=["en"])


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_config(tmp_path, "data.num_frames=40")


def record(folder: Path, name: str, *, seconds: float, pitch: float = 120.0) -> Path:
    path = folder / f"{name}.wav"
    soundfile.write(path, voice(seconds, pitch=pitch), RATE, subtype="PCM_16")
    return path


def utterance(path: Path, *, task: Task = ASR, text: str = "three", ends: tuple[float, ...] = (0.5,)) -> Utterance:
    words = tuple(Word(word, end - 0.2, end) for word, end in zip(text.split(), ends, strict=True))
    audio = Recording(path)
    return Utterance(task, text, words, heard=audio if task.hears else None, spoken=None if task.hears else audio)


def rejections(directory: Path) -> dict[str, str]:
    lines = (directory / "rejected.jsonl").read_text().splitlines()
    return {Path(entry["path"]).name: entry["reason"] for entry in map(json.loads, lines)}


def test_what_is_wrong_is_set_aside_and_the_rest_goes_on(
    tmp_path: Path, config: Config, codec: SpectralCodec, tokenizer: Tokenizer
) -> None:
    good, other = record(tmp_path, "good", seconds=1.0), record(tmp_path, "other", seconds=1.3, pitch=200)
    torn = record(tmp_path, "torn", seconds=1.0)
    torn.write_bytes(torn.read_bytes()[:9000])
    long = record(tmp_path, "long", seconds=36 * 0.08)  # with the prompt and the task delay 41 frames
    fits = record(tmp_path, "fits", seconds=35 * 0.08)  # and here 40
    target = replace(utterance(other, task=S2ST), spoken=Recording(torn))
    rows = [utterance(path) for path in (good, torn, long, fits, tmp_path / "absent.wav")]
    rows += [utterance(good, task=TTS), target, replace(target, spoken=Recording(good))]
    headers = prepare_shards(rows, tmp_path / "out", config=config, codec=codec, tokenizer=tokenizer)

    lines = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    lost = [(Path(entry["path"]).name, entry["task"]) for entry in map(json.loads, lines)]
    assert lost == [
        ("torn.wav", "asr-en"),
        ("long.wav", "asr-en"),
        ("absent.wav", "asr-en"),
        ("torn.wav", "s2st-ja-en"),
    ]
    reasons = rejections(tmp_path / "out")
    assert sorted(reasons) == ["absent.wav", "long.wav", "torn.wav"]
    assert "truncated" in reasons["torn.wav"] and "missing" in reasons["absent.wav"]
    assert reasons["long.wav"].startswith("41 frames") and "data.num_frames = 40" in reasons["long.wav"]
    assert {name: header.num_samples for name, header in headers.items()} == {"asr-en": 2, "tts-en": 1, "s2st-ja-en": 1}
    shard = Shard(tmp_path / "out" / "asr-en")
    assert shard.header == headers["asr-en"] and [shard[index].shape[1] for index in range(2)] == [2 + 13 + 3, 40]
    header = shard.header
    assert (header.codec, header.codec_fingerprint) == ("spectral", codec.fingerprint)
    assert header.tokenizer_fingerprint == tokenizer.fingerprint and header.frame_rate == 12.5
    assert header.silence == tuple(codec.silence_codes.tolist()) and len(header.silence) == 4
    assert not (tmp_path / "out.part").exists()


def test_a_sample_that_is_too_long_does_not_take_others_of_its_recording_along(
    tmp_path: Path, config: Config, codec: SpectralCodec, tokenizer: Tokenizer
) -> None:
    path = record(tmp_path, "shared", seconds=35 * 0.08)  # 40 frames as asr, 39 as tts
    late = utterance(path, text="three", ends=(35 * 0.08,))  # its text stands beyond frame 40
    rows = [late, utterance(path, task=TTS)]
    headers = prepare_shards(rows, tmp_path / "out", config=config, codec=codec, tokenizer=tokenizer)
    assert list(headers) == ["tts-en"]
    (line,) = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    assert (line["path"], line["task"]) == (str(path), "asr-en") and "data.num_frames = 40" in line["reason"]


def test_samples_hold_the_codes_of_their_recordings(
    tmp_path: Path, config: Config, codec: SpectralCodec, tokenizer: Tokenizer
) -> None:
    path = record(tmp_path, "x", seconds=1.0)
    samples, _ = soundfile.read(path, dtype="float32")
    expected = codec.encode(torch.from_numpy(samples)[None])[0].numpy()
    row = utterance(path, text="three seven", ends=(0.45, 0.9))
    codes, rejected = encode_recordings([Recording(path)], codec=codec)
    assert not rejected and np.array_equal(codes[Recording(path)], expected) and expected.shape == (4, 13)
    sample_ST = compose(row, codes, config=config, codec=codec, tokenizer=tokenizer).codes_ST
    assert np.array_equal(sample_ST[5:, 2:15], expected)  # heard
    assert (sample_ST[1:5] == codec.silence_codes.numpy()[:, None]).all()
    text = sample_ST[0]
    assert text[:2].tolist() == tokenizer.encode_prompt(ASR)
    assert tokenizer.decode(text.tolist()) == "three seven"
    three = 2 + 5 + config.data.task_delay  # 0.45 s is in frame 5
    pieces = tokenizer.encode_word("three")
    assert text[three - 1 : three + len(pieces)].tolist() == [0, *pieces] and (text[2 : three - 1] == 3).all()
    assert text[-1] == 3  # one frame of PAD at least, to learn to fall silent

    row = replace(row, task=TTS, heard=None, spoken=row.heard)
    spoken_ST = compose(row, codes, config=config, codec=codec, tokenizer=tokenizer).codes_ST
    origin = 2 + 1 + config.data.speech_lead
    assert np.array_equal(spoken_ST[1:5, origin : origin + 13], expected) and (spoken_ST[5:] == -1).all()
    end = tokenizer.processor.eos_id()
    (place,) = np.flatnonzero(spoken_ST[0] == end)
    last = tokenizer.encode_word("seven")
    assert spoken_ST[0, place - len(last) : place].tolist() == last  # what is told says where it ends,
    assert end not in sample_ST[0]  # what is heard does not


def test_batching_changes_no_code(tmp_path: Path, codec: SpectralCodec) -> None:
    """Recordings of one batch are padded to one length; each has the codes it has by itself."""
    lengths = [0.5, 1.7, 0.08, 1.01, 0.003]
    recordings = [
        Recording(record(tmp_path, f"{place}", seconds=s, pitch=100 + 20 * place)) for place, s in enumerate(lengths)
    ]
    together, rejected = encode_recordings(recordings, codec=codec)
    assert not rejected and list(together) == recordings
    for recording in recordings:
        alone, _ = encode_recordings([recording], codec=codec)
        samples, _ = soundfile.read(recording.path)
        assert together[recording].shape == (4, -(-len(samples) // FRAME))
        assert np.array_equal(together[recording], alone[recording])


def test_more_recordings_than_a_batch(tmp_path: Path, codec: SpectralCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    recordings = [Recording(record(tmp_path, f"{place}", seconds=0.1 * (place + 1))) for place in range(5)]
    whole, _ = encode_recordings(recordings, codec=codec)
    monkeypatch.setattr("megaspeech.preparation.prepare.ENCODE_BATCH", 2)
    seen: list[int] = []

    def progress(items: Iterable, count: int) -> Iterator:
        assert count == 5
        for item in items:
            seen.append(item[0])
            yield item

    by_two, _ = encode_recordings(recordings, codec=codec, progress=progress)
    assert seen == list(range(5)) and list(by_two) == recordings
    assert all(np.array_equal(by_two[recording], whole[recording]) for recording in recordings)


def test_directory_appears_when_all_is_written(
    tmp_path: Path, config: Config, codec: SpectralCodec, tokenizer: Tokenizer
) -> None:
    path, out = record(tmp_path, "x", seconds=0.6), tmp_path / "out"
    settings = {"config": config, "codec": codec, "tokenizer": tokenizer}
    prepare_shards([utterance(path), utterance(path, task=TTS)], out, **settings)
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "junk").write_text("of a killed run")

    def killed(items: Iterable, count: int) -> Iterator:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_shards([utterance(path)], out, progress=killed, **settings)
    assert (out / "tts-en.json").is_file()  # what was there is there still
    prepare_shards([utterance(path)], out, **settings)
    names = sorted(path.name for path in out.iterdir())
    assert names == ["asr-en.bin", "asr-en.idx", "asr-en.json", "asr-en.xxh64", "rejected.jsonl"]
    assert not (tmp_path / "out.part").exists() and rejections(out) == {}


def test_no_sample_left_names_the_reasons(
    tmp_path: Path, config: Config, codec: SpectralCodec, tokenizer: Tokenizer
) -> None:
    with pytest.raises(ValueError, match=r"out: no sample is left; the reasons: .*missing"):
        prepare_shards(
            [utterance(tmp_path / "absent.wav")], tmp_path / "out", config=config, codec=codec, tokenizer=tokenizer
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["streams.cardinality=16"], ("streams.cardinality = 16", "set streams.cardinality = 32")),
        (
            ["streams.num_codebooks=6", "streams.delays=[0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1]"],
            ("streams.num_codebooks = 6", "set streams.num_codebooks = 4"),
        ),
        (
            ["streams.num_given_codebooks=5", "streams.delays=[0, 0, 1, 1, 1, 0, 1, 1, 1, 1]"],
            ("streams.num_given_codebooks = 5", "4 or less"),
        ),
        (["streams.text_cardinality=40"], ("streams.text_cardinality = 40", "set streams.text_cardinality = 48")),
    ],
)
def test_codec_and_tokenizer_that_the_streams_do_not_hold_are_refused(
    tmp_path: Path, codec: SpectralCodec, tokenizer: Tokenizer, overrides: list[str], words: tuple[str, ...]
) -> None:
    config = make_config(tmp_path, *overrides)
    rows = [utterance(record(tmp_path, "x", seconds=1.0))]
    with pytest.raises(ValueError, match="streams") as caught:
        prepare_shards(rows, tmp_path / "out", config=config, codec=codec, tokenizer=tokenizer)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("given", [0, 3])
def test_fewer_codebooks_may_be_heard_than_said(
    tmp_path: Path, codec: SpectralCodec, tokenizer: Tokenizer, given: int
) -> None:
    """The first codebooks of a residual codec are a codec: the shard can be trained on."""
    delays = [0, 0, 1, 1, 1, *[0, 1, 1][:given]]
    config = make_config(tmp_path, f"streams.num_given_codebooks={given}", f"streams.delays={delays}")
    path = record(tmp_path, "x", seconds=1.0)
    prepare_shards([utterance(path)], tmp_path / "out", config=config, codec=codec, tokenizer=tokenizer)
    item = ShardSamples(tmp_path / "out" / "asr-en", config=config)[0]
    assert item["codes"].shape[0] == 5 + given and item["weights"].shape[0] == 5
    codes, _ = encode_recordings([Recording(path)], codec=codec)
    assert np.array_equal(item["codes"][5:, 2:15], codes[Recording(path)][:given])
