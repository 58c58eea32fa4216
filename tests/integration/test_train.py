"""Training as a user runs it: mistakes end in one message, a killed run goes on as if nothing had happened."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from launching import (
    STEPS,
    TIMEOUT,
    command,
    curve,
    environment,
    kill_family,
    train,
    wait_until,
    write_tiny_run,
)

from megaspeech.checkpoint.checksums import find_damage
from megaspeech.config import read_config
from megaspeech.data.tokenizer import train_tokenizer

KILL_AFTER = 7
SAVE_INTERVAL = 5


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `config.toml` and shards."""
    directory = tmp_path_factory.mktemp("train")
    write_tiny_run(directory, eval_interval=10, save_interval=SAVE_INTERVAL)
    return directory


@pytest.fixture(scope="module")
def single(home: Path) -> Path:
    """The run directory of 20 uninterrupted steps on one rank, with TensorBoard, its seed checkpoint saved."""
    # Nothing is removed, so that step 0 stays for other runs to start from.
    overrides = ["checkpoint.save_seed=true", "checkpoint.keep_last=9", "logging.tensorboard=true"]
    finished = train(*_arguments(home, run="single"), *overrides)
    assert finished.returncode == 0, finished.stderr
    return home / "single"


def _arguments(home: Path, *, run: str) -> tuple:
    return home / "config.toml", f"data.directory={home}/shards", f"run.directory={home}/{run}"


def _assert_one_message(finished: subprocess.CompletedProcess, *words: str) -> None:
    """One block "megaspeech.train: ..." with these words, before anything torchrun has to say; no trace of our code.

    What torchrun takes for the cause, and shows last, has the same words.
    """
    assert finished.returncode != 0
    assert finished.stderr.count("megaspeech.train: ") == 1, finished.stderr
    assert not re.search(r'File ".*megaspeech', finished.stderr), finished.stderr
    before, _, message = finished.stderr.partition("megaspeech.train: ")
    assert "Traceback" not in before and "ChildFailedError" not in before
    # torchrun's records start with a letter and a date (E1123 02:45:12.123456 ...) or are its own traceback.
    block = re.split(r"^(?:[EWI]\d{4} |Traceback|\[rank)", message, flags=re.MULTILINE)[0]
    cause = finished.stderr.split("Root Cause")[1]
    for word in words:
        assert word in block and word in cause


def test_unknown_key(home: Path) -> None:
    finished = train(*_arguments(home, run="typo"), "training.train_step=5", "optimizer.lr=-1", ranks=2)
    _assert_one_message(finished, "2 faults", "training.train_step: no such key; did you mean 'train_steps'?", "lr: -1")
    assert not (home / "typo").exists()


def test_missing_config(home: Path) -> None:
    _assert_one_message(train(home / "absent.toml"), "absent.toml", "there is no such file")


def test_layout_that_does_not_divide_the_ranks(home: Path) -> None:
    finished = train(*_arguments(home, run="three"), "parallel.tensor_model_parallel_size=2", ranks=3)
    _assert_one_message(finished, "tensor 2 x pipeline 1", "3 launched", "--nproc-per-node")


def test_megatron_fsdp_is_refused_where_it_would_corrupt_memory(home: Path) -> None:
    finished = train(*_arguments(home, run="no_gpu"), "parallel.data_parallel=megatron_fsdp", ranks=2)
    _assert_one_message(finished, "megatron_fsdp", "needs a GPU", 'use "fsdp2"')


def test_missing_shards(home: Path) -> None:
    finished = train(*_arguments(home, run="bare"), f"data.directory={home}/nowhere", ranks=2)
    _assert_one_message(finished, "data.mixture", f"{home}/nowhere/train/asr-en", "prepare_data.py")


def test_training_lowers_the_loss_and_keeps_its_records(single: Path) -> None:
    records = curve(single)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert records[-1]["loss"] < 0.9 * records[0]["loss"]
    # Linear warm-up over 5 steps from 0, then cosine down.
    assert records[0]["learning_rate"] == 0
    assert max(record["learning_rate"] for record in records) == pytest.approx(3e-3, rel=0.02)
    for record in records:
        assert record["x_real_time"] == pytest.approx(record["frames_per_second"] / 12.5) and record["grad_norm"] > 0
    assert read_config(single / "config.toml").training.train_steps == STEPS
    kinds = {line.split('"')[3] for line in (single / "metrics.jsonl").read_text().splitlines()}
    assert kinds == {"train", "valid/asr-en", "valid/tts-en"}


