"""The quickstart's speech: English and Japanese digit strings, made here, with held-out strings and held-out voices.

    python examples/quickstart/corpus.py OUT_DIR [key=value ...]        keys: see CorpusSettings in script.py

writes OUT_DIR/wav/*.wav (16 kHz, 16 bit), train.jsonl, valid.jsonl, test.jsonl (NeMo JSONL, see
megaspeech/preparation/manifests/nemo.py) and, as the proof that all is there, corpus.json. What to say is drawn in
script.py and made here by a few processes, each with clips and an order of its own, so that a seed gives the same
samples again.
"""

import dataclasses
import difflib
import functools
import io
import json
import multiprocessing
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import soundfile
from script import OWN_VOICE, SPOKEN, WRITTEN, Clip, CorpusSettings, draw_clips
from tqdm import tqdm

from megaspeech.preparation.synthesis.speech import Speech, Voice, lay
from megaspeech.preparation.synthesis.words import speak

SAMPLE_RATE = 16000  # Hz

RECIPE = 2  # raised when the same settings make another corpus, so that an old one is made anew
GROUP = 20  # clips a process makes between two steps of the progress bar
OWN_PEAK = {"en": 0.9, "ja": 0.5}  # fixed gains, which bring both to like loudness
ANSWER_DELAY = (
    0.24  # s from the end of a word heard to its translation: the three frames of the quickstart's task delay
)
OWN_GAP = 0.12  # s at least between two words of the model's; the judge wants them apart
ANSWER_GAP = 0.02  # s likewise in an answer, which must keep up with what is heard
FRAME = 0.08  # s; the model's words begin on a codec frame


def _pad(speech: Speech, *, lead: float, length: float) -> Speech:
    """Put the first word's sound at `lead` seconds and bring the whole to at least `length` seconds."""
    placed = lay([speech], starts=[lead])
    missing = round(length * SAMPLE_RATE) - len(placed.samples)
    return dataclasses.replace(placed, samples=np.pad(placed.samples, (0, max(0, missing))))


@functools.cache
def _own_word(word: str, language: str) -> Speech:
    """A word alone in the model's voice."""
    return speak([word], voice=OWN_VOICE[language], sample_rate=SAMPLE_RATE)


def _own_words(digits: str, *, language: str, earliest: Sequence[float], gap: float) -> Speech:
    """Digits in the model's voice, word by word, word i not before `earliest[i]` seconds, each from the start of a
    codec frame: so a word has one sequence of codes, whatever string it stands in, and is learned in minutes."""
    words, starts, free = [], [], 0.0
    for digit, soonest in zip(digits, earliest, strict=True):
        word = _own_word(SPOKEN[language][int(digit)], language)
        start = np.ceil(round(max(soonest, free) / FRAME, 6)) * FRAME
        words.append(word)
        starts.append(start)
        free = start + word.times[0][1] - word.times[0][0] + gap
    return lay(words, starts=starts)


def _say(clip: Clip) -> tuple[Speech, Speech | None]:
    """What is heard (or is the model's own) and, for a pair, the answer; faster and with shorter gaps until it fits."""
    if clip.kind == "own":
        speech = _own_words(clip.digits, language=clip.language, earliest=[0.0] * len(clip.digits), gap=OWN_GAP)
        return _pad(speech, lead=0.0, length=min(speech.times[-1][1] + clip.trail, clip.longest)), None
    for hurry in (1.0, 1.15, 1.3, 1.5, 1.75):
        words = [SPOKEN[clip.language][int(digit)] for digit in clip.digits]
        gaps = [gap / hurry for gap in clip.gaps]
        speech = speak(
            words, voice=clip.voice, pace=clip.pace * hurry, pitch=clip.pitch, gaps=gaps, sample_rate=SAMPLE_RATE
        )
        speech = lay([speech], starts=[clip.lead])
        answer = None
        if clip.kind == "pair":
            soonest = [end + ANSWER_DELAY for _, end in speech.times]
            answer = _own_words(clip.digits, language="en", earliest=soonest, gap=ANSWER_GAP)
        length = max(speech.times[-1][1], answer.times[-1][1] if answer else 0.0) + clip.trail
        if length <= clip.longest:
            break
    else:
        raise ValueError(f"longest: {clip.digits!r} takes {length:.2f} s of {clip.longest} s; raise the setting")
    return _pad(speech, lead=speech.times[0][0], length=length), answer and _pad(
        answer, lead=answer.times[0][0], length=length
    )


