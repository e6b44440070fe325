"""Clients that vanish, stall, lie and flood: the server goes on, and nothing of them is left."""

import asyncio
import contextlib
import json
import os
import random
import socket
import threading
import time

import httpx
import numpy as np
import openai
import psutil
import pytest
import websockets
from serving import (
    RATE,
    Server,
    base64_of,
    make_endless,
    pcm16,
    picture_url,
    question,
    raw,
    serving,
    talking,
    wait_until,
)

pytestmark = [
    pytest.mark.slow,
    # Answers that would go on, but must not be as long.
    pytest.mark.filterwarnings("ignore:Unfeasible length"),
    # What is dropped without being closed.
    pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning"),
]
MOST_GROWTH = 20 * 2**20  # bytes
TYPED = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Tell me a story."}]}
MANUAL = {"type": "session.update", "session": {"type": "realtime", "audio": {"input": {"turn_detection": None}}}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(library=tmp_path_factory.mktemp("library") / "voices.safetensors", max_answers=4) as running:
        # What is only made once, is made now.
        asyncio.run(one_turn(running))
        yield running


@pytest.fixture
def endless(server, monkeypatch):
    """Answers that go on for 25 s."""
    make_endless(server, monkeypatch)


async def one_turn(server, seconds=30.0):
    """A normal question, answered."""
    async with talking(server, manual=True) as talk:
        response = await asyncio.wait_for(talk.ask("Where does a lion live?", max_output_tokens=60), seconds)
        assert response.status in ("completed", "incomplete")
        assert talk.sound().size


class Watch:
    """What a server holds, before and after."""

    def __init__(self, server):
        self.server = server
        self.threads, self.tasks = threading.active_count(), server.num_tasks

    def is_as_before(self):
        self.server.wait_until_quiet()
        wait_until(lambda: self.server.num_tasks <= self.tasks, 15)
        wait_until(lambda: len(self.server._server.server_state.connections) == 0, 15)
        # `asyncio.to_thread` keeps up to so many.
        assert threading.active_count() <= max(self.threads, 12 + (os.cpu_count() or 1))
        assert self.server.errors == []
        return True


def memory():
    return psutil.Process().memory_info().rss


async def send(socket, *events):
    for event in events:
        await socket.send(json.dumps(event))


async def until(socket, kind):
    while True:
        event = json.loads(await asyncio.wait_for(socket.recv(), 20))
        if event["type"] == kind:
            return event


# ---------------------------------------------------------------- clients that vanish


def upgrade(server):
    """What opens a websocket."""
    lines = ["GET /v1/realtime HTTP/1.1", f"Host: 127.0.0.1:{server.port}", "Upgrade: websocket"]
    lines += ["Connection: Upgrade", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", "Sec-WebSocket-Version: 13"]
    return "\r\n".join([*lines, "", ""]).encode()


async def handshake(server):
    """A websocket by hand: what is sent on it need not be whole frames."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(upgrade(server))
    assert b" 101 " in await reader.readline()
    return reader, writer


def frame(text, mask=b"\1\2\3\4"):
    """A client's frame of text."""
    data = text.encode()
    masked = bytes(byte ^ mask[at % 4] for at, byte in enumerate(data))
    return bytes([0x81, 0x80 | 126]) + len(data).to_bytes(2, "big") + mask + masked


def hang_up(writer):
    """As a machine that is switched off and on again."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    writer.transport.abort()


async def leave_after_connecting(server):
    async with raw(server):
        pass


async def leave_in_the_handshake(server):
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /v1/realtime HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgra")
    await writer.drain()
    hang_up(writer)


async def leave_while_speaking(server):
    async with raw(server) as connection:
        sound = base64_of(pcm16(question()[: RATE // 2]))
        await send(connection, {"type": "input_audio_buffer.append", "audio": sound})
        connection.transport.abort()


async def leave_after_asking(server):
    async with raw(server) as connection:
        sound = base64_of(pcm16(question()))
        await send(connection, MANUAL, {"type": "input_audio_buffer.append", "audio": sound})
        await send(connection, {"type": "input_audio_buffer.commit"}, {"type": "response.create"})
        await until(connection, "input_audio_buffer.committed")
        connection.transport.abort()


async def leave_at_the_first_sound(server):
    async with raw(server) as connection:
        await send(connection, {"type": "conversation.item.create", "item": TYPED}, {"type": "response.create"})
        await until(connection, "response.output_audio.delta")
        connection.transport.abort()


async def leave_in_the_middle(server):
    async with raw(server) as connection:
        await send(connection, {"type": "conversation.item.create", "item": TYPED}, {"type": "response.create"})
        for _ in range(3):
            await until(connection, "response.output_audio.delta")


async def leave_inside_a_frame(server):
    reader, writer = await handshake(server)
    writer.write(frame(json.dumps(MANUAL)) + frame(json.dumps(MANUAL))[:40])
    await writer.drain()
    await reader.readuntil(b"session.updated")
    writer.close()


async def hang_up_inside_a_frame(server):
    reader, writer = await handshake(server)
    writer.write(frame(json.dumps({"type": "conversation.item.create", "item": TYPED})))
    writer.write(frame(json.dumps({"type": "response.create"}))[:20])
    await writer.drain()
    await reader.readuntil(b"conversation.item.done")
    hang_up(writer)


STAGES = [
    leave_after_connecting,
    leave_in_the_handshake,
    leave_while_speaking,
    leave_after_asking,
    leave_at_the_first_sound,
    leave_in_the_middle,
    leave_inside_a_frame,
    hang_up_inside_a_frame,
]


async def come_and_go(server, count):
    places = asyncio.Semaphore(8)

    async def visit(number):
        async with places:
            await asyncio.wait_for(STAGES[number % len(STAGES)](server), 60)

    await asyncio.gather(*map(visit, range(count)))


def test_two_hundred_clients_that_leave_at_every_stage(server, endless):
    watch = Watch(server)
    asyncio.run(come_and_go(server, 100))
    assert watch.is_as_before()
    before = memory()
    asyncio.run(come_and_go(server, 100))
    assert watch.is_as_before()
    assert memory() - before < MOST_GROWTH
    asyncio.run(one_turn(server))


def test_http_clients_that_leave(server, endless):
    watch, client = Watch(server), server.client()
    messages = [{"role": "user", "content": "Tell me a story."}]
    audio = {"modalities": ["text", "audio"], "audio": {"voice": "slt", "format": "wav"}}
    for number in range(12):
        if number % 3 == 0:
            stream = client.chat.completions.create(model="nano", messages=messages, stream=True, **audio)
            next(iter(stream))
            stream.close()
        elif number % 3 == 1:
            speech = client.audio.speech.with_streaming_response
            with speech.create(model="nano", voice="slt", input="Hello. " * 20) as response:
                next(response.iter_bytes())
        else:
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=0.1).chat.completions.create(model="nano", messages=messages)
    assert watch.is_as_before()


# ---------------------------------------------------------------- events that are no events


def junk(generator, depth=0):
    """A value that is probably wrong."""
    nested = [lambda: [junk(generator, depth + 1) for _ in range(generator.randrange(4))]] if depth < 3 else []
    kinds = [
        lambda: None,
        lambda: generator.choice([True, False]),
        lambda: generator.choice([0, -1, 2**31, -(2**63), 10**40, 1e308, -0.5]),
        lambda: generator.choice([float("nan"), float("inf")]),
        lambda: "".join(generator.choice("aZ/.\0\n\u20ac\U0001f600\ud800") for _ in range(generator.randrange(60))),
        lambda: generator.choice(
            ["../../etc/passwd", "http://127.0.0.1:1/x", "<|im_end|>", "%s%n", "A" * 3000, "===="]
        ),
        lambda: base64_of(generator.randbytes(generator.randrange(200))),
        lambda: {name: junk(generator, depth + 1) for name in generator.sample(FIELDS, 2)} if depth < 3 else {},
        *nested,
    ]
    return generator.choice(kinds)()


FIELDS = [
    *("type", "event_id", "audio", "item", "item_id", "session", "response", "content", "role", "audio_end_ms"),
    *("content_index", "instructions", "output_modalities", "turn_detection", "voice", "output", "input", "id"),
    *("max_output_tokens", "text", "image_url", "format", "rate", "threshold", "__class__", "previous_item_id"),
]
KINDS = [
    *("session.update", "input_audio_buffer.append", "input_audio_buffer.commit", "input_audio_buffer.clear"),
    *("conversation.item.create", "conversation.item.retrieve", "conversation.item.truncate"),
    *("conversation.item.delete", "response.create", "response.cancel", "transcription_session.update", "error"),
]
PICTURE = {"type": "input_image", "image_url": "data:"}
CLIP = {"type": "input_audio", "audio": "AAAA"}
SHAPES = [
    {"type": "session.update", "session": {"type": "realtime", "audio": {"input": {"turn_detection": {}}}}},
    {"type": "session.update", "session": {"type": "realtime", "audio": {"output": {"voice": "slt"}}}},
    {"type": "conversation.item.create", "item": {**TYPED, "content": [PICTURE]}},
    {"type": "conversation.item.create", "item": {**TYPED, "content": [CLIP]}},
    {"type": "conversation.item.create", "item": TYPED},
    {"type": "input_audio_buffer.append", "audio": ""},
    {"type": "response.create", "response": {"audio": {"output": {}}, "max_output_tokens": 1}},
    {"type": "conversation.item.truncate", "item_id": "", "content_index": 0, "audio_end_ms": 0},
]


def damage(generator, value):
    """The same with something wrong somewhere in it."""
    if isinstance(value, dict) and value and generator.random() < 0.8:
        name = generator.choice(sorted(value))
        return {**value, name: damage(generator, value[name])}
    if isinstance(value, list) and value and generator.random() < 0.8:
        return [damage(generator, value[0]), *value[1:]]
    return junk(generator)


def malformed(generator):
    """Text or bytes of an event."""
    kind = generator.randrange(12)
    if kind == 0:
        return generator.randbytes(generator.randrange(1, 300))
    if kind == 1:
        return "".join(chr(generator.randrange(32, 1000)) for _ in range(generator.randrange(200)))
    if kind == 2:
        return generator.choice(["[" * 50_000, '{"a":' * 50_000, "1" * 5000, "", "null", "[]", '"', "NaN", "{}", "\0"])
    if kind < 7:
        event = {"type": generator.choice(KINDS)} | {name: junk(generator) for name in generator.sample(FIELDS, 3)}
    elif kind < 8:
        event = junk(generator)
    else:
        event = damage(generator, generator.choice(SHAPES))
    if isinstance(event, dict):
        event = {"event_id": generator.choice(["mine", 3, None, "\ud800", "x" * 2000]), **event}
    text = json.dumps(event)
    return text[: generator.randrange(1, len(text) + 1)] if generator.random() < 0.1 else text


def test_two_thousand_malformed_events(server):
    watch, sessions, each = Watch(server), 10, 200

    async def bother(number):
        generator = random.Random(number)
        async with raw(server) as connection:
            told = []

            async def listen():
                async for message in connection:
                    told.append(json.loads(message))
                    if told[-1]["type"] == "session.updated" and told[-1]["session"]["instructions"] == "The end.":
                        return

            listening = asyncio.create_task(listen())
            for _ in range(each):
                await connection.send(malformed(generator))
            # As if nothing had been.
            end = {"type": "realtime", "instructions": "The end."}
            await send(connection, {"type": "session.update", "session": end})
            await asyncio.wait_for(listening, 60)
            errors = [event["error"] for event in told if event["type"] == "error"]
            assert all(error["message"] and error["type"] == "invalid_request_error" for error in errors), errors
            assert "site-packages" not in str(errors)
            return len(errors)

    async def bother_all():
        return [await bother(number) for number in range(sessions)]

    refused = sum(asyncio.run(bother_all()))
    assert refused > 0.8 * sessions * each
    assert watch.is_as_before()
    asyncio.run(one_turn(server))


def test_halves_of_characters_come_back(server):
    """JSON has them, UTF-8 has not."""

    async def hold():
        async with raw(server) as connection:
            await connection.send('{"type": "\\ud800", "event_id": "\\ud801"}')
            assert (await until(connection, "error"))["error"]["event_id"] == "\ud801"
            await send(connection, {"type": "conversation.item.create", "item": {**TYPED, "id": "\ud802"}})
            assert (await until(connection, "conversation.item.done"))["item"]["id"] == "\ud802"
            text = {"type": "input_text", "text": "\ud803"}
            await send(connection, {"type": "conversation.item.create", "item": {**TYPED, "content": [text]}})
            assert "surrogate" in (await until(connection, "error"))["error"]["message"]

    asyncio.run(hold())


# ---------------------------------------------------------------- clients that stall


async def stalled(server):
    """A client that asks, and then reads nothing; its connection."""
    connection, loop = socket.socket(), asyncio.get_running_loop()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    await loop.sock_connect(connection, ("127.0.0.1", server.port))
    await loop.sock_sendall(connection, upgrade(server))
    assert b" 101 " in await loop.sock_recv(connection, 100)
    asked = [{"type": "conversation.item.create", "item": TYPED}, {"type": "response.create"}]
    await loop.sock_sendall(connection, b"".join(frame(json.dumps(event)) for event in asked))
    return connection


def test_slow_readers_hold_nobody_up_and_are_given_up(endless, monkeypatch):
    monkeypatch.setattr("minimind_o_hf.server.realtime.SEND_SECONDS", 1.0)

    async def hold(server):
        slow = [await stalled(server) for _ in range(3)]
        begin = time.monotonic()
        await one_turn(server)
        assert time.monotonic() - begin < 10
        await asyncio.to_thread(wait_until, lambda: not server.service.sessions, 15)
        for connection in slow:
            connection.close()

    with serving(send_buffer=8192, max_answers=4) as server:
        asyncio.run(hold(server))


def test_half_open_connections_are_noticed():
    async def hold(server):
        reader, writer = await handshake(server)
        await reader.readuntil(b"session.created")
        begin = time.monotonic()
        assert len(server.service.sessions) == 1
        # It answers no ping, and sends half a frame.
        writer.write(frame(json.dumps(MANUAL))[:30])
        await writer.drain()
        await asyncio.to_thread(server.wait_until_quiet, 5)
        assert time.monotonic() - begin < 3
        writer.close()

    with serving(ping_seconds=0.3) as server:
        asyncio.run(hold(server))


def test_a_client_that_floods_is_read_as_fast_as_it_is_served(server):
    """What it sends waits in its own buffers, not in the server's memory."""
    event = json.dumps({"type": "session.update", "session": {"type": "realtime", "instructions": "x" * 7000}})

    async def hold():
        reader, writer = await handshake(server)
        await reader.readuntil(b"session.created")
        before = memory()
        data = frame(event) * 100  # 0.7 MB

        async def flood():
            for _ in range(100):
                writer.write(data)
                await writer.drain()

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(flood(), 2)
        grown = memory() - before
        hang_up(writer)
        return grown

    watch = Watch(server)
    assert asyncio.run(hold()) < MOST_GROWTH
    assert watch.is_as_before()


# ---------------------------------------------------------------- clients that send too much


def test_oversized_events_and_uploads():
    async def send_large(server):
        async with raw(server) as connection:
            await connection.recv()
            await connection.send("x" * 300_000)
            with pytest.raises(websockets.ConnectionClosed):
                await asyncio.wait_for(connection.recv(), 10)
            assert connection.close_code in (1009, 1006)  # what was still on its way may reset the connection

    async def send_parts(server):
        """No part is too large, all of them are."""
        async with raw(server) as connection:
            await connection.recv()

            async def parts():
                for _ in range(40):
                    yield "x" * 10_000

            with contextlib.suppress(websockets.ConnectionClosed):
                await connection.send(parts())
            await asyncio.wait_for(connection.wait_closed(), 10)
            assert connection.close_code in (1009, 1006)  # what was still on its way may reset the connection

    with serving(max_body=200_000) as server:
        watch = Watch(server)
        asyncio.run(send_large(server))
        asyncio.run(send_parts(server))
        for path in ("/v1/chat/completions", "/v1/audio/speech", "/v1/audio/voices"):
            assert httpx.post(f"{server.url}{path}", content=b"x" * 300_000).status_code == 413
            assert httpx.post(f"{server.url}{path}", content=iter([b"x" * 100_000] * 3)).status_code in (413, 400, 422)
        assert watch.is_as_before()
        asyncio.run(one_turn(server))


def test_the_audio_buffer_is_bounded():
    sound = 0.1 * np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    event = {"type": "input_audio_buffer.append", "audio": base64_of(pcm16(sound))}

    async def hold(server):
        async with raw(server) as connection:
            await send(connection, MANUAL, event, event, event)
            error = await until(connection, "error")
            assert error["error"]["code"] == "buffer_full"
            (session,) = server.service.sessions
            assert session._buffered == 2 * RATE
            await send(connection, {"type": "input_audio_buffer.clear"}, event)
            await until(connection, "input_audio_buffer.cleared")
        async with raw(server) as connection:
            # Noise without end, with voice activity detection: only what a turn needs of it is kept.
            for _ in range(20):
                await send(connection, event)
            await send(connection, {"type": "input_audio_buffer.clear"})
            while True:
                kind = json.loads(await connection.recv())["type"]
                (session,) = [s for s in server.service.sessions if s.turn_detection is not None]
                assert sum(map(len, session.buffer)) <= 4 * RATE
                if kind == "input_audio_buffer.cleared":
                    break

    with serving(max_audio_seconds=2.0) as server:
        asyncio.run(hold(server))


def test_messages_that_nobody_answers_are_bounded(server):
    async def hold():
        async with talking(server, manual=True) as talk:
            for _ in range(32):
                await talk.say("Hello!")
            await talk.connection.conversation.item.create(item=TYPED)
            assert "32 messages" in (await talk.error()).message
            part = {"type": "input_image", "image_url": picture_url()}
            await talk.connection.conversation.item.create(item={**TYPED, "content": [part] * 40})
            await talk.error()

    asyncio.run(hold())
    server.wait_until_quiet()


# ---------------------------------------------------------------- the server's end


@pytest.mark.parametrize("how", ["server", "application"])
def test_stopping_with_sessions_open(endless, how):
    server = Server(max_answers=1).start()
    threads = set(server.engine._threads)
    codes = []

    async def hold():
        async with raw(server) as idle, raw(server) as speaking, raw(server) as waiting:
            for connection in (speaking, waiting):
                await send(
                    connection, {"type": "conversation.item.create", "item": TYPED}, {"type": "response.create"}
                )
            await until(speaking, "response.output_audio.delta")
            begin = time.monotonic()
            if how == "server":
                server._server.should_exit = True
            else:
                await asyncio.to_thread(server.call, server.service.close)
            for connection in (idle, speaking, waiting):
                async with asyncio.timeout(10):
                    with contextlib.suppress(websockets.ConnectionClosed):
                        while True:  # the close comes after what was sent before
                            await connection.recv()
                codes.append(connection.close_code)
            return time.monotonic() - begin

    assert asyncio.run(hold()) < 5
    server.stop()
    # uvicorn closes them first: "service restart".
    assert codes == ([1012] * 3 if how == "server" else [1001] * 3)
    assert server.errors == []
    assert server.num_held == 0
    assert not threads & set(threading.enumerate())


def test_stopping_with_a_stream_open(endless):
    server = Server().start()
    stream = server.client().chat.completions.create(
        model="nano", messages=[{"role": "user", "content": "Tell me a story."}], stream=True
    )
    next(iter(stream))
    begin = time.monotonic()
    server.stop()
    assert time.monotonic() - begin < 10
    assert server.num_held == 0
    stream.close()
