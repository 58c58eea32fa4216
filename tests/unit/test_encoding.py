"""Decoding ahead of the encoder: codes do not depend on batches, and the encoder does not wait."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("nvidia.dali")
pytest.importorskip("faiss")

from small_corpus import FRAME, RATE, make_codec, record  # noqa: E402

from megaspeech.codecs import SpectralCodec  # noqa: E402
from megaspeech.config.preparation import PreparationSection  # noqa: E402
from megaspeech.preparation.decode import Decoder  # noqa: E402
from megaspeech.preparation.encoding import (  # noqa: E402
    decoded_windows,
    encode_recordings,
    encode_window,
    length_batches,
)
from megaspeech.preparation.reading_ahead import ahead  # noqa: E402
from megaspeech.preparation.recording import Recording  # noqa: E402
from megaspeech.preparation.timeline import Span, Timeline  # noqa: E402


@pytest.fixture(scope="module")
def codec() -> SpectralCodec:
    return make_codec()


class Watched:
    """A codec that notes what it is given, and may take its time."""

    def __init__(self, codec: SpectralCodec, *, is_causal: bool = True, seconds: float = 0.0) -> None:
        self.codec, self.is_causal, self.seconds = codec, is_causal, seconds
        self.shapes: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.codec, name)

    def encode(self, waveforms_BN: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(waveforms_BN.shape))
        time.sleep(self.seconds)
        return self.codec.encode(waveforms_BN)


def recordings_of_lengths(folder: Path, seconds: list[float]) -> list[Recording]:
    return [
        Recording(record(folder, f"{place}", seconds=s, pitch=100 + 20 * (place % 9)))
        for place, s in enumerate(seconds)
    ]


@pytest.mark.parametrize("is_causal", [True, False])
def test_batching_changes_no_code(tmp_path: Path, codec: SpectralCodec, is_causal: bool) -> None:
    """Recordings of one batch are padded to one length; each has the codes it has by itself."""
    recordings = recordings_of_lengths(tmp_path, [0.5, 1.7, 0.08, 1.01, 0.003, 0.49, 1.66])
    watched = Watched(codec, is_causal=is_causal)
    together, rejected = encode_recordings(recordings, codec=watched)
    assert not rejected and sorted(together, key=recordings.index) == recordings
    assert all(size % FRAME == 0 for _, size in watched.shapes)
    # 1 frame twice, 7 frames twice, 13, and 21 and 22
    assert sorted(count for count, _ in watched.shapes) == ([7] if is_causal else [1, 1, 1, 2, 2])
    for recording in recordings:
        alone, _ = encode_recordings([recording], codec=codec)
        samples, _ = soundfile.read(recording.path)
        assert together[recording].shape == (4, -(-len(samples) // FRAME))
        assert np.array_equal(together[recording], alone[recording])


def test_windows_and_batches_of_any_size_give_the_same_codes(tmp_path: Path, codec: SpectralCodec) -> None:
    recordings = recordings_of_lengths(tmp_path, [0.1 * (place % 7 + 1) for place in range(23)])
    recordings.insert(9, Recording(tmp_path / "absent.wav"))
    whole, rejected = encode_recordings(recordings, codec=codec)
    assert list(rejected) == [recordings[9]] and len(whole) == 23
    for read_ahead, batch_seconds in ((1, 0.05), (4, 1.0), (24, 0.7), (100, 0.3)):
        settings = PreparationSection(read_ahead=read_ahead, batch_seconds=batch_seconds, num_threads=2)
        watched = Watched(codec)
        codes, again = encode_recordings(recordings, codec=watched, settings=settings)
        assert again == rejected and codes.keys() == whole.keys()
        assert all(np.array_equal(codes[recording], whole[recording]) for recording in whole)
        assert all(count == 1 or count * size <= batch_seconds * RATE for count, size in watched.shapes)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200), st.booleans())
def test_batches_hold_everything_once_and_no_more_than_fits(lengths: list[int], most: int, is_causal: bool) -> None:
    batches = length_batches(lengths, most_frames=most, is_causal=is_causal)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * longest <= most
        assert lengths[batch[-1]] == longest and (is_causal or lengths[batch[0]] == longest)


def test_windows_end_by_count_and_by_sound(tmp_path: Path) -> None:
    recordings = recordings_of_lengths(tmp_path, [0.5] * 11)
    timeline = Timeline()

    def sizes(read_ahead: int, batch_seconds: float) -> list[int]:
        settings = PreparationSection(read_ahead=read_ahead, batch_seconds=batch_seconds)
        decoder = Decoder(sample_rate=RATE, batch_size=2)
        windows = decoded_windows(recordings, decoder=decoder, settings=settings, timeline=timeline)
        return [len(window) for window in windows]

    assert sizes(4, 100.0) == [4, 4, 3]
    assert sizes(1, 100.0) == [1] * 11
    assert sizes(100, 100.0) == [11]
    assert sizes(100, 0.4) == [8, 3]  # eight batches of 0.4 s are 3.2 s


def test_the_encoder_does_not_wait(tmp_path: Path, codec: SpectralCodec) -> None:
    """While a window is encoded the next one is decoded; and no more than that, so that memory is bounded."""
    recordings = recordings_of_lengths(tmp_path, [0.3 + 0.05 * (place % 5) for place in range(48)])
    timeline, settings = Timeline(), PreparationSection(read_ahead=8, batch_seconds=100.0)
    decoded_by_then = []

    def decoded() -> list[Span]:
        return [span for span in timeline.spans if span.lane == "decode"]

    class Slow(Watched):
        """Is done with a window when the one after it is decoded: without overlap, never."""

        def encode(self, waveforms_BN: torch.Tensor) -> torch.Tensor:
            place, deadline = len(self.shapes), time.monotonic() + 20
            while len(decoded()) < min(place + 2, 6):
                assert time.monotonic() < deadline, "nothing was decoded while the encoder worked"
                time.sleep(0.001)
            time.sleep(0.05)
            decoded_by_then.append(len(decoded()))
            return super().encode(waveforms_BN)

    watched, decoder = Slow(codec), Decoder(sample_rate=RATE, batch_size=8)
    windows = decoded_windows(recordings, decoder=decoder, settings=settings, timeline=timeline)
    for window in ahead(windows, timeline=timeline):
        encode_window(window, codec=watched, batch_seconds=100.0, timeline=timeline)

    encoded = [span for span in timeline.spans if span.lane == "encode"]
    assert len(encoded) == len(decoded()) == 6
    for place, (ready, span) in enumerate(zip(decoded(), encoded, strict=True)):
        assert ready.end <= span.start and decoded_by_then[place] <= place + 3
        assert place == 5 or decoded()[place + 1].end <= span.end
    assert timeline.share_waited < 0.3


def test_faults_of_the_thread_come_out_here() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise OSError("no space")

    taken = []
    with pytest.raises(OSError, match="no space"):
        for item in ahead(broken(), timeline=Timeline()):
            taken.append(item)
    assert taken == [1]


def test_leaving_early_ends_the_thread() -> None:
    before, made = threading.active_count(), []

    def endless() -> Iterator[int]:
        while True:
            made.append(len(made))
            yield made[-1]

    for item in ahead(endless(), timeline=Timeline(), depth=2):
        if item == 3:
            break
    deadline = time.monotonic() + 5
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(made) <= 8


def test_share_of_waiting() -> None:
    timeline = Timeline()
    timeline.spans += [
        Span("wait", 0, 5, ""),
        Span("encode", 5, 7, ""),
        Span("wait", 7, 8, ""),
        Span("encode", 8, 9, ""),
    ]
    assert timeline.share_waited == pytest.approx(0.25) and timeline.seconds_to_first == 5
    assert Timeline().share_waited == 0


def test_a_timeline_is_written(tmp_path: Path) -> None:
    timeline = Timeline()
    with timeline.span("decode", "2 recordings"), timeline.span("encode", depth=1):
        time.sleep(0.01)
    timeline.write(tmp_path / "new" / "t.png")
    assert (tmp_path / "new/t.png").read_bytes().startswith(b"\x89PNG")
    timeline.write(tmp_path / "t.json")
    events = [event for event in json.loads((tmp_path / "t.json").read_text())["traceEvents"] if event["ph"] == "X"]
    assert [(event["name"], event["args"]["ready"]) for event in events] == [("encode", 1), ("2 recordings", 0)]
    assert all(event["dur"] >= 10_000 for event in events) and events[0]["tid"] != events[1]["tid"]
    with pytest.raises(ValueError, match="t.svg: '.svg'; name a .png or a .json"):
        timeline.write(tmp_path / "t.svg")