def _noise(num_samples: int, *, pink: bool, seed: int) -> np.ndarray:
    """White or pink (1/f power) noise of power 1, float32 `[N]`."""
    length = -(-num_samples // SAMPLE_RATE) * SAMPLE_RATE  # whole seconds: a length of small factors has a fast FFT
    noise = np.random.default_rng(seed).standard_normal(length, dtype=np.float32)
    if pink:
        hertz = np.fft.rfftfreq(length, 1 / SAMPLE_RATE)
        noise = np.fft.irfft(np.fft.rfft(noise) / np.sqrt(np.maximum(hertz, 20.0)), length).astype(np.float32)
    return noise[:num_samples] / np.sqrt(np.mean(noise[:num_samples] ** 2))


def _finish(clip: Clip, speech: Speech) -> np.ndarray:
    """Level and noise of what is heard, float32 `[N]`."""
    samples = speech.samples
    if clip.snr is not None:
        rate = SAMPLE_RATE
        power = np.mean(np.concatenate([samples[int(a * rate) : int(b * rate)] for a, b in speech.times]) ** 2)
        noise = _noise(len(samples), pink=clip.pink, seed=clip.noise_seed)
        samples = samples + noise * np.sqrt(power) * 10 ** (-clip.snr / 20)
    return samples * (10 ** (clip.peak_db / 20) / np.abs(samples).max())


def _words(digits: str, *, language: str, times: Sequence[tuple[float, float]]) -> list[dict]:
    written = WRITTEN[language]
    return [
        {"word": written[int(d)], "start": round(a, 4), "end": round(b, 4)}
        for d, (a, b) in zip(digits, times, strict=True)
    ]


def _line(clip: Clip, task: str, *, target: str, num_samples: int, times: Sequence[tuple[float, float]]) -> dict:
    """A manifest line with the words of language `target`."""
    words = _words(clip.digits, language=target, times=times)
    return {
        "audio_filepath": f"wav/{clip.name}.wav",
        "duration": num_samples / SAMPLE_RATE,
        "taskname": task,
        "source_lang": clip.language,
        "target_lang": target,
        "text": " ".join(word["word"] for word in words),
        "words": words,
        "speaker": clip.voice.label,
    }


def _make_clip(clip: Clip, folder: Path) -> list[dict]:
    """Make a clip, write its wav(s) and return its manifest lines."""
    speech, answer = _say(clip)
    size, other = len(speech.samples), {"en": "ja", "ja": "en"}[clip.language]
    if clip.kind == "own":
        _write(folder / f"{clip.name}.wav", speech.samples * OWN_PEAK[clip.language])
        return [_line(clip, "tts", target=clip.language, num_samples=size, times=speech.times)]
    _write(folder / f"{clip.name}.wav", _finish(clip, speech))
    if answer is None:
        return [
            _line(clip, task, target=target, num_samples=size, times=speech.times)
            for task, target in (("asr", clip.language), ("st", other))
        ]
    _write(folder / f"{clip.name}-answer.wav", answer.samples * OWN_PEAK["en"])
    line = _line(clip, "s2st", target="en", num_samples=size, times=answer.times)
    line["target_audio_filepath"] = f"wav/{clip.name}-answer.wav"
    line["source_words"] = _words(clip.digits, language="ja", times=speech.times)
    return [line]


def _write(path: Path, samples: np.ndarray) -> None:
    wav = io.BytesIO()  # because soundfile waits for the disk after every file it writes: that took most of the time
    soundfile.write(wav, np.clip(samples, -1, 1), SAMPLE_RATE, format="WAV", subtype="PCM_16")
    path.write_bytes(wav.getvalue())


def _make_clips(clips: Sequence[Clip], folder: Path) -> dict[str, list[dict]]:
    return {clip.name: _make_clip(clip, folder) for clip in clips}


def _shares(clips: Sequence[Clip], num_shares: int) -> list[list[list[Clip]]]:
    """Per process its groups of clips, a group being one voice: its words are then synthesised in one process only."""
    by_voice: dict[Voice, list[Clip]] = defaultdict(list)
    for clip in clips:
        by_voice[dataclasses.replace(clip.voice, speed=1.0)].append(clip)
    shares: list[list[list[Clip]]] = [[] for _ in range(num_shares)]
    costs = [0.0] * num_shares
    for voice, group in sorted(by_voice.items(), key=lambda item: (item[0].engine, item[0].label), reverse=True):
        cheapest = costs.index(min(costs))
        shares[cheapest] += [group[i : i + GROUP] for i in range(0, len(group), GROUP)]
        # In clips of espeak-ng: the words of one of Open JTalk's bodies cost as much as 200, and joining them little.
        costs[cheapest] += 200 + len(group) / 4 if voice.engine == "open_jtalk" else len(group)
    return shares


def _made(clips: Sequence[Clip], folder: Path, *, processes: int) -> Iterator[dict[str, list[dict]]]:
    """Make all clips. A share has a process and an order of its own, so that its samples are reproducible."""
    context = multiprocessing.get_context("spawn")
    pools = [ProcessPoolExecutor(1, mp_context=context) for _ in range(processes)]
    try:
        shares = _shares(clips, processes)
        futures = [
            pool.submit(_make_clips, group, folder)
            for pool, share in zip(pools, shares, strict=True)
            for group in share
        ]
        for future in as_completed(futures):
            yield future.result()
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def make_corpus(out_dir: str | os.PathLike, *, settings: CorpusSettings | None = None) -> Path:
    """Make the corpus unless it is there already; killed at any moment, it leaves nothing that looks complete.

    Args:
        out_dir: where; made beside it and renamed at the end.
        settings: how much of what.

    Returns:
        `out_dir` as a path.

    Raises:
        ValueError: `out_dir` holds something else than a corpus, or the settings cannot be met.
    """
    settings, folder = settings or CorpusSettings(), Path(out_dir)
    made_of = {"recipe": RECIPE, "sample_rate": SAMPLE_RATE, **dataclasses.asdict(settings)}
    stamp = folder / "corpus.json"
    if stamp.is_file() and json.loads(stamp.read_text()) == made_of:
        return folder
    if folder.exists() and not stamp.is_file() and any(folder.iterdir()):
        raise ValueError(f"OUT_DIR: {folder} holds something that is not a corpus; name a new or an empty folder")
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "wav").mkdir(parents=True)
    clips = draw_clips(settings)
    lines: dict[str, list[dict]] = {}
    with tqdm(total=len(clips), desc="making speech", unit="clip", mininterval=0.5) as bar:
        for group in _made(clips, aside / "wav", processes=settings.processes):
            lines |= group
            bar.update(len(group))
    for split in ("train", "valid", "test"):
        with open(aside / f"{split}.jsonl", "w", encoding="utf-8") as manifest:
            for clip in clips:
                if clip.split == split:
                    manifest.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines[clip.name])
    (aside / "corpus.json").write_text(json.dumps(made_of, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)
    return folder


def settings_from(arguments: Sequence[str]) -> CorpusSettings:
    """`key=value` words as settings; `ValueError` for an unknown key or a wrong value."""
    types = {field.name: field.type for field in dataclasses.fields(CorpusSettings)}
    values = {}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in types:
            near = difflib.get_close_matches(key, types, n=1, cutoff=0)
            raise ValueError(f"{argument}: no setting {key!r}; did you mean {near[0]!r}?")
        try:
            values[key] = types[key](value)
        except ValueError:
            raise ValueError(f"{argument}: {value!r} is not a {'whole ' if types[key] is int else ''}number") from None
    return CorpusSettings(**values)


def main() -> None:
    """Command line."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        print(make_corpus(sys.argv[1], settings=settings_from(sys.argv[2:])))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
