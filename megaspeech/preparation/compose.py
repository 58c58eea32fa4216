"""From the codes of recordings and the words of a manifest to training samples.

Axes: Q codebooks, S streams (text, the model's own codebooks, the heard codebooks), T frames.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megaspeech.codecs.protocol import Codec
from megaspeech.config import Config
from megaspeech.data.shards import FORMAT, ShardHeader
from megaspeech.data.tasks import PROMPT_FRAMES, Timing, lay_out, text_stream
from megaspeech.data.tokenizer import Tokenizer
from megaspeech.preparation.utterance import Recording, Utterance


def compose(
    utterance: Utterance, codes: Mapping[Recording, np.ndarray], *, config: Config, codec: Codec, tokenizer: Tokenizer
) -> np.ndarray:
    """The sample `[S, T]` of one manifest line, from the codes `[Q, T]` of its recordings."""
    task, timing = utterance.task, timing_of(config)
    pieces = tokenizer.encode_words(utterance.text.split(), told=not task.hears)
    frames = [PROMPT_FRAMES] * len(pieces)  # where they meet, words move right
    if task.name != "text":
        rate = codec.frame_rate
        frames = [timing.text_frame(task, start=one.start, end=one.end, frame_rate=rate) for one in utterance.words]
    words = list(zip(frames, pieces, strict=True))
    # One frame of PAD after the last word, so that a model learns to fall silent.
    length = words[-1][0] + len(words[-1][1]) + 1
    text = text_stream(words, prompt=tokenizer.encode_prompt(task), num_frames=length, streams=config.streams)
    return lay_out(
        task,
        text=text,
        heard=None if utterance.heard is None else codes[utterance.heard],
        spoken=None if utterance.spoken is None else codes[utterance.spoken],
        silence=codec.silence_codes.numpy(),
        timing=timing,
        streams=config.streams,
    )


def timing_of(config: Config) -> Timing:
    """The delays of `[data]`."""
    return Timing(task_delay=config.data.task_delay, speech_lead=config.data.speech_lead)


def shard_header(task: str, *, config: Config, codec: Codec, tokenizer: Tokenizer) -> ShardHeader:
    """What the codes of a shard of `task` (a `Task.key`) mean; how many there are, `write_shard` fills in."""
    return ShardHeader(
        format=FORMAT,
        task=task,
        codec=codec.name,
        codec_fingerprint=codec.fingerprint,
        tokenizer_fingerprint=tokenizer.fingerprint,
        frame_rate=codec.frame_rate,
        cardinalities=config.streams.cardinalities,
        num_codebooks=config.streams.num_codebooks,
        silence=tuple(codec.silence_codes.tolist()),
        task_delay=config.data.task_delay,
        speech_lead=config.data.speech_lead,
    )
