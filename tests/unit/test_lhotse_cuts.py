"""Lhotse's cuts, written by lhotse itself: recordings and Shar, and what of them cannot be used."""

import gzip
import io
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile

from megaspeech.config.preparation import SourceSection
from megaspeech.data.tasks import Task
from megaspeech.preparation.manifests.lhotse_cuts import read_line
from megaspeech.preparation.recording import Recording
from megaspeech.preparation.utterance import Utterance, Word

lhotse = pytest.importorskip("lhotse")
from lhotse.shar import SharWriter  # noqa: E402
from lhotse.supervision import AlignmentItem  # noqa: E402

RATE, SECONDS = 16000, 10.0
ASR = SourceSection(name="cuts", format="lhotse", task="asr")
TIMES = [AlignmentItem("hello", 3.1, 0.5), AlignmentItem("<eps>", 3.6, 0.4), AlignmentItem("there", 4.0, 0.5)]


@pytest.fixture
def waveform() -> np.ndarray:
    """Stereo `[N, 2]`, whose samples say where they are from."""
    ramp = np.linspace(0, 0.5, int(RATE * SECONDS))
    return np.stack([ramp, -ramp], axis=1)


@pytest.fixture
def stereo(tmp_path, waveform) -> "lhotse.Recording":
    soundfile.write(tmp_path / "a.wav", waveform, RATE, subtype="PCM_16")
    return lhotse.Recording.from_file(tmp_path / "a.wav")


def _said(text: str = "Hello, there!", *, start: float = 3.0, seconds: float = 2.0, **fields: object):
    values = {"id": "said", "recording_id": "a", "language": "English", "speaker": "mei", **fields}
    return lhotse.SupervisionSegment(start=start, duration=seconds, text=text, **values)


def _cut(recording, *supervisions, channel: int = 0, **fields: object):
    values = {"id": "d/x.1", "start": 0, "duration": SECONDS, **fields}
    return lhotse.MonoCut(channel=channel, recording=recording, supervisions=list(supervisions), **values)


def _read(cut, folder: Path, source: SourceSection = ASR) -> Utterance:
    """What is read of a cut that lhotse has written to a manifest."""
    path = folder / "cuts.jsonl.gz"
    lhotse.CutSet.from_cuts([cut]).to_file(path)
    (line,) = gzip.decompress(path.read_bytes()).splitlines()
    (utterance,) = read_line(line, manifest=path, source=source)
    return utterance


def test_a_cut_with_word_times(tmp_path, stereo):
    cut = _cut(stereo, _said(alignment={"word": TIMES}), channel=1)
    assert _read(cut, tmp_path) == Utterance(
        task=Task("asr", "en", "en"),
        text="Hello, there!",
        words=(Word("Hello,", 3.1, 3.6), Word("there!", 4.0, 4.5)),
        heard=Recording(tmp_path / "a.wav", channel=1, duration=SECONDS),
        speaker="mei",
    )


def test_a_part_of_a_recording_keeps_its_times(tmp_path, stereo):
    cut = _cut(stereo, _said(alignment={"word": TIMES})).truncate(offset=2.0, duration=5.0)
    utterance = _read(cut, tmp_path)
    assert utterance.heard == Recording(tmp_path / "a.wav", start=2.0, end=7.0, channel=0, duration=5.0)
    assert [(word.word, round(word.start, 6)) for word in utterance.words] == [("Hello,", 1.1), ("there!", 2.0)]


@pytest.mark.parametrize(
    "text, times",
    [
        ("Hello there", None),
        ("Hello there you", TIMES),  # more words than were aligned
        ("Goodbye there", TIMES),
        ("Hello there", [AlignmentItem("hello", 23.1, 0.5), AlignmentItem("there", 24.0, 0.5)]),  # on another clock
    ],
)
def test_a_supervision_without_fitting_word_times_is_a_phrase(tmp_path, stereo, text, times):
    cut = _cut(stereo, _said(text, alignment=times and {"word": times}))
    assert _read(cut, tmp_path).words == (Word(text, 3.0, 5.0),)


def test_japanese_words_need_no_spaces(tmp_path, stereo):
    times = [AlignmentItem("今日は", 3.1, 0.5), AlignmentItem("いい", 4.0, 0.5)]
    utterance = _read(_cut(stereo, _said("今日はいい", language="ja", alignment={"word": times})), tmp_path)
    assert utterance.words == (Word("今日は", 3.1, 3.6), Word("いい", 4.0, 4.5))


def test_all_supervisions_of_a_cut_are_put_together_by_time(tmp_path, stereo):
    later = _said("and you", id="b", start=6.0, seconds=1.0, speaker="bob")
    empty = _said("", id="c", start=8.0, seconds=1.0)
    utterance = _read(_cut(stereo, later, empty, _said(alignment={"word": TIMES})), tmp_path)
    assert utterance.text == "Hello, there! and you"
    assert [word.start for word in utterance.words] == [3.1, 4.0, 6.0]
    assert utterance.speaker == ""


