"""The server's parts in one process: what Kyutai's loop gives is the batch's answer; what takes too long ends."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from served_folder import make_served_folder
from small_corpus import DIGITS, voice

from megaspeech.data.tasks import PROMPT_FRAMES, Task
from megaspeech.preparation.compose import timing_of
from megaspeech.streaming.folder import ServedFolder, open_folder
from megaspeech.streaming.live import LiveText
from megaspeech.streaming.runtime import make_generator
from megaspeech.streaming.session import Request, answer

if any(find_spec(name) is None for name in ("moshi", "aiohttp", "sphn")):
    pytest.skip("moshi, aiohttp or sphn is not installed", allow_module_level=True)

import aiohttp
import sphn
from aiohttp import WSMsgType
from aiohttp.test_utils import TestClient, TestServer

from megaspeech.streaming import connection
from megaspeech.streaming import server as server_module
from megaspeech.streaming.connection import SOUND, Heard
from megaspeech.streaming.server import PAGE, SpeechServer

ASR, S2S = Task("asr", "en", "en"), Task("s2s", "en", "en")
SOUND_N = voice(1.6, pitch=130.0)  # 20 frames
DELAYS = ["streams.delays=[0, 0, 0, 0, 0, 0, 0, 0, 0]", "streams.delays=[0, 0, 1, 1, 2, 0, 1, 1, 1]"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {delays: make_served_folder(tmp_path_factory.mktemp("served") / "model", delays) for delays in DELAYS}


@pytest.fixture
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[getattr(request, "param", DELAYS[1])]


@pytest.fixture
def served(folder: Path) -> ServedFolder:
    """A model of its own for each test: a server keeps it for good."""
    return open_folder(folder)


class Tape:
    """A connection that plays a sound to the server's loop and keeps what comes back."""

    def __init__(self, served: ServedFolder) -> None:
        self.size, self.sent = served.codec.frame_size, []

    async def __aiter__(self) -> AsyncIterator[Heard]:
        for first in range(0, len(SOUND_N), 1000):  # no whole frames
            yield Heard(SOUND + SOUND_N[first : first + 1000].tobytes())

    async def send_bytes(self, data: bytes) -> None:
        self.sent.append(data)


@pytest.mark.parametrize("folder", DELAYS, indirect=True)
@pytest.mark.parametrize("task", [ASR, S2S, None])
def test_the_loop_gives_the_very_answer_of_a_batch(served: ServedFolder, folder: Path, task: Task | None) -> None:
    """The first frame of the client is the step that hears nothing; it is not part of what is heard."""
    speech_server = SpeechServer(served, task=task, temperature=0.0)
    tapes = [Tape(served), Tape(served)]
    for tape in tapes:
        speech_server._converse(tape)
    assert tapes[0].sent == tapes[1].sent, "a session knows of the one before"
    handshake, *messages = tapes[0].sent
    assert handshake == b"\x00"
    num_heard = len(SOUND_N) // tapes[0].size - 1
    heard = served.codec.encode(torch.from_numpy(SOUND_N[tapes[0].size :])[None])[0].numpy()
    text_T, codes_QT = expected(open_folder(folder), task, heard=heard[:, :num_heard])
    delay = max(served.config.streams.delays)
    prompt = PROMPT_FRAMES if task else 0
    # As many answers as frames came, the last of which is held back by the delay of the codebooks.
    frames = range(max(0, prompt - delay), prompt + num_heard + 1 - delay)
    live_text, decoder = LiveText(served.tokenizer), served.codec.streaming_decoder()
    writer = sphn.OpusStreamWriter(served.codec.sample_rate)
    text = "".join(live_text.push(int(text_T[frame])) for frame in frames)
    said = [decoder.step(torch.from_numpy(codes_QT[:, frame])[None])[0].numpy() for frame in frames]
    assert "".join(one[1:].decode() for one in messages if one[0] == 2) == text
    assert len(text.split()) > 3
    assert b"".join(one[1:] for one in messages if one[0] == 1) == b"".join(map(writer.append_pcm, said))


def test_text_is_what_the_tokenizer_says(tmp_path: Path) -> None:
    """Kyutai's loop takes piece 3 for PAD; other tokenizers have text there, and PAD anywhere."""
    folder = make_served_folder(tmp_path / "model", "streams.text_pad_id=40")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(DIGITS)] * 20), model_writer=model, vocab_size=48, model_type="unigram",
        pad_id=40, hard_vocab_limit=False, minloglevel=2, user_defined_symbols=[f"x{n}" for n in range(22)],
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    served = open_folder(folder)
    speech_server, tape = SpeechServer(served, task=None), Tape(served)
    writer = sphn.OpusStreamWriter(served.codec.sample_rate)
    speech_server._open()
    for token in (3, 40, 0):
        tokens_BS1 = torch.tensor([[[token], [1], [2], [3], [4]]])
        asyncio.run(speech_server._state.decode_and_send(tokens_BS1, tape, writer))
    assert served.tokenizer.is_text(3)
    assert [one[1:].decode() for one in tape.sent if one[0] == 2] == ["x0"]


