"""The realtime protocol with OpenAI's own client: typed and spoken turns, interruptions, and what is refused."""

import asyncio
import base64
import json
import time
from collections import Counter

import numpy as np
import openai.types.realtime as types
import pytest
from serving import (
    DATA,
    RATE,
    base64_of,
    check_event,
    make_endless,
    pcm16,
    picture_url,
    question,
    raw,
    serving,
    talking,
)

LION = "Where does a lion live?"
CHUNK = RATE // 10  # samples, as clients send them


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(library=tmp_path_factory.mktemp("library") / "voices.safetensors") as running:
        yield running


@pytest.fixture
def endless(server, monkeypatch):
    """Answers that go on for 25 s."""
    make_endless(server, monkeypatch)


def run(server, conversation, manual=True):
    """Holds a session, and looks in the end whether it is gone."""

    async def hold():
        async with talking(server, manual) as talk:
            await asyncio.wait_for(conversation(talk), 60)

    asyncio.run(hold())
    server.wait_until_quiet()


def kinds(events):
    """Types of events, each run of deltas as one."""
    names = [event.type for event in events]
    return [name for number, name in enumerate(names) if not (name.endswith(".delta") and name in names[:number])]


async def push(talk, samples, pace=0.0):
    """Sends sound as a microphone does."""
    for start in range(0, len(samples), CHUNK):
        await talk.connection.input_audio_buffer.append(audio=base64_of(pcm16(samples[start : start + CHUNK])))
        if pace:
            await asyncio.sleep(pace)


def silence(seconds):
    # Of a real room: nothing is exactly zero there.
    return 1e-4 * np.random.default_rng(0).standard_normal(int(seconds * RATE)).astype(np.float32)


def session_of(server):
    (session,) = server.service.sessions
    return session


# ---------------------------------------------------------------- typed turns


def test_the_session(server):
    async def hold(talk):
        created = talk.events[0]
        assert isinstance(created, types.SessionCreatedEvent)
        session = created.session
        assert session.id.startswith("sess_")
        assert (session.type, session.object, session.model) == ("realtime", "realtime.session", "nano")
        assert (session.output_modalities, session.instructions) == (["audio"], "")
        heard, said = session.audio.input, session.audio.output
        assert (heard.format.type, heard.format.rate, said.format.rate) == ("audio/pcm", 24000, 24000)
        turns = heard.turn_detection
        assert (turns.type, turns.threshold, turns.silence_duration_ms) == ("server_vad", 0.5, 500)
        assert (turns.create_response, turns.interrupt_response) == (True, True)
        assert (said.voice, said.speed, session.max_output_tokens) == (server.service.voice_name(None), 1.0, "inf")

    run(server, hold, manual=False)


def test_a_typed_turn(server):
    async def hold(talk):
        del talk.events[:]
        response = await talk.ask(LION)
        events = {event.type: event for event in talk.events}
        assert kinds(talk.events) == [
            "conversation.item.added",
            "conversation.item.done",
            "response.created",
            "response.output_item.added",
            "conversation.item.added",
            "response.content_part.added",
            "response.output_audio_transcript.delta",
            "response.output_audio.delta",
            "response.output_audio.done",
            "response.output_audio_transcript.done",
            "response.content_part.done",
            "response.output_item.done",
            "conversation.item.done",
            "response.done",
        ]
        assert len({event.event_id for event in talk.events}) == len(talk.events)
        asked, answered = (event.item for event in talk.events if event.type == "conversation.item.added")
        assert (asked.role, asked.content[0].type, asked.content[0].text) == ("user", "input_text", LION)
        assert (answered.role, answered.status, answered.content) == ("assistant", "in_progress", [])
        for event in talk.events:
            if hasattr(event, "content_index"):
                place = (event.response_id, event.item_id, event.output_index, event.content_index)
                assert place == (response.id, answered.id, 0, 0)
        transcript = events["response.output_audio_transcript.done"].transcript
        deltas = [e.delta for e in talk.events if e.type == "response.output_audio_transcript.delta"]
        assert "".join(deltas) == transcript
        assert "lives" in transcript
        assert events["response.content_part.done"].part.transcript == transcript
        assert (response.status, response.status_details) == ("completed", None)
        assert response.output_modalities == ["audio"]
        (item,) = response.output
        assert (item.id, item.status, item.content[0].transcript) == (answered.id, "completed", transcript)
        assert item.content[0].type == "output_audio"
        assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens > 10
        assert events["response.created"].response.status == "in_progress"
        done = [event for event in talk.events if event.type == "conversation.item.done"]
        assert done[1].previous_item_id == asked.id
        sound = talk.sound()
        assert len(sound) % 1920 == 0
        assert len(sound) > RATE
        assert np.abs(sound).max() > 1000
        first = next(event for event in talk.events if event.type == "response.output_audio.delta")
        assert len(first.delta) == 1920 * 2 * 4 // 3  # a frame of 80 ms at once

    run(server, hold)


