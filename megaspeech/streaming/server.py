"""Kyutai's `moshi.server` on a converted folder: any codec that streams, the prompt of a task, clients that misbehave.

The model is held, heard and answered by Kyutai's own `ServerState`: its loop takes sound a frame at a time and steps
the generator. Here is what it lacks: a codec that is not Mimi looks like it (`CodecAsMimi`); text is what the tokenizer
says; a session opens with the prompt; whoever comes second is told to wait and has a turn; whoever sends what it should
not is sent away with a reason (`connection`), and the next one is served.

The loop drops a client's first frame, because its first step hears nothing. With a prompt, this is the step after it.
"""

from __future__ import annotations

import ast
import asyncio
import concurrent.futures
import importlib.util
import sys
import traceback
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from megaspeech.codecs.protocol import Codec
from megaspeech.data.tasks import ZERO_TOKEN, Task
from megaspeech.streaming.live import LiveText, prompt_of
from megaspeech.streaming.runtime import MOSHI_VERSION, import_moshi
from megaspeech.streaming.steering import TextScript, TextSteering

try:
    from aiohttp import WSCloseCode, web
    from sphn import OpusStreamWriter

    from megaspeech.streaming.connection import (
        CLOSE_SECONDS,
        MAX_MESSAGE_BYTES,
        SOUND,
        TEXT,
        Connection,
        DecodedSound,
        RefusedError,
    )
except ImportError as error:
    raise ImportError(f"serving needs aiohttp and sphn ({error}): pip install megaspeech[serve]") from None

if TYPE_CHECKING:
    from megaspeech.streaming.folder import ServedFolder

PAGE = Path(__file__).with_name("page")
"""What a browser is given: an own page, in plain JavaScript."""
OPUS_RATES = (8000, 12000, 16000, 24000, 48000)
MAX_WAITING = 8
WAIT = "Somebody else is talking to the model. You are next as soon as they leave, in the order of arrival.\n"


def import_server() -> ModuleType:
    """`moshi.server` with everything but its last statement, which starts it whenever it is imported.

    Raises:
        ImportError: moshi is not installed.
        ValueError: it is another version, whose file does not end so.
    """
    import_moshi()
    spec = importlib.util.find_spec("moshi.server")
    assert isinstance(spec, ModuleSpec) and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"), filename=spec.origin)
    if not isinstance(tree.body[-1], ast.With):
        raise ValueError(f"{spec.origin} is not that of moshi {MOSHI_VERSION}; install that version")
    del tree.body[-1]
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    exec(compile(tree, spec.origin, "exec"), module.__dict__)
    return module


class CodecAsMimi:
    """A codec with what `moshi.server` asks of Mimi. Shapes: B = 1, Q codebooks, N samples."""

    def __init__(self, codec: Codec, *, num_given_codebooks: int) -> None:
        self._codec = codec
        self.sample_rate, self.frame_rate = codec.sample_rate, codec.frame_rate
        self.deaf_BQT = torch.full((1, num_given_codebooks, 1), ZERO_TOKEN, device=codec.device)
        """The codes of nothing heard."""
        self.is_deaf = False
        """Whether the next frame is not heard."""

    def streaming_forever(self, batch_size: int) -> None:
        """Start over; there is one session at a time."""
        assert batch_size == 1
        self.reset_streaming()

    def reset_streaming(self) -> None:
        """Start over."""
        self._encoder, self._decoder = self._codec.streaming_encoder(), self._codec.streaming_decoder()

    def encode(self, samples_B1N: torch.Tensor) -> torch.Tensor:
        """Samples of a frame to codes `[B, Q, 1]`."""
        if self.is_deaf:
            self.is_deaf = False
            return self.deaf_BQT
        return self._encoder.step(samples_B1N[:, 0])[..., None][:, : self.deaf_BQT.shape[1]]

    def decode(self, codes_BQ1: torch.Tensor) -> torch.Tensor:
        """Codes of a frame to samples `[B, 1, N]`; silence of a model that does not speak."""
        if not codes_BQ1.shape[1]:
            return torch.zeros(1, 1, self._codec.frame_size)
        return self._decoder.step(codes_BQ1[..., 0])[:, None]


