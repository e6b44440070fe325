"""Turn taking: when somebody begins and ends speaking into a microphone."""

import math
import threading
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

MODEL_RATE = 16000
WINDOW = 512  # Samples at 16 kHz, 32 ms: what silero-vad reads at a time ...
CONTEXT = 64  # ... after the end of the window before.
HYSTERESIS = 0.15  # Speech ends below `threshold - HYSTERESIS`, as in silero's own VADIterator.
MIN_SPEECH_WINDOWS = 3  # 96 ms. A cough or a click is over by then, and speech is reported within 200 ms.
MAX_MS = 60_000
# Input rates whose windows of 32 ms are whole samples, and the ratio by which they become 16 kHz.
RATES = {8000: (2, 1), 16000: (1, 1), 24000: (2, 3), 48000: (1, 3)}

BLOCK = 256  # Samples the echo canceller reads at a time ...
PARTITIONS = 12  # ... of which it looks back on this many: 192 ms of room.
FORGET = 0.996  # How sure it stays, from block to block, of what it learned: rooms change.
FADE = np.sqrt(np.hanning(2 * BLOCK + 1)[:-1]).astype(np.float32)
LEAD = 128  # Samples by which the canceller's reference comes early: the place is found to a few samples.
MAX_DELAY = int(3.2 * MODEL_RATE)  # From sending a sample to hearing it, if the client is not behind with playing.
JITTER = MODEL_RATE // 4  # By which the delay may shrink from one answer to the next.
TAIL = 3 * MODEL_RATE // 10  # How long a room goes on.
REACTION = MODEL_RATE  # How long a client may play on after it was stopped.
HISTORY = 31 * WINDOW  # What is compared with what was sent: 1 s.
SEARCH = 36864  # Length of its Fourier transform at 8 kHz; holds MAX_DELAY, TAIL and HISTORY.
DISTORTION = 0.1  # Of the echo's power: what a loudspeaker adds that no filter can know.
FADING = 0.7  # Of the echo's power, from block to block: 60 dB in 0.6 s.
MATURE = 8 * MODEL_RATE // 10  # Audible sound after which the way from loudspeaker to microphone is known.
FOUND = 0.14  # Likeness from which on a place counts as found, ...
SUSPECTED = 0.09  # ... and, if it is the same twice running, as worth waiting for.
AUDIBLE = 1e-4  # Mean square (-40 dB) of sound that would be heard, ...
SILENT_AFTER = MODEL_RATE  # ... of which this much, not found, means that the client's echo is inaudible.
LONGEST_AHEAD = 300 * MODEL_RATE  # More than this, sent and not yet played, is not kept (19 MB).
HOLD_WINDOWS = 10  # 0.3 s of speech while it may be an echo that is not known yet: it is somebody, then.
LONG_HOLD_WINDOWS = 20  # 0.6 s, while there is something to suspect.


@dataclass(frozen=True)
class TurnSettings:
    """
    When a turn begins and ends, as in the realtime protocol's `server_vad`.

    Args:
        threshold (`float`, defaults to 0.5): Probability of speech, between 0 and 1, from which on it is speech.
        prefix_padding_ms (`int`, defaults to 300): Sound before the detected speech that belongs to it, up to 60,000.
        silence_duration_ms (`int`, defaults to 500): Silence that ends speech, up to 60,000.

    Raises:
        ValueError: A value has the wrong type, or is out of range.
    """

    threshold: float = 0.5
    prefix_padding_ms: int = 300
    silence_duration_ms: int = 500

    def __post_init__(self):
        for field in fields(self):
            value: Any = getattr(self, field.name)
            numbers = (int, float) if field.name == "threshold" else int
            if isinstance(value, bool) or not isinstance(value, numbers):
                kind = "a number" if field.name == "threshold" else "a whole number of milliseconds"
                raise ValueError(f"`{field.name}` is {kind}, got {value!r:.100}.")
            highest = 1 if field.name == "threshold" else MAX_MS
            if not 0 <= value <= highest:
                raise ValueError(f"`{field.name}` lies between 0 and {highest}, got {value!r:.100}.")


