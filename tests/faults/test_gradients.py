"""Gradients that are not finite and spikes: replayed, then skipped, named by sample, and at last the run stops."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import STEPS, course
from launching import curve, train

from megaspeech.config import read_config
from megaspeech.config.schema import TrainingSection
from megaspeech.data.mixture import TrainBatches
from megaspeech.training.refusal import LONGEST_HISTORY, SHORTEST_HISTORY, GradientHistory

INJECTING = (str(Path(__file__).parent / "injecting.py"),)


def _refusals(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "skipped_steps.jsonl").read_text().splitlines()]


def _batches(arguments: tuple, *, dp_rank: int) -> TrainBatches:
    config, *overrides = arguments
    return TrainBatches(read_config(config, overrides), dp_rank=dp_rank, dp_size=2)


def test_replayed_skipped_and_named(arguments: Callable, run_directory: Callable, reference: list[tuple]) -> None:
    """One rank of two: NaN once at step 5; NaN for a given sample as often as it comes; a spike at step 30."""
    other = _batches(arguments("nan"), dp_rank=1)
    sample = other.sample_ids(14)[0][0]
    hit = [step + 1 for step in range(STEPS) if any(sample in ids for ids in other.sample_ids(step))]
    assert 15 in hit and not {5, 30} & set(hit)
    faults = [
        {"what": "nan", "step": 5, "rank": 1, "times": 1},
        {"what": "nan", "sample": sample, "rank": 1},
        {"what": "spike", "step": 30, "rank": 0},
    ]
    finished = train(
        *arguments("nan"),
        "training.spike_factor=20",
        ranks=2,
        variables={"INJECT": json.dumps(faults)},
        entry=INJECTING,
    )
    assert finished.returncode == 0, finished.stderr

    run, by_step = run_directory("nan"), {}
    for refusal in _refusals(run):
        by_step[refusal["step"]] = refusal
        assert f"step {refusal['step']:>6}  {refusal['reason']}; {refusal['action']}" in finished.stdout
    assert sorted(by_step) == sorted([5, *hit, 30])
    assert by_step[5]["action"] == "replayed" and sorted(by_step[5]["samples"]) == sorted(other.sample_ids(4)[1])
    assert by_step[15]["action"] == "skipped" and sample in by_step[15]["samples"]
    assert len(by_step[15]["samples"]) == 2 and by_step[15]["grad_norm"] is None
    assert by_step[30]["action"] == "skipped" and "times the usual" in by_step[30]["reason"]
    assert sorted(by_step[30]["samples"]) == sorted(other.all_sample_ids(29))

    # A replayed step is as if nothing had been, a skipped one leaves the weights as they were: the next goes on.
    assert course(run)[: hit[0] - 1] == reference[: hit[0] - 1]
    records = curve(run)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    skipped = {*hit}
    assert all(math.isfinite(record["loss"]) is (record["step"] not in skipped) for record in records)
    assert records[-1]["loss"] < 0.9 * records[0]["loss"]
    assert [record["learning_rate"] for record in records] == [step[5] for step in reference]


def test_last_stage_alone_and_then_too_many(arguments: Callable, run_directory: Callable) -> None:
    """Of a pipeline the last stage's gradient alone is NaN: both stages refuse it, and both stop after three."""
    faults = [{"what": "gradient", "step": 7, "on": True, "rank": 1}]
    finished = train(
        *arguments("diverged"),
        "parallel.pipeline_model_parallel_size=2",
        "training.max_skipped_steps=3",
        "checkpoint.save_interval=4",
        ranks=2,
        variables={"INJECT": json.dumps(faults)},
        entry=INJECTING,
    )
    assert finished.returncode == 1
    run = run_directory("diverged")
    assert [(refusal["step"], refusal["action"]) for refusal in _refusals(run)] == [
        (7, "skipped"),
        (8, "skipped"),
        (9, "skipped"),
    ]
    whole_batch = sorted(_batches(arguments("diverged"), dp_rank=0).all_sample_ids(8))
    assert _refusals(run)[-1]["samples"] == whole_batch
    said, last = finished.stderr.split("megaspeech.train: ")[1], finished.stderr.split("Root Cause")[1]
    for text in (said, last):
        assert "training.max_skipped_steps: 3 steps in a row had to be skipped, up to step 9" in text
        assert f"The last good checkpoint is {run}/checkpoints/step_00000008" in text
        assert ", ".join(whole_batch[:8]) in text and 'megaspeech/training/trainer.py"' not in text
    assert finished.stderr.count("megaspeech.train: ") == 1


