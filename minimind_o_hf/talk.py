"""`minimind-o talk`: a spoken conversation, through microphone and loudspeaker or through files."""

import argparse
import contextlib
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from transformers import set_seed

from .chat import add_answer_arguments, check, load, open_conversation, shown
from .conversation import Conversation
from .processing import load_audio
from .recordings import without_quiet_edges
from .server.turns import SpeechStarted, TurnDetector, TurnSettings
from .watermark import Watermark

RATE = 24000  # Hz, of the microphone and of the codec
BLOCK = 768  # Samples, 32 ms: what the voice activity detection reads at a time.
KEPT = 2 * RATE  # Samples of silence that may turn out to belong to the next turn.
LONGEST_TURN = 60 * RATE  # Somebody who does not stop, or a noise that is taken for speech, is answered all the same.
MAX_LATENCY = 0.64  # Seconds: an interrupted answer has not been decoded much further than it was heard.
LATENCY = 0.06  # Seconds that the loudspeaker plays on after it was stopped.
LOST_AFTER = 5.0  # Seconds without a sample, not even a silent one: the microphone was pulled out.
TWICE = 1.0  # Seconds between two Ctrl-C that end the program during an answer.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `minimind-o talk`."""
    parser.add_argument("--model", metavar="DIR", help="checkpoint directory or Hub id (default: nano, a toy)")
    parser.add_argument(
        "--adapter", metavar="DIR", action="append", default=[], help="LoRA adapter to merge into the model (one)"
    )
    parser.add_argument(
        "--input",
        metavar="FILE",
        action="append",
        default=[],
        help="listen to a recording in place of the microphone (repeatable); its pauses end the turns",
    )
    parser.add_argument(
        "--out",
        metavar="WAV",
        default="reply.wav",
        help="with --input, where speech is written, as reply-1.wav, reply-2.wav, ... (default: %(default)s)",
    )
    parser.add_argument(
        "--silence", type=int, default=500, metavar="MS", help="silence that ends a turn, in ms (default: %(default)s)"
    )
    add_answer_arguments(parser)
    parser.set_defaults(text_only=False)


# ---------------------------------------------------------------- microphones and loudspeakers


class Microphone(Protocol):
    """Where questions come from. A live one goes on while an answer plays; others wait for its end."""

    is_live: bool

    def read(self) -> np.ndarray | None:
        """The next samples of shape `(num_samples,)`, float32 at 24 kHz; None at the end."""


class Loudspeaker(Protocol):
    """Where answers go."""

    @property
    def is_playing(self) -> bool:
        """Whether something that was given has not been played yet."""
        ...

    def play(self, sound: np.ndarray) -> None:
        """Plays samples of shape `(num_samples,)`, float32 at 24 kHz, after those that were given before."""

    def stop(self) -> float:
        """Falls silent at once, and returns how many seconds were played since it was last stopped."""
        ...


