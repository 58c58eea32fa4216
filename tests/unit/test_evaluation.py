"""A model is asked what manifests hold: answers written down, scored by task, what is faulty set aside."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from served_folder import make_served_folder
from small_corpus import RATE, line, record, write_manifest

from megaspeech.data.tasks import Task
from megaspeech.preparation.encoding import encode_recordings
from megaspeech.preparation.reading import recordings_of
from megaspeech.streaming.evaluation import Evaluator, first_of_each_task, full_batches
from megaspeech.streaming.folder import ServedFolder, open_folder
from megaspeech.streaming.judging import judge, judges_of
from megaspeech.streaming.manifests import read_manifests
from megaspeech.streaming.results import Settings, evaluate, figures_by_task
from megaspeech.streaming.results_table import scalars_of, table_of
from megaspeech.streaming.scoring import score
from megaspeech.streaming.translation_scores import bleu_tokenizer, translation_score

pytestmark = pytest.mark.skipif(find_spec("moshi") is None, reason="moshi is not installed")

SAYS_THREE = "import sys\nfor line in sys.stdin: open(line.rstrip('\\n')).close(); print('three')"


def python(code: str) -> str:
    """A command that runs it."""
    return shlex.join([sys.executable, "-c", code])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedFolder:
    return open_folder(make_served_folder(tmp_path_factory.mktemp("served") / "model"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three to hear, one to translate, two to say; one each that is missing, no JSON, and nothing to write."""
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(4):
        record(folder, f"{index}", seconds=0.8 + 0.1 * index, pitch=100 + 30 * index)
    lines: list[dict[str, Any] | str] = [line(f"{index}.wav") for index in range(3)]
    lines += [line("3.wav", task="st", source_lang="ja"), line("0.wav", task="tts"), line("1.wav", task="tts")]
    unwritable = {"text": "\u00df\u00e7", "words": [{"word": "\u00df\u00e7", "start": 0.3, "end": 0.5}]}
    lines += [line("none.wav"), "{no JSON", {**line("2.wav"), **unwritable}]
    return write_manifest(folder / "test.jsonl", lines)


@pytest.fixture(scope="module")
def evaluated(served: ServedFolder, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder, seen = tmp_path_factory.mktemp("evaluated"), []

    def watch(steps: Iterable, what: str) -> Iterable:
        seen.append(what)
        return steps

    utterances, refused = read_manifests([manifest])
    settings = Settings(num_timed=1, judges={"en": python(SAYS_THREE)})
    result = evaluate(served, utterances, folder=folder, settings=settings, refused=refused, watch=watch)
    assert seen == ["encoding", "batches of answers", "sessions timed one by one"]
    return folder, result


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(one) for one in path.read_text(encoding="utf-8").splitlines()]


def test_every_answer_is_written_down_and_scored(evaluated: tuple[Path, dict]) -> None:
    folder, result = evaluated
    lines = lines_of(folder / "answers.jsonl")
    assert [one["task"] for one in lines] == ["asr-en"] * 3 + ["st-ja-en"] + ["tts-en"] * 2
    assert {one["reference"] for one in lines} == {"three"}
    asr, st, tts = (result["tasks"][key] for key in ("asr-en", "st-ja-en", "tts-en"))
    hypotheses = [one["hypothesis"] for one in lines[:3]]
    assert any(hypotheses), "empty answers would prove nothing"
    expected = score(["three"] * 3, hypotheses, language="en")
    assert asr["word_error_rate"] == expected.word_error_rate > 0
    assert asr["character_error_rate"] == expected.character_error_rate
    assert st["bleu"] == translation_score(["three"], [lines[3]["hypothesis"]], language="en").bleu
    assert tts == {"num_samples": 2, "heard": {"word_error_rate": 0.0, "character_error_rate": 0.0}}