def test_history() -> None:
    history = GradientHistory(TrainingSection(spike_factor=3.0, max_skipped_steps=2))
    for _ in range(SHORTEST_HISTORY - 1):
        assert history.fault(1e9) is None  # too few to tell
        history.use(2.0)
    history.use(2.0)
    assert history.fault(5.9) is None and "3.1 times the usual 2" in history.fault(6.2)
    assert history.fault(math.nan) and history.fault(math.inf)
    assert [history.skip(), history.skip()] == [False, True]
    again = GradientHistory(history.section)
    again.load_state(copy.deepcopy(history.state()))
    assert again.fault(6.2) == history.fault(6.2) and again.num_skipped == 2
    for _ in range(LONGEST_HISTORY):
        history.use(8.0)
    assert history.num_skipped == 0 and history.fault(6.2) is None and len(history.norms) == LONGEST_HISTORY
    assert GradientHistory(TrainingSection()).fault(1e30) is None


@pytest.fixture
def host() -> Iterator[None]:
    from megaspeech.parallel import groups

    yield
    groups.shut_down()


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_skipping_leaves_weights_and_moments(arguments: Callable, host: None, dtype: str, distributed: bool) -> None:
    from megaspeech.parallel import groups
    from megaspeech.parallel.watchdog import Watchdog
    from megaspeech.training.signals import StopSignals
    from megaspeech.training.trainer import Trainer

    path, *overrides = arguments(f"moments-{dtype}-{distributed}")
    chosen = [f"precision.recipe={dtype}", f"parallel.use_distributed_optimizer={str(distributed).lower()}"]
    config = read_config(path, [*overrides, *chosen])
    grid = groups.initialise(config.parallel, seed=1)
    watchdog = Watchdog(directory=config.run.directory, timeout=600)
    trainer = Trainer(config, grid=grid, signals=StopSignals(), watchdog=watchdog)
    trainer.journal.resume(0)
    for _ in range(3):
        trainer.train_step(trainer.batches(trainer.step))
        trainer.step += 1
    before = _weights_and_moments(trainer)
    run = partial(trainer._run, trainer.batches(3), forward_only=False)

    def spoiled() -> tuple:
        outcome = run()
        *_, parameter = trainer.wrapped.chunks[-1].parameters()
        parameter.main_grad[0] = math.inf
        return outcome

    trainer.guarded(3, spoiled)
    after = _weights_and_moments(trainer)
    assert before.keys() == after.keys() and len(before) > 10
    assert all(torch.equal(before[name], after[name]) for name in before)
    trainer.guarded(4, run)
    used = _weights_and_moments(trainer)
    assert all(torch.isfinite(value).all() for value in used.values())
    assert sum(not torch.equal(before[name], used[name]) for name in before) > len(before) / 2


def _weights_and_moments(trainer: object) -> dict[str, torch.Tensor]:
    """Copies of all that an optimizer step changes, by name."""
    values = dict(trainer.wrapped.chunks[0].named_parameters())
    for part, optimizer in enumerate(trainer.wrapped.optimizer.chained_optimizers):
        for place, state in enumerate(optimizer.optimizer.state.values()):
            values |= {f"{part}/{place}/{key}": value for key, value in state.items() if torch.is_tensor(value)}
    return {name: value.detach().clone() for name, value in values.items()}
