"""Sources as units of work: every line in one unit, on one side, whoever lists them; what is faulty is set aside."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from megaspeech.config.preparation import SourceSection
from megaspeech.preparation import line_index, sources
from megaspeech.preparation.sources import Refused, is_held_out, list_units, read_unit
from megaspeech.preparation.utterance import Utterance


def _line(number: int, **changed: object) -> bytes:
    values = {"audio_filepath": f"{number}.wav", "duration": 1.5, "text": f"number {number}", **changed}
    return json.dumps({key: value for key, value in values.items() if value is not None}).encode() + b"\n"


def _source(train: Path | str = "", **fields: object) -> SourceSection:
    return SourceSection(**{"name": "books", "task": "asr", "target_lang": "en", "train": str(train), **fields})


def _texts(source: SourceSection, split: str, lines_per_shard: int = 10) -> list[str]:
    units = [unit for unit in list_units([source], lines_per_shard=lines_per_shard) if unit.split == split]
    return [utterance.text for unit in units for utterance in read_unit(unit)]


@pytest.fixture
def manifest(tmp_path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"".join(map(_line, range(2500))))
    return path


@settings(max_examples=150, deadline=None)
@given(
    lines=st.lists(st.binary(max_size=9).map(lambda line: line.replace(b"\n", b"")), min_size=1, max_size=40),
    ends=st.booleans(),
    per_shard=st.integers(1, 12),
    block=st.integers(1, 50),
    packed=st.booleans(),
)
def test_every_line_is_in_one_unit_which_begins_where_it_says(tmp_path_factory, lines, ends, per_shard, block, packed):
    content = b"\n".join(lines) + (b"\n" if ends else b"")
    path = tmp_path_factory.mktemp("m") / ("a.jsonl.gz" if packed else "a.jsonl")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(line_index, "BLOCK", block)
        if not content:
            with pytest.raises(ValueError, match="there is nothing in"):
                list_units([_source(path)], lines_per_shard=per_shard)
            return
        units = list_units([_source(path)], lines_per_shard=per_shard)
    assert [unit.number for unit in units] == list(range(len(units)))
    assert [unit.first_line for unit in units] == [number * per_shard for number in range(len(units))]
    assert all(unit.num_lines == per_shard for unit in units[:-1])
    read = [each for unit in units for each in sources._lines(unit)]
    assert b"".join(line for _, line in read) == content
    assert all(line.count(b"\n") == 1 for _, line in read[:-1])
    assert [number for number, _ in read] == list(range(1, len(read) + 1))


def test_a_manifest_is_read_once_by_all_who_list_it_and_again_when_it_changes(tmp_path, manifest, monkeypatch):
    read, kept = [], tmp_path / "kept"
    really = line_index.open_manifest
    monkeypatch.setattr(line_index, "open_manifest", lambda path: (read.append(path), really(path))[1])
    first, *others = (list_units([_source(manifest)], lines_per_shard=700, kept=kept) for _ in range(3))
    assert others == [first, first] == 2 * [list_units([_source(manifest)], lines_per_shard=700)]
    assert read == [manifest] * 2  # the second without `kept`
    assert [unit.num_lines for unit in list_units([_source(manifest)], lines_per_shard=2000, kept=kept)] == [2000, 500]
    manifest.write_bytes(manifest.read_bytes() + _line(2500))
    assert sum(unit.num_lines for unit in list_units([_source(manifest)], lines_per_shard=700, kept=kept)) == 2501


def test_units_are_numbered_through_all_manifests_of_a_pattern(tmp_path):
    for name, count in (("b", 5), ("a", 25), ("c/d", 9)):
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"".join(_line(number) for number in range(count)))
    units = list_units([_source(f"{tmp_path}/**/*.jsonl")], lines_per_shard=10)
    places = [(unit.path.name, unit.first_line, unit.num_lines) for unit in units]
    assert places == [
        ("a.jsonl", 0, 10),
        ("a.jsonl", 10, 10),
        ("a.jsonl", 20, 5),
        ("b.jsonl", 0, 5),
        ("d.jsonl", 0, 9),
    ]
    assert [unit.number for unit in units] == [0, 1, 2, 3, 4]
    assert str(units[1]) == f"{tmp_path}/a.jsonl, lines 11 to 20"


def test_each_source_and_split_counts_for_itself(tmp_path, manifest):
    valid = tmp_path / "valid.jsonl"
    valid.write_bytes(_line(1) + _line(2))
    both = [_source(manifest, name="a", valid=str(valid)), _source(manifest, name="b")]
    counted = [(unit.source.name, unit.split, unit.number) for unit in list_units(both, lines_per_shard=2000)]
    assert counted == [("a", "train", 0), ("a", "train", 1), ("a", "valid", 0), ("b", "train", 0), ("b", "train", 1)]


def test_what_is_held_out_is_the_same_in_every_run_and_never_trained_on(manifest):
    source = _source(manifest, held_out=0.02)
    train, valid = _texts(source, "train", 100), _texts(source, "valid", 100)
    assert sorted(train + valid) == sorted(f"number {number}" for number in range(2500))
    assert 25 < len(valid) < 85
    assert (_texts(source, "train", 333), _texts(source, "valid", 1)) == (train, valid)
    assert set(valid) < set(_texts(_source(manifest, held_out=0.04), "valid"))  # more of them, and these too
    units = list_units([source], lines_per_shard=10)
    assert [unit.num_lines for unit in units if unit.split == "valid"] == [500] * 5  # 50 blocks hold out 10 lines


def test_the_side_of_a_line_depends_on_nothing_but_its_bytes():
    held = [number for number in range(1000) if is_held_out(f"line {number}".encode(), share=0.01)]
    assert held == [142, 157, 312, 446, 478, 521, 555, 577]  # these bytes, whatever Python or machine


def test_a_faulty_line_is_set_aside_and_the_others_go_on(tmp_path):
    path = tmp_path / "some.jsonl"
    faulty = [b"{", b"[]", b'{"text": "\xff"}', _line(1, text=None), _line(1, text="\ud800"), _line(1, duration="x")]
    faulty.append(_line(1, shard_id="9" * 300))
    path.write_bytes(b"\n".join([_line(0), b"", b"  ", *faulty, _line(9)]))
    (unit,) = list_units([_source(path)], lines_per_shard=100)
    first, *refused, last = read_unit(unit)
    assert (first.text, last.text) == ("number 0", "number 9")
    reasons = [
        "not JSON:",
        "not a JSON object:",
        "not UTF-8:",
        "key 'text': is missing",
        "not Unicode:",
        "key 'duration': 'x'",
        "unreadable: File name too long",
    ]
    for one, reason in zip(refused, reasons, strict=True):
        assert isinstance(one, Refused) and one.reason.startswith(reason) and "\n" not in one.reason
    numbers = [number for number, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    assert [one.where for one in refused] == [f"{path}, line {number}" for number in numbers[1:-1]]


def test_a_folder_of_audio_is_cut_into_units_too(tmp_path):
    for number in range(7):
        path = tmp_path / f"speaker{number % 3}/{number}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, np.zeros(160), 16000)
        if number != 4:
            path.with_suffix(".txt").write_text(f"number {number}")
    units = list_units([_source(tmp_path, format="folder", held_out=0.4)], lines_per_shard=3)
    assert [(unit.split, unit.number, unit.num_lines) for unit in units] == [
        ("train", 0, 3),
        ("train", 1, 3),
        ("train", 2, 1),
        ("valid", 0, 7),
    ]
    read = [each for unit in units for each in read_unit(unit)]
    texts = sorted(each.text for each in read if isinstance(each, Utterance))
    assert texts == [f"number {number}" for number in (0, 1, 2, 3, 5, 6)]
    (refused,) = (each for each in read if isinstance(each, Refused))
    assert refused.where == str(tmp_path / "speaker1/4.wav")
    assert refused.reason == "no text: there is no 4.txt beside it; write what is said into one"


def test_a_folder_of_shar_stands_for_its_cuts(tmp_path):
    lhotse = pytest.importorskip("lhotse")
    soundfile.write(tmp_path / "a.wav", np.zeros(16000), 16000)
    recording = lhotse.Recording.from_file(tmp_path / "a.wav")
    said = lhotse.SupervisionSegment("s", "a", 0, 1, text="hello", language="en")
    cuts = [lhotse.MonoCut(f"c{n}", 0, 1, 0, supervisions=[said], recording=recording) for n in range(5)]
    (tmp_path / "shar").mkdir()
    lhotse.CutSet.from_cuts(cuts).to_shar(tmp_path / "shar", fields={"recording": "flac"}, shard_size=3)
    units = list_units([_source(tmp_path / "shar", format="lhotse")], lines_per_shard=2)
    assert [(unit.path.name, unit.num_lines) for unit in units] == [
        ("cuts.000000.jsonl.gz", 2),
        ("cuts.000000.jsonl.gz", 1),
        ("cuts.000001.jsonl.gz", 2),
    ]
    spans = {(each.heard.path.name, *each.heard.span) for unit in units for each in read_unit(unit)}
    assert len(spans) == 5


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"train": "nowhere/*.jsonl"}, r"sources\.books\.train: 'nowhere/\*\.jsonl': there is no such file or folder"),
        ({"valid": "nowhere.jsonl"}, r"sources\.books\.valid: 'nowhere\.jsonl': there is no such"),
        ({}, r"sources\.books\.train: names nothing; give a manifest"),
        ({"valid": "M", "held_out": 0.1}, r"sources\.books\.held_out: 0\.1 of nothing; give 'train'"),
        ({"train": "M", "valid": "M"}, r"sources\.books\.valid: .*train\.jsonl is one of 'train' too; name other"),
        ({"train": "M", "task": "arr"}, r"sources\.books\.task: 'arr' is not one of asr, st, "),
        ({"train": "M", "target_lang": "E"}, r"sources\.books\.target_lang: 'E' is not a language's code; give"),
        ({"train": "F"}, r"sources\.books\.train: .* is a folder; give a manifest, or a pattern"),
        (
            {"train": "M", "format": "folder"},
            r"sources\.books\.train: .*train\.jsonl is a file; give a folder of audio",
        ),
        ({"train": "F", "format": "folder"}, r"sources\.books\.train: there is nothing in '.*'; leave it out"),
        (
            {"train": "F", "format": "folder", "task": "s2s"},
            r"\.task: 's2s' is not one of asr, st, tts, which",
        ),
        ({"train": "F", "format": "folder", "task": ""}, r"\.task: is missing; give one of asr, st, tts"),
        ({"train": "F", "format": "folder", "target_lang": ""}, r"\.target_lang: is missing; give the language"),
        ({"train": "M", "format": "moshi", "target_lang": "", "task": ""}, r"\.target_lang: is missing; give"),
        ({"train": "M", "format": "moshi"}, r"\.task: 'asr' is not one of s2s, which a source of format 'moshi'"),
        ({"train": "G"}, r"cut\.jsonl\.gz: unreadable: .*; write the manifest anew"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused_at_once(tmp_path, manifest, fields, message):
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(manifest.read_bytes())[:-100])
    (tmp_path / "empty").mkdir()
    names = {"M": manifest, "F": tmp_path / "empty", "G": tmp_path / "cut.jsonl.gz"}
    fields = {key: str(names.get(value, value)) if isinstance(value, str) else value for key, value in fields.items()}
    with pytest.raises(ValueError, match=message) as caught:
        list_units([_source(**fields)], lines_per_shard=10)
    assert "\n" not in str(caught.value)


def test_without_lhotse_it_says_what_to_install(manifest, monkeypatch):
    monkeypatch.setitem(sys.modules, "lhotse.cut.set", None)
    with pytest.raises(ImportError, match=r"Lhotse's cuts needs lhotse .*pip install megaspeech\[lhotse\]"):
        list_units([_source(manifest, format="lhotse")], lines_per_shard=10)
