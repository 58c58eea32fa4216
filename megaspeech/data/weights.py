"""How much each predicted token of a sample weighs in the loss.

Nothing is learned from what is given: the prompt, the words that `tts` is told to say, zero tokens. The rest follows
the config's `[loss]`.
"""

from __future__ import annotations

import numpy as np

from megaspeech.config.schema import LossSection, StreamsSection
from megaspeech.data.shards import ShardHeader
from megaspeech.data.tasks import PROMPT_FRAMES, ZERO_TOKEN


def loss_weights(
    codes_ST: np.ndarray,
    *,
    header: ShardHeader,
    streams: StreamsSection,
    loss: LossSection,
    generator: np.random.Generator,
) -> np.ndarray:
    """Weights `[P, T]` float32 of the predicted streams (text, then Q codebooks).

    Args:
        codes_ST: a sample.
        header: names the task and the codes for silence.
        streams: names PAD and EPAD, and the delays: a token that falls off the end weighs nothing.
        loss: weights by kind of token.
        generator: draws which frames the depth transformer is trained on, where a fraction is asked for.
    """
    num_frames = codes_ST.shape[1]
    weights_PT = np.zeros((1 + streams.num_codebooks, num_frames), dtype=np.float32)
    text = codes_ST[0]
    padding = (text == streams.text_pad_id) | (text == streams.text_end_pad_id)
    told = header.task.startswith("tts-")
    weights_PT[0] = np.where(padding, loss.text_padding, 0.0 if told else loss.text)

    own_QT = codes_ST[1 : 1 + streams.num_codebooks]
    silent_T = (own_QT == np.asarray(header.silence)[: streams.num_codebooks, None]).all(0)
    fraction_T = np.where(silent_T, loss.silence_fraction, loss.speech_fraction)
    trained_T = generator.random(num_frames) < fraction_T
    weights_PT[1:2] = loss.semantic * trained_T  # there may be none
    weights_PT[2:] = loss.acoustic * trained_T

    weights_PT[0, :PROMPT_FRAMES] = 0  # the prompt is given, but the model is silent of its own accord
    weights_PT[codes_ST[: 1 + streams.num_codebooks] == ZERO_TOKEN] = 0
    for stream, delay in enumerate(streams.delays[: 1 + streams.num_codebooks]):
        if delay:
            weights_PT[stream, -delay:] = 0
    return weights_PT