class SpeechServer:
    """A model that is served to one client at a time.

    Args:
        served: the model and what belongs to it.
        task: what every session is asked; None for a model that knows no tasks.
        temperature: of the draws; None takes the most likely tokens for a task, and draws as moshi does without.

    Raises:
        ValueError: the model, the task and the codec cannot be served together.
        ImportError: moshi is not installed.
    """

    def __init__(self, served: ServedFolder, *, task: Task | None, temperature: float | None = None) -> None:
        streams, codec = served.config.streams, served.codec
        if task is not None and not task.hears:
            raise ValueError(f"task {task.key}: a client speaks, and this task hears nothing; see tools/stream.py")
        if codec.sample_rate not in OPUS_RATES:
            raise ValueError(f"codec {codec.name}: {codec.sample_rate} Hz is no rate of Opus ({OPUS_RATES})")
        self.sample_rate = codec.sample_rate
        self._prompt = prompt_of(task, tokenizer=served.tokenizer)
        self._streams = streams
        self._mimi = CodecAsMimi(codec, num_given_codebooks=streams.num_given_codebooks)
        self._tokenizer = served.tokenizer
        draws: dict = {} if temperature is None else {"temp": temperature, "temp_text": temperature}
        if task is not None and temperature is None:
            draws = {"use_sampling": False}
        # One thread for all that the model does: one session at a time, and nobody else waits for it.
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        server = import_server()
        self._state = self._thread.submit(
            server.ServerState, "moshi", self._mimi, None, served.lm, 1.0, served.lm.device, **draws
        ).result()
        self._state.decode_and_send = self._send
        self._connections: set[Connection] = set()

    def warm_up(self) -> None:
        """Make the GPU's graphs before the first client comes; a CPU has none."""
        if self._state.device.type == "cuda":
            self._thread.submit(self._state.warmup).result()

    def app(self, static: Path) -> web.Application:
        """What answers: Kyutai's `/api/chat`, and the files of the folder `static`."""
        app = web.Application()
        app.router.add_get("/api/chat", self.handle_chat)
        app.router.add_get("/", lambda _: _file(static / "index.html"))
        app.router.add_static("/", path=static)
        app.on_shutdown.append(self._shut_down)
        return app

    async def handle_chat(self, request: web.Request) -> web.WebSocketResponse:
        """A client, from its coming to its going."""
        ws = web.WebSocketResponse(max_msg_size=MAX_MESSAGE_BYTES, autoping=False)
        await ws.prepare(request)
        connection = Connection(ws, transport=request.transport, sample_rate=self.sample_rate)
        self._connections.add(connection)
        reading, answering = (asyncio.create_task(one) for one in (connection.read(), self._answer(connection)))
        try:
            await asyncio.wait({reading, answering}, return_when=asyncio.FIRST_COMPLETED)
            await self._part(connection, reading=reading, answering=answering)
        finally:
            connection.hang_up()  # or the model's thread would listen for ever
            self._connections.discard(connection)
        return ws

    async def _part(self, connection: Connection, *, reading: asyncio.Task, answering: asyncio.Task) -> None:
        """End both sides of a connection of which one has ended, and tell the client why."""
        connection.hang_up()
        reading.cancel()
        if not connection.is_answered:
            answering.cancel()
        for task in (reading, answering):
            try:
                await task
            except (asyncio.CancelledError, ConnectionError):
                continue  # the client has gone
            except RefusedError as refusal:
                self._log(f"client sent away: {refusal.reason}")
                await connection.close(code=refusal.code, reason=refusal.reason)
        await connection.close()

    async def _answer(self, connection: Connection) -> None:
        """Wait for the turn, then be heard and answered until the client goes."""
        state = self._state
        if state.lock.locked():
            if len(self._connections) > 1 + MAX_WAITING:
                raise RefusedError(WSCloseCode.TRY_AGAIN_LATER, f"{MAX_WAITING} others are waiting; come back later")
            await connection.ws.send_bytes(TEXT + WAIT.encode())
        async with state.lock:
            connection.begin()
            await asyncio.get_running_loop().run_in_executor(self._thread, self._converse, connection)

    @torch.no_grad()
    def _converse(self, connection: Connection) -> None:
        """In the model's thread: open a session, and let Kyutai's loop go on with it."""
        try:
            self._open()
            writer = OpusStreamWriter(self.sample_rate)
            asyncio.run(self._session(connection, writer))
        except ConnectionError:
            raise
        except (TimeoutError, concurrent.futures.TimeoutError):
            raise RefusedError(WSCloseCode.POLICY_VIOLATION, "what was said was not read") from None
        except Exception as error:
            traceback.print_exc()
            raise RefusedError(WSCloseCode.INTERNAL_ERROR, "the model failed; see the server's output") from error

    async def _session(self, connection: Connection, writer: OpusStreamWriter) -> None:
        await connection.send_bytes(b"\x00")
        await self._state.recv_loop(connection, DecodedSound(), writer)

    async def _send(self, tokens_BS1: torch.Tensor, ws: Connection, writer: OpusStreamWriter) -> None:
        """What a step gave, for Kyutai's loop, whose own takes pieces 0 and 3 for no text whatever the tokenizer."""
        samples_B1N = self._mimi.decode(tokens_BS1[:, 1:])
        if pages := writer.append_pcm(samples_B1N[0, 0].cpu().numpy()):
            await ws.send_bytes(SOUND + pages)
        if text := self._text.push(int(tokens_BS1[0, 0])):
            await ws.send_bytes(TEXT + text.encode())

    def _open(self) -> None:
        """Start over, and step through the prompt."""
        state, device = self._state, self._state.device
        self._mimi.reset_streaming()
        self._mimi.is_deaf = True
        self._text = LiveText(self._tokenizer)
        state.lm_gen.reset_streaming()
        script = TextScript(self._prompt, words=None, streams=self._streams)
        state.lm_gen.on_text_hook = TextSteering([script], streams=self._streams, device=device).force
        for _ in self._prompt:
            state.lm_gen.step(self._mimi.deaf_BQT.to(device))

    async def _shut_down(self, _: web.Application) -> None:
        for connection in tuple(self._connections):
            connection.hang_up()

    def _log(self, line: str) -> None:
        print(f"serve: {line}", flush=True)


async def _file(path: Path) -> web.FileResponse:
    return web.FileResponse(path)


def run(app: web.Application, *, host: str, port: int) -> None:
    """Serve until interrupted.

    Raises:
        OSError: the address is taken, or is none of this machine's.
    """
    web.run_app(
        app,
        host=host,
        port=port,
        print=lambda _: print(f"serve: open http://{host}:{port} in a browser", flush=True),  # once it listens
        shutdown_timeout=CLOSE_SECONDS,
    )
