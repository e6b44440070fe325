"""Turn taking: when a turn begins and ends, whatever the chunks, and that the model does not interrupt itself."""

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torchaudio.functional

pytest.importorskip("onnxruntime")
pytest.importorskip("silero_vad")

from minimind_o_hf.server.turns import (  # noqa: E402
    SpeechStarted,
    SpeechStopped,
    TurnDetector,
    TurnSettings,
    VoiceActivity,
)

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
RATE = 24000


def read(path: Path) -> np.ndarray:
    """A recording at 24 kHz, from where it is first heard to where it is last."""
    sound, rate = soundfile.read(path, dtype="float32")
    sound = torchaudio.functional.resample(torch.from_numpy(sound), rate, RATE).numpy()
    loud = np.flatnonzero(np.abs(sound) > 0.05 * np.abs(sound).max())
    return sound[loud[0] : loud[-1]]


@pytest.fixture(scope="module")
def answer() -> np.ndarray:
    """What nano says, and a second sentence, in one answer of 3 s."""
    return np.concatenate([read(ROOT / "docs" / "nano_answer.wav"), read(DATA / "flite_where_does_a_pig_live.flac")])


@pytest.fixture(scope="module")
def person() -> np.ndarray:
    """Somebody else: a person where the release's recordings are found, else another synthesiser."""
    real = ROOT.parent / "shared" / "eval_omni" / "audio-en-05_why_is_the_sky_blue.mp3"
    return read(real if real.is_file() else DATA / "espeak_why_is_the_sky_blue.flac")


def noise(seconds: float, decibels: float, seed: int = 0) -> np.ndarray:
    samples = np.random.default_rng(seed).standard_normal(int(seconds * RATE))
    return (samples * 10 ** (decibels / 20)).astype(np.float32)


def add(sound: np.ndarray, other: np.ndarray, seconds: float) -> np.ndarray:
    start = int(seconds * RATE)
    sound[start : start + len(other)] += other[: len(sound) - start]
    return sound


