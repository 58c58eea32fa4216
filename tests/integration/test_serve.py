"""A real server process on the real moshi runtime, and clients of all kinds: those that misbehave end alone."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from importlib.util import find_spec

import numpy as np
import pytest
from served_folder import make_served_folder
from serving import FRAME, ROOT, Client, Served, connected, start

sys.path.insert(0, str(ROOT))

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("moshi", "aiohttp", "sphn")), reason="moshi, aiohttp or sphn is missing"
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("serve")
    folder = make_served_folder(place / "model")
    with start(folder, "--task", "asr-en", log=place / "log") as one:
        yield one


def visit(url: str, doing: Callable[[Client], Awaitable[None]]) -> Client:
    """A client that does something once the server is ready, and stays until it is sent away."""

    async def stay() -> Client:
        async with connected(url) as client:
            await asyncio.wait_for(client.ready.wait(), 30)
            await doing(client)
            await asyncio.wait_for(client.listening, 30)
            return client

    return asyncio.run(stay())


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
    # Who comes while the last one is still leaving is told so; and the last frames may not have come.
    texts = [check_served(served.url).text.rpartition("\n")[2] for _ in range(2)]
    shorter, longer = sorted(texts, key=len)
    assert longer.startswith(shorter), "a session knows of the one before"


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
    from tools import serve

    folder = make_served_folder(tmp_path_factory.mktemp("faulty") / "model")
    assert serve.main([str(folder), *(option.replace("PORT", str(served.port)) for option in options)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("package", ["aiohttp", "sphn"])
def test_without_a_package_the_remedy_is_named(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from tools import serve

    for module in ("megaspeech.streaming.server", "megaspeech.streaming.connection"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delattr("megaspeech.streaming.server", raising=False)
    assert serve.main(["nowhere", "--task", "asr-en"]) == 1
    assert "pip install megaspeech[serve]" in capsys.readouterr().err
