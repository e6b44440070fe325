"""Answers as they are generated: text and sound, row by row, while `generate` runs in a thread of its own."""

import asyncio
import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from .generation_minimind_o import MiniMindOStreamer
from .streaming_codec_minimind_o import MimiStreamingDecoder, MimiStreamState

FRAME_SECONDS = 0.08
FEW_FRAMES = 4  # which cost Mimi little more time than one
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass
class MiniMindOStreamEvent:
    """
    A piece of one row's answer.

    Args:
        row (`int`): Which row of the batch.
        text (`str`): What was written since the row's last event; whole characters.
        audio (`torch.Tensor` of shape `(num_samples,)`, *optional*):
            What was spoken since then, at the codec's rate (24 kHz): float32 in [-1, 1], or int16 where asked for.
        is_last (`bool`): Whether the row's answer is complete.
    """

    row: int
    text: str = ""
    audio: torch.Tensor | None = None
    is_last: bool = False


class StopOn(StoppingCriteria):
    """Ends every row once an event is set."""

    def __init__(self, event: "threading.Event | _EitherEvent"):
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


class _RowText:
    """A row's tokens as text that only ever grows by whole characters."""

    def __init__(self, tokenizer: Any, skip_special_tokens: bool):
        self.tokenizer, self.skip_special_tokens = tokenizer, skip_special_tokens
        self.tokens: list[int] = []
        self.written = ""

    def add(self, token: int) -> str:
        self.tokens.append(token)
        return self._grow(is_end=False)

    def _grow(self, is_end: bool) -> str:
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=self.skip_special_tokens)
        # The bytes of an unfinished character are shown as one that stands for what cannot be read.
        if not is_end:
            text = text.rstrip(REPLACEMENT)
        if not text.startswith(self.written):
            return ""
        new, self.written = text[len(self.written) :], text
        return new

    def end(self) -> str:
        return self._grow(is_end=True)


class _Pace:
    """
    When waiting frames are decoded. The first one at once; then as late, and so as many together, as a listener who
    plays without a pause allows. Where frames come too slowly for that, a few are decoded together, so that decoding
    does not slow them further.

    Args:
        limit (`int`): Most frames that wait.
        clock (callable): The time in seconds.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic):
        self.limit, self.clock = limit, clock
        self.began: float | None = None  # when the first chunk was there
        self.last_frame = 0.0
        self.given = self.interval = self.decoding = 0.0  # seconds
        self.decoded = self.wanted = 1

    def is_due(self, waiting: int) -> bool:
        """Whether so many waiting frames, of which the last has just come, are to be decoded now."""
        now = self.clock()
        if self.began is None:
            return True
        self.interval = (
            now - self.last_frame if self.interval == 0 else 0.8 * self.interval + 0.2 * (now - self.last_frame)
        )
        self.last_frame = now
        ahead = self.given - (now - self.began)
        if waiting >= self.limit:
            return True
        if waiting < self.wanted:
            return False
        # Another frame, and the decoding, must fit before what was given has been played; both may take longer.
        decoding = self.decoding * max(1.0, (waiting + 1) / self.decoded)
        return ahead < 1.5 * (self.interval + decoding)

    def gave(self, frames: int, seconds: float) -> None:
        """So many frames have been decoded, which took so long."""
        now = self.clock()
        if self.began is None:
            self.began = self.last_frame = now
        pause = max(0.0, now - self.began - self.given)
        self.began += pause  # playing goes on from here
        # One frame at a time would let decoding take most of the time.
        self.wanted = min(2 * self.wanted, FEW_FRAMES) if pause else 1
        self.given += frames * FRAME_SECONDS
        self.decoding, self.decoded = seconds, frames


class _RowSound:
    """A row's frames as sound."""

    def __init__(self, decoder: MimiStreamingDecoder, pace: _Pace):
        self.decoder, self.pace = decoder, pace
        self.state: MimiStreamState | None = None
        self.frames: list[torch.LongTensor] = []

    def add(self, frame: torch.LongTensor, more: bool = False) -> torch.Tensor | None:
        self.frames.append(frame)
        return self.flush() if not more and self.pace.is_due(len(self.frames)) else None

    def flush(self) -> torch.Tensor | None:
        if not self.frames:
            return None
        begin = self.pace.clock()
        codes = torch.stack(self.frames, dim=-1).unsqueeze(0).to(self.decoder.codec.device)
        waveform, self.state = self.decoder(codes, self.state)
        sound = waveform[0].float().clamp(-1, 1).cpu()
        self.pace.gave(len(self.frames), self.pace.clock() - begin)
        self.frames = []
        return sound