def test_text_alone(server):
    async def hold(talk):
        response = await talk.ask(LION, output_modalities=["text"])
        assert talk.sound().size == 0
        assert response.output[0].content[0].type == "output_text"
        text = response.output[0].content[0].text
        assert "".join(e.delta for e in talk.events if e.type == "response.output_text.delta") == text
        assert response.output_modalities == ["text"]
        await talk.connection.session.update(session={"type": "realtime", "output_modalities": ["text"]})
        assert (await talk.until("session.updated")).session.output_modalities == ["text"]
        await talk.ask(LION)
        assert talk.sound().size == 0
        await talk.ask(LION, output_modalities=["audio"])
        assert talk.sound().size

    run(server, hold)


def test_a_picture(server):
    async def hold(talk):
        picture = {"type": "input_image", "image_url": picture_url()}
        content = [{"type": "input_text", "text": "What do you see?"}, picture]
        item = {"type": "message", "role": "user", "content": content}
        await talk.connection.conversation.item.create(item=item)
        told = (await talk.until("conversation.item.done")).item
        assert [part.type for part in told.content] == ["input_text", "input_image"]
        await talk.connection.response.create(response={"output_modalities": ["text"]})
        response = (await talk.until("response.done")).response
        assert response.usage.input_tokens > 60  # a picture takes many positions
        assert response.output[0].content[0].text

    run(server, hold)


def test_a_clip_in_a_message(server):
    async def hold(talk):
        part = {"type": "input_audio", "audio": base64_of(pcm16(question()))}
        item = {"type": "message", "role": "user", "content": [part]}
        await talk.connection.conversation.item.create(item=item)
        assert (await talk.until("conversation.item.done")).item.content[0].type == "input_audio"
        await talk.connection.response.create()
        response = (await talk.until("response.done")).response
        assert response.output[0].content[0].transcript

    run(server, hold)


def test_the_voice_changes_between_answers(server):
    async def hold(talk):
        sounds = []
        for voice in ("slt", "rms"):
            update = {"type": "realtime", "audio": {"output": {"voice": voice}}}
            await talk.connection.session.update(session=update)
            assert (await talk.until("session.updated")).session.audio.output.voice == voice
            del talk.events[:]
            response = await talk.ask(LION)
            sounds.append(talk.sound())
            assert response.audio.output.voice == voice
        assert not np.array_equal(*(sound[:RATE] for sound in sounds))
        assert session_of(server).conversation.voice is not None

    run(server, hold)


def test_history_that_the_client_sends(server):
    async def hold(talk):
        create = talk.connection.conversation.item.create
        await create(
            item={"type": "message", "role": "system", "content": [{"type": "input_text", "text": "Be brief."}]}
        )
        assert (await talk.until("conversation.item.done")).item.role == "system"
        await talk.say("Hello!")
        said = [{"type": "output_text", "text": "Hello, how are you?"}]
        await create(item={"type": "message", "role": "assistant", "content": said})
        assert (await talk.until("conversation.item.done")).item.role == "assistant"
        await talk.ask(LION)
        system, *messages = session_of(server).conversation.messages
        assert system == {"role": "system", "content": "Be brief."}
        assert [message["role"] for message in messages] == ["user", "assistant"] * 2
        assert messages[1]["content"] == "Hello, how are you?"

    run(server, hold)


