"""One client of the server: what it sends is checked at the door, before the model hears it.

Kyutai's protocol, in binary messages of the websocket: a byte that tells the kind, then what it says; 0 handshake (the
server is ready), 1 sound as pages of Ogg Opus, 2 text in UTF-8, 3 control, 4 metadata, 5 error, 6 ping. Their server
only heeds sound, and so do we.

Messages are read by the server's event loop, and heard by Kyutai's `recv_loop` in a thread of its own. So a frame that
the model works on keeps nobody waiting, and what waits to be heard can be bounded. Shapes: N samples.
"""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import numpy as np
import sphn
from aiohttp import WSCloseCode, WSMsgType, web

SOUND, TEXT = b"\x01", b"\x02"
NO_SOUND = np.zeros(0, dtype=np.float32)
IGNORED_KINDS = (0, 3, 4, 6)
MAX_MESSAGE_BYTES = 1 << 14
"""Opus takes at most 64 kB a second; pages are of some 40 to 80 ms."""
MAX_SOUNDLESS_BYTES = 1 << 16
"""What may come without a sound in it: headers, and what is ignored."""
MAX_AHEAD = 10.0
"""Seconds of sound beyond the time that has passed: what a page sends that was held up."""
MAX_BEHIND = 2 * MAX_AHEAD
"""Seconds of sound that may wait for the model; more than a flood can bring before it is known for one."""
IDLE_SECONDS = 30.0
"""After which a client that sends no sound leaves the model to others."""
SEND_SECONDS = 10.0
"""After which a client that does not read is given up."""

CLOSE_SECONDS = 5.0
"""After which a client that does not take its leave is cut off."""


