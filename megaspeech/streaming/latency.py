"""Response latency of an answer, in milliseconds, and what it is made of.

**Session time.** Frame f lasts from f / frame_rate to (f + 1) / frame_rate. Step s begins when frame s - 1 has been
heard completely, at s / frame_rate, or when step s - 1 is done where the machine is slower than the sound. It ends
`step_seconds[s]` later. The clock of what is heard starts at `timing.speech_origin(task)` frames.

**Text** (`asr`, `st`): from the end of the last heard word to the end of the step that writes the last piece of the
last word.

**Speech** (`s2st`): from the end of the last heard word to the first sample of the last spoken word. Speech often runs
on from word to word, so the onset is looked for `timing.speech_lead` frames after the first piece of the last written
word, where training put it: the first sound from there on.

**Speech** (`tts`): from the moment the text is there, at the end of the prompt, to the first sample of sound.

A sample of frame s can be played once the most delayed own codebook of frame s is there, at the end of step
s + acoustic delay, and decoded; a sample inside a frame plays as much later as it lies behind the frame's start.

**Parts**, which sum to the total: `acoustic_delay`: delay of the model's codebooks; `compute`: encoder, step, decoder,
and what the machine is behind; `task_delay`: all the rest, what data and model chose to wait (the data's task delay
counts from the *frame* in which the word ends, so up to one frame less is waited from its end; it also holds the
frames of a word's further pieces, and time that the model takes of its own accord, and is negative where the model
answers early).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from megaspeech.data.tasks import PROMPT_FRAMES, Task, Timing
from megaspeech.data.tokenizer import Tokenizer
from megaspeech.data.transcript import written_words
from megaspeech.streaming.session import Answer

WINDOW_SECONDS = 0.01
SUSTAINED_WINDOWS = 3
ONSET_DECIBELS = -25.0
SILENCE_LEVEL = 1e-3
"""Root mean square (full scale 1) below which a whole waveform counts as silent."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds of each part; see the module's docstring."""

    task_delay: float
    acoustic_delay: float
    compute: float

    @property
    def total(self) -> float:
        """Milliseconds from question to answer."""
        return self.task_delay + self.acoustic_delay + self.compute


def text_latency(
    answer: Answer, *, task: Task, heard_end: float, timing: Timing, frame_rate: float, tokenizer: Tokenizer
) -> Latency | None:
    """Latency of a written answer.

    Args:
        answer: of one request run alone, or `step_seconds` is not what a listener would wait.
        task: what was asked.
        heard_end: seconds at which the last heard word ends, from the start of the heard audio.
        timing: the delays of the data.
        frame_rate: frames a second.
        tokenizer: tells words from PAD.

    Returns:
        None where nothing was written.
    """
    words = written_words(answer.text, tokenizer=tokenizer)
    if not words:
        return None
    frame = words[-1].last_frame
    asked = timing.speech_origin(task) / frame_rate + heard_end
    return Latency(
        task_delay=1000 * (frame / frame_rate - asked),
        acoustic_delay=0.0,
        compute=1000 * (step_ends(answer.step_seconds, frame_rate=frame_rate)[frame] - frame / frame_rate),
    )


