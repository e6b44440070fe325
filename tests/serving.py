"""What the server's tests share: the packaged nano, the real application on a port of this machine, and sounds."""

import asyncio
import base64
import contextlib
import functools
import io
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import openai
import pytest
import soundfile
import soxr
import torch
import uvicorn
import websockets
from openai.types.realtime import RealtimeServerEvent

from minimind_o_hf.chat import load
from minimind_o_hf.packaged import default_checkpoint, speaker_encoder_of
from minimind_o_hf.server.app import create_app
from minimind_o_hf.server.settings import ServerSettings

DATA = Path(__file__).resolve().parent / "data"
RATE = 24000  # Hz, of the realtime protocol
QUESTION = "flite_where_does_a_pig_live.flac"


@functools.cache
def load_nano() -> tuple[Any, Any]:
    """The trained nano that the package carries, and its processor; loaded once."""
    torch.set_num_threads(1)
    return load(str(default_checkpoint()), "cpu", "float32")


def wait_until(true: Callable[[], Any], seconds: float = 20.0) -> None:
    """Waits for what another thread does."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.005)


# ---------------------------------------------------------------- the server


class _Errors(logging.Handler):
    """What a thread logs as errors."""

    def __init__(self, thread: threading.Thread):
        super().__init__(logging.ERROR)
        self.thread = thread
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        # Of a websocket that was refused with an HTTP status, as it should be, uvicorn says that it was not opened.
        if record.thread != self.thread.ident or "without completing handshake" in record.getMessage():
            return
        self.said.append(f"{record.name}: {record.getMessage()} {record.exc_info}")


class Server:
    """
    The application behind a real socket, in a thread of this process.

    Args:
        ping_seconds (`float`): How often websockets are pinged, and how long they may take to answer.
        send_buffer (`int`, *optional*): Of each connection, in bytes, so that a client who reads nothing is soon felt.
        **settings: Of [`ServerSettings`].

    Attributes:
        errors (list of `str`): What it logged as errors; the tests expect none.
        loop (`asyncio.AbstractEventLoop`): The one that it runs in.
    """

    def __init__(self, ping_seconds: float = 20.0, send_buffer: int | None = None, **settings: Any):
        settings = {"model_name": "nano", "speaker_encoder": speaker_encoder_of(None), "max_turns": 8, **settings}
        self.settings = ServerSettings(**{"requests_per_minute": 0, **settings})
        self.app = create_app(*load_nano(), self.settings)
        self.service = self.app.state.service
        self.engine = self.service.engine
        self._listener = socket.create_server(("127.0.0.1", 0))
        if send_buffer is not None:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.websocket_url = f"ws://127.0.0.1:{self.port}/v1/realtime?model=nano"
        config = uvicorn.Config(
            self.app,
            log_config=None,
            ws_max_size=self.settings.max_body,
            ws_ping_interval=ping_seconds,
            ws_ping_timeout=ping_seconds,
            timeout_graceful_shutdown=5,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run)
        self._handler = _Errors(self._thread)
        self.errors = self._handler.said

    def _run(self) -> None:
        async def serve() -> None:
            self.loop = asyncio.get_running_loop()
            await self._server.serve(sockets=[self._listener])

        asyncio.run(serve())

    def start(self) -> "Server":
        for name in ("uvicorn.error", "minimind_o_hf.server", "asyncio"):
            logging.getLogger(name).addHandler(self._handler)
        self._thread.start()
        wait_until(lambda: self._server.started or not self._thread.is_alive())
        return self

    def stop(self) -> None:
        """As a signal does."""
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive(), "the server does not stop"
        for name in ("uvicorn.error", "minimind_o_hf.server", "asyncio"):
            logging.getLogger(name).removeHandler(self._handler)

    def call(self, function: Callable[[], Any]) -> Any:
        """What a function or coroutine function returns in the server's loop."""

        async def run() -> Any:
            result = function()
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(30)

    @property
    def num_tasks(self) -> int:
        """Tasks in its loop, without the one that counts them."""
        return self.call(lambda: len(asyncio.all_tasks())) - 1

    @property
    def num_held(self) -> int:
        """Answers, rows and sessions that have not ended."""
        engine = self.engine
        answers = engine.num_open + engine.num_active + engine.num_waiting + len(engine._slots)
        return answers + len(self.service.sessions)

    def wait_until_quiet(self, seconds: float = 20.0) -> None:
        """Until everybody has left."""
        wait_until(lambda: self.num_held == 0, seconds)

    def client(self, **options: Any) -> openai.OpenAI:
        """The official client."""
        options = {"api_key": self.settings.api_key or "none", "max_retries": 0, "timeout": 60.0, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def async_client(self, **options: Any) -> openai.AsyncOpenAI:
        """The official client, for `await`."""
        options = {"api_key": self.settings.api_key or "none", "max_retries": 0, "timeout": 60.0, **options}
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", **options)


@contextlib.contextmanager
def serving(**settings: Any) -> Iterator[Server]:
    """A server that runs in the block, and has nothing to complain of and nothing left in the end."""
    server = Server(**settings).start()
    try:
        yield server
        server.wait_until_quiet()
    finally:
        server.stop()
    assert server.errors == [], server.errors
    assert not [t.name for t in threading.enumerate() if t in server.engine._threads]


# ---------------------------------------------------------------- realtime


KINDS = get_args(get_args(RealtimeServerEvent)[0])
EVENTS = {get_args(kind.model_fields["type"].annotation)[0]: kind for kind in KINDS}


def check_event(data: bytes | str) -> Any:
    """A server's event, with all that the official client's types ask of it."""
    return EVENTS[json.loads(data)["type"]].model_validate_json(data)


class Talk:
    """A realtime connection of the official client, with all that was heard on it."""

    def __init__(self, connection: Any):
        self.connection = connection
        self.events: list[Any] = []

    async def next(self, seconds: float = 20.0) -> Any:
        data = await asyncio.wait_for(self.connection.recv_bytes(), seconds)
        # The client takes what it gets; its types say what there must be.
        check_event(data)
        event = self.connection.parse_event(data)
        self.events.append(event)
        return event

    async def until(self, kind: str, seconds: float = 30.0) -> Any:
        """The next event of a kind; an error fails, unless it is what is waited for."""
        async with asyncio.timeout(seconds):
            while True:
                event = await self.next(seconds)
                if event.type == kind:
                    return event
                assert event.type != "error", event.error

    async def error(self) -> Any:
        return (await self.until("error")).error

    async def say(self, text: str, **item: Any) -> Any:
        """Adds a message of the user."""
        content = [{"type": "input_text", "text": text}]
        await self.connection.conversation.item.create(
            item={"type": "message", "role": "user", "content": content, **item}
        )
        return (await self.until("conversation.item.done")).item

    async def ask(self, text: str, **response: Any) -> Any:
        """Asks, and reads the answer; its `response.done`."""
        await self.say(text)
        await self.connection.response.create(response=response)
        return (await self.until("response.done")).response

    def sound(self) -> np.ndarray:
        """All sound that came so far, int16."""
        deltas = [base64.b64decode(e.delta) for e in self.events if e.type == "response.output_audio.delta"]
        return np.frombuffer(b"".join(deltas), "<i2")


@contextlib.asynccontextmanager
async def talking(server: Server, manual: bool = False) -> AsyncIterator[Talk]:
    """A session, without voice activity detection where `manual`."""
    async with server.async_client().realtime.connect(model="nano") as connection:
        talk = Talk(connection)
        assert (await talk.next()).type == "session.created"
        if manual:
            await connection.session.update(session={"type": "realtime", "audio": {"input": {"turn_detection": None}}})
            await talk.until("session.updated")
        yield talk


def make_endless(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many answers are short: these go on for 25 s, until they are stopped."""
    config = server.service.model.generation_config
    for name, value in {"min_new_tokens": 300, "max_new_tokens": 310}.items():
        monkeypatch.setattr(config, name, value)


def raw(server: Server, **options: Any) -> Any:
    """A websocket without a client library's ideas of what may be sent."""
    return websockets.connect(server.websocket_url, max_size=None, **options)


# ---------------------------------------------------------------- sounds and pictures


def question(rate: int = RATE) -> np.ndarray:
    """A spoken question, 1.7 s: float32 at a rate."""
    samples, own = soundfile.read(DATA / QUESTION, dtype="float32")
    return soxr.resample(samples, own, rate).astype(np.float32)


def pcm16(samples: np.ndarray) -> bytes:
    return (np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def sound_file(samples: np.ndarray, rate: int, kind: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind)
    return buffer.getvalue()


def picture_url() -> str:
    return f"data:image/png;base64,{base64_of((DATA / 'two_blue_circles.png').read_bytes())}"
