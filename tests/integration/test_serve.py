"""A real server process on the real moshi runtime, and clients of all kinds: those that misbehave end alone."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import pytest
from served_folder import make_served_folder
from small_corpus import voice

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("moshi", "aiohttp", "sphn")), reason="moshi, aiohttp or sphn is missing"
)
RATE = 24000
"""Of the clients, who need not know that of the model (16 kHz)."""
FRAME = 1920
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Served:
    """A process, and where it listens."""

    process: psutil.Process
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("serve")
    folder = make_served_folder(place / "model")
    with start(folder, "--task", "asr-en", log=place / "log") as one:
        yield one


class start:  # noqa: N801
    """The command of the README, until the end of the `with`."""

    def __init__(self, folder: Path, *options: str, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "tools/serve.py", str(folder), "--port", str(port), *options]
        with log.open("w") as file:
            self.popen = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        self.served = Served(psutil.Process(self.popen.pid), port, log)

    def __enter__(self) -> Served:
        until = time.monotonic() + 90
        while "serve: open http" not in self.served.log.read_text():
            assert self.popen.poll() is None and time.monotonic() < until, self.served.log.read_text()
            time.sleep(0.1)
        return self.served

    def __exit__(self, *raised: object) -> None:
        self.popen.terminate()
        assert self.popen.wait(timeout=30) in (0, -15), self.served.log.read_text()


@dataclass
class Client:
    """What a client got; `ready` is set by the handshake, `samples` are the sounds as they came."""

    ws: object
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    samples: list[np.ndarray] = field(default_factory=list)
    text: str = ""
    reason: str = ""

    async def listen(self) -> None:
        import aiohttp
        import sphn

        reader = sphn.OpusStreamReader(RATE)
        while True:
            message = await self.ws.receive()
            if message.type is not aiohttp.WSMsgType.BINARY:
                self.reason = message.extra or ""
                return
            kind, content = message.data[0], message.data[1:]
            if kind == 0:
                self.ready.set()
            elif kind == 1:
                self.samples.append(reader.append_bytes(content))
            else:
                assert kind == 2
                self.text += content.decode()

    async def speak(self, num_frames: int, *, pause: float = 0.02) -> None:
        import sphn

        writer = sphn.OpusStreamWriter(RATE)
        sound = np.resize(voice(2.0, pitch=120.0), FRAME * num_frames)
        for first in range(0, len(sound), FRAME):
            await self.ws.send_bytes(b"\x01" + writer.append_pcm(sound[first : first + FRAME]))
            await asyncio.sleep(pause)


def visit(url: str, doing: Callable[[Client], Awaitable[None]]) -> Client:
    """A client that does something once the server is ready, and stays until it is sent away."""

    async def stay() -> Client:
        async with connected(url) as client:
            await asyncio.wait_for(client.ready.wait(), 30)
            await doing(client)
            await asyncio.wait_for(client.listening, 30)
            return client

    return asyncio.run(stay())


class connected:  # noqa: N801
    """A client that listens, as long as the `async with` lasts."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def __aenter__(self) -> Client:
        import aiohttp

        self.session = aiohttp.ClientSession()
        self.client = Client(await self.session.ws_connect(f"{self.url}/api/chat"))
        self.client.listening = asyncio.create_task(self.client.listen())
        return self.client

    async def __aexit__(self, *raised: object) -> None:
        self.client.listening.cancel()
        await self.client.ws.close()
        await self.session.close()


async def converse(url: str, *, num_frames: int = 12) -> Client:
    """An ordinary client: speaks, and hears as much."""
    async with connected(url) as client:
        await asyncio.wait_for(client.ready.wait(), 30)
        await client.speak(num_frames)
        until = time.monotonic() + 20
        while sum(map(len, client.samples)) < FRAME * (num_frames - 3) and time.monotonic() < until:
            await asyncio.sleep(0.02)
        return client


def check_served(url: str) -> Client:
    """That an ordinary client is served."""
    client = asyncio.run(converse(url))
    said = np.concatenate(client.samples)
    assert len(said) >= FRAME * 9 and np.abs(said).max() > 0.01
    assert client.text.strip() and "<" not in client.text, "the prompt is not for the client"
    return client


def test_a_client_is_heard_and_answered(served: Served) -> None:
    first, second = check_served(served.url), check_served(served.url)
    assert first.text == second.text, "a session knows of the one before"


