"""Units of work: killed anywhere and started again, or shared out to any number of tasks, the bytes are the same."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("soundfile")
pytest.importorskip("nvidia.dali")
pytest.importorskip("faiss")

from small_corpus import (  # noqa: E402
    content_of,
    line,
    make_codec,
    make_lines,
    make_project,
    make_tokenizer,
    prepare,
    prepare_units,
    record,
    write_manifest,
)

from megaspeech.data.shard_set import ShardSet  # noqa: E402
from megaspeech.preparation import fitting, units  # noqa: E402
from megaspeech.preparation.prepare import Preparation  # noqa: E402
from megaspeech.preparation.sources import list_units  # noqa: E402

SETTINGS = ("preparation.lines_per_shard=9", "preparation.read_ahead=4", "preparation.batch_seconds=3.0")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of two sources and five units, with codec and tokenizer."""
    folder = tmp_path_factory.mktemp("home")
    lines = make_lines(folder, 30)
    make_project(folder, a=lines, b=[*lines[:4], "{", line("absent.wav")])
    make_codec().save(folder / "codec")
    (folder / "tokenizer.model").write_bytes(make_tokenizer().model)
    return folder


@pytest.fixture(scope="module")
def expected(home: Path) -> dict[str, bytes]:
    """All files of a run that nothing interrupted."""
    assert prepare_units(home / "config.toml", (*SETTINGS, f"data.directory={home}/expected"))
    content = content_of(home / "expected")
    assert {"rejected.jsonl", "train/a/asr-en/000003.bin", "train/a/asr-en/catalogue.json"} <= set(content)
    return content


def into(folder: Path) -> tuple[str, ...]:
    return (*SETTINGS, f"data.directory={folder}")


