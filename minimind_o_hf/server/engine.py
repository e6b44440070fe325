"""One model, many answers: those that are being made are stepped as one batch, which they join and leave between
steps."""

import asyncio
import contextlib
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Hashable
from typing import Any, Protocol

import torch
from transformers.generation.stopping_criteria import StoppingCriteriaList

from minimind_o_hf.modeling import (
    MiniMindOCache,
    MiniMindODecoding,
    MiniMindOForConditionalGeneration,
    MiniMindOGenerateOutput,
    MiniMindOIteratorStreamer,
    MiniMindOOutputWithPast,
    MiniMindOSlotCache,
    MiniMindOStreamEvent,
)
from minimind_o_hf.modeling.streaming_minimind_o import StopOn
from minimind_o_hf.processing import MiniMindOProcessor


class Busy(RuntimeError):
    """As many answers wait as may."""


class Pending(Protocol):
    """What is to be answered, such as a [`PendingAnswer`] of a conversation."""

    outputs: Any  # to be set to what `generate` returns

    def __enter__(self) -> dict[str, Any]: ...

    def __exit__(self, *error: object) -> None: ...


class SinglePrompt:
    """
    A prompt without a conversation around it.

    Args:
        inputs (`dict`): What `generate` takes, of one row.
    """

    def __init__(self, inputs: dict[str, Any]):
        self.inputs = inputs
        self.outputs: MiniMindOGenerateOutput | None = None

    def __enter__(self) -> dict[str, Any]:
        return self.inputs

    def __exit__(self, *error: object) -> None:
        pass


class Answer:
    """
    An answer that is being made, or waits for it. Read it with `async for`, in the event loop it was asked for in.

    Args:
        output ([`MiniMindOGenerateOutput`], *optional*): What was generated, once the answer has ended.
        waited (`float`, *optional*): Seconds until it was begun.
        first_sound (`float`, *optional*): Seconds until its first sound.
    """

    def __init__(self, engine: "Engine", pending: Pending, max_latency: float, client: Hashable):
        self._engine, self._pending, self._client = engine, pending, client
        self._cancelled = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue = asyncio.Queue()
        self._streamer = _Streamer(engine, self, max_latency)
        self._asked = time.monotonic()
        self.output: MiniMindOGenerateOutput | None = None
        self.waited: float | None = None
        self.first_sound: float | None = None

    def cancel(self) -> None:
        """Ends it within a step; what was said until then has been kept when the iteration ends."""
        self._cancelled.set()
        self._engine.wake()

    @property
    def is_complete(self) -> bool:
        """Whether it came to its own end, in text and speech."""
        return self.output is not None and self.output.is_complete is not None and bool(self.output.is_complete.all())

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    async def __aiter__(self) -> AsyncIterator[MiniMindOStreamEvent]:
        """
        Yields [`MiniMindOStreamEvent`]s of row 0, the last with `is_last`; nothing more once it was cancelled.

        Raises:
            ValueError: What `generate` refuses.
            RuntimeError: The server stopped, or the model failed.
        """
        while True:
            event = await self._events.get()
            if event is None:
                return
            if isinstance(event, BaseException):
                raise event
            if not self.is_cancelled:
                yield event

    # ---------------------------------------------------------------- in the threads of the engine

    def _tell(self, event: MiniMindOStreamEvent | BaseException | None) -> None:
        # The loop may be gone when the server stops.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def _take(self, kind: str, value: Any, more: bool = False) -> None:
        """What the model has made: text and sound of it go to the reader."""
        if kind == "done":
            self.output = value if isinstance(value, MiniMindOGenerateOutput) else None
            if not isinstance(value, BaseException) and not self.is_cancelled:
                self._read("end", None)
            self._engine.forget(self)
            self._tell(value if isinstance(value, BaseException) else None)
        elif not self.is_cancelled:
            self._read(kind, value, more)

    def _read(self, kind: str, value: Any, more: bool = False) -> None:
        try:
            for event in self._streamer.events(kind, value, more):
                if event.audio is not None and self.first_sound is None:
                    self.first_sound = time.monotonic() - self._asked
                    self._engine.on_first_sound(self.first_sound)
                self._tell(event)
        except Exception as error:  # the codec's: nobody else is concerned
            self.cancel()
            self._tell(error)


class _Streamer(MiniMindOIteratorStreamer):
    """Passes on what the model makes, to be decoded in another thread than the model's."""

    def __init__(self, engine: "Engine", answer: Answer, max_latency: float):
        super().__init__(engine.processor, max_latency)
        self._items: Any = self
        self._engine, self._answer = engine, answer

    def put(self, value: Any) -> None:
        """Takes items in the place of a queue, and tokens as a streamer."""
        if isinstance(value, tuple):
            self._engine.sound.put((self._answer, *value))
        else:
            super().put(value)

    def end(self) -> None:
        """The engine says it, when the answer has been kept."""


class _Row:
    """An answer in the batch."""

    def __init__(self, answer: Answer, decoding: MiniMindODecoding, cache: MiniMindOCache):
        self.answer, self.decoding, self.cache = answer, decoding, cache