def test_talkers_at_once_are_phrases_in_order(tmp_path, stereo):
    at_once = _said("yes", id="b", start=3.5, seconds=1.0)
    utterance = _read(_cut(stereo, _said(alignment={"word": TIMES}), at_once), tmp_path)
    assert utterance.words == (Word("Hello, there!", 3.0, 5.0), Word("yes", 3.5, 4.5))


def test_a_cuts_own_task_and_languages_win(tmp_path, stereo):
    custom = {"taskname": "ast", "source_lang": "ja", "target_lang": "en"}
    assert _read(_cut(stereo, _said(), custom=custom), tmp_path).task == Task("st", "ja", "en")


def test_a_conversation_in_two_channels(tmp_path, stereo):
    said = [_said("hi", channel=[0]), _said("who is it", id="b", start=6.0, channel=1)]
    cut = lhotse.MultiCut("m", 0, SECONDS, channel=[0, 1], supervisions=said, recording=stereo)
    utterance = _read(cut, tmp_path, SourceSection(name="c", format="lhotse", task="s2s"))
    assert utterance.spoken == Recording(tmp_path / "a.wav", channel=0, duration=SECONDS)
    assert utterance.heard == Recording(tmp_path / "a.wav", channel=1, duration=SECONDS)
    assert (utterance.text, utterance.words) == ("hi", (Word("hi", 3.0, 5.0),))
    assert utterance.source_words == (Word("who is it", 6.0, 8.0),)
    assert _read(cut, tmp_path).heard == Recording(tmp_path / "a.wav", duration=SECONDS)  # to asr, the mix of both


def test_an_answer_in_a_recording_of_its_own(tmp_path, stereo):
    soundfile.write(tmp_path / "b.wav", np.zeros(int(RATE * SECONDS)), RATE)
    target = lhotse.Recording.from_file(tmp_path / "b.wav")
    cut = _cut(stereo, _said(), custom={"target_audio": target, "source_lang": "ja"})
    utterance = _read(cut, tmp_path, SourceSection(name="c", format="lhotse", task="s2st"))
    assert utterance.heard.path.name == "a.wav" and utterance.heard.channel == 0
    assert utterance.spoken == Recording(tmp_path / "b.wav", duration=SECONDS)
    with pytest.raises(ValueError, match=r"^nothing to say: s2st needs .* in custom\['target_audio'\]"):
        _read(_cut(stereo, _said()), tmp_path, SourceSection(name="c", format="lhotse", task="s2st", source_lang="ja"))


def _shar(cuts: list, folder: Path, **fields: str) -> list[bytes]:
    """Lines of the first shard of a Shar folder of cuts."""
    folder.mkdir()
    with warnings.catch_warnings(), SharWriter(str(folder), fields=fields, shard_size=10) as writer:
        warnings.simplefilter("ignore")
        for cut in cuts:
            writer.write(cut)
    return gzip.decompress((folder / "cuts.000000.jsonl.gz").read_bytes()).splitlines()


@pytest.mark.parametrize("form", ["wav", "flac", "opus"])
def test_audio_in_shar_is_bytes_of_its_archive(tmp_path, stereo, waveform, form):
    whole = _cut(stereo, _said(alignment={"word": TIMES}), id="c")
    part = _cut(stereo, _said(), channel=1).truncate(offset=2.0, duration=5.0).with_id("d/x.1")
    lines = _shar([whole, part], tmp_path / "shar", recording=form)
    read = [read_line(line, manifest=tmp_path / "shar/cuts.000000.jsonl.gz", source=ASR)[0] for line in lines]
    assert read[0].words == (Word("Hello,", 3.1, 3.6), Word("there!", 4.0, 4.5))
    assert read[1].words == (Word("Hello, there!", 1.0, 3.0),)
    for utterance, wanted in zip(read, (waveform[:, 0], waveform[2 * RATE : 7 * RATE, 1]), strict=True):
        heard = utterance.heard
        assert (heard.path, heard.channel) == (tmp_path / "shar/recording.000000.tar", None)
        assert (heard.start, heard.end, heard.duration) == (0, None, len(wanted) / RATE)
        start, size = heard.span
        samples, rate = soundfile.read(io.BytesIO(heard.path.read_bytes()[start : start + size]))
        assert len(samples) / rate == pytest.approx(heard.duration, abs=0.05)
        if form != "opus":
            np.testing.assert_allclose(samples, wanted, atol=1e-4)


