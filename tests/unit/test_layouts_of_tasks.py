"""Whatever a sample is laid out from comes out of it again, of every task: once, in time, and through the delays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaspeech.config.schema import LossSection, StreamsSection
from megaspeech.data.synthetic import synthetic_header
from megaspeech.data.tasks import (
    PROMPT_FRAMES,
    TASKS,
    ZERO_TOKEN,
    Parts,
    Task,
    Timing,
    lay_out,
    settle,
    take_apart,
    text_stream,
)
from megaspeech.data.weights import loss_weights
from megaspeech.kernels.stream_embedding.reference import delayed_codes

TEXT, CODES, PAD, EPAD = 48, 1000, 3, 0
PROMPT = (4, 5)
WORDS = st.lists(
    st.tuples(st.integers(0, 40), st.lists(st.integers(6, TEXT - 1), min_size=1, max_size=4)), max_size=8
).map(lambda words: sorted(words, key=lambda word: word[0]))


@st.composite
def samples(draw: st.DrawFn) -> dict:
    """What goes into one sample: a task, streams, delays, words at frames, audio in which no code comes twice."""
    task = Task(draw(st.sampled_from(TASKS)), "en", "ja")
    own, given_ = draw(st.integers(int(task.speaks), 3)), draw(st.integers(0, 3))
    delays = draw(st.lists(st.integers(0, 3), min_size=own + given_, max_size=own + given_))
    streams = StreamsSection(
        text_cardinality=TEXT,
        num_codebooks=own,
        num_given_codebooks=given_,
        cardinality=CODES,
        delays=(0, *delays),
    )
    timing = Timing(task_delay=draw(st.integers(0, 4)), speech_lead=draw(st.integers(0, 3)))
    lengths = [draw(st.integers(1, 30)) for _ in range(2)]
    unique = np.arange(CODES - 3 * sum(lengths), CODES)  # silence lies below them
    heard, spoken = unique[: 3 * lengths[0]].reshape(3, -1), unique[3 * lengths[0] :].reshape(3, -1)
    return {
        "task": task,
        "streams": streams,
        "timing": timing,
        "words": draw(WORDS),
        "heard": heard if task.hears else None,
        "spoken": spoken if task.speaks else None,
    }


SILENCE = np.array([1, 2, 3])


def laid_out(sample: dict) -> np.ndarray:
    text = text_stream(sample["words"], prompt=PROMPT, num_frames=0, streams=sample["streams"])
    rest = {key: sample[key] for key in ("heard", "spoken", "timing", "streams")}
    return lay_out(sample["task"], text=text, silence=SILENCE, **rest)


def parts(sample: dict, codes_ST: np.ndarray) -> Parts:
    num_codebooks = sample["streams"].num_codebooks
    return take_apart(codes_ST, task=sample["task"], timing=sample["timing"], num_codebooks=num_codebooks)


@settings(max_examples=150, deadline=None)
@given(sample=samples())
def test_what_goes_in_comes_out(sample: dict) -> None:
    codes_ST = laid_out(sample)
    out, streams = parts(sample, codes_ST), sample["streams"]
    assert codes_ST.shape[0] == streams.num_streams and out.prompt == PROMPT
    said = [token for token in out.text.tolist() if token not in (PAD, EPAD)]
    assert said == [piece for _, pieces in sample["words"] for piece in pieces]
    assert len(out.text) == codes_ST.shape[1] - PROMPT_FRAMES
    for wanted, found, count in (
        (sample["heard"], out.heard, streams.num_given_codebooks),
        (sample["spoken"], out.spoken, streams.num_codebooks),
    ):
        assert (wanted is None) == (found is None)
        if wanted is not None:
            length = wanted.shape[1]
            assert found.shape == (count, codes_ST.shape[1] - sample["timing"].speech_origin(sample["task"]))
            assert np.array_equal(found[:, :length], wanted[:count])
            assert (found[:, length:] == SILENCE[:count, None]).all()


@settings(max_examples=100, deadline=None)
@given(sample=samples())
def test_no_token_is_in_two_places(sample: dict) -> None:
    codes_ST, streams = laid_out(sample), sample["streams"]
    rows = codes_ST[1:]
    for wanted, count in ((sample["heard"], streams.num_given_codebooks), (sample["spoken"], streams.num_codebooks)):
        for code in [] if wanted is None else wanted[:count].ravel():
            assert (rows == code).sum() == 1
    audio = [code for one in (sample["heard"], sample["spoken"]) if one is not None for code in one.ravel()]
    assert set(np.unique(rows)) <= {ZERO_TOKEN, *SILENCE, *audio}


@settings(max_examples=100, deadline=None)
@given(words=WORDS, first=st.integers(0, 6))
def test_words_stand_where_they_should_or_just_behind_the_one_before(words: list, first: int) -> None:
    frames, free = settle(words, first=first), first
    for frame, (wanted, pieces) in zip(frames, words, strict=True):
        assert frame == (wanted if wanted >= free else free)
        free = frame + len(pieces)


@settings(max_examples=100, deadline=None)
@given(sample=samples())
def test_delays_are_undone_exactly_and_what_falls_off_weighs_nothing(sample: dict) -> None:
    codes_ST, streams = laid_out(sample), sample["streams"]
    num_frames, delays = codes_ST.shape[1], torch.tensor(streams.delays)
    initial = torch.tensor(streams.cardinalities)
    delayed_ST = delayed_codes(torch.from_numpy(codes_ST)[None], shifts=delays, fill=initial)[0].numpy()
    weights_PT = loss_weights(
        codes_ST,
        header=synthetic_header(sample["task"].key, streams=streams),
        streams=streams,
        loss=LossSection(),
        generator=np.random.default_rng(0),
    )
    for stream, delay in enumerate(streams.delays):
        whole = max(0, num_frames - delay)
        assert (delayed_ST[stream, :delay] == streams.cardinalities[stream]).all()
        assert np.array_equal(delayed_ST[stream, delay:], codes_ST[stream, :whole])
        if stream <= streams.num_codebooks:
            assert (weights_PT[stream, whole:] == 0).all()


@settings(max_examples=100, deadline=None)
@given(sample=samples())
def test_loss_weights_of_every_task(sample: dict) -> None:
    task, streams, codes_ST = sample["task"], sample["streams"], laid_out(sample)
    loss = LossSection(text=2.0, text_padding=0.25, semantic=8.0, acoustic=4.0)
    header = synthetic_header(task.key, streams=streams)
    weights_PT = loss_weights(codes_ST, header=header, streams=streams, loss=loss, generator=np.random.default_rng(0))
    assert weights_PT.shape == (1 + streams.num_codebooks, codes_ST.shape[1])  # what is heard is never predicted
    text, rest = codes_ST[0, PROMPT_FRAMES:], weights_PT[0, PROMPT_FRAMES:]
    padding = (text == PAD) | (text == EPAD)
    assert (weights_PT[0, :PROMPT_FRAMES] == 0).all() and (rest[padding] == 0.25).all()
    assert (rest[~padding] == (0.0 if task.name == "tts" else 2.0)).all()
    for stream, delay in enumerate(streams.delays[1 : 1 + streams.num_codebooks], 1):
        expected = 0.0 if task.name == "text" else 8.0 if stream == 1 else 4.0
        assert (weights_PT[stream, : max(0, codes_ST.shape[1] - delay)] == expected).all()


def test_the_header_of_a_shard_names_the_task() -> None:
    streams = StreamsSection(
        text_cardinality=TEXT, num_codebooks=1, num_given_codebooks=0, cardinality=9, delays=(0, 0)
    )
    for name in TASKS:
        assert Task.parse(synthetic_header(Task(name, "ja", "en").key, streams=streams).task).name == name
    with pytest.raises(ValueError, match="no task"):
        Task.parse("speech")


def test_a_model_without_codebooks_of_its_own_is_not_asked_to_speak() -> None:
    streams = StreamsSection(
        text_cardinality=TEXT, num_codebooks=0, num_given_codebooks=3, cardinality=CODES, delays=(0, 0, 1, 1)
    )
    options = {"text": np.array(PROMPT), "silence": SILENCE, "timing": Timing(), "streams": streams}
    assert lay_out(Task("st", "en", "ja"), heard=np.ones((3, 4), int), spoken=None, **options).shape == (4, 9)
    with pytest.raises(
        ValueError, match="task tts-en: speaks, but streams.num_codebooks = 0; give the model codebooks"
    ):
        lay_out(Task("tts", "en", "en"), heard=None, spoken=np.ones((3, 4), int), **options)