def start(home: Path, folder: Path, **settings: object) -> multiprocessing.Process:
    """A process of its own that prepares into `folder`; one server imports everything for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small_corpus", "megaspeech.preparation.fitting", "nvidia.dali", "soundfile"])
    process = context.Process(target=prepare_units, args=(home / "config.toml", into(folder)), kwargs=settings)
    process.start()
    return process


def whole_files(folder: Path) -> dict[str, bytes]:
    """Without what a process that was killed was writing aside (`data.whole_files`)."""
    return {name: content for name, content in content_of(folder).items() if not name.endswith(".part")}


def test_killed_at_random_and_started_again(home: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    for name in ("imports", "whole"):
        started = time.monotonic()
        process = start(home, tmp_path / name)
        process.join()
        assert process.exitcode == 0 and content_of(tmp_path / name) == expected
    seconds, draws, kills = time.monotonic() - started, random.Random(5), 0
    while kills < 5:
        process = start(home, tmp_path / "out")
        process.join(draws.uniform(0.1, 0.8) * seconds)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:  # it was faster: the machine has less to do than when the time was taken
            assert whole_files(tmp_path / "out") == expected
            shutil.rmtree(tmp_path / "out")
            seconds /= 1.5
    assert prepare_units(home / "config.toml", into(tmp_path / "out"))
    assert whole_files(tmp_path / "out") == expected


def test_a_kill_at_any_renaming(home: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """Each run is killed at one renaming farther on in what is left to do: between any two files, some time."""
    for killed_at in (1, 2, 5, 7, 9, 11, 4, 3, 12, 6):
        process = start(home, tmp_path / "out", killed_at=killed_at)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        done = list((tmp_path / "out").rglob("units/*.json"))
        assert all(json.loads(mark.read_text())["totals"] for mark in done)
    else:
        assert prepare_units(home / "config.toml", into(tmp_path / "out"))
    assert content_of(tmp_path / "out") == expected


def test_done_units_are_not_made_again(home: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    shutil.copytree(home / "expected", tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("0*") if path.is_file()}
    assert prepare_units(home / "config.toml", into(tmp_path / "out"))
    assert {path: path.stat().st_mtime_ns for path in times} == times
    (tmp_path / "out/train/a/units/000001.json").unlink()  # which makes that unit again, and no other
    assert prepare_units(home / "config.toml", into(tmp_path / "out"))
    changed = {path.stem for path, when in times.items() if path.stat().st_mtime_ns != when}
    assert changed <= {"000001", "000001.rejected"} and content_of(tmp_path / "out") == expected


def test_tasks_of_an_array_share_the_units_without_a_word(
    home: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    order = [2, 0, 1]
    finished = [prepare_units(home / "config.toml", into(tmp_path / "out"), share=(index, 3)) for index in order]
    assert finished == [False, False, True]
    assert content_of(tmp_path / "out") == expected


def test_two_tasks_that_do_the_same_unit_do_no_harm(home: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    several = [start(home, tmp_path / "out") for _ in range(4)]
    for process in several:
        process.join()
    assert [process.exitcode for process in several] == [0, 0, 0, 0]
    assert content_of(tmp_path / "out") == expected


def test_no_sample_is_there_twice_or_lost(home: Path, expected: dict[str, bytes]) -> None:
    lines = [json.loads(one) for one in (home / "a.jsonl").read_text().splitlines()]
    rejected = [json.loads(one) for one in expected["rejected.jsonl"].decode().splitlines()]
    for task in ("asr", "tts"):
        mine = [one["audio_filepath"] for one in lines if one["taskname"] == task]
        lost = [one for one in rejected if one["source"] == "a" and one["task"] == f"{task}-en"]
        shards = ShardSet(home / f"expected/train/a/{task}-en")
        assert len(shards) == len(mine) - len(lost) and lost
    where = [(one["source"], one["path"].rsplit("/", 1)[-1]) for one in rejected]
    assert ("b", "absent.wav") in where and ("b", "b.jsonl, line 5") in where


@pytest.mark.parametrize(
    "override, named",
    [
        ("data.task_delay=5", "made with data.task_delay = 3, now it is 5"),
        ("preparation.loudness=-23.0", "made with preparation.loudness = None, now it is -23.0"),
        ("sources.a.augment=false", "made with source.augment = True, now it is False"),
        ("preparation.lines_per_shard=10", "made with preparation.lines_per_shard = 9, now it is 10"),
    ],
)
def test_another_config_refuses_what_is_there(
    home: Path, expected: dict[str, bytes], override: str, named: str
) -> None:
    with pytest.raises(ValueError, match=r"train/a/units/000000.json: made with") as caught:
        prepare_units(home / "config.toml", (*into(home / "expected"), override))
    assert named in str(caught.value) and "remove" in str(caught.value)
    assert content_of(home / "expected") == expected


def test_what_changes_no_sample_may_change(home: Path, expected: dict[str, bytes]) -> None:
    overrides = ("preparation.num_threads=2", "preparation.batch_seconds=1.0", "sources.a.weight=3.0", "run.seed=7")
    assert prepare_units(home / "config.toml", (*into(home / "expected"), *overrides))
    assert content_of(home / "expected") == expected


def test_a_manifest_that_has_changed_is_noticed(home: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    shutil.copytree(home / "expected", tmp_path / "out")
    lines = (home / "b.jsonl").read_text()
    shorter = write_manifest(tmp_path / "a.jsonl", (home / "a.jsonl").read_text().splitlines()[:9])
    for text, match in ((lines + lines, r"num_lines = 6, now it is 9"),):
        (tmp_path / "b.jsonl").write_text(text)
        with pytest.raises(ValueError, match=match):
            prepare_units(home / "config.toml", (*into(tmp_path / "out"), f"sources.b.train={tmp_path}/b.jsonl"))
    with pytest.raises(ValueError, match=r"a/units/000001.json: of a unit that the sources no longer have"):
        prepare_units(home / "config.toml", (*into(tmp_path / "out"), f"sources.a.train={shorter}"))


def test_shards_of_a_killed_run_with_another_config_do_not_stay(
    home: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    stale = tmp_path / "out/train/a/st-en-ja/000001.bin"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of another config")
    half = tmp_path / "out/train/a/asr-en/000001.json"
    half.parent.mkdir(parents=True)
    half.write_text("{")
    assert prepare_units(home / "config.toml", into(tmp_path / "out"))
    assert content_of(tmp_path / "out") == expected


def test_a_mark_that_is_damaged_says_what_to_do(home: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    shutil.copytree(home / "expected", tmp_path / "out")
    (tmp_path / "out/train/a/units/000001.json").write_text('{"made')
    with pytest.raises(ValueError, match=r"000001.json: not JSON any more .*; remove it"):
        prepare_units(home / "config.toml", into(tmp_path / "out"))


def test_a_full_disk_stops_the_run_and_marks_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(units, "write_shard", full)
    with pytest.raises(OSError, match="No space left"):
        prepare_units(home / "config.toml", into(tmp_path / "out"))
    assert not list((tmp_path / "out").rglob("units/*.json"))


def test_nothing_held_out_says_so(tmp_path: Path) -> None:
    lines = [line(record(tmp_path, "x", seconds=1.0).name)]
    config = make_project(tmp_path, "sources.a.held_out=0.001", a=lines)
    with pytest.raises(ValueError, match="valid: no sample is left; the reasons: no line is held out; raise held_out"):
        prepare(config, codec=make_codec(), tokenizer=make_tokenizer())


def test_what_is_missing_is_made_once_and_kept(tmp_path: Path) -> None:
    """Fitted on what can be used, to the same codec and tokenizer whoever does it."""
    lines = [line(record(tmp_path, f"{i}", seconds=2.0, pitch=90 + 5 * i).name) for i in range(12)]
    config = make_project(tmp_path, a=[line("absent.wav"), *lines])
    listed = list_units(config.sources, lines_per_shard=5)
    assert fitting.what_is_missing(config) == ["codec.path", "data.tokenizer"]
    said: list[str] = []
    fitting.make_what_is_missing(config, listed, say=said.append)
    assert fitting.what_is_missing(config) == [] and len(said) == 2
    before = content_of(tmp_path / "codec"), (tmp_path / "tokenizer.model").read_bytes()
    fitting.make_what_is_missing(config, listed, say=said.append)
    assert len(said) == 2
    codec, tokenizer = fitting.load_codec_and_tokenizer(config)
    Preparation(config, codec=codec, tokenizer=tokenizer).run(listed)
    shutil.rmtree(tmp_path / "codec")
    (tmp_path / "tokenizer.model").unlink()
    fitting.make_what_is_missing(config, listed, say=said.append)
    assert before == (content_of(tmp_path / "codec"), (tmp_path / "tokenizer.model").read_bytes())
    assert not list(tmp_path.glob("*.part"))


def test_nothing_to_fit_on_says_why(tmp_path: Path) -> None:
    config = make_project(tmp_path, a=[line("absent.wav")])
    with pytest.raises(ValueError, match=r"absent.wav: missing: .*; and no other recording"):
        fitting.make_what_is_missing(config, list_units(config.sources, lines_per_shard=5), say=print)
    assert not (tmp_path / "codec").exists()


def test_units_to_fit_on_are_spread_over_the_sources(tmp_path: Path) -> None:
    lines = [line("absent.wav")] * 100
    config = make_project(tmp_path, a=lines, b=lines[:3], c=lines)
    chosen = fitting._some(list_units(config.sources, lines_per_shard=1))
    numbers = {name: [unit.number for unit in chosen if unit.source.name == name] for name in "abc"}
    assert len(numbers["a"]) == len(numbers["c"]) == 6 and numbers["b"] == [0, 1, 2]
    assert numbers["a"][0] == 0 and numbers["a"][-1] == 99 and (np.diff(numbers["a"]) >= 19).all()