# ---------------------------------------------------------------- spoken turns


def test_a_manual_turn(server):
    async def hold(talk):
        await push(talk, question())
        await talk.connection.input_audio_buffer.commit()
        committed = await talk.until("input_audio_buffer.committed")
        added = await talk.until("conversation.item.added")
        assert committed.item_id == added.item.id
        assert (added.item.role, added.item.content[0].type) == ("user", "input_audio")
        await talk.until("conversation.item.done")
        await talk.connection.response.create()
        response = (await talk.until("response.done")).response
        assert "pig" in response.output[0].content[0].transcript
        assert committed.previous_item_id is None
        await push(talk, question())
        await talk.connection.input_audio_buffer.commit()
        again = await talk.until("input_audio_buffer.committed")
        assert again.previous_item_id == response.output[0].id

    run(server, hold)


def test_nothing_to_commit_and_clearing(server):
    async def hold(talk):
        await talk.connection.input_audio_buffer.commit(event_id="mine")
        error = await talk.error()
        assert (error.code, error.event_id) == ("input_audio_buffer_commit_empty", "mine")
        await push(talk, question())
        await talk.connection.input_audio_buffer.clear()
        await talk.until("input_audio_buffer.cleared")
        await talk.connection.input_audio_buffer.commit()
        assert "0 ms" in (await talk.error()).message
        await talk.connection.response.create()
        assert (await talk.error()).code == "nothing_to_answer"

    run(server, hold)


def test_the_server_hears_when_a_turn_ends(server):
    async def hold(talk):
        sound = np.concatenate([silence(0.5), question(), silence(1.2)])
        await push(talk, sound)
        started = await talk.until("input_audio_buffer.speech_started")
        stopped = await talk.until("input_audio_buffer.speech_stopped")
        committed = await talk.until("input_audio_buffer.committed")
        response = (await talk.until("response.done")).response
        assert started.item_id == stopped.item_id == committed.item_id
        assert 100 <= started.audio_start_ms <= 600
        assert 1800 <= stopped.audio_end_ms <= 2900
        assert response.status == "completed"
        assert response.output[0].content[0].transcript
        order = kinds(talk.events)
        assert order[1:7] == [
            "input_audio_buffer.speech_started",
            "input_audio_buffer.speech_stopped",
            "input_audio_buffer.committed",
            "conversation.item.added",
            "conversation.item.done",
            "response.created",
        ]

    run(server, hold, manual=False)


def test_no_answer_by_itself_where_none_is_wanted(server):
    async def hold(talk):
        turns = {"type": "server_vad", "create_response": False, "silence_duration_ms": 200}
        update = {"type": "realtime", "audio": {"input": {"turn_detection": turns}}}
        await talk.connection.session.update(session=update)
        told = (await talk.until("session.updated")).session.audio.input.turn_detection
        assert (told.create_response, told.silence_duration_ms, told.threshold) == (False, 200, 0.5)
        await push(talk, np.concatenate([silence(0.3), question(), silence(1)]))
        await talk.until("conversation.item.done")
        await talk.connection.response.create()
        assert (await talk.until("response.done")).response.status == "completed"
        assert [event.type for event in talk.events].count("response.created") == 1

    run(server, hold, manual=False)