def expected(served: ServedFolder, task: Task | None, *, heard: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Text `[T]` and own codes `[Q, T]`, from the first frame on."""
    if task is None:
        return without_prompt(served, heard)
    (got,) = answer(
        served.lm,
        [Request(task, num_frames=PROMPT_FRAMES + heard.shape[1] + 1, heard=heard)],
        tokenizer=served.tokenizer,
        streams=served.config.streams,
        timing=timing_of(served.config),
        silence=served.codec.silence_codes.numpy(),
    )
    return got.text, got.codes


def without_prompt(served: ServedFolder, heard: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As Kyutai's `run_inference` does it: the first frame goes in twice."""
    generator = make_generator(served.lm)
    with generator.streaming(1):
        steps = [generator.step(torch.from_numpy(heard[None, :, [max(0, s - 1)]])) for s in range(heard.shape[1] + 1)]
    codes = torch.cat([step for step in steps if step is not None], dim=2)[0].numpy()
    return codes[0], codes[1:]


# ---- clients, over a real websocket in this process ------------------------------------------------------------------


@pytest.fixture
def speech_server(served: ServedFolder) -> SpeechServer:
    return SpeechServer(served, task=ASR)


def with_clients(speech_server: SpeechServer, doing: Callable[[TestClient], Awaitable[None]]) -> None:
    async def main() -> None:
        async with TestClient(TestServer(speech_server.app(PAGE))) as client:
            await asyncio.wait_for(doing(client), 10)

    asyncio.run(main())


def sound(num_frames: int) -> list[bytes]:
    """Messages of 80 ms."""
    writer = sphn.OpusStreamWriter(24000)
    return [SOUND + writer.append_pcm(np.zeros(1920, dtype=np.float32)) for _ in range(num_frames)]


async def reason_of(ws: aiohttp.ClientWebSocketResponse) -> str:
    """Why the server ended it."""
    while (message := await ws.receive()).type is WSMsgType.BINARY:
        pass
    assert message.type is WSMsgType.CLOSE
    return message.extra


def test_who_says_nothing_leaves_the_model_to_others(
    speech_server: SpeechServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "IDLE_SECONDS", 0.3)

    async def doing(client: TestClient) -> None:
        silent, waiting = await client.ws_connect("/api/chat"), await client.ws_connect("/api/chat")
        for _ in range(5):
            await silent.send_bytes(b"\x06")  # a ping is no sound
            await asyncio.sleep(0.1)
        assert await reason_of(silent) == "no sound came for 0 s"
        assert (await waiting.receive()).data[:1] == b"\x02"
        assert (await waiting.receive()).data == b"\x00", "who waits is not idle"

    with_clients(speech_server, doing)


def test_only_so_many_wait(speech_server: SpeechServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MAX_WAITING", 2)

    async def doing(client: TestClient) -> None:
        clients = [await client.ws_connect("/api/chat") for _ in range(4)]
        assert await reason_of(clients[3]) == "2 others are waiting; come back later"
        await clients[1].close()
        again = await client.ws_connect("/api/chat")
        assert (await again.receive()).data[1:].startswith(b"Somebody")

    with_clients(speech_server, doing)


def test_a_machine_that_is_too_slow_says_so(speech_server: SpeechServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_BEHIND", 0.5)
    encode = speech_server._mimi.encode
    monkeypatch.setattr(speech_server._mimi, "encode", lambda x: (time.sleep(0.2), encode(x))[1])

    async def doing(client: TestClient) -> None:
        ws = await client.ws_connect("/api/chat")
        await ws.receive()
        for message in sound(20):
            await ws.send_bytes(message)
        assert "this machine is too slow" in await reason_of(ws)

    with_clients(speech_server, doing)


def test_who_does_not_read_is_given_up(speech_server: SpeechServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SEND_SECONDS", 0.3)
    monkeypatch.setattr(connection, "CLOSE_SECONDS", 0.3)

    async def full(*_: object) -> None:
        await asyncio.sleep(60)  # what a send does while buffers are full

    async def doing(client: TestClient) -> None:
        first = await client.ws_connect("/api/chat")
        await first.receive()
        (theirs,) = speech_server._connections
        monkeypatch.setattr(theirs.ws, "send_bytes", full)
        for message in sound(4):
            await first.send_bytes(message)
        assert await reason_of(first) == "what was said was not read"
        second = await client.ws_connect("/api/chat")
        assert (await second.receive()).data == b"\x00"

    with_clients(speech_server, doing)


def test_a_failing_model_ends_one_client(
    speech_server: SpeechServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory, say")

    async def doing(client: TestClient) -> None:
        with monkeypatch.context() as broken:
            broken.setattr(speech_server._mimi, "encode", fail)
            ws = await client.ws_connect("/api/chat")
            for message in sound(4):
                await ws.send_bytes(message)
            assert "the model failed" in await reason_of(ws)
        second = await client.ws_connect("/api/chat")
        assert (await second.receive()).data == b"\x00"

    with_clients(speech_server, doing)
    assert "out of memory, say" in capsys.readouterr().err