class RefusedError(Exception):
    """Why a client is sent away: a code of RFC 6455 section 7.4.1, and a reason of at most 123 bytes."""

    def __init__(self, code: WSCloseCode, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


@dataclass(frozen=True)
class Heard:
    """A message as `recv_loop` takes it; the sound in it is decoded."""

    data: bytes
    type: WSMsgType = WSMsgType.BINARY


class DecodedSound:
    """The Opus reader of a sound that was decoded at the door."""

    def append_bytes(self, payload: bytes) -> np.ndarray:
        """float32 samples."""
        return np.frombuffer(bytearray(payload), dtype=np.float32)  # writable, as torch likes it


@dataclass
class Clock:
    """Seconds of sound that came, and that were taken from the queue, since a session began."""

    began: float = field(default_factory=time.monotonic)
    last_sound: float = field(default_factory=time.monotonic)
    received: float = 0.0
    taken: float = 0.0

    def check(self) -> None:
        """Raises RefusedError where no sound comes, or it runs too far ahead of the time, or of the model."""
        now = time.monotonic()
        if now - self.last_sound > IDLE_SECONDS:
            raise RefusedError(WSCloseCode.POLICY_VIOLATION, f"no sound came for {IDLE_SECONDS:.0f} s")
        if self.received - (now - self.began) > MAX_AHEAD:
            raise RefusedError(
                WSCloseCode.POLICY_VIOLATION, f"more than {MAX_AHEAD:.0f} s ahead: send sound as fast as it is spoken"
            )
        if self.received - self.taken > MAX_BEHIND:
            raise RefusedError(
                WSCloseCode.TRY_AGAIN_LATER, f"the model is {MAX_BEHIND:.0f} s behind: this machine is too slow for it"
            )


class Connection:
    """A client, from both sides: `read` is the server's; the rest is the websocket as `recv_loop` sees it.

    Args:
        ws: prepared, not answering pings by itself.
        transport: that of its request.
        sample_rate: of the sound that the model hears.
    """

    def __init__(self, ws: web.WebSocketResponse, *, transport: asyncio.BaseTransport | None, sample_rate: int) -> None:
        self.ws, self._transport = ws, transport
        self._loop = asyncio.get_running_loop()
        self._opus, self._sample_rate = sphn.OpusStreamReader(sample_rate), sample_rate
        self._soundless_bytes = 0
        self._is_over = False
        self._clock: Clock | None = None
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    @property
    def is_answered(self) -> bool:
        """Whether the client's session has begun."""
        return self._clock is not None

    def begin(self) -> None:
        """From now on the sound is heard; until now it was dropped."""
        self._clock = Clock()

    def hang_up(self) -> None:
        """The end of what is heard, whatever still waits to be."""
        self._is_over = True
        self._queue.put(None)

    async def close(self, *, code: int = WSCloseCode.OK, reason: str = "") -> None:
        """Take leave of the client, who need not be there, or listen, any more."""
        try:
            await asyncio.wait_for(self.ws.close(code=code, message=reason.encode()), timeout=CLOSE_SECONDS)
        except (asyncio.TimeoutError, ConnectionError):
            if self._transport is not None:
                self._transport.abort()

    async def read(self) -> None:
        """Take what the client sends until it goes.

        Raises:
            RefusedError: it sent what it should not have, or nothing for too long.
        """
        while True:
            try:
                message = await self.ws.receive(timeout=IDLE_SECONDS)
            except asyncio.TimeoutError:
                self._take(NO_SOUND)
                continue
            if message.type in (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR):
                return
            if message.type is WSMsgType.PING:
                await self.ws.pong(message.data)
            self._take(self._sound_in(message))
            await asyncio.sleep(0)  # messages that are there already are received without a pause for others

    def _sound_in(self, message: web.WSMessage) -> np.ndarray:
        """The samples of a message, which may be none."""
        data = message.data
        self._soundless_bytes += 1 + len(data)
        if message.type is WSMsgType.TEXT:
            raise RefusedError(WSCloseCode.UNSUPPORTED_DATA, "a text frame: sound comes in binary ones")
        if message.type is WSMsgType.BINARY:
            if not data:
                raise RefusedError(WSCloseCode.INVALID_TEXT, "an empty message: its first byte tells its kind")
            if data[:1] == SOUND:
                return self._decoded(data[1:])
            if data[0] not in IGNORED_KINDS:
                raise RefusedError(WSCloseCode.UNSUPPORTED_DATA, f"a message of the unknown kind {data[0]}; 1 is sound")
        self._check_soundless()
        return NO_SOUND

    def _decoded(self, pages: bytes) -> np.ndarray:
        try:
            samples_N = self._opus.append_bytes(pages)
        except ValueError as error:
            raise RefusedError(WSCloseCode.INVALID_TEXT, f"no Ogg Opus: {error}"[:120]) from error
        if len(samples_N):
            self._soundless_bytes = 0
        self._check_soundless()
        return samples_N

    def _check_soundless(self) -> None:
        if self._soundless_bytes > MAX_SOUNDLESS_BYTES:
            raise RefusedError(WSCloseCode.POLICY_VIOLATION, f"{self._soundless_bytes} bytes without a sound in them")

    def _take(self, samples_N: np.ndarray) -> None:
        if self._clock is None:
            return
        if len(samples_N):
            self._clock.last_sound = time.monotonic()
            self._clock.received += len(samples_N) / self._sample_rate
            self._queue.put(samples_N.astype(np.float32).tobytes())
        self._clock.check()

    # ---- what recv_loop sees, in its own thread ---------------------------------------------------------------------

    async def __aiter__(self) -> AsyncIterator[Heard]:
        while (sound := self._queue.get()) is not None and not self._is_over:
            assert self._clock is not None
            self._clock.taken += len(sound) / 4 / self._sample_rate
            yield Heard(SOUND + sound)

    async def send_bytes(self, data: bytes) -> None:
        """Have the server's loop send it, and wait until it has.

        Raises:
            ConnectionError: the client is gone.
            TimeoutError: it does not read.
        """
        if self._is_over:
            raise ConnectionResetError("the client has gone")
        asyncio.run_coroutine_threadsafe(self.ws.send_bytes(data), self._loop).result(timeout=SEND_SECONDS)
