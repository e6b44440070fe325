"""What all of the server's protocols share: the model, the voices, the limits and what is counted."""

import asyncio
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Hashable, Mapping
from typing import Any

import prometheus_client as prometheus
import torch

from minimind_o_hf.conversation import MAX_NEW_TOKENS, Conversation
from minimind_o_hf.modeling import MiniMindOForConditionalGeneration
from minimind_o_hf.processing import MiniMindOProcessor
from minimind_o_hf.voices import Voice, VoiceLibrary
from minimind_o_hf.watermark import WatermarkStream

from .engine import Answer, Engine, Pending, SinglePrompt
from .settings import ServerSettings

FIRST_SOUND_BUCKETS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)


class ApiError(Exception):
    """
    What a client is told.

    Args:
        message (`str`): What is wrong and what to do.
        status (`int`): HTTP status.
        code (`str`, *optional*): For programs.
        param (`str`, *optional*): The field that is wrong.
    """

    def __init__(self, message: str, status: int = 400, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.message, self.status, self.code, self.param = message, status, code, param

    @property
    def body(self) -> dict[str, Any]:
        """As in OpenAI's API."""
        kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}


class RateLimit:
    """
    Requests of each client in a minute, as a bucket that fills up again.

    Args:
        per_minute (`int`): How many; 0 for any number.
    """

    def __init__(self, per_minute: int):
        self.per_minute = per_minute
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str) -> float:
        """Counts a request, and returns for how many seconds the client has to wait; 0 if it is taken."""
        if not self.per_minute:
            return 0.0
        now, rate = time.monotonic(), self.per_minute / 60
        left, at = self._left.pop(client, (float(self.per_minute), now))
        left = min(self.per_minute, left + (now - at) * rate)
        wait = 0.0 if left >= 1 else (1 - left) / rate
        self._left[client] = (left if wait else left - 1, now)
        while len(self._left) > 10_000:
            self._left.popitem(last=False)
        return wait


class Metrics:
    """What Prometheus reads, of one server."""

    def __init__(self):
        self.registry = prometheus.CollectorRegistry()
        known = {"registry": self.registry, "namespace": "minimind_o"}
        self.requests = prometheus.Counter("requests", "HTTP requests", ["path", "status"], **known)
        self.events = prometheus.Counter("realtime_events", "Events of realtime clients", ["outcome"], **known)
        self.sessions = prometheus.Gauge("realtime_sessions", "Open realtime sessions", **known)
        self.refused = prometheus.Counter("refused", "Answers, sessions and requests refused", ["reason"], **known)
        self.first_sound = prometheus.Histogram(
            "first_sound_seconds", "From a question to its first sound", buckets=FIRST_SOUND_BUCKETS, **known
        )

    def watch(self, engine: Engine) -> None:
        """Adds what the engine counts."""
        for name, text in (
            ("num_active", "Answers that are being made"),
            ("num_waiting", "Answers that wait"),
            ("num_open", "Answers that have not ended"),
            ("num_answers", "Answers asked for"),
            ("num_steps", "Steps of the model"),
            ("num_row_steps", "Steps of all answers"),
        ):
            gauge = prometheus.Gauge(name.removeprefix("num_"), text, registry=self.registry, namespace="minimind_o")
            gauge.set_function(lambda name=name: getattr(engine, name))


