"""Ask a model what manifests hold, and score its answers.

    python tools/evaluate.py MODEL MANIFEST ... [--task asr-en] [--judge en=COMMAND] [--output DIR] [--json F]
    python tools/evaluate.py RUN MANIFEST ... --follow

MODEL is a converted folder, a native checkpoint, or the directory of a run, whose newest checkpoint is taken. Every
answer goes to DIR/answers.jsonl, what cannot be asked to DIR/rejected.jsonl, what is said to DIR/spoken. COMMAND hears
it: it gets paths of wavs on its standard input and prints a line of text for each. It is asked about speech of the
language before the "=", or else about all, with `{language}` in it replaced.

With --follow, each checkpoint is evaluated as the run writes it, here or on another machine that sees its directory:
figures go to RUN/evaluation.jsonl and TensorBoard, files to RUN/evaluation/step_.... Ends with the run's last step.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

EVALUATION, RECORDS, TENSORBOARD = "evaluation", "evaluation.jsonl", "tensorboard"
ALL_STEPS = sys.maxsize


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    options = _parse(arguments)
    warnings.filterwarnings("ignore")
    try:
        _follow(options) if options.follow else _once(options)
    except (ValueError, ImportError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path)
    add("manifests", metavar="MANIFEST", nargs="+")
    add("--task", default="", help="only this one (asr-en, st-ja-en); that of lines which name none")
    add("--format", default="nemo", help="of the manifests: nemo, moshi, lhotse or folder (default nemo)")
    add("--batch", type=int, default=60, help="sessions at once (default 60)")
    add("--latency", type=int, default=8, metavar="N", help="of each task, asked one at a time and timed (default 8)")
    add("--judge", action="append", default=[], metavar="[LANGUAGE=]COMMAND", help="hears what is said")
    add("--output", type=Path, metavar="DIR", help="default runs/evaluation/NAME of the model")
    add("--json", type=Path, metavar="F", help="the figures")
    add("--device", default="auto")
    add("--dtype", choices=("fp32", "bf16"), help="default bf16 on an accelerator, fp32 on a CPU")
    add("--follow", action="store_true", help="evaluate each checkpoint of the run as it comes")
    add("--scratch", type=Path, metavar="DIR", help="holds the converted checkpoint for a while")
    return parser.parse_args(arguments)


def _once(options: argparse.Namespace) -> None:
    result = _evaluate(options.model, options, folder=options.output or Path("runs", EVALUATION, options.model.name))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _follow(options: argparse.Namespace) -> None:
    from torch.utils.tensorboard import SummaryWriter

    from megaspeech.checkpoint.folders import step_of
    from megaspeech.conversion.served import new_checkpoints
    from megaspeech.streaming.results_table import scalars_of
    from megaspeech.training.record_file import RecordFile

    run, complain = options.model, lambda text: print(text, file=sys.stderr)
    run.mkdir(parents=True, exist_ok=True)
    records = RecordFile(run / RECORDS, step=ALL_STEPS, complain=complain)
    done = [json.loads(line)["step"] for line in records.path.open()] if records.path.is_file() else []
    # A folder of its own: TensorBoard takes the files of one folder for those of one writer.
    with SummaryWriter(str(run / TENSORBOARD / EVALUATION), flush_secs=10) as writer:
        for checkpoint in new_checkpoints(run, done=done):
            step = step_of(checkpoint)
            print(f"step {step}")
            try:
                result = _evaluate(checkpoint, options, folder=(options.output or run / EVALUATION) / checkpoint.name)
            except (ValueError, OSError) as error:
                if checkpoint.is_dir():
                    raise
                complain(f"step {step}: the run has removed it meanwhile ({error})")
                continue
            records.add({"step": step, "time": time.time(), **result})
            for name, value in scalars_of(result).items():
                writer.add_scalar(f"evaluation/{name}", value, step)


def _evaluate(model: Path, options: argparse.Namespace, *, folder: Path) -> dict[str, Any]:
    from rich.console import Console
    from tqdm import tqdm

    from megaspeech.conversion.served import converted
    from megaspeech.streaming.folder import open_folder
    from megaspeech.streaming.judging import judges_of
    from megaspeech.streaming.manifests import read_manifests
    from megaspeech.streaming.results import Settings, evaluate
    from megaspeech.streaming.results_table import table_of
    from megaspeech.streaming.runtime import place_of

    utterances, refused = read_manifests(options.manifests, format=options.format, task=options.task)
    device, dtype = place_of(options.device, dtype=options.dtype)
    with converted(model, scratch=options.scratch) as source:
        result = evaluate(
            open_folder(source, device=device, dtype=dtype),
            utterances,
            folder=folder,
            settings=Settings(batch_size=options.batch, num_timed=options.latency, judges=judges_of(options.judge)),
            refused=refused,
            watch=lambda steps, what: tqdm(steps, what),
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table_of(result))
    print(f"answers: {folder}/answers.jsonl")
    return result


if __name__ == "__main__":
    sys.exit(main())
