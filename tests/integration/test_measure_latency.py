"""Latencies and floors against hand-made figures; the tool on a preset and on a converted folder."""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from one_rank import make_config
from served_folder import make_served_folder
from small_corpus import line, record, write_manifest

from megaspeech.benchmarks import sessions, sessions_run
from megaspeech.benchmarks.sessions import Coder, Row, Timed, cache_bytes, row_of, time_frames, weight_bytes
from megaspeech.benchmarks.sessions_run import BY_ANSWERS, BY_DELAYS, Report, Waited, by_delays, judge
from megaspeech.conversion.moshi_config import moshi_config
from megaspeech.data.tasks import Task
from megaspeech.model.counting import count_parameters
from megaspeech.streaming.evaluation import Evaluator
from megaspeech.streaming.latency import summarise
from megaspeech.streaming.runtime import random_runtime

sys.path.insert(0, str(Path(__file__).parents[2]))
from tools import measure_latency  # noqa: E402

pytestmark = pytest.mark.skipif(find_spec("moshi") is None, reason="moshi is not installed")

RATE = 12.5
TIMED = Timed(np.full(4, 0.001), np.full(4, 0.010), np.full(4, 0.002))


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "COPIED_BYTES", 2**22)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    return random_runtime(moshi_config(make_config(tmp_path_factory.mktemp("tiny"))))


@pytest.mark.parametrize(
    "key, parts",
    [
        # Half a frame of 80 ms is over when the median word ends; `tiny` delays its own codebooks by a frame.
        ("asr-en", (200, 0, 11)),
        ("st-ja-en", (200, 0, 11)),
        ("s2s-en", (120, 80, 13)),
        ("s2st-ja-en", (280, 80, 13)),
        ("tts-en", (160, 80, 12)),
    ],
)
def test_latency_by_delays(key: str, parts: tuple[float, ...], tmp_path: Path) -> None:
    config = make_config(tmp_path, "data.task_delay=3", "data.speech_lead=1")
    found = by_delays(Task.parse(key), TIMED, config=config, frame_rate=RATE)
    assert tuple(summarise(found)["median_parts"].values()) == pytest.approx(parts)
    ends = sorted(one.task_delay for one in found)
    assert ends[-1] - ends[0] == pytest.approx(0 if key == "tts-en" else 60)


def test_frames_in_time_and_floor(lm: torch.nn.Module) -> None:
    timed = Timed(np.zeros(4), np.array([0.01, 0.02, 0.07, 0.09]), np.array([0.0, 0.0, 0.02, 0.0]))
    row = row_of(lm, timed, batch_size=3, codec="mimi", frame_rate=RATE, bandwidth=1e6)
    assert row.step_ms[0] == pytest.approx(45) and row.frame_ms[0] == pytest.approx(55)
    assert row.in_time == 0.5
    assert row.floor_ms == pytest.approx((weight_bytes(lm) + 3 * cache_bytes(lm)) / 1e3)


def test_bytes_of_a_step(lm: torch.nn.Module, tmp_path: Path) -> None:
    """Four layers cache 12 frames of two heads of 16 numbers, keys and values; no step reads a whole embedding."""
    assert cache_bytes(lm) == 4 * 12 * (2 * 16) * 2 * 4
    tables = 49 * 64 + 8 * 33 * 64 + 49 * 32 + 3 * 33 * 32
    assert weight_bytes(lm) == 4 * (sum(count_parameters(make_config(tmp_path)).values()) - tables)


def test_what_is_heard_and_said_goes_through_the_codec(lm: torch.nn.Module) -> None:
    heard, said = [], []

    @contextmanager
    def coding(batch_size: int):
        def encode(sound_BN: torch.Tensor) -> torch.Tensor:
            heard.append(tuple(sound_BN.shape))
            return torch.zeros(batch_size, 6, dtype=torch.long)

        def decode(codes_BQ: torch.Tensor) -> torch.Tensor:
            said.append(codes_BQ)
            return torch.zeros(batch_size, 100)

        yield Coder(encode, decode, 100)

    timed = time_frames(lm, batch_size=3, num_frames=5, coding=coding)
    assert len(timed.step) == len(timed.encode) == len(timed.decode) == 5
    assert (timed.encode > 0).all() and (timed.step > 0).all() and (timed.decode > 0).all()
    assert set(heard) == {(3, 100)} and len(said) == len(heard) - 1  # nothing comes before the delay of a frame
    assert all(codes.shape == (3, 4) and codes.min() >= 0 and codes.max() < 32 for codes in said)