class Service:
    """
    A model that is served.

    Args:
        model ([`MiniMindOForConditionalGeneration`]): The model, in evaluation mode.
        processor ([`MiniMindOProcessor`]): Its processor, with a codec.
        settings ([`ServerSettings`]): The server's.
        described (`dict`, *optional*): The checkpoint's voices as [`Voice`]s, which say whose they are.
    """

    def __init__(
        self,
        model: MiniMindOForConditionalGeneration,
        processor: MiniMindOProcessor,
        settings: ServerSettings,
        described: Mapping[str, Voice] | None = None,
    ):
        if processor.audio_tokenizer is None:
            raise ValueError("The checkpoint has no codec, so it cannot speak: attach one (`minimind-o convert`).")
        self.model, self.processor, self.settings = model, processor, settings
        self.described = described or {}
        self.metrics = Metrics()
        self.engine = Engine(
            model, processor, settings.max_answers, settings.max_waiting, self.metrics.first_sound.observe
        )
        self.metrics.watch(self.engine)
        self.library = VoiceLibrary(settings.library)
        self.limit = RateLimit(settings.requests_per_minute)
        self.started = int(time.time())
        self.cloning = asyncio.Lock()
        self.sessions: set[Any] = set()  # open realtime sessions
        self.said: OrderedDict[str, str] = OrderedDict()  # transcripts of spoken answers, by their ids
        if settings.voice is not None:
            self.voice(settings.voice)

    @property
    def sampling_rate(self) -> int:
        """Of all speech that is made, in Hz."""
        return self.processor.output_sampling_rate

    async def close(self) -> None:
        """Ends all sessions and answers."""
        for session in list(self.sessions):
            session.stop()
        await asyncio.to_thread(self.engine.close)

    @property
    def max_new_tokens(self) -> int:
        """Longest answer, in steps of 80 ms."""
        return self.settings.max_new_tokens or self.model.generation_config.max_new_tokens or MAX_NEW_TOKENS

    # ---------------------------------------------------------------- voices

    def voices(self) -> dict[str, tuple[Mapping[str, Any], str]]:
        """All voices by name, and where each is from."""
        own = {name: (self.described.get(name, voice), "checkpoint") for name, voice in self.processor.voices.items()}
        return {**{name: (voice, "library") for name, voice in self.library.voices().items()}, **own}

    def voice(self, name: Any) -> Voice | Mapping[str, Any] | None:
        """
        A voice by its name, or by an object with it as `id`; the default one for `None`.

        Raises:
            ApiError: There is none of that name.
        """
        name = self.voice_name(name)
        if name is None:
            return None
        if isinstance(name, str) and name in self.processor.voices:
            return self.processor.voices[name]
        voices = self.voices()
        if not isinstance(name, str) or name not in voices:
            raise ApiError(
                f"There is no voice {name!r:.100}: there are {', '.join(voices) or 'none'}.", 400, "voice_not_found"
            )
        return voices[name][0]

    def voice_name(self, name: Any) -> str | None:
        """The name of what `voice` returns."""
        name = name.get("id") if isinstance(name, dict) else name
        return self.settings.voice or next(iter(self.processor.voices), None) if name is None else name

    # ---------------------------------------------------------------- answers

    def conversation(self) -> Conversation:
        """A new one, within the limits."""
        settings = self.settings
        return Conversation(
            self.model,
            self.processor,
            voice=self.voice(None),
            max_positions=settings.max_positions,
            max_turns=settings.max_turns,
        )

    def prompt(
        self, messages: list[dict[str, Any]], voice: Any, longest: int | None = None, **settings: Any
    ) -> SinglePrompt:
        """
        Messages without a conversation around them, as what the engine takes.

        Args:
            messages (`list[dict]`): As the processor takes them.
            voice ([`Voice`], *optional*): To answer in.
            longest (`int`, *optional*): Longest answer, in steps; the server's longest by default.
            **settings: As [`~MiniMindOGenerationMixin.generate`].

        Raises:
            ApiError: The messages leave no room for an answer.
        """
        inputs: Any = self.processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            sanitize_control_tokens=True,
            voice=voice,
        )
        length, most = inputs["input_ids"].shape[1], self.settings.max_positions
        if length >= most:
            raise ApiError(
                f"The messages take {length} positions, more than {most}: shorten them.",
                code="context_length_exceeded",
            )
        longest = min(longest or self.max_new_tokens, most - length, self.max_new_tokens)
        return SinglePrompt({**inputs.to(self.model.device), **settings, "max_new_tokens": longest})

    def submit(self, pending: Pending, max_latency: float = 2.56, client: Hashable = None) -> Answer:
        """As the engine's, and counts what is refused."""
        try:
            return self.engine.submit(pending, max_latency, client)
        except RuntimeError as error:
            self.metrics.refused.labels("busy").inc()
            raise ApiError(str(error), 503, "server_busy") from error

    async def events(self, answer: Answer) -> AsyncIterator[tuple[str, torch.Tensor | None]]:
        """
        Text and sound of an answer, as they come; with the watermark where it is on. An answer that is read no
        further is cancelled.
        """
        mark = WatermarkStream(self.sampling_rate) if self.settings.watermark else None
        try:
            async for event in answer:
                if mark is not None:
                    event = await asyncio.to_thread(mark.mark_event, event)
                yield event.text, event.audio if event.audio is not None and len(event.audio) else None
        finally:
            answer.cancel()

    def remember_transcript(self, text: str) -> tuple[str, int]:
        """Keeps what a spoken answer said, for clients that refer to it; its id, and until when it is kept."""
        name = new_id("audio")
        self.said[name] = text
        while len(self.said) > 1000:
            self.said.popitem(last=False)
        return name, int(time.time()) + 3600


def new_id(kind: str) -> str:
    """An id like `item_4f...`."""
    return f"{kind}_{uuid.uuid4().hex[:24]}"


async def run_in_thread(function: Callable, *arguments) -> Any:
    """Runs what takes long in a thread; what is wrong with its input is the client's mistake."""
    try:
        return await asyncio.to_thread(function, *arguments)
    except ValueError as error:
        raise ApiError(str(error)) from error


async def finished(task: asyncio.Task) -> None:
    """Waits for a task's end, whatever it is. Unlike `await task`, it hears when the waiting itself is cancelled."""
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()  # has been looked at


__all__ = ["ApiError", "Metrics", "RateLimit", "Service", "finished", "new_id", "run_in_thread"]
