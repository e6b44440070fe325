"""`/v1/realtime`: a spoken conversation over a websocket, with OpenAI's events."""

import asyncio
import base64
import contextlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError

from minimind_o_hf.modeling.streaming_minimind_o import FRAME_SECONDS
from minimind_o_hf.recordings import without_quiet_edges

from .chat_completions import content_parts, usage_of
from .engine import Answer
from .media import decode_base64, read_pcm16, to_pcm16
from .service import ApiError, Service, finished, new_id, run_in_thread
from .turns import SpeechStarted, SpeechStopped, TurnDetector, TurnSettings

router = APIRouter()
logger = logging.getLogger("minimind_o_hf.server")

RATE = 24000  # Hz, both ways
PCM = {"type": "audio/pcm", "rate": RATE}
SHORTEST_TURN = 0.1  # seconds
MAX_LATENCY = 1.28  # seconds: an interrupted answer has not been decoded much further than it was heard
SEND_SECONDS = 20.0  # a client that takes nothing for so long is gone
MAX_ITEMS = 1000
MAX_INSTRUCTIONS = 8000  # characters
SLICE = RATE  # samples that are listened to before others get their turn


class _Model(BaseModel):
    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)


class TurnDetection(_Model):
    """When the server takes its turn."""

    type: Literal["server_vad"] = "server_vad"
    threshold: float = Field(default=0.5, ge=0, le=1)
    prefix_padding_ms: StrictInt = Field(default=300, ge=0, le=5000)
    silence_duration_ms: StrictInt = Field(default=500, ge=50, le=10_000)
    create_response: StrictBool = True
    interrupt_response: StrictBool = True


class AudioFormat(_Model):
    """PCM alone."""

    type: Literal["audio/pcm"] = "audio/pcm"
    rate: Literal[24000] = 24000


class AudioInput(_Model):
    """The microphone's side."""

    format: AudioFormat | None = None
    turn_detection: TurnDetection | None = None


class AudioOutput(_Model):
    """The loudspeaker's side."""

    format: AudioFormat | None = None
    voice: str | dict[str, str] | None = None
    speed: float | None = Field(default=None, ge=1, le=1)


class AudioSettings(_Model):
    """Both sides."""

    input: AudioInput | None = None
    output: AudioOutput | None = None


class ResponseSettings(_Model):
    """What a `response.create` may change for one answer."""

    instructions: str | None = Field(default=None, max_length=MAX_INSTRUCTIONS)
    output_modalities: list[Literal["text", "audio"]] | None = Field(default=None, min_length=1, max_length=1)
    audio: AudioSettings | None = None
    max_output_tokens: StrictInt | Literal["inf"] | None = None
    tools: list | None = Field(default=None, max_length=0)


class SessionSettings(ResponseSettings):
    """What a `session.update` may change."""

    type: Literal["realtime"] = "realtime"


@dataclass
class _Item:
    """A message of the conversation."""

    role: str
    content: list[dict[str, Any]]
    id: str = field(default_factory=lambda: new_id("item"))
    status: str = "completed"

    def told(self) -> dict[str, Any]:
        """As events show it: without speech and pictures themselves."""
        return {
            "id": self.id,
            "object": "realtime.item",
            "type": "message",
            "status": self.status,
            "role": self.role,
            "content": self.content,
        }


@dataclass
class _Response:
    """An answer of the session."""

    item: _Item
    speaks: bool
    id: str = field(default_factory=lambda: new_id("resp"))
    answer: Answer | None = None
    reason: str | None = None  # why it was cancelled
    is_truncated: bool = False  # by the client, which has not cancelled it as well
    text: str = ""
    sent: float = 0.0  # seconds of sound
    first_sent: float | None = None  # when

    @property
    def heard(self) -> float:
        """How much of it a client that plays it at once has played, in seconds."""
        return 0.0 if self.first_sent is None else min(self.sent, time.monotonic() - self.first_sent)