def test_what_does_not_fit_is_a_row_that_says_so(
    lm: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starved(lm: torch.nn.Module, *, batch_size: int, **options: object) -> Timed:
        if batch_size > 1:
            raise torch.OutOfMemoryError
        return TIMED

    monkeypatch.setattr(sessions_run, "time_frames", starved)
    report = Report("tiny", "fp32", RATE, {"device": "cpu"}, 1e9)
    options = {
        "batches": [1, 2],
        "num_frames": 4,
        "codings": {"": None},
        "clock": lambda: 0.0,
        "advance": lambda _: None,
    }
    sessions_run.measure(report, lm, config=make_config(tmp_path), **options)
    assert [row.status for row in report.rows] == ["measured", "out of memory"]
    assert {one.batch_size for one in report.latencies} == {1}


def report_of(*latencies: Waited, rows: tuple[Row, ...] = ()) -> Report:
    return Report("8b", "bf16", RATE, {"device": "x"}, 1e9, rows=list(rows), latencies=list(latencies))


def waited(task: str, median: float, p99: float, *, batch_size: int = 1, whence: str = BY_DELAYS) -> Waited:
    return Waited(task, batch_size, whence, median, p99, {})


def test_aims() -> None:
    def row(batch_size: int, codec: str, in_time: float) -> Row:
        return Row(batch_size, codec, "measured", (1, 1), (1, 1), in_time, 1)

    latencies = [waited("s2s-en", 190, 300), waited("s2st-ja-en", 350, 450), waited("asr-en", 260, 700, batch_size=64)]
    rows = (row(32, "mimi", 0.995), row(64, "mimi", 0.98), row(64, "", 1.0))
    speech, promise, live = judge(report_of(*latencies, rows=rows), is_gpu=True)
    assert (speech.verdict, speech.worst, promise.verdict, promise.worst) == ("pass", 190, "pass", 450)
    assert (live.verdict, live.worst) == ("pass", 32)
    late = waited("asr-en", 260, 501, batch_size=32)
    speech, promise, live = judge(report_of(*latencies, late, rows=rows[1:]), is_gpu=True)
    assert (promise.verdict, promise.where, live.verdict, live.worst) == ("fail", "asr-en, 32 sessions", "fail", 0)
    assert judge(report_of(*latencies, rows=rows), is_gpu=False)[2].verdict == "not measured"


def test_answers_count_before_delays() -> None:
    latencies = [waited("s2s-en", 190, 300), waited("tts-en", 210, 300, whence=BY_ANSWERS)]
    speech, *_ = judge(report_of(*latencies), is_gpu=False)
    assert (speech.verdict, speech.where) == ("fail", "tts-en")
    assert judge(report_of(), is_gpu=False)[0].verdict == "not measured"


def test_a_mimi_of_full_size_is_served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sessions, "WARM_UP", 0)
    lm = random_runtime(moshi_config(make_config(tmp_path, "streams.cardinality=2048")))
    coding = sessions.of_random_mimi(4, device=torch.device("cpu"))
    with coding(1) as coder:
        codes = coder.encode(0.1 * torch.randn(1, coder.frame_size))
    assert codes.shape == (1, 4) and len(codes.unique()) > 1, "all entries would be one"
    timed = time_frames(lm, batch_size=1, num_frames=1, coding=coding)
    assert timed.encode[0] > 0 and timed.decode[0] > 0


def test_cpu_time_leaves_out_what_others_do(lm: torch.nn.Module) -> None:
    @contextmanager
    def coding(batch_size: int):
        yield Coder(lambda _: time.sleep(0.05) or torch.zeros(1, 4, dtype=torch.long), lambda codes: codes, 100)

    assert time_frames(lm, batch_size=1, num_frames=1, coding=coding).encode[0] > 0.04
    assert time_frames(lm, batch_size=1, num_frames=1, coding=coding, clock=time.process_time).encode[0] < 0.03


def test_the_tool_on_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "latency.json"
    shared = ["--device", "cpu", "--frames", "5", "--json", str(file)]
    assert (
        measure_latency.main(["tiny", "data.speech_lead=0", "--batches", "1,2", "--note", "By itself.", *shared]) == 0
    )
    found = json.loads(file.read_text())
    assert [row["batch_size"] for row in found["rows"]] == [1, 2] and found["bandwidth"] > 1e8
    s2s = next(one for one in found["latencies"] if one["task"] == "s2s-en")
    assert s2s["parts"]["task_delay"] == pytest.approx(40) and s2s["whence"] == "delays"
    assert "By itself." in file.with_suffix(".md").read_text() and file.with_suffix(".png").stat().st_size > 10_000
    assert "not measured" in capsys.readouterr().out


def test_the_tool_on_a_folder_asks_its_manifest(tmp_path: Path) -> None:
    record(tmp_path, "0", seconds=0.9)
    manifest = write_manifest(tmp_path / "m.jsonl", [line("0.wav"), line("0.wav", task="tts")])
    folder, file = make_served_folder(tmp_path / "model"), tmp_path / "latency.json"
    options = ["--manifest", str(manifest), "--codec", "--batches", "2", "--frames", "4", "--json", str(file)]
    assert measure_latency.main([str(folder), "--device", "cpu", *options]) == 0
    found = json.loads(file.read_text())
    assert [row["codec"] for row in found["rows"]] == ["", "spectral"]
    assert {one["task"] for one in found["latencies"] if one["whence"] == "answers"} == {"asr-en", "tts-en"}


def test_sessions_that_do_not_fit_are_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def starved(*_: object, batch_size: int, **options: object) -> Timed:
        if batch_size > 1:
            raise torch.OutOfMemoryError
        return TIMED

    def asked(self: Evaluator, *_: object, batch_size: int) -> dict:
        assert batch_size == 1, "the memory is full again"
        return {}

    monkeypatch.setattr(sessions_run, "time_frames", starved)
    monkeypatch.setattr(Evaluator, "latencies", asked)
    record(tmp_path, "0", seconds=0.9)
    manifest = write_manifest(tmp_path / "m.jsonl", [line("0.wav")])
    options = ["--manifest", str(manifest), "--batches", "1,2", "--device", "cpu"]
    assert measure_latency.main([str(make_served_folder(tmp_path / "model")), *options]) == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["tiny", "--batches", "0"], "--batches 0: "),
        (["tiny", "--batches", "1", "--frames", "0"], "--frames 0: "),
        (["tiny", "--batches", "1", "--frames", "2", "--json", "/proc/x/y.json"], "/proc/x"),
        (["8c"], "8c: there is no such folder, and no such preset; presets: tiny"),
        (["tiny", "--batches", "1;2"], "--batches 1;2: write numbers with commas"),
        (["tiny", "--manifest", "m.jsonl", "--batches", "1", "--frames", "2"], "random weights give no answers"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert measure_latency.main([*arguments, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err
