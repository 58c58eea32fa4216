"""NeMo manifests: what is read, and each fault named with file, line, key and remedy."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from megaspeech.config.preparation import SourceSection
from megaspeech.data.tasks import Task
from megaspeech.preparation.manifests.nemo import read_line, read_manifest
from megaspeech.preparation.recording import Recording
from megaspeech.preparation.utterance import Utterance, Word

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
    with pytest.raises(ValueError, match=r"some\.jsonl, line 1: not UTF-8: byte 4 of the line; convert"):
        read_manifest(tmp_path / "some.jsonl")


@pytest.mark.parametrize("bad", ['{"audio_filepath": ', "[1, 2]", "plain text"])
def test_bad_json_names_its_line(tmp_path, bad):
    with pytest.raises(ValueError, match=r"some\.jsonl, line 3: not (JSON|a JSON object): .*; write one JSON"):
        read_manifest(_write(tmp_path, LINE, "", bad))


@pytest.mark.parametrize("key", ["audio_filepath", "taskname", "source_lang", "target_lang", "text"])
def test_a_missing_key_is_named(tmp_path, key):
    with pytest.raises(ValueError, match=rf"some\.jsonl, line 2: key '{key}': is missing.*; give "):
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


@pytest.mark.parametrize("duration", [0, -2, "2.3", True, float("inf"), pytest.param(10**400, id="huge")])
def test_wrong_duration(tmp_path, duration):
    with pytest.raises(ValueError, match=r"line 1: key 'duration': .* is not a positive number"):
        read_manifest(_write(tmp_path, {**LINE, "duration": duration}))


def _read(tmp_path: Path, line: dict, **source: str) -> Utterance:
    """One line of a source's manifest."""
    content = json.dumps(line).encode()
    (utterance,) = read_line(content, manifest=tmp_path / "m.jsonl", source=SourceSection(name="s", **source))
    return utterance


ASR = {"audio_filepath": "x.flac", "duration": 4.0, "text": "one two"}


def test_a_plain_nemo_line_takes_task_and_language_from_its_source(tmp_path):
    utterance = _read(tmp_path, ASR, task="asr", target_lang="en")
    assert utterance == Utterance(
        task=Task("asr", "en", "en"),
        text="one two",
        words=(Word("one two", 0.0, 4.0),),
        heard=Recording(tmp_path / "x.flac", duration=4.0),
    )


def test_a_lines_own_task_and_languages_win(tmp_path):
    assert _read(tmp_path, {**ASR, "lang": "ja"}, task="asr", target_lang="en").task == Task("asr", "ja", "ja")
    canary = {**ASR, "task": "ast", "source_lang": "ja", "target_lang": "en"}
    assert _read(tmp_path, canary, task="asr", target_lang="ja").task == Task("st", "ja", "en")
    assert _read(tmp_path, {**ASR, "lang": "English"}, task="st", source_lang="ja").task == Task("st", "ja", "en")
    assert _read(tmp_path, ASR, task="tts", source_lang="en").spoken.path == tmp_path / "x.flac"


@pytest.mark.parametrize("language", ["Klingon", "e", "en_US"])
def test_a_name_that_is_no_languages_code_is_refused(tmp_path, language):
    with pytest.raises(ValueError, match=rf"key 'target_lang': '{language}' is not a language's code; give"):
        _read(tmp_path, {**ASR, "target_lang": language, "source_lang": "en"}, task="asr")


@pytest.mark.parametrize("blank", [-1, -1.0, None, ""])
def test_a_duration_may_be_left_blank(tmp_path, blank):
    utterance = _read(tmp_path, {**ASR, "duration": blank}, task="asr", target_lang="en")
    assert utterance.heard.duration is None and utterance.words == ()


def test_an_offset_makes_a_stretch(tmp_path):
    utterance = _read(tmp_path, {**ASR, "offset": 7.5}, task="asr", target_lang="en")
    assert utterance.heard == Recording(tmp_path / "x.flac", start=7.5, end=11.5, duration=4.0)
    assert utterance.words == (Word("one two", 0.0, 4.0),)
    to_the_end = _read(tmp_path, {**ASR, "offset": 7.5, "duration": -1}, task="asr", target_lang="en")
    assert to_the_end.heard == Recording(tmp_path / "x.flac", start=7.5)
    with pytest.raises(ValueError, match="key 'offset': -1 is not a number from 0 on; give"):
        _read(tmp_path, {**ASR, "offset": -1}, task="asr", target_lang="en")


def test_segments_are_phrases_with_times(tmp_path):
    segments = [{"text": "one", "start": 0.5, "end": 1.0}, {"segment": "two", "start": 3, "end": 4}]
    utterance = _read(tmp_path, {**ASR, "segments": segments}, task="asr", target_lang="en")
    assert utterance.words == (Word("one", 0.5, 1.0), Word("two", 3.0, 4.0))