class MiniMindOIteratorStreamer(MiniMindOStreamer):
    """
    A streamer to iterate over, while `generate` runs in another thread: text and sound, row by row. The sound of a
    row's events, joined, is that of `processor.decode(model.generate(...))`, to rounding.

    Args:
        processor ([`MiniMindOProcessor`]): Its tokenizer and its codec; without a codec there is no sound.
        max_latency (`float`, defaults to 2.56):
            Longest chunk of sound in seconds. The first is one frame (80 ms): sound starts soon. Later ones are as
            long as a listener who plays them without a pause allows: decoding takes little time.
        pcm16 (`bool`, defaults to `False`): Whether sound is int16 in place of float32.
        skip_special_tokens (`bool`, defaults to `True`): Whether special tokens are left out of the text.
        timeout (`float`, *optional*):
            Longest wait for the next item in seconds, then `queue.Empty` is raised. A `generate` that fails cannot
            tell the streamer: whoever runs it passes its error to `fail`, or sets this.

    Raises:
        ValueError: `max_latency` is less than a frame, or not finite.

    Example:

    ```python
    >>> streamer = MiniMindOIteratorStreamer(processor)
    >>> Thread(target=model.generate, kwargs={**inputs, "streamer": streamer}).start()
    >>> for event in streamer:
    ...     print(event.text, end="")
    ```

    `model.stream` runs that thread itself, ends it when nobody listens, and passes its errors on.
    """

    def __init__(
        self,
        processor: Any,
        max_latency: float = 2.56,
        pcm16: bool = False,
        skip_special_tokens: bool = True,
        timeout: float | None = None,
    ):
        if not FRAME_SECONDS <= max_latency < math.inf:
            raise ValueError(f"`max_latency` must be at least a frame ({FRAME_SECONDS} s), got {max_latency}.")
        self.processor, self.pcm16, self.skip_special_tokens = processor, pcm16, skip_special_tokens
        self.timeout = timeout
        self._longest_chunk = max(1, int(max_latency / FRAME_SECONDS + 1e-6))  # frames
        self._items: queue.SimpleQueue = queue.SimpleQueue()
        self._has_prompts = False
        self._begin()

    def _begin(self) -> None:
        codec = self.processor.audio_tokenizer
        self._decoder = None if codec is None else MimiStreamingDecoder(codec)
        self._texts: dict[int, _RowText] = {}
        self._sounds: dict[int, _RowSound] = {}
        self._open_rows: list[int] | None = None

    def put(self, value: torch.LongTensor):
        """See [`MiniMindOStreamer`]."""
        if self._has_prompts:
            self._items.put(("text", value.tolist()))
        self._has_prompts = True

    def put_audio(self, codes: torch.LongTensor, mask: torch.BoolTensor):
        """See [`MiniMindOStreamer`]."""
        self._items.put(("audio", (codes, mask.tolist())))

    def put_end(self, rows: torch.BoolTensor):
        """See [`MiniMindOStreamer`]."""
        self._items.put(("last", rows.tolist()))

    def end(self):
        """See [`MiniMindOStreamer`]."""
        self._items.put(("end", None))
        self._has_prompts = False

    def fail(self, error: BaseException):
        """Raises an error where the events are read."""
        self._items.put(("error", error))

    def __iter__(self) -> Iterator[MiniMindOStreamEvent]:
        """Yields [`MiniMindOStreamEvent`]s; at last one for each row with `is_last`, with what was left."""
        while True:
            kind, value = self._items.get(timeout=self.timeout)
            yield from self.events(kind, value)
            if kind == "end":
                break

    def events(self, kind: str, value: Any, more: bool = False) -> Iterator[MiniMindOStreamEvent]:
        """
        What one item of `generate` adds, for callers who have a queue of their own. Decodes sound.

        Args:
            kind (`str`), value: As they were put.
            more (`bool`, defaults to `False`): Whether frames that come next are there already: all are decoded
                together then.
        """
        if kind == "error":
            raise value
        if kind == "end":
            yield from [self._last(row) for row in self._open_rows or []]
            self._begin()
            return
        if self._open_rows is None:
            self._open_rows = list(range(len(value[1] if kind == "audio" else value)))
        if kind == "text":
            for row in self._open_rows:
                if value[row] == self.processor.tokenizer.pad_token_id:
                    continue  # the row's text has ended
                text = self._texts.setdefault(row, _RowText(self.processor.tokenizer, self.skip_special_tokens))
                new = text.add(value[row])
                if new:
                    yield MiniMindOStreamEvent(row, text=new)
        elif kind == "audio" and self._decoder is not None:
            frames, has_frame = value
            for row in self._open_rows:
                waveform = None
                if has_frame[row]:
                    sound = self._sounds.setdefault(row, _RowSound(self._decoder, _Pace(self._longest_chunk)))
                    waveform = sound.add(frames[row], more)
                elif row in self._sounds:  # its speech has ended, others go on
                    waveform = self._sounds[row].flush()
                if waveform is not None:
                    yield MiniMindOStreamEvent(row, audio=self._samples(waveform))
        elif kind == "last":
            for row in [row for row in self._open_rows if value[row]]:
                self._open_rows.remove(row)
                yield self._last(row)

    def _last(self, row: int) -> MiniMindOStreamEvent:
        text = self._texts[row].end() if row in self._texts else ""
        waveform = self._sounds[row].flush() if row in self._sounds else None
        return MiniMindOStreamEvent(row, text=text, audio=self._samples(waveform), is_last=True)

    def _samples(self, waveform: torch.Tensor | None) -> torch.Tensor | None:
        return (waveform * 32767).round().to(torch.int16) if self.pcm16 and waveform is not None else waveform