def room(sound: np.ndarray, decibels: float) -> np.ndarray:
    """Through a loudspeaker and a room that dies away by 60 dB in 0.25 s, attenuated."""
    at = np.arange(RATE // 4)
    path = np.random.default_rng(0).standard_normal(len(at)) * 10 ** (-3 * at / len(at)) * 0.02
    path[12] = 1
    size = len(sound) + len(path)
    heard = np.fft.irfft(np.fft.rfft(sound, size) * np.fft.rfft(path, size), size)
    return (heard * 10 ** (decibels / 20)).astype(np.float32)


def listen(detector: TurnDetector, sound: np.ndarray, chunk: int = 480, sends: dict[int, np.ndarray] | None = None):
    """The events, each with the position at which it was told; `sends` is what is played from which sample on."""
    events, waiting = [], sorted((sends or {}).items(), key=lambda item: item[0])
    for start in range(0, len(sound), chunk):
        while waiting and waiting[0][0] <= start:
            detector.played(waiting.pop(0)[1])
        events += [(event, detector.position) for event in detector.push(sound[start : start + chunk])]
    return events


def sent(answer: np.ndarray, seconds: float) -> dict[int, np.ndarray]:
    """An answer in frames of 80 ms, three times as fast as it is played."""
    return {int(seconds * RATE) + at // 3: answer[at : at + 1920] for at in range(0, len(answer), 1920)}


def starts(events) -> list[SpeechStarted]:
    return [event for event, _ in events if isinstance(event, SpeechStarted)]


def latency(events, seconds: float) -> float:
    """Milliseconds from when somebody began to speak until it was told; nothing else may have been told."""
    told = [position for event, position in events if isinstance(event, SpeechStarted)]
    assert len(told) == 1
    return told[0] / RATE * 1000 - seconds * 1000


# ---------------------------------------------------------------- settings


def test_settings_are_checked():
    assert TurnSettings() == TurnSettings(0.5, 300, 500)
    assert TurnSettings(1, 0, 0).threshold == 1
    wrong: Any
    for wrong in (-0.1, 1.1, math.nan, math.inf, True, "0.5", None):
        with pytest.raises(ValueError, match="threshold"):
            TurnSettings(threshold=wrong)
    for name in ("prefix_padding_ms", "silence_duration_ms"):
        for wrong in (-1, 60_001, 1.5, math.nan, True, "300", None):
            with pytest.raises(ValueError, match=name):
                TurnSettings(**{name: wrong})


@pytest.mark.parametrize("rate", [44100, 0, True, "24000", None, 24000.5])
def test_other_sampling_rates_are_refused(rate):
    with pytest.raises(ValueError, match="sampling_rate"):
        TurnDetector(sampling_rate=rate)


# ---------------------------------------------------------------- turns


def test_detectors_share_one_network_and_no_state(person):
    one, other = VoiceActivity(), VoiceActivity()
    assert one._network is other._network
    window = np.ascontiguousarray(person[12000 : 12000 + 3 * 512 : 3])
    fresh = one(window)
    assert one(window) != fresh
    assert other(window) == fresh
    one.reset()
    assert one(window) == fresh


def test_what_is_not_speech_starts_nothing():
    at = np.arange(3 * RATE) / RATE
    click = np.zeros(3 * RATE, np.float32)
    click[RATE] = 1
    sounds = {
        "silence": np.zeros(3 * RATE, np.float32),
        "noise": noise(3, -20),
        "click": click,
        "clap": np.where(at > 1, noise(3, -6) * np.exp(-(at - 1).clip(0) * 40), 0).astype(np.float32),
        "sine": (0.3 * np.sin(2 * np.pi * 440 * at)).astype(np.float32),
    }
    for name, sound in sounds.items():
        assert listen(TurnDetector(), sound) == [], name


@pytest.mark.parametrize("rate", [8000, 16000, 24000, 48000])
def test_speech_is_one_turn(person, rate):
    sound = add(noise(4, -65), person, 1.0)
    sound = torchaudio.functional.resample(torch.from_numpy(sound), RATE, rate).numpy()
    detector = TurnDetector(sampling_rate=rate)
    (start, told), (stop, _) = listen(detector, sound, chunk=rate // 50)
    assert told / rate - 1.0 < 0.2
    # The padding, a window of 32 ms and what silero needs.
    assert 700 - 32 <= start.start_ms <= 700 + 96
    assert abs(stop.end_ms - (1000 + len(person) / RATE * 1000 + 500)) < 200
    assert (start.start_ms, stop.end_ms) == (start.start_sample * 1000 // rate, stop.end_sample * 1000 // rate)
    assert detector.position == len(sound)


def test_turns_do_not_overlap_and_begin_at_the_beginning(person):
    sound = add(add(noise(6, -65), person, 0.1), person, 3.0)
    events = [event for event, _ in listen(TurnDetector(TurnSettings(prefix_padding_ms=5000)), sound)]
    assert [type(event) for event in events] == [SpeechStarted, SpeechStopped] * 2
    assert events[0] == SpeechStarted(0, 0)
    assert events[2].start_sample == events[1].end_sample


def test_settings_may_change_between_chunks(person):
    detector = TurnDetector()
    detector.settings = TurnSettings(threshold=0.6, silence_duration_ms=100, prefix_padding_ms=0)
    (start, _), (stop, _), *_ = listen(detector, add(noise(3, -65), person, 1.0))
    assert start.start_ms >= 1000 - 32
    assert stop.end_ms <= 1000 + len(person) / RATE * 1000 + 200


def test_chunks_do_not_matter(person, answer):
    """Nor to the echo canceller: what was sent is told at the same positions."""
    sound = add(add(noise(3.4, -60), room(answer, -15), 0.3), person, 2.2)
    events = None
    for chunk in (1, 7, 160, 480, 1920, len(sound)):
        detector = TurnDetector()
        detector.played(answer)
        found = [event for event, _ in listen(detector, sound, chunk)]
        events = events or found
        assert found == events
    assert len(events) >= 1


def test_reset_is_a_new_stream(person, answer):
    sound = add(noise(3, -65), person, 1.0)
    detector = TurnDetector()
    detector.played(answer)
    listen(detector, sound[: 2 * RATE])
    detector.reset()
    assert detector.position == 0
    assert not detector.is_speaking
    assert listen(detector, sound) == listen(TurnDetector(), sound)


def test_what_is_no_sound_is_refused_and_changes_nothing(person):
    sound = add(noise(3, -65), person, 1.0)
    detector = TurnDetector()
    events = listen(detector, sound[: RATE + 5000])
    wrong: list[Any] = [
        np.zeros((2, 10), np.float32),
        np.zeros(10),
        np.zeros(10, np.int16),
        np.full(10, np.nan, np.float32),
        np.array([0, np.inf], np.float32),
        [0.0],
        b"\0\0",
        None,
    ]
    for value in wrong:
        with pytest.raises(ValueError, match="Sound"):
            detector.push(value)
        with pytest.raises(ValueError, match="Sound"):
            detector.played(value)
    assert detector.push(np.zeros(0, np.float32)) == []
    detector.played(np.zeros(0, np.float32))
    assert detector.position == RATE + 5000
    events += listen(detector, sound[RATE + 5000 :])
    assert [event for event, _ in events] == [event for event, _ in listen(TurnDetector(), sound)]


# ---------------------------------------------------------------- echo


@pytest.mark.parametrize("delay", [0, 0.2, 1.0, 2.7])
@pytest.mark.parametrize("decibels", [-6, -20, -30])
def test_the_model_does_not_interrupt_itself(answer, delay, decibels):
    sound = add(noise(delay + 4.5, -50), room(answer, decibels), 0.5 + delay)
    assert listen(TurnDetector(), sound, sends=sent(answer, 0.5)) == []


def test_without_its_echo_known_it_would(answer):
    """So the tests around this one test something."""
    assert starts(listen(TurnDetector(), add(noise(4.5, -50), room(answer, -20), 0.5)))


def test_the_next_answer_may_come_later_or_sooner(answer):
    sound = noise(10, -60)
    for seconds in (0.9, 5.7):
        add(sound, room(answer, -15), seconds)
    assert listen(TurnDetector(), sound, sends={**sent(answer, 0.5), **sent(answer, 5.5)}) == []


@pytest.mark.parametrize("delay", [0.2, 1.0])
def test_a_person_is_heard_over_the_echo(answer, person, delay):
    echo = room(answer, -15)
    at = 0.5 + delay + 1.4
    loudness = np.sqrt(np.mean(echo[: 2 * RATE] ** 2) / np.mean(person**2))
    sound = add(add(noise(delay + 4.5, -60), echo, 0.5 + delay), person * loudness * 1.4, at)
    assert latency(listen(TurnDetector(), sound, sends=sent(answer, 0.5)), at) < 230


def test_a_person_is_heard_before_the_echo_is_known(answer, person):
    """Later than otherwise: it might be the echo."""
    sound = add(noise(3, -60), person, 0.7)
    assert latency(listen(TurnDetector(), sound, sends=sent(answer, 0.5)), 0.7) < 500


def test_a_person_with_headphones_is_heard_at_once(answer, person):
    """Once an answer was not heard in the microphone, later ones do not delay anything."""
    sound = add(noise(11, -60), person, 9.0)
    assert latency(listen(TurnDetector(), sound, sends={**sent(answer, 0.5), **sent(answer, 8.5)}), 9.0) < 200


def test_a_person_is_heard_after_the_loudspeaker_was_stopped(answer, person):
    long = np.concatenate([answer, answer[::-1]])
    sound = add(noise(7, -60), room(long, -15)[: int(1.7 * RATE)], 0.7)
    add(sound, person, 4.0)
    detector = TurnDetector()
    events = listen(detector, sound[: 2 * RATE], sends=sent(long, 0.5))
    detector.stop_playing()
    events += listen(detector, sound[2 * RATE :])
    assert latency(events, 4.0) < 200


def test_memory_is_constant():
    def size(detector: TurnDetector) -> int:
        echo = vars(detector._echo)
        return sum(len(pickle.dumps(echo[name])) for name in ("_sent", "_heard", "_spans", "_carry", "_canceller"))

    detector, sizes = TurnDetector(), []
    answer, silence = noise(8, -30, seed=1), np.zeros(10 * RATE, np.float32)
    for _ in range(9):
        detector.played(answer)
        detector.push(silence)
        sizes.append(size(detector))
    assert max(sizes[5:]) - min(sizes[5:]) < 10_000
    assert max(sizes) < 3_000_000