def test_who_comes_second_is_told_to_wait_and_then_served(served: Served) -> None:
    async def two() -> None:
        async with connected(served.url) as first:
            await asyncio.wait_for(first.ready.wait(), 30)
            async with connected(served.url) as second:
                await first.speak(6)
                await second.speak(3)  # is not kept
                assert "Somebody else is talking" in second.text and not second.ready.is_set()
                assert not second.samples and first.samples
                await first.ws.close()
                await asyncio.wait_for(second.ready.wait(), 30)
                told = len(second.text)
                await second.speak(6)
                until = time.monotonic() + 20
                while not second.samples and time.monotonic() < until:
                    await asyncio.sleep(0.02)
                assert second.samples and told

    asyncio.run(two())


def test_who_leaves_while_waiting_is_forgotten(served: Served) -> None:
    async def three() -> None:
        async with connected(served.url) as first:
            await asyncio.wait_for(first.ready.wait(), 30)
            for _ in range(3):
                async with connected(served.url) as impatient:
                    while not impatient.text:
                        await asyncio.sleep(0.01)
            async with connected(served.url) as second:
                while not second.text:
                    await asyncio.sleep(0.01)
                await first.ws.close()
                await asyncio.wait_for(second.ready.wait(), 30)

    asyncio.run(three())
    check_served(served.url)


@pytest.mark.parametrize(
    ("message", "code", "reason"),
    [
        (b"\x09what", 1003, "unknown kind 9"),
        ("hello", 1003, "text frame"),
        (b"", 1007, "empty message"),
        (b"\x01" + b"no pages at all, but long enough", 1007, "no Ogg Opus"),
        (b"\x01OggS" + bytes(200), 1007, "no Ogg Opus"),
        (b"\x01" + bytes(1 << 20), 1009, ""),
    ],
    ids=["unknown", "text", "empty", "garbage", "bad page", "huge"],
)
def test_a_malformed_message_ends_its_client_alone(
    served: Served, message: bytes | str, code: int, reason: str
) -> None:
    async def misbehave(client: Client) -> None:
        await client.speak(2)
        await (client.ws.send_str(message) if isinstance(message, str) else client.ws.send_bytes(message))

    client = visit(served.url, misbehave)
    assert client.ws.close_code == code and reason in client.reason
    check_served(served.url)


def test_soundless_messages_have_an_end(served: Served) -> None:
    async def ping(client: Client) -> None:
        for _ in range(40):
            await client.ws.send_bytes(b"\x06" + bytes(2000))

    assert "without a sound" in visit(served.url, ping).reason
    check_served(served.url)


def test_a_dropped_connection_frees_the_model(served: Served) -> None:
    async def drop() -> None:
        async with connected(served.url) as client:
            await asyncio.wait_for(client.ready.wait(), 30)
            await client.speak(5, pause=0)
            client.ws._response.connection.transport.abort()  # as where a cable is pulled: no farewell

    asyncio.run(drop())
    started = time.monotonic()
    check_served(served.url)
    assert time.monotonic() - started < 15


def test_a_flood_ends_with_a_reason_and_takes_no_memory(served: Served) -> None:
    check_served(served.url)
    before = served.process.memory_info().rss

    async def flood(client: Client) -> None:
        try:
            await client.speak(4000, pause=0)  # five minutes
        except ConnectionError:
            return

    client = visit(served.url, flood)
    assert client.ws.close_code == 1008 and "as fast as it is spoken" in client.reason
    assert served.process.memory_info().rss - before < 100 << 20
    check_served(served.url)


def test_the_page_is_served_and_nothing_beside_it(served: Served) -> None:
    import urllib.error
    import urllib.request

    with urllib.request.urlopen(served.url) as page:
        assert b"</html>" in page.read()
    for path in ("/../server.py", "/%2e%2e/server.py", "/nothing"):
        with pytest.raises(urllib.error.HTTPError, match="40[34]"):
            urllib.request.urlopen(served.url + path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--task is missing"),
        (["--task", "asr"], "'asr' is no task"),
        (["--task", "tts-en"], "hears nothing"),
        (["--task", "asr-fr"], "<fr>"),
        (["--task", "asr-en", "--static", "docs"], "no index.html"),
        (["--task", "asr-en", "--port", "PORT"], "in use"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    served: Served,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    sys.path.insert(0, str(ROOT))
    from tools import serve

    folder = make_served_folder(tmp_path_factory.mktemp("faulty") / "model")
    assert serve.main([str(folder), *(option.replace("PORT", str(served.port)) for option in options)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