def check_codec(model: Any, processor: Any, settings: dict[str, Any]) -> None:
    """Refuses to speak without a codec, before anything is generated."""
    generation_config = settings.get("generation_config") or model.generation_config
    mode = settings.get("generation_mode") or getattr(generation_config, "generation_mode", None)
    if processor.audio_tokenizer is None and mode != "text":
        raise ValueError('The processor has no codec to speak with: attach one, or pass `generation_mode="text"`.')


class _EitherEvent:
    """Set once one of two events is."""

    def __init__(self, first: threading.Event | None, second: threading.Event):
        self.events = [event for event in (first, second) if event is not None]

    def is_set(self) -> bool:
        return any(event.is_set() for event in self.events)


def stream_answers(
    model: Any,
    processor: Any,
    *,
    max_latency: float = 2.56,
    pcm16: bool = False,
    skip_special_tokens: bool = True,
    cancel: threading.Event | None = None,
    on_output: Callable[[Any], None] | None = None,
    **inputs,
) -> Generator[MiniMindOStreamEvent, None, None]:
    """
    Answers prompts and yields text and sound while they are generated.

    Args:
        model ([`MiniMindOForConditionalGeneration`]): The model.
        processor, max_latency, pcm16, skip_special_tokens: As [`MiniMindOIteratorStreamer`].
        cancel (`threading.Event`, *optional*): Ends the answer within a step once another thread sets it.
        on_output (callable, *optional*):
            Called with what `generate` returned, of an answer that was cancelled too, before the stream ends.
        **inputs: As [`~MiniMindOGenerationMixin.generate`].

    Yields:
        [`MiniMindOStreamEvent`]: At last one for each row with `is_last`, with what was left. Closing the iterator,
            or reading no further, ends the answer.

    Raises:
        ValueError: As `generate`; the processor has no codec, though speech is asked for.
    """
    streamer = MiniMindOIteratorStreamer(processor, max_latency, pcm16, skip_special_tokens)
    check_codec(model, processor, inputs)
    if inputs.get("streamer") is not None:
        raise ValueError("`stream` has a streamer of its own: pass yours to `generate`.")
    return _stream(model, streamer, cancel, on_output, inputs)


def _stream(model, streamer, cancel, on_output, inputs):
    # A generator of its own, so that what is wrong is said when it is called and not when it is first read.
    own_stop = threading.Event()
    stop = StopOn(_EitherEvent(cancel, own_stop))
    criteria = StoppingCriteriaList([*(inputs.pop("stopping_criteria", None) or []), stop])

    def run():
        settings = {"streamer": streamer, "stopping_criteria": criteria, "return_dict_in_generate": True}
        try:
            outputs = model.generate(**{**inputs, **settings})
            if on_output is not None:
                on_output(outputs)
        except BaseException as error:  # whatever it is, the reader is told
            errors.append(error)
            streamer.fail(error)

    errors: list[BaseException] = []
    thread = threading.Thread(target=run, name="minimind-o-generate", daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        # The reader may have stopped: the answer ends within a step, and its thread with it.
        own_stop.set()
        thread.join()
    if errors:  # after the answer's end
        raise errors[0]


async def iterate_async(
    start: Callable[..., Generator[MiniMindOStreamEvent, None, None]], cancel: threading.Event | None, *args, **kwargs
) -> AsyncIterator[MiniMindOStreamEvent]:
    """
    A stream for `async for`: other tasks run while the next event is awaited. Where the task is cancelled or the
    iterator closed, the answer ends within a step.

    Args:
        start (callable): Makes the stream of its `cancel=` and the further arguments.
        cancel (`threading.Event`, *optional*): The caller's, which is only looked at.
    """
    own = threading.Event()
    events: Any = start(*args, cancel=_EitherEvent(cancel, own), **kwargs)
    end = object()
    waiting = None
    try:
        while True:
            waiting = asyncio.ensure_future(asyncio.to_thread(next, events, end))
            event = await asyncio.shield(waiting)
            if event is end:
                return
            yield event
    finally:
        own.set()
        # A generator cannot be closed while another thread is in it.
        if waiting is not None and not waiting.done():
            await asyncio.wait([waiting])
        await asyncio.to_thread(events.close)


def stream_answers_async(
    model: Any, processor: Any, cancel: threading.Event | None = None, **kwargs
) -> AsyncIterator[MiniMindOStreamEvent]:
    """As [`stream_answers`], for `async for` (see [`iterate_async`])."""
    return iterate_async(stream_answers, cancel, model, processor, **kwargs)


__all__ = [
    "MiniMindOIteratorStreamer",
    "MiniMindOStreamEvent",
    "StopOn",
    "iterate_async",
    "stream_answers",
    "stream_answers_async",
]
