"""A page in a real Chromium without a window, driven over its DevTools websocket; its microphone plays a file."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--no-first-run",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--remote-debugging-port=0",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)


class Browser:
    """Chromium on a page, as long as the `async with` lasts.

    Args:
        url: of the page.
        microphone: a WAV that it hears, over and over.
        profile: an empty folder.
    """

    def __init__(self, url: str, *, microphone: Path, profile: Path) -> None:
        self.url, self.microphone, self.profile = url, microphone, profile
        self.num_sent = 0

    async def __aenter__(self) -> Browser:
        places = [f"--user-data-dir={self.profile}", f"--use-file-for-fake-audio-capture={self.microphone}"]
        with (self.profile / "log").open("w") as log:
            self.process = subprocess.Popen([str(CHROMIUM), *OPTIONS, *places, "about:blank"], stdout=log, stderr=log)
        address = self.profile / "DevToolsActivePort"
        until = time.monotonic() + 60
        while not (address.is_file() and len(address.read_text().splitlines()) == 2):
            assert self.process.poll() is None and time.monotonic() < until, (self.profile / "log").read_text()
            await asyncio.sleep(0.1)
        port = address.read_text().split()[0]
        self.session = aiohttp.ClientSession()
        async with self.session.put(f"http://127.0.0.1:{port}/json/new?{self.url}") as answer:
            page = await answer.json()
        self.ws = await self.session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)
        await self.until(f"location.href.startsWith('{self.url}') && document.readyState === 'complete'")
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.session.close()
        self.process.terminate()
        self.process.wait(timeout=30)

    async def run(self, script: str) -> Any:
        """The value of some JavaScript, run as where the user clicked."""
        self.num_sent += 1
        how = {"expression": script, "awaitPromise": True, "returnByValue": True, "userGesture": True}
        await self.ws.send_json({"id": self.num_sent, "method": "Runtime.evaluate", "params": how})
        while (answer := await self.ws.receive_json()).get("id") != self.num_sent:
            pass
        result = answer["result"]
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, condition: str, *, seconds: float = 30) -> None:
        """Wait until some JavaScript is true."""
        end = time.monotonic() + seconds
        while not await self.run(condition):
            assert time.monotonic() < end, f"never came: {condition}"
            await asyncio.sleep(0.05)