def test_arrays_in_shar_are_refused_by_name(tmp_path, stereo):
    with lhotse.NumpyFilesWriter(tmp_path / "features") as storage:
        cut = _cut(stereo, _said(), id="c").compute_and_store_features(lhotse.Fbank(), storage)
    lines = _shar([cut], tmp_path / "shar", recording="flac", features="numpy")
    assert read_line(lines[0], manifest=tmp_path / "shar/cuts.000000.jsonl.gz", source=ASR)
    (tmp_path / "shar/features.000000.tar").rename(tmp_path / "shar/recording.000001.tar")
    with pytest.raises(ValueError, match=r"^audio is not a file: .*1\.tar is an array \(\.npy\).*with flac, opus"):
        read_line(lines[0], manifest=tmp_path / "shar/cuts.000001.jsonl.gz", source=ASR)


def test_what_shar_lacks_is_named(tmp_path, stereo):
    lines = _shar([_cut(stereo, _said(), id="c"), _cut(None, _said(), id="no audio")], tmp_path / "s", recording="flac")
    manifest = tmp_path / "s/cuts.000000.jsonl.gz"
    with pytest.raises(ValueError, match="^no recording: cut 'no audio' has none"):
        read_line(lines[1], manifest=manifest, source=ASR)
    other = json.dumps({**json.loads(lines[0]), "id": "other"}).encode()
    with pytest.raises(
        ValueError, match=r"^not in its archive: .*no whole recording of cut 'other' in .*recording\.000000\.tar"
    ):
        read_line(other, manifest=manifest, source=ASR)
    with pytest.raises(ValueError, match=r"^no archive: there is no recording\.000004\.tar beside cuts\.000004"):
        read_line(lines[0], manifest=tmp_path / "s/cuts.000004.jsonl.gz", source=ASR)


def test_cuts_whose_audio_is_made_by_lhotse_are_refused(tmp_path, stereo):
    cut = _cut(stereo, _said())
    with pytest.raises(ValueError, match=r"^audio is not a file: a MixedCut is mixed by lhotse; write"):
        _read(cut.pad(20.0), tmp_path)
    with pytest.raises(ValueError, match="^audio is not a file: cut .* is changed by Speed; write it to Shar first"):
        _read(cut.perturb_speed(1.1), tmp_path)
    assert _read(cut.resample(8000), tmp_path).heard.path == tmp_path / "a.wav"  # which is done to all audio anyway
    stereo.sources[0].type = "url"
    with pytest.raises(ValueError, match="^audio is not a file: .* is of type 'url'; write such cuts to Shar"):
        _read(cut, tmp_path)


def test_text_that_reaches_out_of_its_cut_is_refused(tmp_path, stereo):
    cut = _cut(stereo, _said()).truncate(offset=4.0, duration=5.0, keep_excessive_supervisions=True)
    with pytest.raises(
        ValueError, match=r"^text beyond the audio: .*'said' reaches from -1.* to 1.* s, but .* to 5.0 s"
    ):
        _read(cut, tmp_path)


SAID = _said().to_dict()
SAID_ABROAD = {**SAID, "custom": {"taskname": "s2st", "source_lang": "ja", "target_lang": "en"}}


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"supervisions": []}, "^no text: no supervision of"),
        ({"type": None}, "^not a cut: its 'type' is None; join recordings and supervisions with `lhotse cut simple`"),
        ({"start": "0"}, r"^not a cut: lhotse cannot read it \(TypeError: start '0' or duration 10.0 is not a"),
        ({"supervisions": [{"text": "x"}]}, r"^not a cut: lhotse cannot read it \(TypeError"),
        ({"supervisions": [{**SAID, "text": 3}]}, "^not a cut: .*AttributeError: 'int'"),
        ({"supervisions": [{**SAID, "alignment": {"word": [["a", "b", "c"]]}}]}, "start 'b' or duration 'c' is not a"),
        ({"duration": 1e306}, "^too long: cut .* of 1e\\+306 s is more than a day; give seconds"),
        ({"start": 1e306, "duration": 5.0}, r"^not a cut: lhotse cannot read it \(InvalidOperation"),
        ({"surprise": 1}, r"^not a cut: lhotse cannot read it \(TypeError.*surprise"),
        ({"custom": {"target_audio": "b.wav"}, "supervisions": [SAID_ABROAD]}, "^not a cut: .*AttributeError: 'str'"),
        ({"recording": {}}, "^not a cut: lhotse cannot read it"),
        ({"channel": 7}, r"^channels: no file of cut .* has \[7\]"),
    ],
)
def test_faulty_lines(tmp_path, stereo, changed, reason):
    line = {**_cut(stereo, _said()).to_dict(), **changed}
    with pytest.raises(ValueError, match=reason):
        read_line(json.dumps(line).encode(), manifest=tmp_path / "cuts.jsonl", source=ASR)


def test_relative_paths_are_the_manifests_or_else_ones_own(tmp_path, stereo, monkeypatch):
    stereo.sources[0].source = "a.wav"
    assert _read(_cut(stereo, _said()), tmp_path).heard.path == tmp_path / "a.wav"
    (tmp_path / "elsewhere").mkdir()
    assert _read(_cut(stereo, _said()), tmp_path / "elsewhere").heard.path == Path("a.wav")