class FileMicrophone:
    """
    A recording, and silence after it that ends its last turn.

    Args:
        recording (`np.ndarray` of shape `(num_samples,)`): float32 at 24 kHz.
        silence_ms (`int`): What ends a turn.
    """

    is_live = False

    def __init__(self, recording: np.ndarray, silence_ms: int):
        sound = np.append(recording, np.zeros(silence_ms * RATE // 1000 + RATE // 4, dtype=np.float32))
        self._blocks = iter(np.split(sound, range(BLOCK, len(sound), BLOCK)))

    def read(self) -> np.ndarray | None:
        """See [`Microphone`]."""
        return next(self._blocks, None)


class FileLoudspeaker:
    """
    Writes each answer to a file of its own, and takes no time to play it.

    Args:
        out (`Path`): `reply.wav` for `reply-1.wav`, `reply-2.wav`, ...
        save (callable): Writes samples to a path.
    """

    is_playing = False

    def __init__(self, out: Path, save: Callable[[np.ndarray, Path], None]):
        self._out, self._save, self._number = out, save, 0
        self._sounds: list[np.ndarray] = []

    def play(self, sound: np.ndarray) -> None:
        """See [`Loudspeaker`]."""
        self._sounds.append(sound)

    def stop(self) -> float:
        """See [`Loudspeaker`]."""
        self._number += 1
        if not self._sounds:
            return 0.0
        sound, self._sounds = np.concatenate(self._sounds), []
        path = self._out.with_name(f"{self._out.stem}-{self._number}{self._out.suffix}")
        self._save(sound, path)
        print(f"{path}: {len(sound) / RATE:.1f} s of speech", file=sys.stderr)
        return len(sound) / RATE


def _open_stream(kind: str, what: str, **settings: Any) -> Any:
    """A stream of `sounddevice`, with what is missing said in words."""
    try:
        import sounddevice  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError) as error:
        raise OSError(
            f"talking needs `pip install sounddevice` and PortAudio ({error}); or ask by files (--input FILE.wav)"
        ) from error
    try:
        return getattr(sounddevice, kind)(samplerate=RATE, channels=1, dtype="float32", blocksize=BLOCK, **settings)
    except (sounddevice.PortAudioError, ValueError) as error:
        raise OSError(f"no {what} can be opened ({error}): ask by files (--input FILE.wav)") from error


class DeviceMicrophone:
    """The default microphone; it listens within `with microphone.stream`. `OSError` where there is none."""

    is_live = True

    def __init__(self):
        # By a callback, so that nothing is lost while the model is busy.
        self._blocks: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        self.stream = _open_stream("InputStream", "microphone", callback=self._take)

    def _take(self, sound: np.ndarray, *_: Any) -> None:
        self._blocks.put(sound[:, 0].copy())

    def read(self) -> np.ndarray | None:
        """See [`Microphone`]."""
        try:
            return self._blocks.get(timeout=LOST_AFTER)
        except queue.Empty as error:
            raise OSError(f"the microphone gave nothing for {LOST_AFTER:g} s: is it still there?") from error


class DeviceLoudspeaker:
    """The default loudspeaker; it plays within `with loudspeaker.stream`. `OSError` where there is none."""

    def __init__(self):
        self._lock = threading.Lock()
        self._waiting = np.zeros(0, dtype=np.float32)
        self._taken = 0  # Samples that the device was given since it was last stopped.
        self.stream = _open_stream("OutputStream", "loudspeaker", latency=LATENCY, callback=self._fill)

    def _fill(self, out: np.ndarray, *_: Any) -> None:
        with self._lock:
            sound, self._waiting = self._waiting[: len(out)], self._waiting[len(out) :]
            self._taken += len(sound)
        out[: len(sound), 0] = sound
        out[len(sound) :] = 0

    @property
    def is_playing(self) -> bool:
        """See [`Loudspeaker`]."""
        return len(self._waiting) > 0

    def play(self, sound: np.ndarray) -> None:
        """See [`Loudspeaker`]."""
        with self._lock:
            self._waiting = np.append(self._waiting, sound)

    def stop(self) -> float:
        """See [`Loudspeaker`]."""
        with self._lock:
            # What the device was given is heard a little later. An answer that was not cut is, to its end.
            late = self.stream.latency if len(self._waiting) else 0.0
            heard = max(0.0, self._taken / RATE - late)
            self._waiting, self._taken = self._waiting[:0], 0
        return heard


# ---------------------------------------------------------------- the conversation


class _Answer:
    """An answer that is being made, in a thread of its own."""

    def __init__(self, conversation: Conversation, speech: np.ndarray, settings: dict[str, Any], watermark: bool):
        self.items: queue.SimpleQueue = queue.SimpleQueue()  # texts, sounds, an error, and None at the end
        self.asked = time.perf_counter()
        self.first_sound: float | None = None  # seconds
        self.is_made = self.is_kept = False
        self._cancel = threading.Event()
        arguments = (conversation, speech, settings, Watermark() if watermark else None)
        self._thread = threading.Thread(target=self._make, args=arguments, name="minimind-o-talk", daemon=True)
        self._thread.start()

    def _make(self, conversation: Conversation, speech: np.ndarray, settings: dict, mark: Any) -> None:
        def on_output(outputs: Any) -> None:
            self.is_kept = True

        said = [{"type": "audio", "audio": without_quiet_edges(speech, RATE), "sampling_rate": RATE}]
        own = {"max_latency": MAX_LATENCY, "cancel": self._cancel, "on_output": on_output}
        try:
            events = conversation.stream(said, **settings, **own)
            for event in events if mark is None else mark.apply_to_stream(events):
                self.items.put(event.text)
                if event.audio is not None and len(event.audio):
                    self.items.put(event.audio.numpy())
        except Exception as error:  # the listening thread tells it
            self.items.put(error)
        self.items.put(None)

    def cancel(self) -> None:
        """Ends it, within a step of the model."""
        self._cancel.set()
        self._thread.join()


class Talk:
    """
    Listens, answers, and falls silent when it is interrupted. Captions are printed as the answers are made, what else
    there is to say goes to the standard error stream.

    Args:
        conversation ([`Conversation`]): What answers.
        detector ([`TurnDetector`]): Finds the turns, at 24 kHz.
        loudspeaker ([`Loudspeaker`]): Where answers go.
        watermark (`bool`): Whether they get the inaudible watermark.
        **settings: As [`~Conversation.stream`].
    """

    def __init__(
        self,
        conversation: Conversation,
        detector: TurnDetector,
        loudspeaker: Loudspeaker,
        watermark: bool = False,
        **settings: Any,
    ):
        self.conversation, self.detector, self.loudspeaker = conversation, detector, loudspeaker
        self.watermark, self.settings = watermark, settings
        self.turns = 0
        self._answer: _Answer | None = None
        self._is_live = False
        self._forget()

    def _forget(self) -> None:
        self.detector.reset()
        self._blocks: deque[np.ndarray] = deque()
        self._start = 0  # Of the first block, in samples of all that was heard.
        self._turn_start: int | None = None  # While somebody speaks.

    def listen(self, microphone: Microphone) -> None:
        """
        Talks until the microphone's end. Ctrl-C ends an answer; twice, or where there is none, it is passed on.

        Raises:
            OSError: The microphone is gone; an answer cannot be written.
        """
        self._is_live, pressed = microphone.is_live, -TWICE
        self._forget()
        with contextlib.closing(self):
            while True:
                try:
                    block = microphone.read()
                    if block is None:
                        return
                    self._hear(block)
                    self._speak()
                except KeyboardInterrupt:
                    if not self.is_answering or time.monotonic() - pressed < TWICE:
                        raise
                    pressed = time.monotonic()
                    self._interrupt()

    @property
    def is_answering(self) -> bool:
        """Whether an answer is being made or played."""
        return self._answer is not None

    def close(self) -> None:
        """Ends the answer that is being made or played, if there is one."""
        if self._answer is not None:
            self._interrupt()

    def _hear(self, block: np.ndarray) -> None:
        self._blocks.append(block)
        for event in self.detector.push(block):
            if isinstance(event, SpeechStarted):
                self._turn_start = event.start_sample
                self.close()
            elif self._turn_start is not None:
                self._ask(self._take(event.end_sample))
        position = self.detector.position
        if self._turn_start is None:
            while self._blocks and position - self._start - len(self._blocks[0]) >= KEPT:
                self._start += len(self._blocks.popleft())
        elif position - self._turn_start > LONGEST_TURN:
            self._ask(self._take(position))
            self._forget()

    def _take(self, end: int) -> np.ndarray:
        """The turn that ends at a sample; what comes after it is kept."""
        whole = np.concatenate(self._blocks)
        first = (self._turn_start or 0) - self._start
        speech, rest = whole[max(0, first) : end - self._start], whole[end - self._start :]
        self._blocks, self._start, self._turn_start = deque([rest]), end, None
        return speech

    def _ask(self, speech: np.ndarray) -> None:
        self.close()
        self.turns += 1
        print(f"({len(speech) / RATE:.1f} s heard)", file=sys.stderr)
        self._answer = _Answer(self.conversation, speech, self.settings, self.watermark)

    def _speak(self) -> None:
        """Passes on what of the answer is there; all of it, where the microphone can wait."""
        answer = self._answer
        while answer is not None and not answer.is_made:
            try:
                item = answer.items.get(block=not self._is_live)
            except queue.Empty:
                break
            if item is None:
                answer.is_made = True
            elif isinstance(item, str):
                print(shown(item), end="", flush=True)
            elif isinstance(item, BaseException):
                self._answer = None
                print(flush=True)
                self.loudspeaker.stop()
                if not isinstance(item, (ValueError, OSError)):
                    raise item
                print(f"error: {item}", file=sys.stderr)
                return
            else:
                if answer.first_sound is None:
                    answer.first_sound = time.perf_counter() - answer.asked
                if self._is_live:
                    self.detector.played(item)
                self.loudspeaker.play(item)
        if answer is not None and answer.is_made and not self.loudspeaker.is_playing:
            self._end(answer)

    def _end(self, answer: _Answer) -> float:
        """The end of an answer, of which so many seconds were heard."""
        self._answer = None
        heard = self.loudspeaker.stop()
        print(flush=True)
        if answer.first_sound is not None:
            print(f"(first sound after {answer.first_sound:.2f} s)", file=sys.stderr)
        return heard

    def _interrupt(self) -> None:
        answer = self._answer
        assert answer is not None
        heard = self._end(answer)
        if self._is_live:
            self.detector.stop_playing()
        answer.cancel()
        kept = self.conversation.cut(heard) if answer.is_kept else ""
        print(f"(interrupted after {heard:.1f} s: {shown(kept)!r} is remembered)", file=sys.stderr)


def run(options: argparse.Namespace) -> None:
    """Runs `minimind-o talk` with parsed options."""
    if len(options.adapter) > 1:
        raise ValueError("A conversation has one adapter: give --adapter once.")
    if options.seed is not None:
        set_seed(options.seed)
    # What is missing is said before the model is loaded.
    recordings = {path: load_audio(path, target_rate=RATE) for path in options.input}
    try:
        detector = TurnDetector(TurnSettings(silence_duration_ms=options.silence), RATE)
    except ImportError as error:
        raise ValueError(f'{error} (pip install "minimind_o_hf[server]")') from error
    devices = None if recordings else (DeviceMicrophone(), DeviceLoudspeaker())
    model, processor = load(options.model, options.device, options.dtype, options.adapter)
    check(options, processor)
    conversation = open_conversation(options, model, processor)
    settings = {} if options.max_new_tokens is None else {"max_new_tokens": options.max_new_tokens}

    if devices is not None:
        microphone, loudspeaker = devices
        with microphone.stream, loudspeaker.stream:
            print("Speak: it answers. Ctrl-C ends an answer, twice the conversation.", file=sys.stderr)
            Talk(conversation, detector, loudspeaker, options.watermark, **settings).listen(microphone)
        return

    def save(sound: np.ndarray, path: Path) -> None:
        processor.save_audio(sound, path, model=Path(options.model or "nano").name, voice=options.voice)

    talk = Talk(conversation, detector, FileLoudspeaker(Path(options.out), save), options.watermark, **settings)
    for path, recording in recordings.items():
        before = talk.turns
        talk.listen(FileMicrophone(recording, options.silence))
        if talk.turns == before:
            print(f"{path}: no speech found", file=sys.stderr)


__all__ = ["add_arguments", "run"]