@dataclass(frozen=True)
class SpeechStarted:
    """
    Somebody began to speak. The start lies before the speech by the padding, but not before the last turn's end.

    Args:
        start_sample (`int`), start_ms (`int`): Where the turn begins in all that was pushed so far.
    """

    start_sample: int
    start_ms: int


@dataclass(frozen=True)
class SpeechStopped:
    """
    Somebody stopped speaking.

    Args:
        end_sample (`int`), end_ms (`int`):
            Where the turn ends in all that was pushed so far, with the silence that ended it.
    """

    end_sample: int
    end_ms: int


class VoiceActivity:
    """silero-vad on onnxruntime. The network is the process's, the recurrent state the instance's."""

    _lock = threading.Lock()
    _session: Any = None

    def __init__(self):
        self._network = self._load()
        self.reset()

    @classmethod
    def _load(cls) -> Any:
        with cls._lock:
            if cls._session is None:
                # Only its file is read: importing the package imports torchaudio, where there is one.
                package = find_spec("silero_vad")
                if package is None or package.origin is None:
                    raise ImportError("Turn taking needs silero-vad: pip install silero-vad onnxruntime")
                import onnxruntime

                options = onnxruntime.SessionOptions()
                # 0.2 ms of work: threads would cost more than they give.
                options.intra_op_num_threads = options.inter_op_num_threads = 1
                path = Path(package.origin).parent / "data" / "silero_vad_16k_op15.onnx"
                cls._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return cls._session

    def reset(self) -> None:
        """Forgets what was heard."""
        self._state = np.zeros((2, 1, 128), dtype=np.float32)
        self._context = np.zeros(CONTEXT, dtype=np.float32)

    def __call__(self, window: np.ndarray) -> float:
        """
        Reads the next 32 ms.

        Args:
            window (`np.ndarray` of shape `(512,)`, float32): Sound at 16 kHz.

        Returns:
            `float`: The probability that it is speech.
        """
        sound = np.concatenate([self._context, window])[None]
        inputs = {"input": sound, "state": self._state, "sr": np.array(MODEL_RATE, dtype=np.int64)}
        probability, self._state = self._network.run(None, inputs)
        self._context = window[-CONTEXT:].copy()
        return float(probability[0, 0])


class _Resampler:
    """To 16 kHz, by a windowed sinc; 1 ms late. Blocks must be whole multiples of the ratio's denominator."""

    def __init__(self, rate: int):
        self.up, self.down = RATES[rate]
        narrow = max(self.up, self.down)
        half = 16 * narrow  # 16 zero crossings on either side
        at = np.arange(-half, half)
        kernel = np.sinc(at / narrow * 0.95) * np.kaiser(2 * half + 1, 8)[:-1]
        kernel *= self.up / kernel.sum()
        # One set of taps for each output within a group of `down` inputs; output p lies p * down / up inputs on.
        self.length = 2 * half // self.up + self.down
        taps = np.zeros((self.length, self.up))
        for phase in range(self.up):
            for tap in range(self.length):
                position = tap * self.up - phase * self.down
                if 0 <= position < 2 * half:
                    taps[tap, phase] = kernel[position]
        self.taps = taps.astype(np.float32)
        self.reset()

    def reset(self) -> None:
        self.before = np.zeros(self.length - self.down, dtype=np.float32)

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        if self.up == self.down or not len(samples):
            return samples
        sound = np.concatenate([self.before, samples])
        self.before = sound[len(samples) :]
        groups = np.lib.stride_tricks.sliding_window_view(sound, self.length)[:: self.down]
        return (groups @ self.taps).reshape(-1)


