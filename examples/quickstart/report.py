"""What the user sees last: scores, latencies, a table, wav files and one picture."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import picture
import soundfile
import torch
from judge import DigitJudge
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from megaspeech.codecs.protocol import Codec
from megaspeech.config import Config
from megaspeech.data.whole_files import replacing
from megaspeech.model.counting import count_parameters
from megaspeech.preparation.encoding import encode_recordings
from megaspeech.preparation.manifests.nemo import read_manifest
from megaspeech.preparation.reading import recordings_of
from megaspeech.streaming.evaluation import Evaluated, Evaluator, first_of_each_task
from megaspeech.streaming.folder import open_folder
from megaspeech.streaming.scoring import Score, result_entries, score

AIMS = {
    "asr_en_wer": 0.05,
    "asr_ja_wer": 0.05,
    "st_ja_en_wer": 0.10,
    "st_en_ja_wer": 0.10,
}
LATENCY_UTTERANCES = 8


def evaluate(directory: Path, *, exported: Path) -> None:
    """Stream the held-out set through the runtime; writes answers.json, wav files and picture.png."""
    torch.set_num_threads(1)  # as it would be served, and small matrices gain nothing from a second one
    served = open_folder(exported)
    evaluator, codec = Evaluator(served), served.codec
    utterances = read_manifest(directory / "corpus" / "test.jsonl")
    codes, _ = encode_recordings(recordings_of(utterances), codec=codec)
    asked = evaluator.requests(utterances, codes)
    results = list(evaluator.answers(asked, progress=lambda batches: tqdm(batches, "batches of answers")))
    scores = _written_scores(results)
    judge = DigitJudge()
    scores.update(_spoken_scores(results, codes=codes, codec=codec, judge=judge))

    some = first_of_each_task(asked, LATENCY_UTTERANCES)
    latency = evaluator.latencies(some, progress=lambda items: tqdm(items, "sessions timed one by one"))
    _write_sound(results, directory / "spoken", sample_rate=codec.sample_rate)
    picture.draw(directory, results, codes=codes, codec=codec, tokenizer=served.tokenizer, timing=evaluator.timing)
    answers = {
        "scores": result_entries(scores),
        "latency_ms": {task.replace("-", "_"): value for task, value in latency.items()},
        "examples": [
            _example(result, sample_rate=codec.sample_rate, judge=judge) for result in first_of_each_task(results, 2)
        ],
    }
    _write_json(directory / "answers.json", answers)


def write(directory: Path, config: Config, *, seconds: dict[str, float], layout: str) -> None:
    """results.json, from what the stages left."""
    answers = json.loads((directory / "answers.json").read_text())
    records = map(json.loads, (Path(config.run.directory) / "metrics.jsonl").read_text().splitlines())
    curve = [record for record in records if record["kind"] == "train"]
    streams = [key.removeprefix("loss/") for key in curve[0] if key.startswith("loss/")]
    results = {
        **answers["scores"],
        "latency_ms": answers["latency_ms"],
        "train_seconds": round(sum(value for name, value in seconds.items() if name.startswith("training")), 1),
        "total_seconds": round(sum(seconds.values()), 1),
        "parameters": sum(count_parameters(config).values()),
        "layout": layout,
        "losses": {name: [curve[0].get(f"loss/{name}"), curve[-1].get(f"loss/{name}")] for name in streams},
        "stage_seconds": {name: round(value, 1) for name, value in seconds.items()},
        "examples": answers["examples"],
    }
    _write_json(directory / "results.json", results)


def show(results_file: Path) -> None:
    """The table in the terminal."""
    results, console = json.loads(results_file.read_text()), Console()
    heard = Table(title="What the model heard and said (held-out strings, held-out voices)")
    for column in ("task", "as it should be", "what the model wrote", "what it was heard to say"):
        heard.add_column(column)
    for example in results["examples"]:
        heard.add_row(example["task"], example["reference"], example["written"], example.get("spoken", ""))
    console.print(heard)

    rates = Table(title="Word error rate")
    for column in ("task", "measured", "aim"):
        rates.add_column(column, justify="left" if column == "task" else "right")
    for key in (key for key in results if key.endswith("_wer")):
        rates.add_row(key, _percent(results[key]), _aim(key, results))
    console.print(rates)

    delays = Table(title="Response latency in ms, one session at a time (aim: 500 in all)")
    for column in ("task", "median", "p99", "task delay", "acoustic delay", "compute"):
        delays.add_column(column, justify="left" if column == "task" else "right")
    for task, value in results["latency_ms"].items():
        if value["median"] is not None:
            parts = [f"{value['median_parts'][part]:.0f}" for part in ("task_delay", "acoustic_delay", "compute")]
            delays.add_row(task, f"{value['median']:.0f}", f"{value['p99']:.0f}", *parts)
    console.print(delays)
    print(
        f"{results['parameters']:,} parameters; "
        f"trained {results['train_seconds'] / 60:.1f} min on {results['layout']}; "
        f"{results['total_seconds'] / 60:.1f} min in all\n"
        f"listen: {results_file.parent}/spoken/*.wav   look: {results_file.parent}/picture.png   "
        f"all figures: {results_file}"
    )


def _written_scores(results: list[Evaluated]) -> dict[str, Score]:
    """Of the text stream, for the tasks whose answer is text."""
    by_task = defaultdict(list)
    for result in results:
        if not result.utterance.task.speaks:
            by_task[result.utterance.task].append(result)
    return {task.key: _score(group, [result.text for result in group]) for task, group in by_task.items()}


def _spoken_scores(
    results: list[Evaluated], *, codes: dict[Path, np.ndarray], codec: Codec, judge: DigitJudge
) -> dict[str, Score]:
    """Of English speech, by the judge; `codec-en` is the codec's own round trip of the strings that tts says."""
    scores = {}
    for task in ("tts-en", "s2st-ja-en"):
        spoken = [result for result in results if result.utterance.task.key == task]
        scores[task] = _score(spoken, [" ".join(judge(result.waveform_N, codec.sample_rate)) for result in spoken])
        if task == "tts-en":
            trips = [codec.decode(torch.from_numpy(codes[result.utterance.spoken])[None])[0] for result in spoken]
            scores["codec-en"] = _score(spoken, [" ".join(judge(trip.numpy(), codec.sample_rate)) for trip in trips])
    return scores