def test_speech_is_kept_as_it_was_decoded(evaluated: tuple[Path, dict]) -> None:
    folder, _ = evaluated
    lines = [one for one in lines_of(folder / "answers.jsonl") if one["task"] == "tts-en"]
    assert [one["heard"] for one in lines] == ["three", "three"]
    for one in lines:
        samples, rate = soundfile.read(folder / one["wav"])
        assert rate == RATE and len(samples) > 0.8 * RATE and np.abs(samples).max() > 0.01


def test_what_cannot_be_asked_is_set_aside_with_its_reason(evaluated: tuple[Path, dict]) -> None:
    folder, result = evaluated
    reasons = {Path(one["where"]).name: one["reason"] for one in lines_of(folder / "rejected.jsonl")}
    assert reasons.keys() == {"test.jsonl, line 8", "none.wav", "2.wav"} and result["num_rejected"] == 3
    assert reasons["test.jsonl, line 8"].startswith("not JSON") and reasons["none.wav"].startswith("missing")


def test_latency_is_measured_for_each_task(evaluated: tuple[Path, dict]) -> None:
    _, result = evaluated
    assert result["latency_ms"].keys() == {"asr-en", "st-ja-en", "tts-en"}
    assert result["latency_ms"]["tts-en"]["median"] > 0


def test_results_are_shown_and_drawn_over_steps(evaluated: tuple[Path, dict]) -> None:
    _, result = evaluated
    scalars = scalars_of(result)
    assert scalars["tts-en/heard/word_error_rate"] == 0.0
    assert scalars["asr-en/word_error_rate"] == result["tasks"]["asr-en"]["word_error_rate"]
    assert scalars["tts-en/latency_p99_ms"] == result["latency_ms"]["tts-en"]["p99"]
    assert all(isinstance(value, float) for value in scalars.values())
    assert table_of(result).row_count == 3


def test_answers_do_not_depend_on_the_batch(served: ServedFolder, manifest: Path) -> None:
    evaluator, asked = Evaluator(served), _asked(served, manifest)
    together, alone = (list(evaluator.answers(asked, batch_size=size)) for size in (60, 1))
    assert len(together) == 6 and [one.text for one in together] == [one.text for one in alone]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one.answer.codes, other.answer.codes)