def _whitened(sound: np.ndarray) -> np.ndarray:
    """The spectrum of sound at 8 kHz between 200 and 3500 Hz, with its envelope taken out."""
    bins = np.fft.rfft(sound, SEARCH)
    reach = 100 * SEARCH // 8000
    energy = np.concatenate([[0.0], np.cumsum(np.abs(bins) ** 2)])
    at = np.arange(len(bins))
    low, high = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(bins))
    bins /= np.sqrt((energy[high] - energy[low]) / (high - low) + 1e-9)
    bins[: 200 * SEARCH // 8000] = bins[3500 * SEARCH // 8000 :] = 0
    return bins


def _correlate(heard: np.ndarray, sent: np.ndarray) -> tuple[int, float]:
    """Where in a longer sound a shorter one is found, and how much the two are alike there, from 0 to 1."""
    short, long = _halved(heard), _halved(sent)
    short_bins, long_bins = _whitened(short), _whitened(long)
    likeness = np.abs(np.fft.irfft(long_bins * short_bins.conj(), SEARCH)[: len(long) - len(short) + 1])
    energy = np.concatenate([[0.0], np.cumsum(np.fft.irfft(long_bins, SEARCH)[: len(long)] ** 2)])
    own = float(np.sum(np.fft.irfft(short_bins, SEARCH)[: len(short)] ** 2))
    there = energy[len(short) :] - energy[: len(energy) - len(short)]
    likeness /= np.sqrt(own * (there + 0.1 * there.mean()) + 1e-12)
    best = int(likeness.argmax())
    return 2 * best, float(likeness[best])


def _halved(sound: np.ndarray) -> np.ndarray:
    """At half the rate; good enough to compare by."""
    even = sound[: len(sound) - len(sound) % 2]
    return (even[::2] + even[1::2]) / 2


class _Canceller:
    """
    Takes a known sound out of the microphone's, once it is known when it is heard.

    A Kalman filter per frequency (Enzner and Vary, 2006; in partitions, Kuech et al., 2014) learns the way from the
    loudspeaker to the microphone. It needs no rule for when somebody speaks at the same time: it knows how sure it is
    of the way, hence how much echo is left, and that much is then taken out of each frequency's magnitude.
    """

    def __init__(self, gain: float):
        bins = BLOCK + 1
        self.way = np.zeros((PARTITIONS, bins), dtype=np.complex64)
        # What the way may be: as loud as the echo was, and dying away by 100 dB a second.
        decay = 10 ** (-10 * np.arange(PARTITIONS) * BLOCK / MODEL_RATE)
        self.doubt = np.repeat((gain * decay).astype(np.float32)[:, None], bins, axis=1)
        self.spectra = np.zeros((PARTITIONS, bins), dtype=np.complex64)
        self.learned = 0  # Samples of audible sound.
        self.noise = np.full(bins, 1e-6, dtype=np.float32)
        self.left = np.zeros(bins, dtype=np.float32)
        self.before = {name: np.zeros(BLOCK, dtype=np.float32) for name in ("sent", "rest", "echo", "clean")}

    def restart(self) -> None:
        """Before other sound: what was learned stays."""
        self.spectra[:] = 0
        for block in self.before.values():
            block[:] = 0

    def __call__(self, sent: np.ndarray, heard: np.ndarray) -> np.ndarray:
        """
        Args:
            sent (`np.ndarray` of shape `(256,)`, float32): What the loudspeaker plays.
            heard (`np.ndarray` of shape `(256,)`, float32): What the microphone hears.

        Returns:
            `np.ndarray` of shape `(256,)`, float32: What is left of it, 16 ms late.
        """
        before = self.before
        self.spectra = np.roll(self.spectra, 1, axis=0)
        self.spectra[0] = np.fft.rfft(np.concatenate([before["sent"], sent]))
        echo = np.fft.irfft((self.way * self.spectra).sum(axis=0))[BLOCK:]
        rest = heard - echo
        error = np.fft.rfft(np.concatenate([np.zeros(BLOCK, dtype=np.float32), rest]))
        self.noise = (self.noise + np.abs(error) ** 2) / 2
        unsure = (self.doubt * np.abs(self.spectra) ** 2).sum(axis=0) / 2
        step = self.doubt * self.spectra.conj() / (unsure + self.noise + 1e-9)
        change = np.fft.irfft(step * error)
        change[:, BLOCK:] = 0
        self.way += np.fft.rfft(change).astype(np.complex64)
        self.doubt = FORGET * (1 - (step * self.spectra).real / 2) * self.doubt
        self.doubt += (1 - FORGET) * np.abs(self.way) ** 2

        echo_bins = np.fft.rfft(FADE * np.concatenate([before["echo"], echo]))
        rest_bins = np.fft.rfft(FADE * np.concatenate([before["rest"], rest]))
        # Little is known at first: all the echo may be left.
        distortion = max(DISTORTION, 2 * 0.95 ** (self.learned / BLOCK))
        self.left = np.maximum(FADING * self.left, 3 * unsure + distortion * np.abs(echo_bins) ** 2)
        left = np.convolve(np.pad(self.left, 2, mode="edge"), np.full(5, 0.2), "valid")
        rest_power = np.abs(rest_bins) ** 2 + 1e-12
        # Never more than was heard: where a loudspeaker has fallen silent, the filter adds what it should take away.
        heard_power = np.abs(rest_bins + echo_bins) ** 2
        gain = np.sqrt(np.minimum(np.maximum(1 - left / rest_power, 1e-5), heard_power / rest_power))
        clean = FADE * np.fft.irfft(gain * rest_bins)
        out = before["clean"] + clean[:BLOCK]
        if np.dot(sent, sent) > AUDIBLE * BLOCK:
            self.learned += BLOCK
        self.before = {"sent": sent, "rest": rest, "echo": echo, "clean": clean[BLOCK:]}
        return out.astype(np.float32)


class _Echo:
    """
    What was sent to the loudspeaker, and where the microphone hears it.

    All positions count samples at 16 kHz: of the microphone, and of what was sent. Sample `i` of what was sent is
    heard at `i + lag`. The lag is found by correlation: no sample is heard before it was sent, and the lag stays as
    long as the client does not run out of sound.
    """

    def __init__(self, rate: int):
        self._resampler = _Resampler(rate)
        self.reset()

    def reset(self) -> None:
        self._resampler.reset()
        self._carry = np.zeros(0, dtype=np.float32)
        self._sent = np.zeros(0, dtype=np.float32)
        self._sent_start = self._sent_end = 0
        self._spans: list[tuple[int, int]] = []  # From sent sample ... on, the lag is ... at the least.
        self._is_stopped = False
        self._heard = np.zeros(HISTORY, dtype=np.float32)
        self._now = 0  # End of what was heard.
        self._lag: int | None = None
        self._delay: int | None = None  # The last lag, less what it was at the least.
        self._canceller: _Canceller | None = None
        self._unheard = 0  # Sent sound that should have been heard by now, and was not.
        self._judged = 0  # Up to where that was counted.
        self._over = 0  # Up to where it was heard for certain.
        self._guess = 0  # The last search's best place, ...
        self.is_suspected = False  # ... and whether it is likely, but not certain.
        self.is_refit = False  # Whether the last search found it where it was.

    # ---------------------------------------------------------------- what was sent

    def played(self, samples: np.ndarray, now: int) -> None:
        sound = np.concatenate([self._carry, samples])
        whole = len(sound) - len(sound) % self._resampler.down
        self._carry = sound[whole:].copy()
        sound = self._resampler(sound[:whole])
        if not len(sound):
            return
        if self._is_stopped:
            self._lose()
        lag = now - self._sent_end
        if self._is_stopped or not self._spans or lag > self._spans[-1][1]:
            self._spans.append((self._sent_end, lag))
        self._is_stopped = False
        self._forget()
        missing = np.zeros(self._sent_end - self._sent_start - len(self._sent), dtype=np.float32)
        self._sent = np.concatenate([self._sent, missing, sound])[:LONGEST_AHEAD]
        self._sent_end += len(sound)

    def stop(self, now: int) -> None:
        """The client plays on until it hears of it."""
        playing = self._playing(now) if self._lag is None else now - self._lag
        end = max(min(self._sent_end, playing + REACTION), self._sent_start)
        # Nobody knows whether what may still be waiting was played.
        self._judged = max(self._judged, end)
        self._sent = self._sent[: end - self._sent_start]
        self._sent_end = end
        self._spans = [span for span in self._spans if span[0] < end]
        self._is_stopped = True

    def _playing(self, now: int) -> int:
        """The last sent sample that can be heard at a time: what is if nothing takes time on its way."""
        last = 0
        for number, (start, lag) in enumerate(self._spans):
            end = self._spans[number + 1][0] if number + 1 < len(self._spans) else self._sent_end
            if now - lag >= start:
                last = max(last, min(end, now - lag))
        return max(last, self._sent_start)

    def _read(self, start: int, length: int) -> np.ndarray:
        """What was sent, with silence before and after."""
        sound = np.zeros(length, dtype=np.float32)
        first, last = max(start, self._sent_start, self._over), min(start + length, self._sent_start + len(self._sent))
        if first < last:
            sound[first - start : last - start] = self._sent[first - self._sent_start : last - self._sent_start]
        return sound

    def _forget(self) -> None:
        """Drops what can no longer be heard."""
        oldest = self._playing(self._now - MAX_DELAY) - HISTORY
        if oldest > self._sent_start:
            self._sent = self._sent[oldest - self._sent_start :]
            self._sent_start = oldest
            while len(self._spans) > 1 and self._spans[1][0] <= oldest:
                self._spans.pop(0)

    # ---------------------------------------------------------------- what is heard

    def _oldest(self) -> int:
        """The first sent sample that may still be heard."""
        return max(self._playing(self._now - MAX_DELAY - TAIL), self._over)

    @property
    def is_possible(self) -> bool:
        """Whether something that was sent may be heard now."""
        return self._playing(self._now) > self._oldest()

    @property
    def is_uncertain(self) -> bool:
        """Whether something may be heard now that was sent, and cannot be told from a person yet."""
        if self._canceller is not None and self._lag is not None:
            return self._canceller.learned < MATURE
        if self._unheard >= SILENT_AFTER:
            return False
        soonest = 0 if self._delay is None else max(0, self._delay - JITTER)
        return self._playing(self._now - soonest) > self._oldest()

    @property
    def is_found(self) -> bool:
        return self._lag is not None

    def clean(self, window: np.ndarray) -> np.ndarray:
        """The next 32 ms without the echo, if it is known where that is."""
        self._heard = np.concatenate([self._heard[WINDOW:], window])
        self._now += WINDOW
        if self._lag is not None and not self._is_valid(self._lag):
            self._lose()
        if self._lag is None or self._canceller is None:
            self._judge()
            return window
        return self._cancel(self._canceller, window, self._now - WINDOW - self._lag)

    def _cancel(self, canceller: _Canceller, heard: np.ndarray, start: int) -> np.ndarray:
        sent = self._read(start + LEAD, len(heard))
        blocks = range(0, len(heard), BLOCK)
        return np.concatenate([canceller(sent[at : at + BLOCK], heard[at : at + BLOCK]) for at in blocks])

    def _lose(self) -> None:
        """What was heard up to now will not be heard again."""
        if self._lag is not None:
            self._over = max(self._over, min(self._now - self._lag, self._sent_end))
            self._judged = max(self._judged, self._over)
            self._lag = None

    def _is_valid(self, lag: int) -> bool:
        playing = self._now - lag
        if playing - TAIL > self._sent_end:
            return False
        spans = [span for span in self._spans if span[0] <= playing]
        return not spans or lag >= spans[-1][1]

    def _judge(self) -> None:
        """Counts the sound that must have been heard by now, without having been found."""
        end = self._playing(self._now - MAX_DELAY - TAIL)
        if end > self._judged:
            sound = self._read(self._judged, end - self._judged)
            self._unheard += len(sound) if np.dot(sound, sound) > AUDIBLE * len(sound) else 0
            self._judged = end

    def search(self) -> list[np.ndarray] | None:
        """
        Looks for what was sent in the last second, and learns that second's way from loudspeaker to microphone.

        Returns:
            The last second's windows without echo, where it was found in them.
        """
        newest = self._playing(self._now)
        oldest = self._playing(self._now - MAX_DELAY) if self.is_found else self._oldest()
        start = oldest - HISTORY
        sent = self._read(start, newest - start)
        if not np.dot(sent, sent) > 0:
            return None
        offset, likeness = _correlate(self._heard, sent)
        lag = self._now - HISTORY - (start + offset)
        self.is_suspected = SUSPECTED <= likeness < FOUND and abs(lag - self._guess) < LEAD
        self._guess = lag
        if likeness < FOUND:
            return None
        self.is_refit = self._lag is not None and abs(lag - self._lag) < LEAD
        self._lag, self._unheard = lag, 0
        least = [least for first, least in self._spans if first <= self._now - lag]
        self._delay = max(0, lag - (least[-1] if least else self._spans[0][1]))

        start = self._now - HISTORY - lag
        sent = self._read(start, HISTORY)
        gain = float(np.dot(self._heard, self._heard) / max(np.dot(sent, sent), 1e-6))
        old, canceller = self._canceller, _Canceller(min(gain, 4.0))
        if old is not None:
            # The room is the same, the place perhaps a little off.
            canceller.way, canceller.doubt = old.way, old.doubt + canceller.doubt / 10
        for _ in range(2):
            self._cancel(canceller, self._heard, start)
            canceller.restart()
        canceller.learned = 0
        self._canceller = canceller
        return np.split(self._cancel(canceller, self._heard, start), HISTORY // WINDOW)


class TurnDetector:
    """
    Finds the turns in a stream of sound. Chunks may have any length: the same sound gives the same events.

    Args:
        settings ([`TurnSettings`], *optional*): When a turn begins and ends. May be replaced between two chunks.
        sampling_rate (`int`, defaults to 24000): Samples per second: 8000, 16000, 24000 or 48000.

    Raises:
        ValueError: The sampling rate is another one.
    """

    def __init__(self, settings: TurnSettings | None = None, sampling_rate: int = 24000):
        if isinstance(sampling_rate, bool) or sampling_rate not in RATES:
            raise ValueError(f"`sampling_rate` is one of {', '.join(map(str, RATES))}, got {sampling_rate!r:.100}.")
        self.settings = settings or TurnSettings()
        self.sampling_rate = sampling_rate
        self._window = WINDOW * sampling_rate // MODEL_RATE
        self._voice = VoiceActivity()
        self._resampler = _Resampler(sampling_rate)
        self._echo = _Echo(sampling_rate)
        self.reset()

    def reset(self) -> None:
        """Forgets everything: what follows is a new stream."""
        self._voice.reset()
        self._resampler.reset()
        self._echo.reset()
        self._rest = np.zeros(0, dtype=np.float32)
        self._read = 0  # Samples in the windows read so far.
        self._speech_windows = 0  # Of what may become speech.
        self._speech_start = 0
        self._silence_start: int | None = None
        self._last_end = 0
        self._searched = 0  # Position of the last search for the echo.
        self.is_speaking = False

    @property
    def position(self) -> int:
        """Samples pushed so far."""
        return self._read + len(self._rest)

    def push(self, samples: np.ndarray) -> list[SpeechStarted | SpeechStopped]:
        """
        Listens to the next chunk of the microphone.

        Args:
            samples (`np.ndarray` of shape `(num_samples,)`, float32): Any number of samples between -1 and 1.

        Returns:
            `list`: The turns that began ([`SpeechStarted`]) and ended ([`SpeechStopped`]), in order.

        Raises:
            ValueError: Not one channel of finite float32 samples; nothing has changed then.
        """
        sound = np.concatenate([self._rest, _checked(samples)])
        events = []
        whole = len(sound) - len(sound) % self._window
        for start in range(0, whole, self._window):
            window = self._resampler(sound[start : start + self._window])
            self._read += self._window
            event = self._listen(self._echo.clean(window))
            if event is not None:
                events.append(event)
        self._rest = sound[whole:].copy()
        return events

    def played(self, samples: np.ndarray) -> None:
        """
        Tells what was sent to the client for its loudspeaker, at the moment of sending.

        Args:
            samples (`np.ndarray` of shape `(num_samples,)`, float32): What follows the samples told before.

        Raises:
            ValueError: Not one channel of finite float32 samples; nothing has changed then.
        """
        self._echo.played(_checked(samples), self.position * MODEL_RATE // self.sampling_rate)

    def stop_playing(self) -> None:
        """Tells that the client's loudspeaker was stopped: what it had not played by now, it never will."""
        self._echo.stop(self.position * MODEL_RATE // self.sampling_rate)

    def _listen(self, window: np.ndarray) -> SpeechStarted | SpeechStopped | None:
        """What the window that ends at `self._read` says about the turn."""
        self._count(self._voice(window), self._read)
        if self._is_worth_a_search():
            self._searched = self._read
            self._count_again(self._echo.search())
        if self.is_speaking:
            return self._end_turn()
        # An echo that has not been found, or not been learned, must not interrupt itself; nor make it deaf.
        needed = MIN_SPEECH_WINDOWS
        if self._echo.is_uncertain:
            needed = LONG_HOLD_WINDOWS if self._echo.is_suspected else HOLD_WINDOWS
        return self._begin_turn() if self._speech_windows >= needed else None

    def _is_worth_a_search(self) -> bool:
        """Whether to look for the echo now: not more often than is needed to find it in time."""
        windows = (self._read - self._searched) // self._window
        if not self._echo.is_possible:
            return False
        if self._echo.is_found:
            # Before it interrupts: is it an echo from elsewhere, or one that was not learned well?
            count = self._speech_windows
            is_due = count >= MIN_SPEECH_WINDOWS if self._echo.is_uncertain else count == MIN_SPEECH_WINDOWS
            return not self.is_speaking and is_due and windows >= MIN_SPEECH_WINDOWS
        if not (self.is_speaking or self._speech_windows):
            return False
        return windows >= (2 if self._echo.is_uncertain else 8)

    def _count(self, probability: float, position: int) -> None:
        """Counts windows of speech, or finds the beginning of silence. The window ends at `position`."""
        threshold = self.settings.threshold
        if probability >= threshold:
            if self._speech_windows == 0:
                self._speech_start = position - self._window
            self._speech_windows += 1
            self._silence_start = None
        elif probability < max(threshold - HYSTERESIS, 0.01):
            self._speech_windows = 0
            if self._silence_start is None:
                self._silence_start = position - self._window

    def _count_again(self, windows: list[np.ndarray] | None) -> None:
        """The last windows are heard anew, without the echo."""
        if windows is None:
            return
        # Until the echo is well known, what is left of it must not make speech longer than it seemed before.
        longest = self._speech_windows if self._echo.is_refit else 0
        self._voice.reset()
        self._speech_windows = 0
        for number, window in enumerate(windows, start=1):
            self._count(self._voice(window), self._read - (len(windows) - number) * self._window)
        if self._echo.is_uncertain:
            self._speech_windows = min(self._speech_windows, longest)

    def _begin_turn(self) -> SpeechStarted:
        self.is_speaking = True
        start = max(self._speech_start - self._samples(self.settings.prefix_padding_ms), self._last_end)
        return SpeechStarted(start, self._ms(start))

    def _end_turn(self) -> SpeechStopped | None:
        if self._silence_start is None:
            return None
        end = max(self._silence_start, self._speech_start) + self._samples(self.settings.silence_duration_ms)
        if end > self._read:
            return None
        self.is_speaking, self._last_end, self._speech_windows = False, end, 0
        return SpeechStopped(end, self._ms(end))

    def _samples(self, ms: int) -> int:
        return ms * self.sampling_rate // 1000

    def _ms(self, samples: int) -> int:
        return samples * 1000 // self.sampling_rate


def _checked(samples: np.ndarray) -> np.ndarray:
    if not isinstance(samples, np.ndarray) or samples.dtype != np.float32 or samples.ndim != 1:
        kind = (
            f"{samples.dtype} of shape {samples.shape}" if isinstance(samples, np.ndarray) else type(samples).__name__
        )
        raise ValueError(f"Sound is a float32 array of shape (num_samples,), got {kind}.")
    if len(samples) and not math.isfinite(float(np.dot(samples, samples))):
        raise ValueError("Sound has finite samples, got NaN, infinite or huge ones.")
    return samples


__all__ = ["SpeechStarted", "SpeechStopped", "TurnDetector", "TurnSettings", "VoiceActivity"]