def test_settings_may_be_repeated_while_somebody_speaks(server):
    """As the Agents SDK does to change the instructions."""

    async def hold(talk):
        sound = np.concatenate([silence(0.5), question(), silence(1.2)])
        await push(talk, sound[: RATE * 3 // 2])
        started = await talk.until("input_audio_buffer.speech_started")
        turns = {"type": "server_vad", "threshold": 0.5, "interrupt_response": True}
        update = {"type": "realtime", "instructions": "Be brief.", "audio": {"input": {"turn_detection": turns}}}
        await talk.connection.session.update(session=update)
        await talk.until("session.updated")
        await push(talk, sound[RATE * 3 // 2 :])
        stopped = await talk.until("input_audio_buffer.speech_stopped")
        assert stopped.item_id == started.item_id
        assert stopped.audio_end_ms - started.audio_start_ms > 1500
        await talk.until("response.done")
        assert [event.type for event in talk.events].count("input_audio_buffer.speech_started") == 1

    run(server, hold, manual=False)


# ---------------------------------------------------------------- interruptions


def test_speech_interrupts_an_answer(server, endless):
    async def hold(talk):
        await talk.say("Tell me a story.")
        await talk.connection.response.create()
        await talk.until("response.output_audio.delta")
        await push(talk, question()[: RATE // 2 + CHUNK])
        await talk.until("input_audio_buffer.speech_started")
        heard = time.monotonic()
        response = (await talk.until("response.done")).response
        assert time.monotonic() - heard < 0.2
        assert response.status == "cancelled"
        assert (response.status_details.type, response.status_details.reason) == ("cancelled", "turn_detected")
        (item,) = response.output
        assert item.status == "incomplete"
        conversation = session_of(server).conversation
        whole = conversation.messages[-1]["content"]
        assert whole.startswith(item.content[0].transcript[:10])
        await talk.connection.conversation.item.truncate(item_id=item.id, content_index=0, audio_end_ms=80)
        truncated = await talk.until("conversation.item.truncated")
        assert (truncated.item_id, truncated.audio_end_ms, truncated.content_index) == (item.id, 80, 0)
        kept = conversation.messages[-1]["content"]
        assert len(kept) < len(whole)
        assert whole.startswith(kept)
        await talk.connection.conversation.item.retrieve(item_id=item.id)
        assert (await talk.until("conversation.item.retrieved")).item.content[0].transcript == kept

    async def with_turns(talk):
        await hold(talk)
        server.service.model.generation_config.min_new_tokens = None
        # The second question is answered as any other.
        await push(talk, np.concatenate([question()[RATE // 2 + CHUNK :], silence(1.0)]))
        assert (await talk.until("response.done")).response.status in ("completed", "incomplete")

    run(server, with_turns, manual=False)


def test_what_was_not_heard_is_cut_without_the_clients_help(server):
    async def hold(talk):
        answer = (await talk.ask(LION)).output[0].content[0].transcript
        # It was made faster than it is played: as if all of it had come just now.
        session_of(server).last.first_sent = time.monotonic()
        await push(talk, np.concatenate([question(), silence(1.0)]))
        await talk.until("input_audio_buffer.speech_started")
        await talk.until("response.done")
        messages = session_of(server).conversation.messages
        assert answer.startswith(messages[1]["content"])
        assert len(messages[1]["content"]) < len(answer)

    run(server, hold, manual=False)


def test_interruptions_that_are_not_wanted(server, monkeypatch):
    async def hold(talk):
        turns = {"type": "server_vad", "interrupt_response": False, "create_response": False}
        update = {"type": "realtime", "audio": {"input": {"turn_detection": turns}}}
        await talk.connection.session.update(session=update)
        await talk.say(LION)
        await talk.connection.response.create()
        await talk.until("response.created")
        await push(talk, np.concatenate([question(), silence(1.0)]))
        assert (await talk.until("response.done")).response.status == "completed"

    run(server, hold, manual=False)


def test_the_client_cancels(server, endless):
    async def hold(talk):
        await talk.say("Tell me a story.")
        await talk.connection.response.create()
        created = (await talk.until("response.created")).response
        await talk.connection.response.create()
        assert (await talk.error()).code == "conversation_already_has_active_response"
        await talk.connection.response.cancel(response_id="resp_of_another")
        assert (await talk.error()).code == "response_cancel_not_active"
        item = next(e for e in talk.events if e.type == "response.output_item.added").item
        await talk.connection.conversation.item.delete(item_id=item.id)
        assert "cancel it first" in (await talk.error()).message
        await talk.connection.response.cancel(response_id=created.id)
        response = (await talk.until("response.done")).response
        assert (response.status, response.status_details.reason) == ("cancelled", "client_cancelled")
        assert response.id == created.id
        await talk.connection.response.cancel()
        assert (await talk.error()).code == "response_cancel_not_active"
        server.service.model.generation_config.min_new_tokens = None
        assert (await talk.ask(LION)).output

    run(server, hold)


async def truncate_a_story(talk):
    """Asks for one, and truncates it at its first sound."""
    await talk.say("Tell me a story.")
    await talk.connection.response.create()
    delta = await talk.until("response.output_audio.delta")
    await talk.connection.conversation.item.truncate(item_id=delta.item_id, content_index=0, audio_end_ms=80)


def test_truncating_an_answer_that_is_being_made_ends_it(server, endless):
    async def hold(talk):
        await truncate_a_story(talk)
        assert (await talk.until("response.done")).response.status == "cancelled"
        await talk.until("conversation.item.truncated")

    run(server, hold)


def test_an_answer_is_truncated_and_cancelled_in_one_go(server, endless):
    """As the Agents SDK interrupts where it does not leave that to the server."""

    async def hold(talk):
        await truncate_a_story(talk)
        await talk.connection.response.cancel()
        await talk.connection.response.cancel(event_id="once more")
        done, truncated, error = "response.done", "conversation.item.truncated", "error"
        assert (await talk.error()).event_id == "once more"
        assert [event.type for event in talk.events[-3:]] == [done, truncated, error]

    run(server, hold)


def test_truncations_that_cannot_be(server):
    async def hold(talk):
        first = (await talk.ask(LION)).output[0].id
        last = (await talk.ask(LION)).output[0].id
        truncate = talk.connection.conversation.item.truncate
        for item, end, about in (
            ("item_none", 0, "no item"),
            (first, 0, "Only the last answer"),
            (last, -1, "at least 0"),
            (last, 10**9, "less than 1000000000"),
        ):
            await truncate(item_id=item, content_index=0, audio_end_ms=end)
            assert about in (await talk.error()).message
        conversation = session_of(server).conversation
        whole = conversation.messages[-1]["content"]
        await truncate(item_id=last, content_index=0, audio_end_ms=0)
        await talk.until("conversation.item.truncated")
        assert conversation.messages[-1]["content"] == ""
        assert whole

    run(server, hold)


def test_an_answer_may_be_short(server):
    async def hold(talk):
        response = await talk.ask(LION, max_output_tokens=4)
        assert (response.status, response.status_details.reason) == ("incomplete", "max_output_tokens")
        assert response.output[0].status == "incomplete"

    run(server, hold)


# ---------------------------------------------------------------- items


def test_items_are_shown_and_deleted(server):
    async def hold(talk):
        connection = talk.connection.conversation.item
        item = await talk.say("Hello!", id="mine")
        assert item.id == "mine"
        await connection.create(item={"id": "mine", "type": "message", "role": "user", "content": []})
        assert "content" in (await talk.error()).message
        await connection.create(
            item={"id": "mine", "type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]}
        )
        assert "id" in (await talk.error()).message
        await connection.retrieve(item_id="mine")
        assert (await talk.until("conversation.item.retrieved")).item.content[0].text == "Hello!"
        await connection.delete(item_id="mine")
        assert (await talk.until("conversation.item.deleted")).item_id == "mine"
        for call in (connection.retrieve, connection.delete):
            await call(item_id="mine")
            assert (await talk.error()).code == "item_not_found"
        await talk.connection.response.create()
        assert (await talk.error()).code == "nothing_to_answer"

        answers = [(await talk.ask(line)).output[0].id for line in ("Hello!", LION, "What is one plus one?")]
        conversation = session_of(server).conversation
        before = conversation.messages
        assert len(before) == 6
        await connection.delete(item_id=answers[1])
        await talk.until("conversation.item.deleted")
        assert conversation.messages == before[:2] + before[4:]
        await talk.ask("And then?")
        assert len(conversation.messages) == 6

    run(server, hold)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "session",
    [
        None,
        [],
        {"type": "transcription"},
        {"voice_of_the_answer": 1, "output_modalities": ["smell"]},
        {"output_modalities": ["text", "audio"]},
        {"output_modalities": []},
        {"instructions": 3},
        {"instructions": "a" * 9000},
        {"instructions": "\ud800"},
        {"max_output_tokens": 0},
        {"max_output_tokens": 5000},
        {"max_output_tokens": True},
        {"max_output_tokens": "many"},
        {"tools": [{"type": "function", "name": "f"}]},
        {"audio": {"output": {"voice": "nobody"}}},
        {"audio": {"output": {"voice": 3}}},
        {"audio": {"output": {"speed": 1.5}}},
        {"audio": {"output": {"format": {"type": "audio/pcmu"}}}},
        {"audio": {"input": {"format": {"type": "audio/pcm", "rate": 16000}}}},
        {"audio": {"input": {"turn_detection": {"type": "semantic_vad"}}}},
        {"audio": {"input": {"turn_detection": {"threshold": 2}}}},
        {"audio": {"input": {"turn_detection": {"threshold": float("nan")}}}},
        {"audio": {"input": {"turn_detection": {"silence_duration_ms": 1e12}}}},
        {"audio": {"input": {"turn_detection": {"prefix_padding_ms": -1}}}},
    ],
)
def test_settings_that_are_refused_change_nothing(server, session):
    async def hold():
        async with raw(server) as socket:
            before = json.loads(await socket.recv())["session"]
            good = {"instructions": "changed", "output_modalities": ["text"], "max_output_tokens": 7}
            session_given = {**good, **session} if isinstance(session, dict) else session
            await socket.send(json.dumps({"type": "session.update", "session": session_given, "event_id": "mine"}))
            error = json.loads(await socket.recv())
            assert error["type"] == "error"
            assert error["error"]["type"] == "invalid_request_error"
            assert error["error"]["event_id"] == "mine"
            await socket.send(json.dumps({"type": "session.update", "session": {"type": "realtime"}}))
            updated = json.loads(await socket.recv())
            assert updated["type"] == "session.updated"
            assert updated["session"] == before

    asyncio.run(hold())


def test_a_session_ends_when_it_is_idle_or_has_lasted_its_time():
    async def hold(server):
        async with raw(server) as socket:
            await socket.recv()
            error = json.loads(await socket.recv())["error"]
            await socket.wait_closed()
            return error, socket.close_code

    for settings, about in (({"idle_seconds": 0.2}, "idle"), ({"session_seconds": 0.2}, "lasted")):
        with serving(**settings) as server:
            error, code = asyncio.run(hold(server))
            assert about in error["message"]
            assert (error["code"], code) == ("session_expired", 1001)


def test_no_more_sessions_than_there_may_be():
    async def hold(server):
        async with raw(server) as first:
            await first.recv()
            async with raw(server) as second:
                error = json.loads(await second.recv())
                assert (error["type"], error["error"]["code"]) == ("error", "server_busy")
                await second.wait_closed()
                assert second.close_code == 1013
        await asyncio.to_thread(server.wait_until_quiet)
        async with raw(server) as third:
            assert json.loads(await third.recv())["type"] == "session.created"

    with serving(max_sessions=1) as server:
        asyncio.run(hold(server))


def test_a_busy_server_tells_the_session_and_it_goes_on(endless):
    async def hold(server):
        async with talking(server, manual=True) as first, talking(server, manual=True) as second:
            for talk in (first, second):
                await talk.say("Tell me a story.")
            await first.connection.response.create()
            await first.until("response.output_audio_transcript.delta")
            await second.connection.response.create()
            assert (await second.error()).code == "server_busy"
            await first.connection.response.cancel()
            await first.until("response.done")
            await second.connection.response.create()
            await second.until("response.output_audio_transcript.delta")

    with serving(max_answers=1, max_waiting=0) as server:
        asyncio.run(hold(server))


# ---------------------------------------------------------------- a recorded session


class Heard:
    """
    What a replayed client is told.

    Attributes:
        kinds (list of `str`): Types of events; of the deltas of an answer the first alone, with a star.
        items (list of `str`): Ids of the conversation's items.
        milliseconds (`Counter`): Of sound, of each answer's item.
        whole (set of `str`): Items whose sound has come to its end.
    """

    def __init__(self, socket):
        self.socket = socket
        self.kinds, self.items, self.milliseconds, self.whole = [], [], Counter(), set()
        self._deltas = set()

    async def next(self):
        event = check_event(await self.socket.recv())
        if event.type == "conversation.item.added":
            self.items.append(event.item.id)
        elif event.type == "response.output_audio.delta":
            self.milliseconds[event.item_id] += len(base64.b64decode(event.delta)) * 1000 / (2 * RATE)
        elif event.type == "response.output_audio.done":
            self.whole.add(event.item_id)
            if not self.milliseconds[event.item_id]:  # other weights may have nothing to say aloud
                self.kinds.append("response.output_audio.delta*")
        if not event.type.endswith(".delta"):
            self.kinds.append(event.type)
        elif (event.type, event.response_id) not in self._deltas:
            self._deltas.add((event.type, event.response_id))
            self.kinds.append(f"{event.type}*")

    async def came(self, expected):
        """Waits until all of that has come; `False` if the server has not heard yet that somebody speaks, or stops."""
        while len(self.kinds) < len(expected):
            depends_on_sound = expected[len(self.kinds)].startswith("input_audio_buffer.speech_")
            try:
                await asyncio.wait_for(self.next(), 1 if depends_on_sound else 30)
            except TimeoutError:
                if not depends_on_sound:
                    raise
                return False
        assert self.kinds[: len(expected)] == expected
        return True


def test_a_recorded_session_is_replayed(server, monkeypatch):
    """
    The session was held by OpenAI's Agents SDK for Python (`openai-agents` 0.24.0, `agents.realtime`) with this server
    and recorded between the two: each line is a message of the client, with the types of the events that came before
    its next one. It asks typed and spoken questions, speaks into an answer that is made but not yet heard to its end,
    stops two that are being made, shows a picture, and takes its turns itself in the end. Sound, the picture and the
    server's ids are filled in here.
    """
    lines = [json.loads(line) for line in (DATA / "realtime_session.jsonl").read_text(encoding="utf-8").splitlines()]
    microphone = np.concatenate([silence(0.5), question(), silence(1.2)])
    chunks = [pcm16(microphone[start : start + CHUNK]) for start in range(0, len(microphone), CHUNK)]
    fill = {"PICTURE": picture_url(), **{f"MICROPHONE {n}": base64_of(chunk) for n, chunk in enumerate(chunks)}}

    async def send(heard, message):
        text = json.dumps(message)
        for name, value in {**fill, **{f"ITEM {n}": item for n, item in enumerate(heard.items)}}.items():
            text = text.replace(f'"{name}"', json.dumps(value))
        message = json.loads(text)
        if message["type"] == "conversation.item.create":
            # The client stopped its stories while they were made: a fast machine must not be done before that.
            monkeypatch.undo()
            if "story" in text:
                make_endless(server, monkeypatch)
        elif message["type"] == "conversation.item.truncate":
            item, end = message["item_id"], message["audio_end_ms"]
            while heard.milliseconds[item] < end and item not in heard.whole:
                await asyncio.wait_for(heard.next(), 30)
            # Other weights may answer more shortly.
            message["audio_end_ms"] = min(end, int(heard.milliseconds[item]))
        await heard.socket.send(json.dumps(message))

    async def hold():
        async with raw(server) as socket:
            heard, expected = Heard(socket), []
            for number, line in enumerate(lines):
                while not await heard.came(expected):
                    # Another machine may hear speech a moment later: the client goes on speaking until it does.
                    later = (line for line in lines[number:] if "send" in line)
                    await send(heard, next(line for line in later if "audio" in line["send"]).pop("send"))
                if "send" in line:
                    await send(heard, line["send"])
                expected += line["expect"]
            assert await heard.came(expected)
            assert heard.kinds == expected

    asyncio.run(hold())
    server.wait_until_quiet()
