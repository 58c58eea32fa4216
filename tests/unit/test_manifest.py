"""Manifests: what is read, and each fault named with file, line, key and remedy."""

import json
from pathlib import Path

import pytest

from megaspeech.data.tasks import Task
from megaspeech.preparation.manifests.nemo import read_manifest
from megaspeech.preparation.utterance import Recording, Utterance, Word

LINE = {
    "audio_filepath": "wav/x.wav",
    "duration": 2.31,
    "taskname": "st",
    "source_lang": "ja",
    "target_lang": "en",
    "text": "three seven",
    "words": [{"word": "three", "start": 0.31, "end": 0.66}, {"word": "seven", "start": 0.7, "end": 1.1}],
    "speaker": "mei",
}


def _write(folder: Path, *lines: dict | str) -> Path:
    path = folder / "some.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


def _without(key: str) -> dict:
    return {name: value for name, value in LINE.items() if name != key}


def test_reads_every_field(tmp_path):
    answer = {
        **LINE,
        "taskname": "s2st",
        "target_audio_filepath": "/elsewhere/y.wav",
        "source_words": [{"word": "三", "start": 0.1, "end": 0.2}, {"word": "七", "start": 0.3, "end": 0.4}],
    }
    first, second = read_manifest(_write(tmp_path, LINE, "", answer))
    assert first == Utterance(
        heard=Recording(tmp_path / "wav/x.wav", duration=2.31),
        task=Task("st", source="ja", target="en"),
        text="three seven",
        words=(Word("three", 0.31, 0.66), Word("seven", 0.7, 1.1)),
        speaker="mei",
    )
    assert second.spoken == Recording(Path("/elsewhere/y.wav"))
    assert second.source_words[1] == Word("七", 0.3, 0.4)


def test_unknown_keys_are_left_alone_and_a_speaker_is_not_needed(tmp_path):
    (utterance,) = read_manifest(_write(tmp_path, {**_without("speaker"), "pnc": "no", "text": "three\u2028seven"}))
    assert utterance.speaker == ""


def test_missing_manifest(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: no such manifest; check the path"):
        read_manifest(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("content", [(), ("", "  ")])
def test_empty_manifest(tmp_path, content):
    with pytest.raises(ValueError, match=r"some\.jsonl: the manifest is empty; write"):
        read_manifest(_write(tmp_path, *content))


def test_binary_manifest(tmp_path):
    (tmp_path / "some.jsonl").write_bytes(b"RIFF\xff\xfe")
    with pytest.raises(ValueError, match=r"some\.jsonl: not UTF-8 text"):
        read_manifest(tmp_path / "some.jsonl")


@pytest.mark.parametrize("bad", ['{"audio_filepath": ', "[1, 2]", "plain text"])
def test_bad_json_names_its_line(tmp_path, bad):
    with pytest.raises(ValueError, match=r"some\.jsonl, line 3: .*not (a )?JSON.*one JSON object a line"):
        read_manifest(_write(tmp_path, LINE, "", bad))


@pytest.mark.parametrize(
    "key", ["audio_filepath", "duration", "taskname", "source_lang", "target_lang", "text", "words"]
)
def test_a_missing_key_is_named(tmp_path, key):
    wanted = "no word times" if key == "words" else "is missing"
    with pytest.raises(ValueError, match=rf"some\.jsonl, line 2: key '{key}': {wanted}.*; give "):
        read_manifest(_write(tmp_path, LINE, _without(key)))


def test_a_misspelt_key_is_suggested(tmp_path):
    with pytest.raises(ValueError, match=r"key 'target_lang': is missing \(there is 'target_language'\)"):
        read_manifest(_write(tmp_path, {**_without("target_lang"), "target_language": "en"}))


def test_no_word_times_names_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"line 1: key 'words': no word times; give .*aligner"):
        read_manifest(_write(tmp_path, {**LINE, "words": []}))


@pytest.mark.parametrize(
    "entry",
    [
        "seven",
        {"word": "seven"},
        {"word": "seven", "start": 1.0, "end": 0.9},
        {"word": "seven", "start": -0.1, "end": 0.9},
        {"word": "seven", "start": float("nan"), "end": 0.9},
        {"word": "seven", "start": "0.7", "end": 0.9},
        {"start": 0.7, "end": 0.9},
        {"word": "seven", "start": 0.2, "end": 0.9},
    ],
)
def test_wrong_word_times(tmp_path, entry):
    with pytest.raises(ValueError, match=r"line 1: key 'words': entry 1 .*; give"):
        read_manifest(_write(tmp_path, {**LINE, "words": [LINE["words"][0], entry]}))


def test_unknown_task(tmp_path):
    with pytest.raises(ValueError, match=r"line 1: key 'taskname': 's2t' is unknown, perhaps .*; give one of asr, st"):
        read_manifest(_write(tmp_path, {**LINE, "taskname": "s2t"}))


@pytest.mark.parametrize("duration", [0, -1, "2.3", True, float("inf")])
def test_wrong_duration(tmp_path, duration):
    with pytest.raises(ValueError, match=r"line 1: key 'duration': .* is not a positive number"):
        read_manifest(_write(tmp_path, {**LINE, "duration": duration}))


def test_text_and_words_must_agree(tmp_path):
    with pytest.raises(ValueError, match=r"line 1: key 'text': 'three two' is not what 'words' spell, 'three seven'"):
        read_manifest(_write(tmp_path, {**LINE, "text": "three two"}))


def test_speech_to_speech_needs_its_target(tmp_path):
    with pytest.raises(ValueError, match=r"line 1: key 'target_audio_filepath': is missing.*on the clock"):
        read_manifest(_write(tmp_path, {**LINE, "taskname": "s2st"}))
