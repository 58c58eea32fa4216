"""The quickstart: speech -> codes -> training on every kind of parallelism -> the moshi runtime -> answers, scored.

    python examples/quickstart/run.py [section.field=value ...]

The overrides are those of config.toml, and `corpus.key=value` for the settings in script.py.

Every stage leaves its result in runs/quickstart and is not done again: killed at any moment and started again, it goes
on where it was. Trains first on 4 CPU ranks (tensor 2 x pipeline 2 with sequence parallelism), then loads that
checkpoint on 2 data parallel ranks, which two cores run faster.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from megaspeech.data.whole_files import replacing

HERE = Path(__file__).resolve().parent
TOOLS = HERE.parents[1] / "tools"
PIPELINED_STEPS = 25
LAYOUTS = (
    (
        "tensor 2 x pipeline 2 with sequence parallelism",
        4,
        (
            "parallel.tensor_model_parallel_size=2",
            "parallel.pipeline_model_parallel_size=2",
            "parallel.sequence_parallel=true",
            f"training.exit_step={PIPELINED_STEPS}",
        ),
    ),
    ("data 2", 2, ()),
)
"""(name, ranks, overrides), one after the other from one checkpoint to the next."""


class Stages:
    """Runs stages in order and keeps how long each took, over restarts too."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "stages.json"
        self.seconds: dict[str, float] = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def run(self, name: str, work: Callable[[], None], *, done: bool = False) -> None:
        """Do `work` unless its result is there already; announce it and write down its time."""
        if done:
            print(f"\n== {name}: already there ({self.seconds.get(name, 0.0):.0f} s)", flush=True)
            return
        print(f"\n== {name}", flush=True)
        started, before = time.perf_counter(), self.seconds.get(name, 0.0)
        try:
            work()
        finally:
            self.seconds[name] = before + time.perf_counter() - started
            with replacing(self.path) as aside:
                aside.write_text(json.dumps(self.seconds, indent=1))
        print(f"   {name}: {self.seconds[name]:.0f} s", flush=True)


def main(overrides: list[str]) -> int:
    """Run all stages; returns the exit status."""
    if {"-h", "--help"} & set(overrides):
        print(__doc__)
        return 0
    warnings.filterwarnings("ignore")
    from megaspeech.config import read_config

    settings = [override.removeprefix("corpus.") for override in overrides if override.startswith("corpus.")]
    overrides = [override for override in overrides if not override.startswith("corpus.")]
    try:
        config = read_config(HERE / "config.toml", overrides)
        directory = Path(config.run.directory).parent
        directory.mkdir(parents=True, exist_ok=True)
        _run(config, directory, overrides, settings=settings)
    except (ValueError, ImportError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(
            f"quickstart: {' '.join(map(str, error.cmd[:8]))} ... failed, see above; fix it and start again",
            file=sys.stderr,
        )
        return 1
    return 0


def _run(config, directory: Path, overrides: list[str], *, settings: list[str]) -> None:
    import report

    from megaspeech.checkpoint.store import CheckpointStore

    stages, corpus = Stages(directory), directory / "corpus"
    stages.run(
        "corpus: spoken digits, synthesised",
        lambda: _command(HERE / "corpus.py", corpus, *settings),
        done=(corpus / "corpus.json").is_file(),
    )
    manifests = [f"sources.digits.{split}={corpus / split}.jsonl" for split in ("train", "valid")]
    stages.run(
        "codec, tokenizer and shards",
        lambda: _command(
            TOOLS / "prepare_data.py", HERE / "config.toml", *manifests, *overrides, threads=os.cpu_count()
        ),
        done=(Path(config.data.directory) / "rejected.jsonl").is_file(),
    )
    store = CheckpointStore(Path(config.run.directory) / "checkpoints", config=config)
    steps = config.training.train_steps
    for place, (name, ranks, layout) in enumerate(LAYOUTS):
        goal = steps if place == len(LAYOUTS) - 1 else min(PIPELINED_STEPS, steps)
        stages.run(
            f"training on {name}",
            lambda ranks=ranks, layout=layout: _train([*overrides, *layout], ranks=ranks),
            done=store.latest_step() >= goal,
        )
    exported = directory / "moshi"
    stages.run(
        "conversion to moshi",
        lambda: _command(
            TOOLS / "convert_checkpoint.py", "--from", "native", "--to", "moshi", store.latest(), exported
        ),
        done=(exported / "config.json").is_file(),
    )
    results = directory / "results.json"
    stages.run(
        "streaming on the moshi runtime",
        lambda: report.evaluate(directory, exported=exported),
        done=(directory / "answers.json").is_file(),
    )
    report.write(directory, config, seconds=stages.seconds, layout=", then ".join(name for name, *_ in LAYOUTS))
    report.show(results)


def _train(overrides: list[str], *, ranks: int) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    _command(*launcher[1:], "-m", "megaspeech.train", HERE / "config.toml", *overrides)


def _command(*arguments: object, threads: int | None = 1) -> None:
    """Run Python; several processes at once get one thread each, or they would spin against each other on few cores."""
    from megaspeech.parallel.lifeline import end_with_parent

    environment = {**os.environ, "OMP_NUM_THREADS": str(threads or 1)}
    subprocess.run([sys.executable, *map(str, arguments)], check=True, env=environment, preexec_fn=end_with_parent)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
