"""A real server process, and clients of it."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from small_corpus import voice

RATE = 24000
"""Of the clients, who need not know that of the model (16 kHz)."""
FRAME = 1920
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Served:
    """A process, and where it listens."""

    process: psutil.Process
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class start:
    """The command of the README, until the end of the `with`."""

    def __init__(self, folder: Path, *options: str, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "tools/serve.py", str(folder), "--port", str(port), "--device", "cpu", *options]
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


class connected:
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