def speech_latency(
    answer: Answer,
    *,
    task: Task,
    heard_end: float | None,
    waveform_N: np.ndarray,
    sample_rate: int,
    timing: Timing,
    frame_rate: float,
    tokenizer: Tokenizer,
    acoustic_delay: int = 0,
    decode_seconds: float = 0.0,
) -> Latency | None:
    """Latency of a spoken answer, `s2st` or `tts`.

    Args:
        answer: of one request run alone, or `step_seconds` is not what a listener would wait.
        task: what was asked.
        heard_end: seconds at which the last heard word ends, from the start of the heard audio; None for `tts`.
        waveform_N: `answer.codes` decoded, sample 0 at the start of frame 0.
        sample_rate: samples a second.
        timing: the delays of the data.
        frame_rate: frames a second.
        tokenizer: tells words from PAD.
        acoustic_delay: the largest delay of the model's own codebooks, in frames; see `session.acoustic_delay`.
        decode_seconds: how long the codec's streaming decoder takes for a frame.

    Returns:
        None where nothing was written, or nothing sounds from there on.

    Raises:
        ValueError: `heard_end` is missing where the task hears.
    """
    if task.hears != (heard_end is not None):
        raise ValueError(f"heard_end = {heard_end} for {task.key}: give the end of the last heard word; None for tts")
    words = written_words(answer.text, tokenizer=tokenizer)
    if not words:
        return None
    asked, after = PROMPT_FRAMES / frame_rate, PROMPT_FRAMES / frame_rate
    if heard_end is not None:
        asked = timing.speech_origin(task) / frame_rate + heard_end
        after = (words[-1].first_frame + timing.speech_lead) / frame_rate
    onset = speech_onset(waveform_N, sample_rate=sample_rate, after=after)
    if onset is None:
        return None
    # The tail of an answer is cut at its last frame; a step beyond it is taken to cost what the last one did.
    step = min(int(onset * frame_rate) + acoustic_delay, len(answer.step_seconds) - 1)
    late = step_ends(answer.step_seconds, frame_rate=frame_rate)[step] - step / frame_rate
    return Latency(
        task_delay=1000 * (onset - asked),
        acoustic_delay=1000 * acoustic_delay / frame_rate,
        compute=1000 * (late + decode_seconds),
    )


def step_ends(step_seconds: np.ndarray, *, frame_rate: float) -> np.ndarray:
    """Session time in seconds at which each step is done `[T]`: it waits for its frame and for the step before."""
    ends = np.zeros(len(step_seconds))
    end = 0.0
    for step, seconds in enumerate(step_seconds):
        end = max(step / frame_rate, end) + seconds
        ends[step] = end
    return ends


def speech_onset(waveform_N: np.ndarray, *, sample_rate: int, after: float = 0.0) -> float | None:
    """Seconds at which sound begins, at or after `after` seconds.

    The level of a window of 10 ms is the least root mean square of it and the two after it, so that a click is
    neither the loudest thing nor an onset. Sound is what is within 25 dB of the loudest level.

    Returns:
        `after` where sound is already on; None where there is none.
    """
    size = max(1, int(WINDOW_SECONDS * sample_rate))
    num_windows = len(waveform_N) // size
    if num_windows < SUSTAINED_WINDOWS:
        return None
    windows = np.asarray(waveform_N[: num_windows * size], dtype=np.float64).reshape(num_windows, size)
    rms = np.sqrt(np.mean(windows**2, axis=1))
    levels = np.lib.stride_tricks.sliding_window_view(rms, SUSTAINED_WINDOWS).min(axis=1)
    if levels.max() < SILENCE_LEVEL:
        return None
    loud = levels >= levels.max() * 10 ** (ONSET_DECIBELS / 20)
    first = int(after * sample_rate / size)
    found = np.flatnonzero(loud[first:])
    return max(after, float((first + found[0]) * size / sample_rate)) if len(found) else None


def summarise(latencies: Sequence[Latency]) -> dict[str, float | None | dict[str, float]]:
    """Median and 99th percentile of the totals, and the median of each part (they need not sum to the median).

    Returns:
        `{"median": ms, "p99": ms, "median_parts": {"task_delay": ms, "acoustic_delay": ms, "compute": ms}}`; None and
        no parts where there are no latencies, as when a model never answers.
    """
    if not latencies:
        return {"median": None, "p99": None, "median_parts": {}}
    totals = [latency.total for latency in latencies]
    parts = {key: float(np.median([asdict(latency)[key] for latency in latencies])) for key in asdict(latencies[0])}
    return {"median": float(np.median(totals)), "p99": float(np.percentile(totals, 99)), "median_parts": parts}