class RealtimeSession:
    """
    One client's conversation.

    Args:
        socket (`WebSocket`): The accepted connection.
        service ([`Service`]): What answers.
    """

    def __init__(self, socket: WebSocket, service: Service):
        self.socket, self.service = socket, service
        self.id = new_id("sess")
        self.conversation = service.conversation()
        self.instructions = ""
        self.speaks = True
        self.voice: Any = None
        self.max_output_tokens: int | str = "inf"
        self.turn_detection: TurnDetection | None = TurnDetection()
        self.detector = TurnDetector(TurnSettings(), RATE)
        self.items: dict[str, _Item] = {}
        self.unanswered: list[tuple[_Item, list[dict[str, Any]]]] = []
        self.turns: list[tuple[list[str], str]] = []  # items of the user and the answer of each turn
        self.buffer: list[np.ndarray] = []
        self.buffer_start = 0  # in samples of all that was appended
        self.appended = 0
        self.turn_start: int | None = None  # while somebody speaks
        self.next_item = new_id("item")
        self.response: _Response | None = None
        self.last: _Response | None = None  # the last that was ended, until it is known how much was heard of it
        self.speaking: asyncio.Task | None = None
        self.sending = asyncio.Lock()
        self.task: asyncio.Task | None = None
        self.is_stopping = self.is_gone = False

    # ---------------------------------------------------------------- the connection

    async def run(self) -> None:
        """Serves the client until it leaves, is idle for too long, or the server stops."""
        settings = self.service.settings
        self.task = asyncio.current_task()
        end = time.monotonic() + settings.session_seconds
        try:
            await self.send("session.created", session=self.told())
            while True:
                left = end - time.monotonic()
                try:
                    message = await asyncio.wait_for(self.socket.receive(), min(settings.idle_seconds, left))
                except TimeoutError:
                    is_idle = time.monotonic() < end
                    reason = "The session was idle for too long." if is_idle else "The session has lasted its time."
                    await self.error(ApiError(reason, code="session_expired"))
                    await self.close(1001, reason)
                    return
                if message["type"] == "websocket.disconnect":
                    return
                await self.take(message.get("text"))
        except (WebSocketDisconnect, TimeoutError, ConnectionError, RuntimeError) as error:
            # A client that went away, or reads nothing: starlette says either in several ways.
            logger.debug("session %s ended: %r", self.id, error)
        except asyncio.CancelledError:
            if self.is_stopping:
                with contextlib.suppress(Exception):
                    await self.close(1001, "The server is stopping.")
            elif not self.is_gone:
                raise
        finally:
            await self._end()

    def stop(self) -> None:
        """Ends the session from outside."""
        self.is_stopping = True
        if self.task is not None:
            self.task.cancel()

    def _leave(self) -> None:
        """Ends the session whose client turned out to be gone while it was answered."""
        self.is_gone = True
        if self.task is not None:
            self.task.cancel()

    async def close(self, code: int, reason: str) -> None:
        """Closes the connection."""
        await asyncio.wait_for(self.socket.close(code, reason), SEND_SECONDS)

    async def _end(self) -> None:
        self.task = None  # it ends by itself from here on
        if self.response is not None and self.response.answer is not None:
            self.response.answer.cancel()
        if self.speaking is not None:
            self.speaking.cancel()
            await finished(self.speaking)
        self.buffer, self.unanswered = [], []

    async def send(self, kind: str, **fields: Any) -> None:
        """Sends an event; a client that does not take it in time is given up."""
        # In ASCII: what a client named its items may hold halves of characters, which UTF-8 does not.
        text = json.dumps({"type": kind, "event_id": new_id("event"), **fields})
        async with self.sending:
            await asyncio.wait_for(self.socket.send_text(text), SEND_SECONDS)

    async def error(self, error: ApiError, event_id: Any = None) -> None:
        """Tells what is wrong; the session goes on."""
        told = {**error.body, "code": error.code or "invalid_value"}
        await self.send("error", error={**told, "event_id": event_id if isinstance(event_id, str) else None})

    async def take(self, text: str | None) -> None:
        """Handles an event of the client."""
        event_id = None
        try:
            if text is None:
                raise ApiError("Events are JSON in text messages, not binary ones.")
            try:
                event = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ApiError("The event is no JSON.", code="invalid_json") from error
            kind = event.get("type") if isinstance(event, dict) else None
            handle = self._handlers.get(kind) if isinstance(kind, str) else None
            event_id = event.get("event_id") if isinstance(event, dict) else None
            if handle is None:
                raise ApiError(f"There is no event {kind!r:.60}.", code="unknown_event")
            await handle(self, event)
            self.service.metrics.events.labels("taken").inc()
            return
        except ApiError as error:
            problem = error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            problem = ApiError(f"{where}: {first['msg']}.", param=where)
        except ValueError as error:
            problem = ApiError(str(error))
        except (WebSocketDisconnect, TimeoutError, ConnectionError, RuntimeError):
            raise
        except Exception as error:
            number = new_id("error")
            logger.error("%s: event of a realtime session", number, exc_info=error)
            problem = ApiError(f"The server failed ({number}).", 500, "server_error")
        self.service.metrics.events.labels("refused").inc()
        await self.error(problem, event_id)

    # ---------------------------------------------------------------- the session

    def told(self) -> dict[str, Any]:
        """The session's settings, as events show them."""
        turns = None if self.turn_detection is None else self.turn_detection.model_dump()
        voice = self.service.voice_name(self.voice)
        return {
            "id": self.id,
            "object": "realtime.session",
            "type": "realtime",
            "model": self.service.settings.model_name,
            "output_modalities": ["audio" if self.speaks else "text"],
            "instructions": self.instructions,
            "audio": {
                "input": {"format": PCM, "turn_detection": turns, "transcription": None, "noise_reduction": None},
                "output": {"format": PCM, "voice": voice, "speed": 1.0},
            },
            "max_output_tokens": self.max_output_tokens,
            "tools": [],
            "tool_choice": "none",
        }

    async def _update(self, event: dict[str, Any]) -> None:
        given = event.get("session")
        settings = SessionSettings.model_validate(given)
        output = settings.audio.output if settings.audio else None
        if output is not None and output.voice is not None:
            await run_in_thread(self.service.voice, output.voice)
        length = settings.max_output_tokens
        if length is not None and length != "inf" and not 1 <= length <= 4096:
            raise ApiError("`max_output_tokens` lies between 1 and 4096, or is 'inf'.", param="max_output_tokens")
        # All of it is right: only now is any of it taken.
        if settings.instructions is not None:
            self.instructions = settings.instructions
        if settings.output_modalities is not None:
            self.speaks = settings.output_modalities == ["audio"]
        if length is not None:
            self.max_output_tokens = length
        if output is not None and output.voice is not None:
            self.voice = output.voice
        hears = settings.audio.input if settings.audio else None
        if hears is not None and "turn_detection" in hears.model_fields_set:
            self._listen_as(hears.turn_detection)
        await self.send("session.updated", session=self.told())

    def _listen_as(self, turns: TurnDetection | None) -> None:
        if turns == self.turn_detection:
            return  # clients repeat all settings to change one: who is speaking goes on being heard
        self.turn_detection, self.turn_start = turns, None
        if turns is not None:
            settings = TurnSettings(turns.threshold, turns.prefix_padding_ms, turns.silence_duration_ms)
            self.detector = TurnDetector(settings, RATE)
            self.appended, self.buffer_start, self.buffer = 0, 0, []

    # ---------------------------------------------------------------- what is heard

    async def _append(self, event: dict[str, Any]) -> None:
        samples = read_pcm16(decode_base64(event.get("audio"), self.service.settings.max_body))
        for start in range(0, len(samples), SLICE):
            await self._hear(samples[start : start + SLICE])
            await asyncio.sleep(0)

    async def _hear(self, samples: np.ndarray) -> None:
        limit = int(self.service.settings.max_audio_seconds * RATE)
        if self.turn_detection is None:
            if self._buffered + len(samples) > limit:
                raise ApiError(
                    f"The audio buffer holds {limit // RATE} s at most: commit or clear it.", code="buffer_full"
                )
            self._buffer(samples)
            return
        self._buffer(samples)
        for event in self.detector.push(samples):
            if isinstance(event, SpeechStarted):
                await self._started(event)
            elif isinstance(event, SpeechStopped):
                await self._stopped(event)
        if self.turn_start is None:
            # Of silence, as much is kept as may belong to the next turn.
            kept = int((self.turn_detection.prefix_padding_ms + 1000) * RATE / 1000)
            while self.buffer and self._buffered - len(self.buffer[0]) >= kept:
                self.buffer_start += len(self.buffer.pop(0))
        elif self.appended - self.turn_start > limit:  # somebody who does not stop is answered all the same
            await self._stopped(SpeechStopped(self.appended, int(self.appended / RATE * 1000)))
            self.detector.reset()
            self.appended, self.buffer_start, self.buffer = 0, 0, []

    def _buffer(self, samples: np.ndarray) -> None:
        self.buffer.append(samples)
        self.appended += len(samples)

    @property
    def _buffered(self) -> int:
        return self.appended - self.buffer_start

    async def _started(self, event: SpeechStarted) -> None:
        self.turn_start = event.start_sample
        turns = self.turn_detection
        started = {"audio_start_ms": event.start_ms, "item_id": self.next_item}
        await self.send("input_audio_buffer.speech_started", **started)
        if turns is not None and turns.interrupt_response:
            self.detector.stop_playing()
            await self._cancel("turn_detected")

    async def _stopped(self, event: SpeechStopped) -> None:
        start, self.turn_start = self.turn_start, None
        if start is None:
            return
        stopped = {"audio_end_ms": event.end_ms, "item_id": self.next_item}
        await self.send("input_audio_buffer.speech_stopped", **stopped)
        whole = np.concatenate(self.buffer) if self.buffer else np.zeros(0, np.float32)
        begin, end = max(0, start - self.buffer_start), event.end_sample - self.buffer_start
        speech, rest = whole[begin:end], whole[end:]
        self.buffer, self.buffer_start = [rest], self.appended - len(rest)
        await self._commit_speech(speech)
        if self.turn_detection is not None and self.turn_detection.create_response and self.response is None:
            try:
                await self._respond(ResponseSettings())
            except ApiError as error:  # busy: what was said waits, and what is said goes on being heard
                await self.error(error)

    async def _commit(self, event: dict[str, Any]) -> None:
        speech = np.concatenate(self.buffer) if self.buffer else np.zeros(0, np.float32)
        if len(speech) < SHORTEST_TURN * RATE:
            raise ApiError(
                f"The audio buffer holds {1000 * len(speech) // RATE} ms, and 100 are needed: append more.",
                code="input_audio_buffer_commit_empty",
            )
        self._clear()
        await self._commit_speech(speech)

    async def _commit_speech(self, speech: np.ndarray) -> None:
        item = _Item("user", [{"type": "input_audio", "transcript": None}], self.next_item)
        self.next_item = new_id("item")
        previous = next(reversed(self.items), None)
        await self.send("input_audio_buffer.committed", item_id=item.id, previous_item_id=previous)
        speech = without_quiet_edges(speech, RATE)
        await self._add(item, [{"type": "audio", "audio": speech, "sampling_rate": RATE}])

    def _clear(self) -> None:
        self.buffer, self.buffer_start, self.turn_start = [], self.appended, None

    async def _clear_buffer(self, event: dict[str, Any]) -> None:
        self._clear()
        await self.send("input_audio_buffer.cleared")

    # ---------------------------------------------------------------- items

    async def _add(self, item: _Item, parts: list[dict[str, Any]] | None = None) -> None:
        """Adds an item; `parts` of the user wait for an answer."""
        previous = next(reversed(self.items), None)
        self.items[item.id] = item
        while len(self.items) > MAX_ITEMS:
            self.items.pop(next(iter(self.items)))
        if parts is not None:
            self.unanswered.append((item, parts))
        for kind in ("conversation.item.added", "conversation.item.done"):
            if kind.endswith("added") or item.status != "in_progress":
                await self.send(kind, previous_item_id=previous, item=item.told())

    async def _create_item(self, event: dict[str, Any]) -> None:
        given = event.get("item")
        if not isinstance(given, dict) or given.get("type") != "message":
            raise ApiError("An item is a message: functions are not supported.", param="item.type")
        role, content = given.get("role"), given.get("content")
        if not isinstance(content, list) or not content:
            raise ApiError("A message's content is a list of parts.", param="item.content")
        name = given.get("id")
        if name is not None and (not isinstance(name, str) or not 0 < len(name) <= 64 or name in self.items):
            raise ApiError("An item's id is new and has 1 to 64 characters.", param="item.id")
        if len(self.unanswered) >= 32:
            raise ApiError("32 messages wait for an answer: ask for it first.")
        parts = await run_in_thread(self._parts, content)
        told = [
            {"type": "input_text" if role != "assistant" else "output_text", "text": part["text"]}
            if part["type"] == "text"
            else {"type": "input_audio" if part["type"] == "audio" else "input_image"}
            for part in parts
        ]
        item = _Item(str(role), told, name or new_id("item"))
        if role == "user":
            await self._add(item, parts)
            return
        if any(part["type"] != "text" for part in parts):
            raise ApiError("Only the user's messages hold speech and pictures.", param="item.content")
        text = "\n".join(part["text"] for part in parts)
        if role == "system":
            self.instructions = f"{self.instructions}\n{text}".strip()[-MAX_INSTRUCTIONS:]
        elif role == "assistant":
            said = self._joined_parts() or [{"type": "text", "text": ""}]
            await run_in_thread(self.conversation.remember, said, text)
            self.turns.append(([item.id for item, _ in self.unanswered], item.id))
            self.unanswered = []
        else:
            raise ApiError(f"A message is the user's, system's or assistant's, got {role!r:.50}.", param="item.role")
        await self._add(item)

    def _parts(self, content: list[Any]) -> list[dict[str, Any]]:
        """Parts of a realtime message as the processor takes them: its speech is PCM."""
        parts: list[dict[str, Any]] = []
        for part in content:
            if isinstance(part, dict) and part.get("type") == "input_audio":
                samples = read_pcm16(decode_base64(part.get("audio"), self.service.settings.max_body))
                if not SHORTEST_TURN * RATE <= len(samples) <= self.service.settings.max_audio_seconds * RATE:
                    raise ApiError(
                        f"Speech lasts {SHORTEST_TURN} to {self.service.settings.max_audio_seconds:g} s, got "
                        f"{len(samples) / RATE:.2f} s."
                    )
                parts.append({"type": "audio", "audio": samples, "sampling_rate": RATE})
            else:
                if isinstance(part, dict) and part.get("type") == "output_audio":
                    part = {"type": "text", "text": part.get("transcript")}
                parts += content_parts([part], self.service)
        return parts

    def _joined_parts(self) -> list[dict[str, Any]]:
        """What the user said since the last answer, in the order of the training data: speech, text, pictures."""
        order = {"audio": 0, "text": 1, "image": 2}
        parts = [part for _, parts in self.unanswered for part in parts]
        return sorted(parts, key=lambda part: order[part["type"]])

    def _find(self, event: dict[str, Any]) -> _Item:
        name = event.get("item_id")
        item = self.items.get(name) if isinstance(name, str) else None
        if item is None:
            raise ApiError(f"There is no item {name!r:.80}.", code="item_not_found", param="item_id")
        return item

    async def _retrieve(self, event: dict[str, Any]) -> None:
        await self.send("conversation.item.retrieved", item=self._find(event).told())

    async def _delete(self, event: dict[str, Any]) -> None:
        item = self._find(event)
        if self.response is not None and item is self.response.item:
            raise ApiError("That answer is being made: cancel it first.")
        self.unanswered = [(other, parts) for other, parts in self.unanswered if other is not item]
        # Older turns may have been forgotten: those that are known are the last.
        for back, (asked, answered) in enumerate(reversed(self.turns), 1):
            if item.id == answered or item.id in asked:
                if back <= self.conversation.num_turns:
                    self.conversation.forget(-back)
                del self.turns[-back]
                break
        del self.items[item.id]
        await self.send("conversation.item.deleted", item_id=item.id)

    async def _truncate(self, event: dict[str, Any]) -> None:
        item, end = self._find(event), event.get("audio_end_ms")
        if isinstance(end, bool) or not isinstance(end, int) or end < 0:
            raise ApiError("`audio_end_ms` is a whole number of at least 0.", param="audio_end_ms")
        if self.response is not None and item is self.response.item:
            await self._cancel("client_cancelled")
        elif self.last is not None and item is self.last.item and self.speaking is not None:
            await finished(self.speaking)  # its end is being told: that comes first
        if self.last is None or item is not self.last.item:
            raise ApiError("Only the last answer can be truncated.", param="item_id")
        if end > self.last.sent * 1000 + 1:
            raise ApiError(
                f"The answer has {self.last.sent * 1000:.0f} ms of sound, less than {end}.", param="audio_end_ms"
            )
        self._cut(end / 1000)
        self.last.is_truncated = True
        await self.send("conversation.item.truncated", item_id=item.id, content_index=0, audio_end_ms=end)

    def _cut(self, heard: float) -> None:
        """Keeps of the last answer what was heard of it."""
        last = self.last
        if last is None or self.conversation.num_turns == 0 or heard >= last.sent:
            return
        kept = self.conversation.cut(heard)
        last.item.content = [{"type": "output_audio", "transcript": kept}]

    # ---------------------------------------------------------------- answers

    async def _create_response(self, event: dict[str, Any]) -> None:
        given = event.get("response")
        settings = ResponseSettings.model_validate({} if given is None else given)
        if isinstance(given, dict) and (given.get("input") or given.get("conversation") not in (None, "auto")):
            raise ApiError("Answers belong to the session's conversation: leave `input` and `conversation` out.")
        if self.response is not None:
            raise ApiError(
                "An answer is being made: cancel it, or wait for its end.",
                code="conversation_already_has_active_response",
            )
        if not self.unanswered:
            raise ApiError("There is nothing to answer: add a message first.", code="nothing_to_answer")
        await self._respond(settings)

    async def _respond(self, given: ResponseSettings) -> None:
        """Begins an answer to what was said."""
        if not self.unanswered:
            return
        if self.last is not None and self.last.reason == "turn_detected":
            # The client has not said how much it played: as much as the clock says.
            self._cut(self.last.heard)
        self.last = None
        modalities = given.output_modalities
        speaks = self.speaks if modalities is None else modalities == ["audio"]
        voice = given.audio.output.voice if given.audio and given.audio.output else None
        length = given.max_output_tokens or self.max_output_tokens
        longest = self.service.max_new_tokens
        settings = {
            "max_new_tokens": longest if length == "inf" else max(1, min(int(length), longest)),
            "generation_mode": None if speaks else "text",
        }
        conversation = self.conversation
        conversation.system = given.instructions or self.instructions or None
        conversation.voice = await run_in_thread(self.service.voice, self.voice if voice is None else voice)
        asked, parts = [item for item, _ in self.unanswered], self._joined_parts()
        response = _Response(_Item("assistant", [], status="in_progress"), speaks)
        pending = await run_in_thread(lambda: conversation.prepare(parts, **settings))
        response.answer = self.service.submit(pending, MAX_LATENCY, self.id)
        self.unanswered, self.response = [], response
        self.speaking = asyncio.create_task(self._speak(response, [item.id for item in asked]))

    def _told_response(self, response: _Response, status: str, **fields: Any) -> dict[str, Any]:
        is_done = status != "in_progress"
        return {
            "id": response.id,
            "object": "realtime.response",
            "status": status,
            "status_details": None,
            "output": [response.item.told()] if is_done else [],
            "conversation_id": f"conv_{self.id.partition('_')[2]}",
            "output_modalities": ["audio" if response.speaks else "text"],
            "audio": {"output": {"format": PCM, "voice": self.service.voice_name(self.voice)}},
            "max_output_tokens": self.max_output_tokens,
            "metadata": None,
            "usage": None,
            **fields,
        }

    async def _speak(self, response: _Response, asked: list[str]) -> None:
        """Sends an answer while it is made."""
        part = "audio" if response.speaks else "text"  # so called in these events, and `output_audio` in items
        words = "response.output_audio_transcript" if response.speaks else "response.output_text"
        where = {"response_id": response.id, "item_id": response.item.id, "output_index": 0, "content_index": 0}
        whole = {name: where[name] for name in ("response_id", "output_index")}
        answer: Any = response.answer
        error: Exception | None = None
        try:
            await self.send("response.created", response=self._told_response(response, "in_progress"))
            await self.send("response.output_item.added", **whole, item=response.item.told())
            await self._add(response.item)
            empty = {"type": part, "transcript" if response.speaks else "text": ""}
            await self.send("response.content_part.added", **where, part=empty)
            async for text, sound in self.service.events(answer):
                if text:
                    response.text += text
                    await self.send(f"{words}.delta", **where, delta=text)
                if sound is not None:
                    await self._send_sound(response, sound, where)
        except (WebSocketDisconnect, TimeoutError, ConnectionError):
            self._leave()
            return
        except ValueError as problem:
            error = problem
        except Exception as problem:
            logger.error("answer of session %s", self.id, exc_info=problem)
            error = RuntimeError("The answer failed.")
        finally:
            answer.cancel()
            self.response = None
        try:
            await self._tell_end(response, asked, error, words, where, whole)
        except (WebSocketDisconnect, TimeoutError, ConnectionError, RuntimeError):
            self._leave()

    async def _send_sound(self, response: _Response, sound: torch.Tensor, where: dict[str, Any]) -> None:
        response.sent += len(sound) / RATE
        if response.first_sent is None:
            response.first_sent = time.monotonic()
        if self.turn_detection is not None:
            self.detector.played(sound.numpy())
        # In pieces of a fifth of a second: a message must not hold others up.
        for piece in sound.split(RATE // 5):
            delta = base64.b64encode(to_pcm16(piece)).decode()
            await self.send("response.output_audio.delta", **where, delta=delta)

    async def _tell_end(
        self,
        response: _Response,
        asked: list[str],
        error: Exception | None,
        words: str,
        where: dict[str, Any],
        whole: dict[str, Any],
    ) -> None:
        answer, item = response.answer, response.item
        output = answer.output if answer is not None else None
        if output is not None:
            self.turns.append((asked, item.id))
            self.turns = self.turns[-max(1, self.conversation.num_turns) :]
            self.last = response
        is_complete = answer is not None and answer.is_complete
        if error is not None:
            status, details = "failed", {"error": {"type": "server_error", "code": None, "message": str(error)}}
        elif response.reason is not None:
            status, details = "cancelled", {"reason": response.reason}
        elif is_complete:
            status, details = "completed", None
        else:
            status, details = "incomplete", {"reason": "max_output_tokens"}
        item.status = "completed" if status == "completed" else "incomplete"
        field_name = "transcript" if response.speaks else "text"
        item.content = [{"type": "output_audio" if response.speaks else "output_text", field_name: response.text}]
        part = {"type": "audio" if response.speaks else "text", field_name: response.text}
        if response.speaks:
            await self.send("response.output_audio.done", **where)
        await self.send(f"{words}.done", **where, **{field_name: response.text})
        await self.send("response.content_part.done", **where, part=part)
        await self.send("response.output_item.done", **whole, item=item.told())
        await self.send("conversation.item.done", previous_item_id=asked[-1] if asked else None, item=item.told())
        if details is not None:
            details = {"type": status, **details}
        usage = usage_of(answer) if answer is not None else {}
        counted = {
            "input_tokens": usage.get("prompt_tokens", 0),
            "output_tokens": usage.get("completion_tokens", 0),
            "total_tokens": usage.get("total_tokens", 0),
        }
        done = self._told_response(response, status, status_details=details, usage=counted)
        await self.send("response.done", response=done)

    async def _cancel(self, reason: str) -> bool:
        """Ends the answer that is being made, within a step; whether there was one."""
        response = self.response
        if response is None:
            if self.last is not None and self.last.heard < self.last.sent - FRAME_SECONDS:
                self.last.reason = reason  # made, but not heard to its end
            return False
        response.reason = response.reason or reason
        if response.answer is not None:
            response.answer.cancel()
        if self.speaking is not None:
            await finished(self.speaking)
        return True

    async def _cancel_response(self, event: dict[str, Any]) -> None:
        named, last = event.get("response_id"), self.last
        if self.response is None and last is not None and last.is_truncated and named in (None, last.id):
            # Who interrupts an answer may truncate and cancel it in one go: the former has ended it already.
            last.is_truncated = False
            return
        if self.response is None or (named is not None and named != self.response.id):
            raise ApiError("There is no such answer to cancel.", code="response_cancel_not_active")
        await self._cancel("client_cancelled")

    _handlers: dict[str, Callable] = {
        "session.update": _update,
        "input_audio_buffer.append": _append,
        "input_audio_buffer.commit": _commit,
        "input_audio_buffer.clear": _clear_buffer,
        "conversation.item.create": _create_item,
        "conversation.item.retrieve": _retrieve,
        "conversation.item.delete": _delete,
        "conversation.item.truncate": _truncate,
        "response.create": _create_response,
        "response.cancel": _cancel_response,
    }


@router.websocket("/v1/realtime")
async def realtime(socket: WebSocket) -> None:
    """Opens a session."""
    service: Service = socket.app.state.service
    offered = [part.strip() for part in socket.headers.get("sec-websocket-protocol", "").split(",")]
    await socket.accept(subprotocol="realtime" if "realtime" in offered else None)
    if len(service.sessions) >= service.settings.max_sessions:
        service.metrics.refused.labels("sessions").inc()
        message = {"type": "error", "error": ApiError("All sessions are taken.", 503, "server_busy").body}
        await socket.send_text(json.dumps(message))
        await socket.close(1013, "All sessions are taken: try again later.")
        return
    session = RealtimeSession(socket, service)
    service.sessions.add(session)
    service.metrics.sessions.inc()
    try:
        await session.run()
    finally:
        service.sessions.discard(session)
        service.metrics.sessions.dec()


__all__ = ["RealtimeSession", "router"]
