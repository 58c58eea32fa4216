"""tools/evaluate.py: a converted folder, a checkpoint, a run whose checkpoints come and go."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from native_folders import write_random
from one_rank import one_rank  # noqa: F401  a fixture
from small_corpus import line, make_codec, make_tokenizer, record, write_manifest

from megaspeech.conversion import companions
from megaspeech.conversion.served import converted, new_checkpoints, newest_checkpoint

sys.path.insert(0, str(Path(__file__).parents[2]))
from tools import evaluate  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_rank"),
    pytest.mark.skipif(find_spec("moshi") is None, reason="moshi is not installed"),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 2 and 4, the last, of a run `run`; a manifest `test.jsonl`."""
    folder = tmp_path_factory.mktemp("project")
    make_codec().save(folder / "codec")
    (folder / "tokenizer.model").write_bytes(make_tokenizer().model)
    paths = (f"codec.path={folder}/codec", f"data.tokenizer={folder}/tokenizer.model", "training.exit_step=4")
    for step in (2, 4):
        write_random(folder / "run" / "checkpoints" / f"step_{step:08}", *paths)
    record(folder, "0", seconds=0.9)
    write_manifest(folder / "test.jsonl", [line("0.wav"), line("0.wav", task="tts"), line("none.wav")])
    return folder


def run(project: Path, *arguments: str | Path) -> int:
    return evaluate.main([*map(str, arguments), "--latency", "1", "--scratch", str(project), "--device", "cpu"])


def test_the_newest_checkpoint_of_a_run_is_evaluated(project: Path, tmp_path: Path) -> None:
    out = ("--output", tmp_path / "out", "--json", tmp_path / "figures.json")
    assert run(project, project / "run", project / "test.jsonl", *out) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["tasks"].keys() == {"asr-en", "tts-en"} and figures["num_rejected"] == 1
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 2
    assert sorted(path.name for path in project.iterdir()) == [
        "0.wav", "codec", "run", "test.jsonl", "tokenizer.model",
    ], "what was converted is gone"  # fmt: skip


def test_each_checkpoint_of_a_run_is_evaluated_once(project: Path, tmp_path: Path) -> None:
    following = shutil.copytree(project / "run", tmp_path / "run")
    for _ in range(2):
        assert run(project, following, project / "test.jsonl", "--follow") == 0
    records = [json.loads(one) for one in (following / "evaluation.jsonl").read_text().splitlines()]
    assert [one["step"] for one in records] == [2, 4]
    assert all(one["tasks"]["asr-en"]["num_samples"] == 1 for one in records)
    assert (following / "evaluation" / "step_00000004" / "answers.jsonl").is_file()
    assert list((following / "tensorboard" / "evaluation").glob("events.*"))


def test_checkpoints_come_in_their_order_and_those_that_are_gone_are_passed_over(project: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run" / "checkpoints"

    def come(name: str) -> None:
        shutil.copytree(project / "run" / "checkpoints" / name, directory / "coming")
        (directory / "coming").rename(directory / name)

    steps: Iterator[Path] = new_checkpoints(tmp_path / "run", done=[], poll_seconds=0.05)
    threading.Timer(0.2, come, ["step_00000002"]).start()  # the directory is not there yet
    assert next(steps).name == "step_00000002"
    shutil.rmtree(directory / "step_00000002")
    come("step_00000004")
    assert [path.name for path in steps] == ["step_00000004"]


def test_what_is_removed_while_it_is_converted_ends_nothing(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    following = shutil.copytree(project / "run", tmp_path / "run")
    whole = evaluate._evaluate

    def removed(model: Path, *arguments: object, **options: object) -> dict:
        if model.name == "step_00000002":
            shutil.rmtree(model)
        return whole(model, *arguments, **options)

    monkeypatch.setattr(evaluate, "_evaluate", removed)
    assert run(project, following, project / "test.jsonl", "--follow") == 0
    assert "step 2: the run has removed it meanwhile" in capsys.readouterr().err
    assert json.loads((following / "evaluation.jsonl").read_text())["step"] == 4


def test_a_conversion_that_breaks_off_leaves_no_room_taken(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise FileNotFoundError("removed while it was read")

    monkeypatch.setattr(companions, "copy", broken)
    with (
        pytest.raises(FileNotFoundError, match="removed while"),
        converted(project / "run", scratch=tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_errors_are_one_line(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(project, tmp_path, project / "test.jsonl") == 1
    assert f"{tmp_path}: is no converted folder, no checkpoint and no run's directory" in capsys.readouterr().err
    assert run(project, project / "run", project / "none.jsonl") == 1
    assert "none.jsonl" in (said := capsys.readouterr().err) and said.count("\n") == 1
    with pytest.raises(ValueError, match="there is no finished checkpoint"):
        newest_checkpoint(tmp_path)


def test_a_converted_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with converted(tmp_path, scratch=tmp_path / "scratch") as folder:
        assert folder == tmp_path
    assert (tmp_path / "config.json").is_file()
