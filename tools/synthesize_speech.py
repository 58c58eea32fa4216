"""Text to speech: audio and NeMo manifests with word times, of any text file.

    python tools/synthesize_speech.py TEXT.txt --lang ja --output DIR [--voices 100] [--tasks tts,asr] [--array 0/16]

TEXT.txt holds an utterance a line; TEXT.jsonl objects with `text` and, if they like, `lang` and `speaker`. English is
spoken by espeak-ng, Japanese by Open JTalk. What they cannot speak is set aside with its reason. A killed run goes on
where it was and ends with the same bytes; a Slurm array shares the work without more ado. Then, in a config:

    [[sources]]
    name = "synthetic-ja"
    train = "DIR/*/manifest.jsonl"
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from megaspeech.preparation.job_array import share_of
from megaspeech.preparation.synthesis.from_text import SpeechSettings, Summary, TextToSpeech


def main() -> int:
    """Run; 0 where something was spoken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help=".txt or .jsonl, UTF-8")
    parser.add_argument("--lang", required=True, help="en or ja, of lines that name none themselves")
    parser.add_argument("--output", type=Path, required=True, help="a folder of its own; all machines share it")
    parser.add_argument("--voices", default="100", help="how many to draw, or labels such as en-us+f2,mei*0.86-7")
    parser.add_argument("--tasks", default="tts", help="of the manifest's lines: tts, asr or tts,asr")
    parser.add_argument("--seed", type=int, default=0, help="of who says what, how fast and how high")
    parser.add_argument("--sample-rate", type=int, default=24000, help="Hz")
    parser.add_argument("--audio", default="flac", help="or wav")
    parser.add_argument("--lines-per-unit", type=int, default=0, help="of one tar: 5000, fewer of a short text")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--array", metavar="I/N", help="do every N-th unit, from I on (0 <= I < N)")
    arguments = parser.parse_args()
    try:
        task, num_tasks = share_of(arguments.array, os.environ)
        settings = SpeechSettings(
            language=arguments.lang,
            voices=arguments.voices,
            seed=arguments.seed,
            tasks=tuple(arguments.tasks.split(",")),
            sample_rate=arguments.sample_rate,
            audio=arguments.audio,
            lines_per_unit=arguments.lines_per_unit,
        )
        speech = TextToSpeech(arguments.text, arguments.output, settings=settings)
        units = speech.make(processes=arguments.processes, task=task, num_tasks=num_tasks)
        for _ in tqdm(units, "units", len(range(task, speech.num_units, num_tasks))):
            pass
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        print(f"synthesize_speech: {error}", file=sys.stderr)
        return 1
    summary, missing = speech.summary()
    _report(summary, missing=missing, output=arguments.output)
    return 0 if summary.num_utterances else 1


def _report(summary: Summary, *, missing: int, output: Path) -> None:
    table = Table(title=f"{output}" + (f" ({missing:,} units are still to be made)" if missing else ""))
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("utterances", f"{summary.num_utterances:,}")
    table.add_row("hours", f"{summary.seconds / 3600:,.2f}")
    if summary.seconds:
        table.add_row("MB an hour", f"{summary.num_bytes / summary.seconds * 3600 / 1e6:,.0f}")
    for reason, count in summary.rejected.most_common():
        table.add_row(f"rejected: {reason}", f"{count:,}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