def test_latency_holds_the_codec(served: ServedFolder, manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder of 1,000 s delays answers to what is heard, a decoder of 2,000 s those that are spoken."""
    evaluator = Evaluator(served)
    monkeypatch.setattr(evaluator, "_codec_seconds", lambda batch_size: (1000.0, 2000.0))
    found = evaluator.latencies(_asked(served, manifest), batch_size=2)
    compute = {task: one["median_parts"]["compute"] for task, one in found.items() if one["median"] is not None}
    assert compute.pop("tts-en") // 1e6 == 2
    assert compute and all(value // 1e6 == 1 for value in compute.values())


def _asked(served: ServedFolder, manifest: Path) -> list:
    utterances, _ = read_manifests([manifest])
    codes, _ = encode_recordings(recordings_of(utterances), codec=served.codec)
    return Evaluator(served).requests(utterances, codes)


def test_a_codec_that_cannot_stream_is_scored_all_the_same(
    served: ServedFolder, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise ValueError("the codec cannot stream")

    monkeypatch.setattr(served.codec, "can_stream", False, raising=False)
    monkeypatch.setattr(served.codec, "streaming_encoder", refuse)
    utterances, _ = read_manifests([manifest], task="asr-en")
    result = evaluate(served, utterances, folder=tmp_path, settings=Settings())
    assert result["tasks"]["asr-en"]["num_samples"] == 3 and result["latency_ms"] == {}
    assert table_of(result).row_count == 1


def test_batches_are_full_and_of_one_task(served: ServedFolder, manifest: Path) -> None:
    asked = _asked(served, manifest)
    batches = full_batches(asked, batch_size=2)
    assert [[one.utterance.task.name for one in batch] for batch in batches] == [["asr"] * 2] * 2 + [
        ["st"] * 2,
        ["tts"] * 2,
    ]
    assert batches[1] == [asked[2], asked[0]]
    assert first_of_each_task(asked, 1) == [asked[0], asked[3], asked[4]]


def test_what_knows_no_tasks_is_not_asked(served: ServedFolder, tmp_path: Path) -> None:
    stranger = dataclasses.replace(served, knows_tasks=False)
    with pytest.raises(ValueError, match="knows no tasks .* tools/measure_latency.py"):
        evaluate(stranger, [], folder=tmp_path, settings=Settings())


def test_nothing_to_ask(served: ServedFolder, tmp_path: Path) -> None:
    utterances, refused = read_manifests([write_manifest(tmp_path / "m.jsonl", [line("none.wav"), "{"])])
    with pytest.raises(ValueError, match=r"there is nothing to ask: .*m\.jsonl, line 2: not JSON"):
        evaluate(served, utterances, folder=tmp_path / "out", settings=Settings(), refused=refused)
    assert len(lines_of(tmp_path / "out" / "rejected.jsonl")) == 2


@pytest.mark.parametrize(
    "command, message",
    [
        ("nowhere/judge", r"--judge nowhere/judge: it cannot be started \(No such file"),
        (python("import sys; sys.exit('deaf')"), "ended with status 1: deaf"),
        (python("print('one')"), "printed 1 lines for 2 wavs"),
    ],
)
def test_judges_that_fail(command: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        judge(command, [tmp_path / "0.wav", tmp_path / "1.wav"], language="en")


def test_a_judge_is_told_the_language(tmp_path: Path) -> None:
    echo = python("import sys\nfor line in sys.stdin: print(sys.argv[1], line.strip()[-5:])") + " --{language}"
    assert judge(echo, [tmp_path / "0.wav"], language="ja") == ["--ja 0.wav"]
    assert judge(python("print('a\\u2028b\\n')"), [tmp_path] * 2, language="ja") == ["a\u2028b", ""]
    assert judges_of(["en=hear --x=1", "zh-Hant=y", "A=b c"]) == {"en": "hear --x=1", "zh-Hant": "y", "": "A=b c"}


def test_manifests_by_task_and_format(manifest: Path) -> None:
    utterances, _ = read_manifests([manifest], task="st-ja-en")
    assert [one.task for one in utterances] == [Task.parse("st-ja-en")]
    with pytest.raises(ValueError, match="'st' is no task such as"):
        read_manifests([manifest], task="st")
    with pytest.raises(ValueError, match="--format kaldi"):
        read_manifests([manifest], format="kaldi")
    with pytest.raises(ValueError, match="there is no such file or folder"):
        read_manifests([manifest.with_name("nowhere.jsonl")])


def test_words_are_counted_where_there_are_spaces() -> None:
    def figures(reference: str) -> dict[str, Any]:
        return figures_by_task([{"task": "asr-ja", "reference": reference, "hypothesis": "\u4e09"}])["asr-ja"]

    assert figures("\u4e09\u4e03") == {"num_samples": 1, "character_error_rate": 0.5}
    assert figures("\u4e09 \u4e03")["word_error_rate"] == 0.5


def test_bleu_is_that_of_papers() -> None:
    """Of 8, 7, 6 and 5 stretches of one to four words 7, 5, 4 and 3 are right: the fourth root of 1/4."""
    found = translation_score(["The cat sat on the mat there."], ["The cat sat on the mat here."], language="en")
    assert found.bleu == pytest.approx(100 * 0.25**0.25) and 80 < found.chrf < 95
    assert "tok:13a" in found.bleu_signature and "version:" in found.chrf_signature
    assert [bleu_tokenizer(language) for language in ("de", "pt-BR", "ja", "th", "zh-Hant", "yue")] == [
        *["13a"] * 2,
        *["char"] * 2,
        *["zh"] * 2,
    ]


def test_a_package_that_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ImportError, match=r"pip install megaspeech\[evaluation\]"):
        translation_score(["a"], ["a"], language="en")