def test_text_alone_needs_no_audio(tmp_path):
    utterance = _read(tmp_path, {"text": "only read"}, task="text", target_lang="en")
    assert (utterance.task.name, utterance.text, utterance.recordings) == ("text", "only read", ())


def test_a_line_that_its_maker_left_out_is_refused(tmp_path):
    with pytest.raises(ValueError, match="key '_skipme'"):
        _read(tmp_path, {**ASR, "_skipme": True}, task="asr", target_lang="en")


def test_a_byte_order_mark_is_no_fault(tmp_path):
    content = b"\xef\xbb\xbf" + json.dumps(ASR).encode()
    source = SourceSection(name="s", task="asr", target_lang="en")
    assert read_line(content, manifest=tmp_path / "m.jsonl", source=source)[0].text == "one two"


def test_text_and_words_must_agree(tmp_path):
    with pytest.raises(ValueError, match=r"line 1: key 'text': 'three two' is not what 'words' spell, 'three seven'"):
        read_manifest(_write(tmp_path, {**LINE, "text": "three two"}))
    with pytest.raises(ValueError, match="key 'text': 'threeseven' is not"):
        read_manifest(_write(tmp_path, {**LINE, "text": "threeseven"}))


def test_japanese_has_no_spaces(tmp_path):
    words = [{"word": "今日は", "start": 0, "end": 1}, {"word": "いい 天気", "start": 1, "end": 2}]
    line = {**ASR, "text": "今日は いい天気", "words": words, "lang": "ja"}
    assert _read(tmp_path, line, task="asr").words[1] == Word("いい 天気", 1.0, 2.0)
    with pytest.raises(ValueError, match="is not what 'words' spell"):
        _read(tmp_path, {**line, "text": "今日はいい"}, task="asr")


def test_speech_to_speech_needs_its_target(tmp_path):
    with pytest.raises(ValueError, match=r"line 1: key 'target_audio_filepath': is missing.*on the clock"):
        read_manifest(_write(tmp_path, {**LINE, "taskname": "s2st"}))


def test_the_lines_of_the_documentation_are_read(tmp_path):
    text = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    {")]
    tasks = [_read(tmp_path, json.loads(line), task="asr", target_lang="en").task.key for line in lines]
    assert tasks == ["asr-en", "st-ja-en", "text-en"]


@pytest.fixture
def tarred(tmp_path) -> Path:
    """A tarred data set as NeMo's script lays it out; the last file of the second archive is cut short."""
    (tmp_path / "sharded_manifests").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / f"audio_{shard}.tar", "w") as tar:
            for name in ("a.wav", "b.wav"):
                member = tarfile.TarInfo(name)
                member.size = 5000
                tar.addfile(member, io.BytesIO(f"{shard}{name}".encode() * 1000))
    archive = tmp_path / "audio_1.tar"
    archive.write_bytes(archive.read_bytes()[:9000])
    return tmp_path / "sharded_manifests" / "manifest_0.json"


def _tarred_line(name: str, shard: int) -> bytes:
    return json.dumps({**ASR, "audio_filepath": name, "shard_id": shard, "taskname": "asr", "lang": "en"}).encode()


@pytest.mark.parametrize("name, found", [("b.wav", b"0b.wav"), ("b-sub1.wav", b"0b.wav"), ("a.wav", b"0a.wav")])
def test_tarred_audio_is_bytes_of_its_archive(tarred, name, found):
    (utterance,) = read_line(_tarred_line(name, 0), manifest=tarred, source=SourceSection(name="s"))
    recording = utterance.heard
    assert recording.path == tarred.parent.parent / "audio_0.tar"
    start, size = recording.span
    assert recording.path.read_bytes()[start : start + size] == (found * 1000)[:5000]


def test_faulty_archives(tarred):
    def read(name: str, shard: int) -> list[Utterance]:
        return read_line(_tarred_line(name, shard), manifest=tarred, source=SourceSection(name="s"))

    assert read("a.wav", 1)
    with pytest.raises(ValueError, match=r"not in its archive: there is no whole file 'b.wav' in .*audio_1\.tar"):
        read("b.wav", 1)
    with pytest.raises(ValueError, match=r"no archive: there is no audio_7\.tar beside manifest_0\.json or one"):
        read("a.wav", 7)
    (tarred.parent / "audio_8.tar").write_bytes(b"not an archive" * 100)
    with pytest.raises(ValueError, match=r"archive unreadable: .*audio_8\.tar is not a tar from which single files"):
        read("a.wav", 8)
