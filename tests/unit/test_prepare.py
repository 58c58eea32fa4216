"""From sources to shards with a small real codec: nothing is lost silently, and samples hold what was recorded."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("nvidia.dali")
pytest.importorskip("faiss")

from small_corpus import (  # noqa: E402
    DIGITS,
    RATE,
    line,
    make_codec,
    make_project,
    make_tokenizer,
    prepare,
    record,
    shown,
    write_manifest,
)

from megaspeech.codecs import SpectralCodec  # noqa: E402
from megaspeech.config import Config, read_config  # noqa: E402
from megaspeech.config.preparation import SourceSection  # noqa: E402
from megaspeech.data.samples import ShardSamples  # noqa: E402
from megaspeech.data.shards import Shard  # noqa: E402
from megaspeech.data.tasks import Task  # noqa: E402
from megaspeech.data.tokenizer import Tokenizer  # noqa: E402
from megaspeech.preparation.compose import compose  # noqa: E402
from megaspeech.preparation.encoding import encode_recordings  # noqa: E402
from megaspeech.preparation.prepare import Preparation  # noqa: E402
from megaspeech.preparation.recording import Recording  # noqa: E402
from megaspeech.preparation.report import report  # noqa: E402
from megaspeech.preparation.utterance import Utterance, Word  # noqa: E402


@pytest.fixture(scope="module")
def codec() -> SpectralCodec:
    return make_codec()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


def rejections(config: Config) -> list[tuple[str, str, str]]:
    """(file, task, reason) of everything left out, in order."""
    lines = map(json.loads, (Path(config.data.directory) / "rejected.jsonl").read_text().splitlines())
    return [(Path(one["path"]).name, one["task"], one["reason"]) for one in lines]


def faulty_lines(folder: Path) -> dict[str, tuple[dict | str, str]]:
    """(line, how its reason begins), by what is wrong with it."""
    torn, long, fits = (record(folder, name, seconds=s) for name, s in (("torn", 1.0), ("long", 2.88), ("fits", 2.8)))
    torn.write_bytes(torn.read_bytes()[:9000])
    soundfile.write(folder / "silent.wav", np.zeros(RATE), RATE)
    soundfile.write(folder / "nan.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    (folder / "empty.flac").touch()
    (folder / "folder.wav").mkdir()
    (folder / "text.wav").write_text("no sound here " * 50)
    (folder / "bare.raw").write_bytes(bytes(range(256)) * 40)
    record(folder, "short", seconds=0.05)
    record(folder, "second", seconds=1.0)
    record(folder, "endless", seconds=3.3)
    return {
        "torn": (line("torn.wav"), "truncated: "),
        "absent": (line("absent.wav"), "missing: "),
        "too many frames with prompt and delays": (line(long.name), "too long: 41 frames"),
        "more than a sample in itself": (
            line("endless.wav"),
            "too long: 3.30 s, more than the 3.2 s of data.num_frames",
        ),
        "silent": (line("silent.wav"), "silent: "),
        "NaN": (line("nan.wav"), "not finite: "),
        "empty": (line("empty.flac"), "empty: "),
        "a folder": (line("folder.wav"), "unreadable: "),
        "text": (line("text.wav"), "wrong type: "),
        "without header": (line("bare.raw"), "wrong type: "),
        "no name of a file": (line("a\0b.wav"), "missing: "),
        "half a surrogate pair": (line("\ud800.wav"), "missing: "),
        "no such user": (line("~nobody/x.wav"), "missing: "),
        "begins beyond numbers": (line("second.wav", seconds=1.0, offset=1e306), "truncated: "),
        "short": (line("short.wav"), "too short: "),
        "longer than said": (line(fits.name, seconds=2.0), "wrong duration: 2.80 s where the manifest says 2.00"),
        "shorter than said": (line("second.wav", seconds=2.0), "wrong duration: 1.00 s where the manifest says 2.00"),
        "longer than a day": (line("second.wav", seconds=1e306), "key 'duration': 1e+306 s is more than a day"),
        "not JSON": ("{", "not JSON"),
        "deep": ("[" * 100_000, "maximum recursion depth"),
        "no text": (line(fits.name, text=""), "key 'text'"),
    }


def test_what_is_wrong_is_set_aside_and_the_rest_goes_on(
    tmp_path: Path, codec: SpectralCodec, tokenizer: Tokenizer
) -> None:
    faults = faulty_lines(tmp_path)
    good, other = record(tmp_path, "good", seconds=1.0), record(tmp_path, "other", seconds=1.3, pitch=200)
    answer = {"task": "s2st", "source_lang": "ja", "target_audio_filepath": "torn.wav"}
    lines = [line(good.name), *(fault for fault, _ in faults.values()), line("fits.wav"), line(good.name, task="tts")]
    lines += [line(other.name, **answer), line(other.name, **{**answer, "target_audio_filepath": good.name})]
    preparation, units = prepare(make_project(tmp_path, a=lines), codec=codec, tokenizer=tokenizer)

    found = rejections(preparation.config)
    assert len(found) == len(faults) + 1
    wanted = [start for _, start in faults.values()]
    unread = [reason for name, _, reason in found if "line" in name]
    for start in wanted:
        assert any(reason.startswith(start) for *_, reason in found), (start, found)
    assert len(unread) == 4 and found[-1][:2] == ("torn.wav", "s2st-ja-en")
    totals = preparation.store.sum(units)
    assert totals.samples == {"asr-en": 2, "tts-en": 1, "s2st-ja-en": 1}
    assert totals.rejected.total() == len(found) and totals.rejected["truncated"] == 3
    shard = Shard(tmp_path / "shards/train/a/asr-en/000000")
    assert [shard[index].shape[1] for index in range(2)] == [2 + 13 + 3, 40]
    header = shard.header
    assert (header.codec, header.codec_fingerprint) == ("spectral", codec.fingerprint)
    assert header.tokenizer_fingerprint == tokenizer.fingerprint and header.frame_rate == 12.5
    assert header.silence == tuple(codec.silence_codes.tolist()) and len(header.silence) == 4
    told = shown(report(preparation.store, units, frame_rate=12.5, timeline=preparation.timeline))
    assert "waited for the decoder" in told
    for reason, count in totals.rejected.items():
        assert any(reason in row and str(count) in row for row in told.splitlines()), reason


def test_a_sample_that_is_too_long_does_not_take_others_of_its_recording_along(
    tmp_path: Path, codec: SpectralCodec, tokenizer: Tokenizer
) -> None:
    record(tmp_path, "shared", seconds=35 * 0.08)  # 40 frames as asr, 39 as tts
    late = line("shared.wav", words=[{"word": "three", "start": 2.6, "end": 2.8}])  # its text goes beyond frame 40
    config = make_project(tmp_path, a=[late, line("shared.wav", task="tts")])
    preparation, units = prepare(config, codec=codec, tokenizer=tokenizer)
    assert preparation.store.sum(units).samples == {"tts-en": 1}
    ((name, task, reason),) = rejections(config)
    assert (name, task) == ("shared.wav", "asr-en") and "data.num_frames = 40" in reason


@pytest.mark.parametrize("more", [(), ("augmentation.copies=1", "augmentation.level=1.0")])
def test_names_of_files_need_not_be_utf8(
    tmp_path: Path, codec: SpectralCodec, tokenizer: Tokenizer, more: tuple[str, ...]
) -> None:
    (audio := tmp_path / "audio").mkdir()
    for name, seconds in ((b"caf\xe9.wav", 1.0), (b"na\xefve.mp3", 1.0), (b"f\xfcr.m4a", 0.0), (b"k\xfcrz.wav", 0.05)):
        path = audio / os.fsdecode(name)
        if seconds:
            record(tmp_path, f"x{path.suffix}", seconds=seconds).rename(path)
        path.with_suffix(".txt").write_text("three")
    (audio / os.fsdecode(b"f\xfcr.m4a")).write_bytes(b"no sound" * 100)
    source = SourceSection(name="f", format="folder", train=str(audio), task="asr", target_lang="en")
    config = make_project(tmp_path, *more).model_copy(update={"sources": (source,)})
    preparation, units = prepare(config, codec=codec, tokenizer=tokenizer)
    assert preparation.store.sum(units).samples == {"asr-en": 2 * (1 + len(more) // 2)}
    kinds = {name: reason.partition(":")[0] for name, _, reason in rejections(config)}
    assert kinds == {os.fsdecode(b"f\xfcr.m4a"): "wrong type", os.fsdecode(b"k\xfcrz.wav"): "too short"}


def test_units_are_shards_and_nothing_crosses_them(tmp_path: Path, codec: SpectralCodec, tokenizer: Tokenizer) -> None:
    lines = [line(record(tmp_path, f"{i}", seconds=0.5 + 0.1 * i).name) for i in range(7)]
    config = make_project(tmp_path, "preparation.lines_per_shard=3", a=lines, b=lines[:1])
    preparation, units = prepare(config, codec=codec, tokenizer=tokenizer)
    assert [(unit.source.name, unit.number) for unit in units] == [("a", 0), ("a", 1), ("a", 2), ("b", 0)]
    lengths = [Shard(tmp_path / f"shards/train/a/asr-en/{number:06d}").header.num_samples for number in range(3)]
    assert lengths == [3, 3, 1]
    samples = ShardSamples(tmp_path / "shards/train", name="a/asr-en", config=config)
    assert len(samples.shards) == 7
    by_source = shown(report(preparation.store, units, frame_rate=12.5, timeline=preparation.timeline))
    assert [row.split("│")[4].strip() for row in by_source.splitlines() if "asr-en" in row] == ["7", "1"]


def test_a_recording_longer_than_a_sample_is_cut(tmp_path: Path, codec: SpectralCodec, tokenizer: Tokenizer) -> None:
    record(tmp_path, "long", seconds=9.0)
    words = [{"word": "three", "start": 0.4 * place, "end": 0.4 * place + 0.2} for place in range(22)]
    config = make_project(tmp_path, a=[line("long.wav", seconds=9.0, text=" ".join(["three"] * 22), words=words)])
    preparation, units = prepare(config, codec=codec, tokenizer=tokenizer)
    shard = Shard(tmp_path / "shards/train/a/asr-en/000000")
    texts = [tokenizer.decode(shard[index][0].tolist()) for index in range(shard.header.num_samples)]
    assert len(texts) > 3 and " ".join(texts).split() == ["three"] * 22
    assert preparation.store.sum(units).seconds == pytest.approx(9.0, abs=0.01) and not rejections(config)


def test_altered_versions_are_samples_of_their_own(tmp_path: Path, codec: SpectralCodec, tokenizer: Tokenizer) -> None:
    lines = [line(record(tmp_path, f"{i}", seconds=1.0, pitch=100 + 30 * i).name, speaker=f"{i}") for i in range(4)]
    plain, _ = prepare(make_project(tmp_path, a=lines), codec=codec, tokenizer=tokenizer)
    overrides = ("augmentation.copies=2", "augmentation.babble=1.0", "augmentation.babble_talkers=[1, 2]")
    config = make_project(tmp_path, *overrides, f"data.directory={tmp_path}/noisy", a=lines)
    preparation, units = prepare(config, codec=codec, tokenizer=tokenizer)
    assert preparation.store.sum(units).samples == {"asr-en": 12}
    noisy, clean = (Shard(tmp_path / f"{name}/train/a/asr-en/000000") for name in ("noisy", "shards"))
    assert all(np.array_equal(noisy[3 * index], clean[index]) for index in range(4))
    assert not any(np.array_equal(noisy[3 * index + copy], clean[index]) for index in range(4) for copy in (1, 2))


def test_what_is_done_to_recordings_is_counted_and_a_bad_one_told_once(
    tmp_path: Path, codec: SpectralCodec, tokenizer: Tokenizer
) -> None:
    names = [record(tmp_path, f"{i}", seconds=1.0, pitch=100 + 30 * i).name for i in range(3)]
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    stretches = [line("bad.wav", offset=offset, seconds=0.5) for offset in (0.0, 0.5)]
    overrides = (
        "augmentation.copies=2",
        "augmentation.share=1.0",
        "augmentation.level=1.0",
        "augmentation.telephone=1.0",
    )
    config = make_project(tmp_path, *overrides, a=[*map(line, names), *stretches, line("bad.wav", task="tts")])
    preparation, units = prepare(config, codec=codec, tokenizer=tokenizer)
    assert preparation.store.sum(units).effects == {"level": 9, "telephone": 9}
    told = shown(report(preparation.store, units, frame_rate=12.5, timeline=preparation.timeline))
    assert "Recordings altered, each version by itself: telephone 9, level 9" in told
    assert [(name, task) for name, task, _ in rejections(config)] == [("bad.wav", "asr-en")] * 2 + [
        ("bad.wav", "tts-en")
    ]


@pytest.mark.parametrize("num_words", [1, 30, 121])
def test_a_text_longer_than_a_sample_is_cut_between_words(
    tmp_path: Path, codec: SpectralCodec, tokenizer: Tokenizer, num_words: int
) -> None:
    words = [DIGITS[place % 10] for place in range(num_words)]
    text = {"taskname": "text", "target_lang": "en", "text": " ".join(words)}
    config = make_project(tmp_path, a=[text])
    preparation, units = prepare(config, codec=codec, tokenizer=tokenizer)
    shard = Shard(tmp_path / "shards/train/a/text-en/000000")
    rows = [shard[index][0].tolist() for index in range(shard.header.num_samples)]
    assert [word for row in rows for word in tokenizer.decode(row).split()] == words
    prompt, end = tokenizer.encode_prompt(Task("text", "en", "en")), tokenizer.processor.eos_id()
    assert all(row[:2] == prompt and len(row) <= 40 for row in rows)
    assert [row.count(end) for row in rows] == [0] * (len(rows) - 1) + [1] and rows[-1][-1] == end
    for row, later in zip(rows, rows[1:], strict=False):  # one more word had not fitted
        following = tokenizer.decode(later).split()[0]
        assert len(row) + len(tokenizer.encode_word(following)) > 40
    assert preparation.store.sum(units).notes.get("text_cuts", 0) == len(rows) - 1
    told = shown(report(preparation.store, units, frame_rate=12.5, timeline=preparation.timeline))
    assert (f"{len(rows) - 1:,} samples more, because texts" in told) == (num_words > 40)


def test_noise_that_cannot_be_decoded_is_said(tmp_path: Path, codec: SpectralCodec, tokenizer: Tokenizer) -> None:
    lines = [line(record(tmp_path, f"{i}", seconds=1.0, pitch=100 + 30 * i).name) for i in range(3)]
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise/bad.wav").write_bytes(b"RIFF")
    overrides = ("augmentation.copies=1", "augmentation.noise=1.0", f"augmentation.noise_files={tmp_path}/noise")
    config = make_project(tmp_path, *overrides, a=lines)
    preparation, units = prepare(config, codec=codec, tokenizer=tokenizer)
    assert preparation.store.sum(units).samples == {"asr-en": 6}
    ((name, task, reason),) = rejections(config)
    assert (name, task) == ("bad.wav", "") and reason


def test_samples_hold_the_codes_of_their_recordings(tmp_path: Path, codec: SpectralCodec, tokenizer: Tokenizer) -> None:
    config = make_project(tmp_path, a=[])
    path = record(tmp_path, "x", seconds=1.0)
    samples, _ = soundfile.read(path, dtype="float32")
    expected = codec.encode(torch.from_numpy(samples)[None])[0].numpy()
    words = (Word("three", 0.25, 0.45), Word("seven", 0.7, 0.9))
    row = Utterance(Task("asr", "en", "en"), "three seven", words, heard=Recording(path))
    codes, rejected = encode_recordings([Recording(path)], codec=codec)
    assert not rejected and np.array_equal(codes[Recording(path)], expected) and expected.shape == (4, 13)
    sample_ST = compose(row, codes, config=config, codec=codec, tokenizer=tokenizer).codes_ST
    assert np.array_equal(sample_ST[5:, 2:15], expected)  # heard
    assert (sample_ST[1:5] == codec.silence_codes.numpy()[:, None]).all()
    text = sample_ST[0]
    assert text[:2].tolist() == tokenizer.encode_prompt(row.task)
    assert tokenizer.decode(text.tolist()) == "three seven"
    three = 2 + 5 + config.data.task_delay  # 0.45 s is in frame 5
    pieces = tokenizer.encode_word("three")
    assert text[three - 1 : three + len(pieces)].tolist() == [0, *pieces] and (text[2 : three - 1] == 3).all()
    assert text[-1] == 3  # one frame of PAD at least, to learn to fall silent

    row = replace(row, task=Task("tts", "en", "en"), heard=None, spoken=row.heard)
    spoken_ST = compose(row, codes, config=config, codec=codec, tokenizer=tokenizer).codes_ST
    origin = 2 + 1 + config.data.speech_lead
    assert np.array_equal(spoken_ST[1:5, origin : origin + 13], expected) and (spoken_ST[5:] == -1).all()
    end = tokenizer.processor.eos_id()
    (place,) = np.flatnonzero(spoken_ST[0] == end)
    last = tokenizer.encode_word("seven")
    assert spoken_ST[0, place - len(last) : place].tolist() == last  # what is told says where it ends,
    assert end not in sample_ST[0]  # what is heard does not


def test_no_sample_left_names_the_reasons(tmp_path: Path, codec: SpectralCodec, tokenizer: Tokenizer) -> None:
    config = make_project(tmp_path, a=[line("absent.wav"), line("gone.wav"), "{"])
    with pytest.raises(ValueError, match=r"train: no sample is left; the reasons: missing \(2\), not JSON.*remove"):
        prepare(config, codec=codec, tokenizer=tokenizer)
    assert not list(tmp_path.rglob("catalogue.json"))


def test_a_unit_of_which_nothing_is_left_is_no_fault(
    tmp_path: Path, codec: SpectralCodec, tokenizer: Tokenizer
) -> None:
    lines = [line("absent.wav"), line(record(tmp_path, "x", seconds=1.0).name)]
    config = make_project(tmp_path, "preparation.lines_per_shard=1", a=lines)
    preparation, units = prepare(config, codec=codec, tokenizer=tokenizer)
    assert preparation.store.sum(units).samples == {"asr-en": 1} and len(rejections(config)) == 1


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
    with pytest.raises(ValueError, match="streams") as caught:
        Preparation(make_project(tmp_path, *overrides, a=[]), codec=codec, tokenizer=tokenizer)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("own, given", [(4, 0), (4, 3), (0, 4)])
def test_other_numbers_of_codebooks_may_be_heard_than_said(
    tmp_path: Path, codec: SpectralCodec, tokenizer: Tokenizer, own: int, given: int
) -> None:
    """The first codebooks of a residual codec are a codec: the shard can be trained on."""
    delays = [0, *[0, 1, 1, 1][:own], *[0, 1, 1, 1][:given]]
    path = record(tmp_path, "x", seconds=1.0)
    sizes = (f"streams.num_codebooks={own}", f"streams.num_given_codebooks={given}")
    config = make_project(tmp_path, *sizes, f"streams.delays={delays}", a=[line(path.name)])
    prepare(config, codec=codec, tokenizer=tokenizer)
    item = ShardSamples(tmp_path / "shards/train", name="a/asr-en", config=config)[0]
    assert item["codes"].shape[0] == 1 + own + given and item["weights"].shape[0] == 1 + own
    codes, _ = encode_recordings([Recording(path)], codec=codec)
    assert np.array_equal(item["codes"][1 + own :, 2:15], codes[Recording(path)][:given])


def test_sources_can_be_overridden_by_name(tmp_path: Path) -> None:
    make_project(tmp_path, a=[line("x.wav")])
    other = write_manifest(tmp_path / "other.jsonl", [line("y.wav")])
    config = read_config(tmp_path / "config.toml", [f"sources.a.train={other}", "sources.a.weight=2.0"])
    assert (config.sources[0].train, config.sources[0].weight) == (str(other), 2.0)
    with pytest.raises(ValueError, match=r"no \[\[sources\]\] of the name 'b'"):
        read_config(tmp_path / "config.toml", ["sources.b.train=x"])
