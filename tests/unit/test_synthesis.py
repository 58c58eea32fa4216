"""Speech from text: where words sound, what cannot be spoken, and runs that are killed, shared and repeated."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("espeakng_loader")
pytest.importorskip("pyopenjtalk")
soundfile = pytest.importorskip("soundfile")

import small_corpus  # noqa: E402

from megaspeech.config import read_config  # noqa: E402
from megaspeech.data.shard_set import ShardSet  # noqa: E402
from megaspeech.preparation.manifests.nemo import read_manifest  # noqa: E402
from megaspeech.preparation.other_formats import read_bytes  # noqa: E402
from megaspeech.preparation.synthesis import from_text, open_jtalk  # noqa: E402
from megaspeech.preparation.synthesis.from_text import SpeechSettings, TextToSpeech  # noqa: E402
from megaspeech.preparation.synthesis.speech import Speech, Voice, voice_called  # noqa: E402
from megaspeech.preparation.synthesis.voices import draw_voices, voices_for  # noqa: E402
from megaspeech.preparation.synthesis.words import read_aloud  # noqa: E402

TOOL = Path(__file__).parents[2] / "tools" / "synthesize_speech.py"
RATE = 24000
ENGLISH = ["Hello, world.", "It costs 3,000 yen - no more!", "日本", "", "Well-known words.", "...", "The end."]


def _level(speech: Speech, start: float, end: float) -> float:
    piece = speech.samples[round(start * RATE) : round(end * RATE)]
    return 10 * np.log10(np.mean(np.square(piece)) + 1e-12)


@pytest.mark.parametrize("pace", [0.85, 1.2])
@pytest.mark.parametrize(
    "label, text, words",
    [
        ("en-us+m3", "Hello, my old friends. And you?", ("Hello,", "my", "old", "friends.", "And", "you?")),
        ("en-gb*0.95", "Three, four.", ("Three,", "four.")),
        ("mei", "今日は良い天気です、散歩に行こう。", ("今日は", "良い", "天気です、", "散歩に", "行こう。")),
        ("mei*0.86-7@1.060", "はい。(いいえ)、1,234円です。", ("はい。", "(いいえ)、", "1,234円です。")),
    ],
)  # fmt: skip
def test_words_sound_at_their_times(label, text, words, pace):
    speech, found = read_aloud(text, voice=voice_called(label), sample_rate=RATE, pace=pace)
    assert found == words and len(speech.times) == len(words)
    loud = max(_level(speech, *times) for times in speech.times)
    assert all(_level(speech, *times) > loud - 15 for times in speech.times)
    for word, (_, end), (start, _) in zip(words, speech.times, speech.times[1:], strict=False):
        assert end <= start + 1e-6
        if word[-1] in ",.、。":
            assert start - end > 0.05 and _level(speech, end + 0.01, start - 0.01) < loud - 25
    assert speech.times[-1][1] * RATE <= len(speech.samples) + 1  # which it does on no other clock than the sound's
    assert speech.times[0][0] < 0.02 and len(speech.samples) / RATE - speech.times[-1][1] < 0.05


@pytest.mark.parametrize("speed", [0.8, 1.0, 1.3])
def test_durations_are_those_of_the_sound(speed):
    labels = open_jtalk._jtalk().extract_fullcontext("東京タワーは高い。本当に。")
    samples, _ = open_jtalk._jtalk().synthesize(labels, speed)
    assert open_jtalk._durations(labels, speed=speed).sum() == len(samples)


def test_a_phrase_of_a_sentence_lasts_as_long_as_its_phonemes_do():
    """Cut out of a sentence, a phrase is the one that is said alone: the same word by correlation of its envelope."""
    voice = voice_called("mei")
    speech, words = read_aloud("ねこ、さくら、てんき", voice=voice, sample_rate=RATE)
    envelopes = {}
    for word, (start, end) in zip(words, speech.times, strict=True):
        alone, _ = read_aloud(word.strip("、"), voice=voice, sample_rate=RATE)
        length = alone.times[0][1] - alone.times[0][0]
        assert end - start == pytest.approx(length, rel=0.25)
        envelopes[word] = length
    assert len(set(envelopes.values())) == 3


@pytest.mark.parametrize(
    "label, text, complaint",
    [
        ("en-us", "I like 寿司", r"does not read '寿'"),
        ("en-us", "?!", "nothing in it sounds"),
        ("mei", "한국어です", r"does not read '한국어'"),
        ("mei", "、。", "nothing in it sounds"),
        ("mei", "あ" * 300, "a sound without bounds"),
    ],
)
def test_what_cannot_be_spoken_is_named(label, text, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_aloud(text, voice=voice_called(label), sample_rate=RATE)


def test_odd_writing_is_read_all_the_same():
    english, words = read_aloud("- a — 3,000 yen", voice=voice_called("en-us"), sample_rate=RATE)
    assert words == ("-", "a", "—", "3,000", "yen")
    assert [end > start for start, end in english.times] == [False, True, False, True, True]
    _, words = read_aloud("Hello world、猫 3.5%", voice=voice_called("mei"), sample_rate=RATE)
    assert words == ("Hello world、", "猫", "3.5%")
    _, words = read_aloud("はい―いいえ", voice=voice_called("mei"), sample_rate=RATE)
    assert words == ("はい―", "いいえ")


def test_labels_name_voices():
    for label in ("en-us+f2", "en-gb-x-rp+drawn-000123*0.95", "mei", "mei*0.86-7@1.030", "mei-3"):
        assert voice_called(label).label == label
    assert voice_called("mei-3").engine == "open_jtalk" and voice_called("en-us").engine == "espeak"
    assert draw_voices("en", 3, seed=1) == draw_voices("en", 5, seed=1)[:3] != draw_voices("en", 3, seed=2)
    assert len({voice.label for voice in draw_voices("ja", 40, seed=0)}) > 35
    assert all(voice_called(voice.label) == voice for voice in draw_voices("ja", 40, seed=0))


@pytest.mark.parametrize(
    "asked, complaint",
    [
        ("0", "voices: 0; give 1 or more"),
        ("en-us+nobody", "has no 'en-us\\+nobody'"),
        ("xx-yy", "has no 'xx-yy'"),
        ("!", "'!' is none"),
        ("mei", "names none of espeak-ng, for 'en'"),
    ],
)
def test_voices_that_are_not_there(asked, complaint):
    with pytest.raises(ValueError, match=complaint):
        voices_for("en", asked, seed=0)
    assert list(voices_for("en", "en-us,en-gb+m3,mei", seed=0)) == ["en", "ja"]


def _run(text: Path, output: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, TOOL, text, "--output", output, "--lines-per-unit", "3", "--processes", "1", *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def english(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("speech")
    text = folder / "text.txt"
    text.write_bytes("\n".join([*ENGLISH, ""]).encode() + b"\xff\xfe\n")
    done = _run(text, folder / "made", "--lang", "en", "--voices", "5", "--tasks", "tts,asr")
    assert done.returncode == 0, done.stderr
    assert "rejected: espeak-ng does not read" in done.stdout
    return text, folder / "made"


def test_a_text_becomes_manifests_that_are_read(english):
    _, made = english
    utterances = [one for number in range(3) for one in read_manifest(made / f"{number:06d}" / "manifest.jsonl")]
    assert [one.text for one in utterances if one.task.name == "tts"] == [ENGLISH[index] for index in (0, 1, 4, 6)]
    assert len(utterances) == 8
    for one in utterances:
        (recording,) = one.recordings
        info = soundfile.info(io.BytesIO(read_bytes(recording)))
        assert info.samplerate == RATE and info.subtype == "PCM_16"
        assert info.duration == pytest.approx(recording.duration, abs=1e-4)
        assert 0 <= one.words[0].start < 0.02 and one.words[-1].end <= recording.duration + 1e-3
        assert (one.heard is None) == (one.task.name == "tts")
    rejected = [json.loads(line) for path in sorted(made.rglob("rejected.jsonl")) for line in path.open()]
    assert [(line["line"], line["reason"].split("'")[0].strip()) for line in rejected] == [
        (3, "espeak-ng does not read"),
        (6, "nothing in it sounds"),
        (8, "text: not UTF-8"),
    ]
    assert len({one.speaker for one in utterances}) > 1


def test_what_is_made_is_prepared(tmp_path):
    """From the text to shards, the audio read out of its tars."""
    pytest.importorskip("nvidia.dali")
    pytest.importorskip("faiss")
    text, made = tmp_path / "text.txt", tmp_path / "made"
    text.write_text("".join(f"three {digit}\n" for digit in small_corpus.DIGITS))
    assert _run(text, made, "--lang", "en", "--voices", "5", "--tasks", "tts,asr").returncode == 0
    assert len([path for path in made.rglob("*") if path.is_file()]) == 1 + 4 * 4
    small_corpus.make_project(tmp_path, a=[])
    config = read_config(tmp_path / "config.toml", [f"sources.a.train={made}/*/manifest.jsonl"])
    codec, tokenizer = small_corpus.make_codec(), small_corpus.make_tokenizer()
    preparation, units = small_corpus.prepare(config, codec=codec, tokenizer=tokenizer)
    totals = preparation.store.sum(units)
    assert totals.samples == {"asr-en": 10, "tts-en": 10} and not totals.rejected and len(units) == 4
    shards = ShardSet(tmp_path / "shards/train/a/tts-en")
    texts = [tokenizer.decode(shards[index][0].tolist()) for index in range(10)]
    assert texts == [f"three {digit}" for digit in small_corpus.DIGITS]


def test_an_array_makes_the_same_bytes(english, tmp_path):
    text, made = english
    options = ("--lang", "en", "--voices", "5", "--tasks", "tts,asr")
    for share in ("1/2", "0/2"):
        done = _run(text, tmp_path / "made", *options, "--array", share)
        assert done.returncode == 0, done.stderr
        assert ("to be made" in " ".join(done.stdout.split())) == (share == "1/2")
    assert _bytes(tmp_path / "made") == _bytes(made)


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path):
    text, made = tmp_path / "text.txt", tmp_path / "made"
    text.write_text("".join(f"Line number {n}, which is a long one so that it takes a while.\n" for n in range(120)))
    options = ["--lang", "en", "--voices", "5", "--lines-per-unit", "40"]
    assert _run(text, tmp_path / "whole", *options).returncode == 0
    for unit in (0, 1):
        command = [sys.executable, TOOL, text, "--output", made, *options, "--processes", "1"]
        process = subprocess.Popen(list(map(str, command)), start_new_session=True, stderr=subprocess.DEVNULL)
        while process.poll() is None and not any(path.stat().st_size for path in made.glob(f"{unit:06d}.part-*/*.tar")):
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert len(list(made.glob("*.part-*"))) == 2 and not (made / "000001").exists()
    assert _run(text, made, *options).returncode == 0
    assert _bytes(made) == _bytes(tmp_path / "whole")


def test_lines_of_a_speaker_have_one_voice(tmp_path, monkeypatch):
    voices = []

    def heard(text: str, *, voice: Voice, **how: object) -> object:
        voices.append(voice)
        return read_aloud(text, voice=voice, **how)

    monkeypatch.setattr(from_text, "read_aloud", heard)
    text = tmp_path / "text.jsonl"
    lines = [{"text": "はい。", "speaker": "A"}, {"text": "いいえ。", "speaker": "A"}, {"text": "Yes.", "lang": "en"}]
    lines += [{"text": "oui", "lang": "fr"}, {"words": "none"}, "not an object", {"text": "は\0い"}]
    text.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines) + "{broken\n")
    settings = SpeechSettings("ja", voices="20", audio="wav")
    made = TextToSpeech(text, tmp_path / "made", settings=settings)
    made._make_unit(0, text.read_bytes().splitlines(keepends=True))
    manifest = [json.loads(line) for line in (tmp_path / "made/000000/manifest.jsonl").open(encoding="utf-8")]
    assert [(line["source_lang"], line["text"]) for line in manifest] == [
        ("ja", "はい。"),
        ("ja", "いいえ。"),
        ("en", "Yes."),
    ]
    assert voices[0] == voices[1] and voices[2].engine == "espeak"
    assert [line["speaker"] for line in manifest[:2]] == ["A", "A"] and "drawn" in manifest[2]["speaker"]
    summary, missing = made.summary()
    assert missing == 0 and summary.num_utterances == 3 and summary.rejected.total() == 5


def test_tasks_of_an_array_may_begin_at_once(tmp_path, monkeypatch):
    text, made, settings = tmp_path / "text.txt", tmp_path / "made", SpeechSettings("en", voices="5")
    text.write_text("Yes.\n")
    write, begun = Path.write_text, []

    def slow(path: Path, *content: str) -> int:
        if not begun:  # while the first task writes, the second begins, and ends first
            begun.append(path)
            path.touch()
            TextToSpeech(text, made, settings=settings)
            (made / "000000.part-x").mkdir()
            TextToSpeech(text, made, settings=settings)
        return write(path, *content)

    monkeypatch.setattr(Path, "write_text", slow)
    TextToSpeech(text, made, settings=settings)
    assert begun and [path.name for path in made.glob("made_of*")] == ["made_of.json"]


def test_another_text_or_folder_is_refused(english, tmp_path):
    text, made = english
    done = _run(text, made, "--lang", "en", "--voices", "6", "--tasks", "tts,asr")
    assert done.returncode == 1 and "made_of.json says another text or other settings" in done.stderr
    (tmp_path / "notes").write_text("mine")
    for options, complaint in (
        (["--lang", "en"], "holds something that is not speech"),
        (["--lang", "fr"], "language: 'fr' is unknown; use en or ja"),
        (["--lang", "en", "--tasks", "st"], "tasks: 'st' is unknown"),
        (["--lang", "en", "--array", "4/4"], "--array 4/4: is not I/N"),
    ):
        done = _run(text, tmp_path, *options)
        assert done.returncode == 1 and complaint in done.stderr and "Traceback" not in done.stderr
    done = _run(text, tmp_path / "notes", "--lang", "en")
    assert done.returncode == 1 and "File exists" in done.stderr and "Traceback" not in done.stderr