class Engine:
    """
    Makes answers, many at a time, with one model in a thread of its own; a second thread decodes their sound. An
    answer does not depend on the others (in float32 and with a seed, its codes are those it has alone).

    Args:
        model ([`MiniMindOForConditionalGeneration`]): The model.
        processor ([`MiniMindOProcessor`]): Its processor.
        max_answers (`int`, defaults to 8): Most answers that are made at the same time.
        max_waiting (`int`, defaults to 32): Most that wait for their turn, in the order they came.
        on_first_sound (callable, *optional*): Called with the seconds from a question to its first sound.
    """

    def __init__(
        self,
        model: MiniMindOForConditionalGeneration,
        processor: MiniMindOProcessor,
        max_answers: int = 8,
        max_waiting: int = 32,
        on_first_sound: Callable[[float], None] = lambda seconds: None,
    ):
        if max_answers < 1 or max_waiting < 0:
            raise ValueError(
                f"`max_answers` must be at least 1 and `max_waiting` at least 0, got {max_answers} and {max_waiting}."
            )
        self.model: Any = model
        self.processor, self.on_first_sound = processor, on_first_sound
        self.max_answers, self.max_waiting = max_answers, max_waiting
        self.sound: queue.SimpleQueue = queue.SimpleQueue()
        self.num_steps = self.num_row_steps = self.num_answers = 0
        self._rows: list[_Row] = []
        self._slots = MiniMindOSlotCache(self.model.config, max_answers)
        self._waiting: deque[Answer] = deque()
        self._is_admitting = False  # whether a prompt is being read that neither waits nor has a row yet
        self._open: set[Answer] = set()
        self._wake = threading.Condition()
        self._is_closing = False
        self._threads = [
            threading.Thread(target=self._run_model, name="minimind-o-model", daemon=True),
            threading.Thread(target=self._run_sound, name="minimind-o-sound", daemon=True),
        ]

    @property
    def num_active(self) -> int:
        """Answers that are being made."""
        return len(self._rows)

    @property
    def num_waiting(self) -> int:
        """Answers that wait for their turn."""
        return len(self._waiting)

    @property
    def is_alive(self) -> bool:
        """Whether answers can be asked for."""
        return not self._is_closing and all(thread.is_alive() for thread in self._threads)

    def start(self) -> None:
        """Starts both threads."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends all answers, with an error for their readers, and both threads."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        self._threads[0].join()
        self.sound.put(None)
        self._threads[1].join()

    def submit(self, pending: Pending, max_latency: float = 2.56, client: Hashable = None) -> Answer:
        """
        Asks for an answer. To be called in an event loop.

        Args:
            pending ([`Pending`]): What is to be answered; the model's thread enters and leaves it.
            max_latency (`float`): Longest chunk of sound, see [`MiniMindOIteratorStreamer`].
            client (*optional*):
                Who asks. Of those that wait, the first of whoever has the fewest answers in the making comes next.

        Raises:
            Busy: `max_waiting` answers wait already.
        """
        answer = Answer(self, pending, max_latency, client)
        with self._wake:
            if self._is_closing:
                raise Busy("The server is stopping.")
            if len(self._waiting) >= self.max_waiting + self.max_answers - len(self._rows) - self._is_admitting:
                raise Busy(f"{len(self._rows)} answers are being made and {len(self._waiting)} wait: try again soon.")
            self._waiting.append(answer)
            self._open.add(answer)
            self.num_answers += 1
            self._wake.notify()
        return answer

    def wake(self) -> None:
        """Has the model's thread look for cancelled answers."""
        with self._wake:
            self._wake.notify()

    def forget(self, answer: Answer) -> None:
        """Of an answer that has ended."""
        with self._wake:
            self._open.discard(answer)

    @property
    def num_open(self) -> int:
        """Answers that have not ended."""
        return len(self._open)

    # ---------------------------------------------------------------- the thread of the sound

    def _run_sound(self) -> None:
        waiting: dict[Answer, list[tuple[str, Any]]] = {}
        is_closing = False
        while not is_closing or waiting:
            # All that has come meanwhile: frames of one answer are decoded together, which takes less time.
            while not is_closing and (not waiting or not self.sound.empty()):
                item = self.sound.get()
                if item is None:
                    is_closing = True
                else:
                    waiting.setdefault(item[0], []).append(item[1:])
            if not waiting:
                continue
            # Who has heard nothing yet comes first, then who has waited longest.
            answer = next((answer for answer in waiting if answer.first_sound is None), next(iter(waiting)))
            items = waiting.pop(answer)
            frames = sum(kind == "audio" for kind, _ in items)
            for kind, value in items:
                frames -= kind == "audio"
                answer._take(kind, value, more=kind == "audio" and frames > 0)

    # ---------------------------------------------------------------- the thread of the model

    def _run_model(self) -> None:
        with self.model._optimize_model_for_decode(), torch.no_grad():
            while True:
                with self._wake:
                    while not (self._rows or self._waiting or self._is_closing):
                        self._wake.wait()
                    if self._is_closing:
                        break
                # One prompt at most between two steps: those who listen already must not wait for many.
                self._admit()
                if self._rows:
                    self._step()
        error = RuntimeError("The server stopped.")
        for row in range(len(self._rows) - 1, -1, -1):
            self._leave(row, error)
        while self._waiting:
            self._done(self._waiting.popleft(), error)

    def _done(self, answer: Answer, result: MiniMindOGenerateOutput | BaseException | None) -> None:
        self.sound.put((answer, "done", result))

    def _next(self) -> Answer | None:
        """Who comes next: the first of those that wait, or of a client that has fewer answers in the making."""
        with self._wake:
            cancelled = [answer for answer in self._waiting if answer.is_cancelled]
            for answer in cancelled:
                self._waiting.remove(answer)
                self._done(answer, None)
            self._is_admitting = bool(self._waiting) and len(self._rows) < self.max_answers
            if not self._is_admitting:
                return None
            taken = Counter(row.answer._client for row in self._rows if row.answer._client is not None)
            chosen = min(self._waiting, key=lambda answer: taken[answer._client])  # the first of several
            self._waiting.remove(chosen)
            return chosen

    def _admit(self) -> None:
        answer = self._next()
        if answer is None:
            return
        answer.waited = time.monotonic() - answer._asked
        is_open = False
        try:
            inputs = answer._pending.__enter__()
            is_open = True
            stops = StoppingCriteriaList([*inputs.pop("stopping_criteria", []), StopOn(answer._cancelled)])
            cache = inputs.setdefault("past_key_values", MiniMindOCache(self.model.config))
            settings = {"stopping_criteria": stops, "return_dict_in_generate": True}
            decoding = self.model.start_decoding(answer._streamer, **{**inputs, **settings})
            decoding.advance(decoding.prefill())
            row = _Row(answer, decoding, cache)
            if decoding.is_finished:
                self._end(row)
                return
            self._slots.add(cache)
            with self._wake:
                self._rows.append(row)
                self._is_admitting = False
        except Exception as error:  # what is wrong with one prompt is no other's concern
            if is_open:
                answer._pending.__exit__()
            self._done(answer, error)
        finally:
            self._is_admitting = False

    def _step(self) -> None:
        try:
            outputs: Any = self._forward()
        except Exception as error:  # out of memory, say: nobody's keys and values can be trusted
            for index in range(len(self._rows) - 1, -1, -1):
                self._leave(index, error)
            self._slots = MiniMindOSlotCache(self.model.config, self.max_answers)
            return
        self.num_steps += 1
        self.num_row_steps += len(self._rows)
        rows = list(self._rows)
        results: dict[int, BaseException | None] = {}
        for index, row in enumerate(rows):
            own = slice(index, index + 1)
            speech = None if outputs.audio_logits is None else outputs.audio_logits[own]
            try:
                row.decoding.advance(
                    MiniMindOOutputWithPast(logits=outputs.logits[own], audio_logits=speech, past_key_values=row.cache)
                )
            except Exception as error:
                results[index] = error
            else:
                if row.decoding.is_finished:
                    results[index] = None
        # From the last on: the last row takes the place of one that leaves.
        for index in sorted(results, reverse=True):
            self._leave(index, results[index])

    def _forward(self) -> MiniMindOOutputWithPast:
        """One position of all rows."""
        config, decodings = self.model.config, [row.decoding for row in self._rows]
        inputs = self._slots.begin_step()
        inputs["input_ids"] = torch.cat([decoding.input_ids[:, -1:] for decoding in decodings])
        speaks = any(decoding.speaks for decoding in decodings)
        if speaks:
            silence = torch.full((1, config.num_codebooks, 1), config.audio_pad_token, device=self.model.device)
            nobody = torch.zeros(1, config.spk_emb_size, device=self.model.device)
            codes = [d.model_kwargs["audio_codes"][..., -1:] if d.speaks else silence for d in decodings]
            voices = [d.model_kwargs.get("speaker_embeddings") for d in decodings]
            inputs["audio_codes"] = torch.cat(codes)
            if any(voice is not None for voice in voices):
                voices = [nobody if voice is None else voice.to(nobody) for voice in voices]
                inputs["speaker_embeddings"] = torch.cat(voices)
        return self.model(**inputs, past_key_values=self._slots, use_cache=True, run_talker=speaks, return_dict=True)

    def _leave(self, index: int, error: BaseException | None) -> None:
        """Takes a row out of the batch."""
        row = self._rows[index]
        self._rows[index] = self._rows[-1]
        self._rows.pop()
        self._slots.remove(index, with_talker=row.decoding.speaks)
        self._end(row, error)

    def _end(self, row: _Row, error: BaseException | None = None) -> None:
        result: Any = error
        try:
            if error is None:
                result = row.answer._pending.outputs = row.decoding.end()
            row.answer._pending.__exit__()
        except Exception as problem:  # this answer's alone: the thread goes on for the others
            result = problem
        self._done(row.answer, result)


__all__ = ["Answer", "Busy", "Engine", "Pending", "SinglePrompt"]