def _score(results: list[Evaluated], texts: list[str]) -> Score:
    """Of one task's answers."""
    return score([result.reference for result in results], texts, language=results[0].utterance.task.target)


def _example(result: Evaluated, *, sample_rate: int, judge: DigitJudge) -> dict[str, str]:
    task = result.utterance.task
    example = {"task": task.key, "reference": result.reference, "written": result.text}
    if task.speaks and task.target == "en":
        example["spoken"] = " ".join(judge(result.waveform_N, sample_rate))
    return example


def _write_sound(results: list[Evaluated], directory: Path, *, sample_rate: int) -> None:
    """The first few spoken answers of each task, named by what they should say."""
    directory.mkdir(exist_ok=True)
    spoken = [result for result in results if result.waveform_N is not None]
    for result in first_of_each_task(spoken, 5):
        name = f"{result.utterance.task.key}-{result.reference.replace(' ', '-')}.wav"
        soundfile.write(directory / name, np.asarray(result.waveform_N), sample_rate)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _aim(key: str, results: dict) -> str:
    if key in AIMS:
        return f"at most {100 * AIMS[key]:.0f}%"
    if key == "tts_en_wer":
        return f"at most {100 * (results['codec_en_wer'] + 0.10):.1f}% (the codec's + 10 points)"
    return "(bounds speech)" if key.startswith("codec") else "(reported)"


def _write_json(path: Path, values: dict) -> None:
    with replacing(path) as aside:
        aside.write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")
