"""Run requests through the moshi runtime, frame by frame, as a deployment would: requests in, answers out.

Step s is fed what was heard in frame s - 1 and gives the text of frame s; codebook q gives its code of frame
s - delay_q. So text is known in its own frame, and the sound of a frame once its most delayed codebook is there.

Axes: B requests of a batch, Q codebooks of one speaker, T frames of an answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from megaspeech.config.schema import StreamsSection
from megaspeech.data.tasks import PROMPT_FRAMES, ZERO_TOKEN, Task, Timing, lay_out
from megaspeech.data.tokenizer import Tokenizer
from megaspeech.streaming.runtime import make_generator
from megaspeech.streaming.steering import TextScript, TextSteering

if TYPE_CHECKING:
    from moshi.models import LMGen, LMModel

WARMED_UP, WARM_UP = ("cuda",), 4
"""Devices on which the runtime is slow at first, and the steps that it is given before the clock starts."""
Clock: TypeAlias = Callable[[], float]
"""Gives seconds: `time.perf_counter`, or on a shared CPU `time.process_time`, which does not run while others do."""


@dataclass(frozen=True, eq=False)
class Request:
    """What one session is asked.

    `num_frames`: frames of the answer, those of the prompt included.
    `heard`: codes `[Q, T_heard]` int64 of what the model hears, its first frame right after the prompt; `tts`: None.
    `words`: the text to say, piece ids word by word; only for `tts`, else None.
    """

    task: Task
    num_frames: int
    heard: np.ndarray | None = None
    words: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True, eq=False)
class Answer:
    """What one session gave, by frame; the first `PROMPT_FRAMES` frames are the prompt's.

    `text`: tokens `[T]` int64.
    `codes`: the model's own codebooks `[Q, T]` int64, without their delays: column t is the sound of frame t.
    `step_seconds`: how long step t took `[T]` float64, for the whole batch: it is a deployment's compute time only
    where the batch was one request.
    """

    text: np.ndarray
    codes: np.ndarray
    step_seconds: np.ndarray


def answer(
    lm: LMModel,
    requests: Sequence[Request],
    *,
    tokenizer: Tokenizer,
    streams: StreamsSection,
    timing: Timing,
    silence: np.ndarray,
    clock: Clock = time.perf_counter,
) -> list[Answer]:
    """Answer `requests` as one batch, greedily.

    All run as long as the longest needs, which costs time but changes nothing: rows of a batch do not see each other.

    Args:
        lm: see `runtime.load_runtime`.
        requests: of any tasks and lengths.
        tokenizer: knows the prompts.
        streams: the streams that `lm` was trained on.
        timing: the delays that `lm` was trained on.
        silence: the codec's codes for silence, one a codebook; heard after the audio has ended.
        clock: gives seconds, by which steps are timed.

    Raises:
        ValueError: `streams` or the tokenizer are not the model's, or a request does not fit its task or the streams.
    """
    if not requests:
        return []
    check_streams(lm, streams)
    tokenizer.check_streams(streams, tasks=(request.task for request in requests))
    for request in requests:
        check_request(request, streams=streams)
    num_steps = max(request.num_frames for request in requests) + acoustic_delay(streams)
    given_BQT = np.stack(
        [_given_streams(r, num_steps=num_steps, silence=silence, timing=timing, streams=streams) for r in requests]
    )
    scripts = [TextScript(tokenizer.encode_prompt(r.task), words=r.words, streams=streams) for r in requests]
    steering = TextSteering(scripts, streams=streams, device=lm.device)
    text_TB, codes_TBQ, seconds_T = _stream(lm, given_BQT, steering=steering, clock=clock)
    codes_BQT = _undelay(codes_TBQ, delays=streams.delays[1 : 1 + streams.num_codebooks])
    return [
        Answer(text_TB[:n, b], codes_BQT[b, :, :n], seconds_T[:n])
        for b, n in enumerate(request.num_frames for request in requests)
    ]


def acoustic_delay(streams: StreamsSection) -> int:
    """Frames between the text of a frame and the last of the model's own codes of that frame."""
    return max(streams.delays[1 : 1 + streams.num_codebooks], default=0)


def check_streams(lm: LMModel, streams: StreamsSection) -> None:
    """Compare the config with the model.

    Raises:
        ValueError: they differ, or the text stream is delayed, which the latencies and the hooks do not provide for.
    """
    of_model = {
        "text_cardinality": lm.text_card,
        "text_pad_id": lm.text_padding_token_id,
        "text_end_pad_id": lm.end_of_text_padding_id,
        "num_codebooks": lm.dep_q,
        "num_given_codebooks": lm.n_q - lm.dep_q,
        "cardinality": lm.card,
        "delays": tuple(lm.delays),
    }
    for key, value in of_model.items():
        if getattr(streams, key) != value:
            raise ValueError(
                f"streams.{key} = {getattr(streams, key)}, but the model was exported with {value}; "
                f"use the config that was written beside its checkpoint"
            )
    if streams.delays[0]:
        raise ValueError(f"streams.delays[0] = {streams.delays[0]}: streaming needs the text undelayed; set it to 0")


