"""From the codes of recordings and the words of a manifest to training samples.

Axes: Q codebooks, S streams (text, the model's own codebooks, the heard codebooks), T frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megaspeech.codecs.protocol import Codec
from megaspeech.config import Config
from megaspeech.data.shards import FORMAT, ShardHeader
from megaspeech.data.tasks import PROMPT_FRAMES, Task, Timing, lay_out, settle, text_stream
from megaspeech.data.tokenizer import SpelledWord, Tokenizer
from megaspeech.preparation.alignment import align, check_text
from megaspeech.preparation.recording import Recording
from megaspeech.preparation.utterance import Utterance


@dataclass(frozen=True, eq=False)
class Composed:
    """A sample, and where its text is not quite in time.

    Attributes:
        codes_ST: the sample, int64.
        moved_words: words that stand later than they should: the ones before them, or the prompt, have their frames.
        largest_shift: frames by which the one that was moved farthest was.
        frames_past_end: frames for which the text goes on after the audio has ended, and the task delay after it.
        unknown_pieces: stretches of the text that the tokenizer has no piece for; they are left out.
    """

    codes_ST: np.ndarray
    moved_words: int = 0
    largest_shift: int = 0
    frames_past_end: int = 0
    unknown_pieces: int = 0


def compose(
    utterance: Utterance, codes: Mapping[Recording, np.ndarray], *, config: Config, codec: Codec, tokenizer: Tokenizer
) -> Composed:
    """The sample of one line of a manifest.

    Args:
        utterance: the line.
        codes: `[Q, T]` of its recordings.
        config: names the streams and the delays.
        codec, tokenizer: what the codes were made with, and the text is.

    Raises:
        UnusableTextError: the text is empty, is not what its words spell, or does not fit the audio: the sample is to
            be set aside.
        ValueError: the tokenizer has no prompt for the task: nothing of it can be prepared.
    """
    if utterance.task.name == "text":
        (whole,) = compose_text(utterance, config=config, codec=codec, tokenizer=tokenizer)
        return whole
    task, timing, rate = utterance.task, timing_of(config), codec.frame_rate
    heard = None if utterance.heard is None else codes[utterance.heard]
    spoken = None if utterance.spoken is None else codes[utterance.spoken]
    num_frames = (spoken if task.speaks else heard).shape[1]
    aligned = align(utterance, num_seconds=num_frames / rate, frame_rate=rate, tokenizer=tokenizer)
    words = [
        (timing.text_frame(task, start=word.start, end=word.end, frame_rate=rate), word.pieces)
        for word in aligned.words
    ]
    frames = settle(words, first=PROMPT_FRAMES)
    shifts = [frame - wanted for frame, (wanted, _) in zip(frames, words, strict=True)]
    end = frames[-1] + len(words[-1][1]) if words else PROMPT_FRAMES
    codes_ST = lay_out(
        task,
        # One frame of PAD after the last word, so that a model learns to fall silent.
        text=text_stream(words, prompt=tokenizer.encode_prompt(task), num_frames=end + 1, streams=config.streams),
        heard=heard,
        spoken=spoken,
        silence=codec.silence_codes.cpu().numpy(),
        timing=timing,
        streams=config.streams,
    )
    return Composed(
        codes_ST,
        moved_words=sum(shift > 0 for shift in shifts),
        largest_shift=max(shifts, default=0),
        frames_past_end=max(0, end - timing.speech_origin(task) - num_frames - max(0, timing.text_shift(task))),
        unknown_pieces=aligned.num_unknown,
    )


def compose_text(
    utterance: Utterance, *, config: Config, codec: Codec, tokenizer: Tokenizer, most_frames: int | None = None
) -> list[Composed]:
    """Text alone, one piece a frame: one sample, or as many of at most `most_frames` as it takes.

    It is cut between words, and only there: a word that is longer by itself makes a sample that is too long. Each
    sample begins with the prompt, and is as full as its last word allows; end of sentence is in the last one alone, so
    that a sample that is cut does not teach to end there.

    Args:
        utterance: of the task `text`.
        config, codec, tokenizer: as of `compose`.
        most_frames: of a sample, prompt included; None makes one sample of any length.

    Raises:
        UnusableTextError: the text is empty, or wholly unknown.
    """
    words = tokenizer.spell(utterance.text, ends=True)
    check_text(tokenizer.normalise(utterance.text), words=words)
    portions: list[list[SpelledWord]] = [[]]
    num_frames = PROMPT_FRAMES
    for word in words:
        num_frames += len(word.pieces)
        if most_frames is not None and num_frames > most_frames and portions[-1]:
            portions.append([])
            num_frames = PROMPT_FRAMES + len(word.pieces)
        portions[-1].append(word)
    return [_written(one, utterance.task, config=config, codec=codec, tokenizer=tokenizer) for one in portions]


def _written(
    words: Sequence[SpelledWord], task: Task, *, config: Config, codec: Codec, tokenizer: Tokenizer
) -> Composed:
    """A sample of words that nobody says."""
    pieces = [piece for word in words for piece in word.pieces]
    prompt = tokenizer.encode_prompt(task)
    codes_ST = lay_out(
        task,
        text=text_stream([(PROMPT_FRAMES, pieces)], prompt=prompt, num_frames=0, streams=config.streams),
        heard=None,
        spoken=None,
        silence=codec.silence_codes.cpu().numpy(),
        timing=timing_of(config),
        streams=config.streams,
    )
    return Composed(codes_ST, unknown_pieces=sum(word.num_unknown for word in words))


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