def test_tensorboard_holds_the_curves(single: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(single / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"train/loss", "train/accuracy/text", "train/frames_per_second", "valid/asr-en/loss"} <= set(tags)
    shown = events.Scalars("train/loss")
    assert [event.step for event in shown] == list(range(1, STEPS + 1))
    assert [event.value for event in shown] == pytest.approx([record["loss"] for record in curve(single)], rel=1e-6)


def test_killed_run_goes_on(home: Path, single: Path) -> None:
    run, arguments = home / "killed", command(*_arguments(home, run="killed"))
    seed = f"checkpoint.seed_checkpoint={single}/checkpoints/step_00000000"
    metrics = run / "metrics.jsonl"
    with subprocess.Popen([*arguments, seed], env=environment(), stdout=-3, stderr=-3) as process:
        wait_until(lambda: metrics.is_file() and len(curve(run)) >= KILL_AFTER, process=process)
        kill_family(process)
    before = curve(run)
    assert KILL_AFTER <= len(before) < STEPS
    with metrics.open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "st')  # cut short by the kill
    # What a kill in the middle of a save leaves behind, newer than every whole checkpoint.
    torn = run / "checkpoints" / f"step_{STEPS - 1:08d}.part"
    torn.mkdir()
    (torn / "config.toml").write_text("torn")

    finished = subprocess.run([*arguments, seed], env=environment(), capture_output=True, text=True, timeout=TIMEOUT)
    assert finished.returncode == 0, finished.stderr
    (resumed,) = map(int, re.findall(r"going on at step (\d+) from", finished.stdout))
    assert resumed in range(SAVE_INTERVAL, len(before) + 1, SAVE_INTERVAL)
    assert "starting from the weights" not in finished.stdout
    _assert_every_step_once(run)
    _assert_same_course(curve(run), single, tolerance=1e-6)
    _assert_same_course(before, single, tolerance=1e-6)
    kept = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    assert kept == ["step_00000015", "step_00000020"]
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000020"


def _assert_every_step_once(run: Path) -> None:
    """No record twice, though steps after the last checkpoint were done twice."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    steps = [(record["kind"], record["step"]) for record in records]
    expected = [("train", step) for step in range(1, STEPS + 1)]
    expected += [(kind, step) for kind in ("valid/asr-en", "valid/tts-en") for step in (10, 20)]
    assert sorted(steps) == expected


def _assert_same_course(records: list[dict], reference: Path, *, tolerance: float) -> None:
    expected = {record["step"]: record for record in curve(reference)}
    for record in records:
        for key in ("loss", "text_loss", "audio_loss", "grad_norm", "learning_rate", "loss/codebook_3"):
            wanted = expected[record["step"]][key]
            assert record[key] == pytest.approx(wanted, rel=tolerance), f"step {record['step']}, {key}"


def test_goes_on_with_another_layout(home: Path, single: Path) -> None:
    seed = f"checkpoint.seed_checkpoint={single}/checkpoints/step_00000000"
    spread = [
        "parallel.tensor_model_parallel_size=2",
        "parallel.pipeline_model_parallel_size=2",
        "parallel.sequence_parallel=true",
        "training.exit_step=10",
    ]
    arguments = (*_arguments(home, run="moved"), seed)
    first = train(*arguments, *spread, ranks=4)
    assert first.returncode == 0, first.stderr
    assert len(curve(home / "moved")) == 10
    second = train(*arguments, ranks=2)
    assert second.returncode == 0, second.stderr
    assert "going on at step 10" in second.stdout and "data 2" in second.stdout
    records = curve(home / "moved")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    _assert_same_course(records, single, tolerance=1e-5)


def test_finished_run_has_nothing_left_to_do(home: Path, single: Path) -> None:
    before = len(curve(single))
    finished = train(*_arguments(home, run="single"))
    assert finished.returncode == 0 and len(curve(single)) == before


@pytest.mark.parametrize(
    "override, words",
    [
        ("temporal.ffn_hidden_size=88", ("temporal.ffn_hidden_size", "176", "88")),
        ("streams.delays=[0,0,1,2,2,0,1,1,1]", ("streams.delays", "(0, 0, 1, 2, 2, 0, 1, 1, 1)")),
    ],
)
def test_checkpoint_of_another_shape_is_refused(home: Path, single: Path, override: str, words: tuple) -> None:
    seed = f"checkpoint.seed_checkpoint={single}/checkpoints/step_00000000"
    finished = train(*_arguments(home, run="other"), seed, override)
    _assert_one_message(finished, *words)


def test_seed_checkpoint_that_is_not_there(home: Path, single: Path) -> None:
    finished = train(*_arguments(home, run="lost"), "checkpoint.seed_checkpoint=nowhere/step_00000000")
    _assert_one_message(finished, "there is no checkpoint at nowhere/step_00000000")


def test_damaged_seed_checkpoint(home: Path, single: Path, tmp_path: Path) -> None:
    torn = tmp_path / "step_00000000"
    shutil.copytree(single / "checkpoints" / "step_00000000", torn)
    next(torn.glob("*.distcp")).unlink()
    finished = train(*_arguments(home, run="torn"), f"checkpoint.seed_checkpoint={torn}")
    _assert_one_message(finished, f"checkpoint {torn} is damaged", "distcp is missing")


def test_shards_of_another_codec_are_refused(home: Path) -> None:
    pytest.importorskip("faiss")
    from megaspeech.codecs import SpectralCodec, SpectralConfig

    noise = np.random.default_rng(0).normal(0, 0.1, (2, 64_000)).astype(np.float32)
    codec = SpectralCodec.fit(noise, config=SpectralConfig(num_codebooks=4, cardinality=32, latent_dim=24))
    codec.save(home / "codec")
    stages = "parallel.pipeline_model_parallel_size=2"  # the last of which opens the codec for all
    finished = train(*_arguments(home, run="foreign"), f"codec.path={home}/codec", stages, ranks=2)
    named = f"their codec_fingerprint is none, that of codec.path = {home}/codec is {codec.fingerprint}"
    _assert_one_message(finished, "shards train/asr-en", named)


def test_shards_of_another_tokenizer_are_refused(home: Path) -> None:
    tokenizer = train_tokenizer(["zero one two three four five six seven"], vocabulary_size=48, languages=["en"])
    (home / "tokenizer.model").write_bytes(tokenizer.model)
    finished = train(*_arguments(home, run="foreign"), f"data.tokenizer={home}/tokenizer.model")
    _assert_one_message(finished, "train/asr-en", "their tokenizer_fingerprint is none", tokenizer.fingerprint)


def test_tokenizer_that_the_streams_do_not_hold_is_refused(home: Path) -> None:
    tokenizer = train_tokenizer(["zero one two three four five six seven"], vocabulary_size=40, languages=["en"])
    (home / "small.model").write_bytes(tokenizer.model)
    shutil.copytree(home / "shards", home / "small")
    for header in [*(home / "small").rglob("0*.json"), *(home / "small").rglob("catalogue.json")]:
        made_with = f'"tokenizer_fingerprint": "{tokenizer.fingerprint}"'
        header.write_text(header.read_text().replace('"tokenizer_fingerprint": "none"', made_with))
    changes = (f"data.tokenizer={home}/small.model", f"data.directory={home}/small")
    finished = train(*_arguments(home, run="small_run"), *changes, ranks=2)
    _assert_one_message(finished, "streams.text_cardinality = 48", "has 40 pieces")


def test_damaged_checkpoint_is_named_and_the_one_before_it_used(home: Path, single: Path) -> None:
    run = home / "damaged"
    seed = f"checkpoint.seed_checkpoint={single}/checkpoints/step_00000000"
    first = train(*_arguments(home, run="damaged"), seed, "training.exit_step=10")
    assert first.returncode == 0, first.stderr
    newest = run / "checkpoints" / "step_00000010"
    _flip(max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size))

    second = train(*_arguments(home, run="damaged"), seed, ranks=2)
    assert second.returncode == 0, second.stderr
    assert re.search(
        rf"skipping a damaged checkpoint, {newest}: __0_0.distcp is corrupt: its checksum is", second.stdout
    )
    assert "going on at step 5 from" in second.stdout and "starting from the weights" not in second.stdout
    _assert_every_step_once(run)
    _assert_same_course(curve(run), single, tolerance=1e-5)
    kept = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    assert kept == ["step_00000015", "step_00000020"] and find_damage(run / "checkpoints" / kept[0]) is None


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_some_steps_are_profiled_on_the_ranks_asked_for(home: Path) -> None:
    steps = ["logging.profile_step_start=2", "logging.profile_step_end=3", "logging.profile_ranks=[1]"]
    finished = train(
        *_arguments(home, run="profiled"), "training.exit_step=4", "checkpoint.save_interval=0", *steps, ranks=2
    )
    assert finished.returncode == 0, finished.stderr
    assert "profile of steps 2 to 3" in finished.stdout
    assert sorted(path.name for path in (home / "profiled/profile").iterdir()) == ["rank1.json.gz", "rank1.txt"]
    with gzip.open(home / "profiled/profile/rank1.json.gz") as trace:
        names = [event["name"] for event in json.load(trace)["traceEvents"]]
    assert "aten::scaled_dot_product_attention" in names and names.count("Optimizer.step#AdamW.step") == 2
    assert "aten::mm" in (home / "profiled/profile/rank1.txt").read_text()