def check_request(request: Request, *, streams: StreamsSection) -> None:
    """See that a request has what its task needs, in range.

    Raises:
        ValueError: names the field, its value and the remedy.
    """
    name = f"request {request.task.key}"
    if request.num_frames <= PROMPT_FRAMES:
        raise ValueError(f"{name}: num_frames = {request.num_frames} leaves no answer; ask for over {PROMPT_FRAMES}")
    if request.task.speaks and not streams.num_codebooks:
        raise ValueError(f"{name}: the model writes text alone (streams.num_codebooks = 0); ask it for asr or st")
    if request.task.hears != (request.heard is not None):
        raise ValueError(f"{name}: heard must be {'the codes of some audio' if request.task.hears else 'None'}")
    if (request.task.name == "tts") != (request.words is not None):
        raise ValueError(f"{name}: words must be {'None' if request.task.hears else 'the text to say'}")
    if request.heard is not None:
        least = streams.num_given_codebooks
        if request.heard.ndim != 2 or request.heard.shape[0] < least:
            raise ValueError(f"{name}: heard has shape {request.heard.shape}; give codes [Q, T] of {least} codebooks")
        _check_range(request.heard, limit=streams.cardinality, name=f"{name}: heard")
    for word in request.words or ():
        if not word:
            raise ValueError(f"{name}: words holds a word without pieces; leave empty words out")
        _check_range(np.asarray(word), limit=streams.text_cardinality, name=f"{name}: words")


def _check_range(tokens: np.ndarray, *, limit: int, name: str) -> None:
    if tokens.size and (tokens.min() < 0 or tokens.max() >= limit):
        raise ValueError(f"{name} holds {tokens.min()} to {tokens.max()}; the model knows 0 to {limit - 1}")


def _given_streams(
    request: Request, *, num_steps: int, silence: np.ndarray, timing: Timing, streams: StreamsSection
) -> np.ndarray:
    """The given codes `[Q, num_steps]` by frame: laid out by the very function that lays out training samples."""
    text = np.full(num_steps, streams.text_pad_id, dtype=np.int64)
    codes = lay_out(
        request.task, text=text, heard=request.heard, spoken=None, silence=silence, timing=timing, streams=streams
    )
    return codes[1 + streams.num_codebooks :, :num_steps]


def _stream(
    lm: LMModel, given_BQT: np.ndarray, *, steering: TextSteering, clock: Clock
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Text `[steps, B]`, own codes as generated (delayed) `[steps, B, Q]`, seconds `[steps]`.

    Tokens are taken in the hooks, where they are made: what `LMGen.step` returns is held back by the largest delay.
    """
    texts: list[torch.Tensor] = []
    codes: list[torch.Tensor] = []

    def on_text(tokens_B: torch.Tensor) -> None:
        steering.force(tokens_B)
        texts.append(tokens_B.clone())

    generator = make_generator(
        lm,
        on_text_logits_hook=steering.restrict,
        on_text_hook=on_text,
        on_audio_hook=lambda codes_BQ: codes.append(codes_BQ.clone()),
    )
    batch_size, _, num_steps = given_BQT.shape
    # Step s gets frame s - 1; what step 0 gets, the runtime overwrites with initial tokens.
    heard_BQT = np.pad(given_BQT, ((0, 0), (0, 0), (1, 0)), constant_values=ZERO_TOKEN)
    seconds = np.zeros(num_steps)
    with generator.streaming(batch_size):
        if lm.device.type in WARMED_UP:
            _warm_up(generator, torch.from_numpy(heard_BQT[:, :, :1]).to(lm.device))
        for step in range(num_steps):
            start = clock()
            generator.step(torch.from_numpy(heard_BQT[:, :, step : step + 1]).to(lm.device))
            if lm.device.type == "cuda":
                torch.cuda.synchronize(lm.device)
            seconds[step] = clock() - start
    none = torch.zeros(num_steps, batch_size, 0, dtype=torch.long)  # of a model that writes text alone
    return torch.stack(texts).cpu().numpy(), (torch.stack(codes) if codes else none).cpu().numpy(), seconds


def _warm_up(generator: LMGen, heard_BQ1: torch.Tensor) -> None:
    """Have the runtime compile, and record its graphs, as a server does before anybody comes; then start over."""
    hooks = {name: getattr(generator, name) for name in ("on_text_logits_hook", "on_text_hook", "on_audio_hook")}
    for name in hooks:
        setattr(generator, name, None)
    for _ in range(WARM_UP):
        generator.step(heard_BQ1)
    generator.reset_streaming()
    for name, hook in hooks.items():
        setattr(generator, name, hook)


def _undelay(codes_TBQ: np.ndarray, *, delays: Sequence[int]) -> np.ndarray:
    """Codes `[B, Q, T]` by the frame they belong to, T = steps - the largest delay."""
    num_frames = len(codes_TBQ) - max(delays, default=0)
    codes_BQT = np.empty((*codes_TBQ.shape[1:], num_frames), dtype=codes_TBQ.dtype)
    for codebook, delay in enumerate(delays):
        codes_BQT[:, codebook] = codes_TBQ[delay : delay + num_frames, :, codebook].T
    return codes_BQT
