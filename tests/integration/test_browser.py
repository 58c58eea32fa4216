"""The page that the server serves, in a real browser: it sends what the microphone hears, shows text, plays sound."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile
from served_folder import make_served_folder
from serving import Served, connected, start
from small_corpus import RATE, voice

if any(find_spec(name) is None for name in ("moshi", "aiohttp", "sphn")):
    pytest.skip("moshi, aiohttp or sphn is not installed", allow_module_level=True)

from browser import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")

WATCH = """
window.played = [];
const start = AudioBufferSourceNode.prototype.start;
AudioBufferSourceNode.prototype.start = function (when) {
  played.push({ when, seconds: this.buffer.duration, loudest: Math.max(...this.buffer.getChannelData(0)) });
  return start.call(this, when);
};
"""
"""Keeps what the page plays, which goes on to be played."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("browser")
    with start(make_served_folder(place / "model"), "--task", "s2s-en", log=place / "log") as one:
        yield one


def visit(served: Served, tmp_path: Path) -> Browser:
    soundfile.write(tmp_path / "microphone.wav", voice(3.0, pitch=130.0), RATE)
    profile = tmp_path / "profile"
    profile.mkdir()
    return Browser(served.url, microphone=tmp_path / "microphone.wav", profile=profile)


def test_a_user_talks_and_is_answered(served: Served, tmp_path: Path) -> None:
    async def talk() -> None:
        async with visit(served, tmp_path) as page:
            await page.run(WATCH)
            await page.run("document.getElementById('talk').click()")
            await page.until("played.length >= 40")
            await page.until("document.getElementById('text').textContent.trim().length > 10")
            assert await page.run("document.getElementById('status').textContent") == "Speak."
            assert await page.run("document.getElementById('you').value") > 0
            played = await page.run("played")
            assert max(one["loudest"] for one in played) > 0.01
            ends = np.array([one["when"] + one["seconds"] for one in played])
            starts = np.array([one["when"] for one in played])
            assert (starts[1:] >= ends[:-1] - 1e-6).all(), "packets overlap"
            await page.run("document.getElementById('talk').click()")
            await page.until("document.getElementById('status').textContent === 'Over.'")
            assert await page.run("document.getElementById('talk').textContent") == "Talk"
        log = served.log.read_text()
        assert "sent away" not in log and "Traceback" not in log, log

    asyncio.run(talk())


def test_the_second_page_waits_and_a_reason_is_shown(served: Served, tmp_path: Path) -> None:
    async def two() -> None:
        async with visit(served, tmp_path) as page:
            async with connected(served.url) as first:
                await first.ready.wait()
                await page.run("document.getElementById('talk').click()")
                await page.until("document.getElementById('text').textContent.includes('Somebody else')")
            await page.until("document.getElementById('status').textContent === 'Speak.'")
            broken = "WebSocket.prototype.send = (send => function () { send.call(this, 'broken') })"
            await page.run(f"{broken}(WebSocket.prototype.send)")
            await page.until("document.getElementById('status').textContent.startsWith('The server left: a text')")
            assert await page.run("document.getElementById('talk').textContent") == "Talk"

    asyncio.run(two())
