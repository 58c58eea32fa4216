"""moshi-finetune's manifests and bare folders: what is read from real files, and each fault with its remedy."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from megaspeech.config.preparation import SourceSection
from megaspeech.data.tasks import Task
from megaspeech.preparation.manifests import folder, moshi_finetune
from megaspeech.preparation.recording import Recording
from megaspeech.preparation.utterance import Utterance, Word

EN = SourceSection(name="talk", format="moshi", target_lang="en")
ALIGNMENTS = [
    [" there", [0.9, 1.2], "SPEAKER_MAIN"],
    [" Hello", [0.3, 0.6], "SPEAKER_MAIN"],
    ["yes", [1.5, 1.7], "SPEAKER_01"],
    ["  ", [1.8, 1.9], "SPEAKER_MAIN"],
]


@pytest.fixture
def talk(tmp_path) -> Path:
    """The folder of a manifest of one conversation."""
    (tmp_path / "data_stereo").mkdir()
    soundfile.write(tmp_path / "data_stereo/a.wav", np.zeros((48000, 2)), 24000)
    (tmp_path / "data_stereo/a.json").write_text(json.dumps({"alignments": ALIGNMENTS}), encoding="utf-8")
    return tmp_path


def _moshi(talk: Path, source: SourceSection = EN, **changed: object) -> Utterance:
    line = {"path": "data_stereo/a.wav", "duration": 2.0, **changed}
    (utterance,) = moshi_finetune.read_line(json.dumps(line).encode(), manifest=talk / "set.jsonl", source=source)
    return utterance


def test_the_model_is_on_the_left_and_the_user_on_the_right(talk):
    audio = talk / "data_stereo/a.wav"
    assert _moshi(talk) == Utterance(
        task=Task("s2s", "en", "en"),
        text="Hello there",
        words=(Word("Hello", 0.3, 0.6), Word("there", 0.9, 1.2)),
        heard=Recording(audio, channel=1, duration=2.0),
        spoken=Recording(audio, channel=0, duration=2.0),
        source_words=(Word("yes", 1.5, 1.7),),
    )


def test_japanese_words_are_put_together_without_spaces(talk):
    assert _moshi(talk, SourceSection(name="talk", format="moshi", source_lang="ja")).text == "Hellothere"


def test_a_model_that_says_nothing_has_no_words(talk):
    (talk / "data_stereo/a.json").write_text('{"alignments": []}')
    utterance = _moshi(talk)
    assert (utterance.text, utterance.words) == ("", ())


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, r"^no transcript: there is no .*a\.json; moshi-finetune's annotate\.py writes it"),
        (b'{"alignments": [', r"^unreadable transcript: .*a\.json: not JSON, .* at line 1; write it anew"),
        (b'{"alignments": "\xff"}', r"^not UTF-8: byte 16 of a\.json; convert it with iconv"),
        (b'{"words": []}', r"^unreadable transcript: .*a\.json: no alignments; write"),
        (b"[]", r"^unreadable transcript: .*a\.json: no alignments; write"),
        (b'{"alignments": 3}', r"^unreadable transcript: .*a\.json: no alignments; write"),
        (b'{"alignments": [["a", [0, 1]]]}', r"entry 0 of alignments is .*, not \[word, \[start, end"),
        (
            b'{"alignments": [["a", [0, "1"], "S"]]}',
            r"entry 0 of alignments is .*, not \[word, \[start, end",
        ),
        (b'{"alignments": [["a", 3, "S"]]}', r"entry 0 of alignments is .*, not \[word, \[start, end"),
        (b'{"alignments": [["a", [2, 1], "S"]]}', r"entry 0 of alignments \('a'\) lasts from 2 to 1 s"),
    ],
)
def test_faulty_alignments(talk, content, reason):
    path = talk / "data_stereo/a.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        _moshi(talk)


def test_faulty_moshi_lines(talk):
    with pytest.raises(ValueError, match="key 'path': is missing .there is 'paths'.; give the audio"):
        _moshi(talk, path=None, paths="data_stereo/a.wav")
    with pytest.raises(ValueError, match="key 'duration': 'long' is not a positive number"):
        _moshi(talk, duration="long")
    with pytest.raises(ValueError, match="key 'source_lang': is missing"):
        _moshi(talk, SourceSection(name="talk", format="moshi"))


@pytest.fixture
def audio(tmp_path) -> Path:
    """A folder of audio with texts, folders within, and what is neither."""
    for name in ("b.wav", "a/2.FLAC", "a/10.ogg", "c/d/x.wav", ".hidden/x.wav", "a.b/y.wav"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.zeros(1600), 16000)
        path.with_suffix(".txt").write_text(f"{name}\n is\tsaid ", encoding="utf-8")
    (tmp_path / "notes.md").write_text("not audio")
    (tmp_path / "c/back").symlink_to(tmp_path)
    return tmp_path


def test_audio_files_come_in_one_order(audio):
    names = ["a/10.ogg", "a/2.FLAC", "a.b/y.wav", "b.wav", "c/d/x.wav"]
    assert list(folder.audio_files(audio)) == names
    for place, name in enumerate(names):
        assert list(folder.audio_files(audio, first=name)) == names[place:]


def test_folders_before_the_first_file_are_not_listed(audio, monkeypatch):
    listed = []
    scandir = folder.os.scandir
    monkeypatch.setattr(folder.os, "scandir", lambda path: listed.append(path.name) or scandir(path))
    assert list(folder.audio_files(audio, first="b.wav")) == ["b.wav", "c/d/x.wav"]
    assert "a" not in listed and "c" in listed


@pytest.mark.parametrize("task, said", [("asr", "heard"), ("tts", "spoken")])
def test_a_file_with_its_text(audio, task, said):
    source = SourceSection(name="f", format="folder", task=task, target_lang="en")
    (utterance,) = folder.read_name(b"a/2.FLAC", manifest=audio, source=source)
    assert utterance == Utterance(
        Task(task, "en", "en"), "a/2.FLAC is said", (), **{said: Recording(audio / "a/2.FLAC")}
    )


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, r"^no text: there is no b\.txt beside it; write what is said into one"),
        (b" \n", r"^no text: b\.txt is empty; write"),
        ("こんにちは".encode("shift_jis"), r"^not UTF-8: byte 0 of b\.txt; convert it with iconv"),
    ],
)
def test_faulty_texts(audio, content, reason):
    (audio / "b.txt").unlink()
    if content is not None:
        (audio / "b.txt").write_bytes(content)
    source = SourceSection(name="f", format="folder", task="asr", target_lang="ja")
    with pytest.raises(ValueError, match=reason):
        folder.read_name(b"b.wav", manifest=audio, source=source)
