"""`minimind-o talk`, with files, with a room in which sound takes its time, and with devices that are stand-ins."""

import argparse
import re
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from minimind_o_hf.processing import read_mark

from minimind_o_hf import Conversation, default_checkpoint, load_audio
from minimind_o_hf.chat import load
from minimind_o_hf.server.turns import TurnDetector, TurnSettings
from minimind_o_hf.talk import (
    KEPT,
    RATE,
    DeviceLoudspeaker,
    DeviceMicrophone,
    FileLoudspeaker,
    FileMicrophone,
    Talk,
    add_arguments,
    run,
)

DATA = Path(__file__).parent / "data"
PIG, SKY = DATA / "flite_where_does_a_pig_live.flac", DATA / "espeak_why_is_the_sky_blue.flac"
TICK = 480  # Samples, 20 ms. Four are a frame: sound that is there is played without a gap.


@pytest.fixture(scope="module")
def trained():
    """The package's nano: its answers end."""
    return load(str(default_checkpoint()), "cpu", "float32")


@pytest.fixture(scope="module")
def questions() -> list[np.ndarray]:
    return [load_audio(str(path), target_rate=RATE) for path in (PIG, SKY)]


def options(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(given)


def talk_with(trained, loudspeaker, **settings) -> Talk:
    detector = TurnDetector(TurnSettings(), RATE)
    return Talk(Conversation(*trained), detector, loudspeaker, seed=0, **settings)


# ---------------------------------------------------------------- files


def test_questions_from_files(nano, tmp_path, capsys):
    out = tmp_path / "reply.wav"
    run(
        options(
            "--model", str(nano), "--input", str(PIG), "--input", str(SKY), "--out", str(out), "--max-new-tokens", "20"
        )
    )
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 2
    assert "s heard)" in printed.err
    assert printed.err.count("first sound after") == 2
    assert not out.exists()
    for number in (1, 2):
        path = tmp_path / f"reply-{number}.wav"
        sound, rate = soundfile.read(path)
        assert rate == RATE
        assert len(sound) > 0
        assert len(sound) % 1920 == 0
        assert read_mark(path)["model"] == "nano"
        assert f"{path}: {len(sound) / RATE:.1f} s of speech" in printed.err


def test_a_long_recording_is_cut_into_turns(trained, questions, tmp_path, capsys):
    saved = {}
    loudspeaker = FileLoudspeaker(tmp_path / "reply.wav", lambda sound, path: saved.update({path.name: sound}))
    talk = talk_with(trained, loudspeaker, max_new_tokens=60)
    pause = np.zeros(RATE, dtype=np.float32)
    talk.listen(FileMicrophone(np.concatenate([pause, questions[0], pause, questions[1]]), 500))
    assert talk.turns == 2
    assert list(saved) == ["reply-1.wav", "reply-2.wav"]
    captions = capsys.readouterr().out.splitlines()
    assert len(captions) == 2
    assert captions[1] == talk.conversation.messages[-1]["content"]
    assert all(len(sound) % 1920 == 0 and len(sound) > 0 for sound in saved.values())


def test_what_was_heard_is_the_turn_alone(trained, questions, monkeypatch):
    asked = []
    talk = talk_with(trained, SimpleNamespace(is_playing=False, stop=lambda: 0.0))
    monkeypatch.setattr(talk, "_ask", asked.append)
    pause = np.zeros(3 * RATE, dtype=np.float32)
    recording = np.concatenate([pause, questions[0], pause])
    talk.listen(FileMicrophone(recording, 500))
    (speech,) = asked
    # The prefix before it, and the silence that ended it, belong to it; and not a sample is changed.
    assert len(questions[0]) < len(speech) + RATE
    assert len(speech) < len(questions[0]) + 1.1 * RATE
    start = np.flatnonzero(recording)[0] - np.flatnonzero(speech)[0]
    assert np.array_equal(recording[start : start + len(speech)], speech)
    # Of the silence, no more is kept than may belong to a turn.
    assert sum(map(len, talk._blocks)) < KEPT + RATE


def test_a_recording_without_speech(nano, tmp_path, capsys):
    silence = tmp_path / "silence.wav"
    soundfile.write(silence, np.zeros(RATE), RATE)
    run(options("--model", str(nano), "--input", str(silence), "--out", str(tmp_path / "reply.wav")))
    printed = capsys.readouterr()
    assert f"{silence}: no speech found" in printed.err
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == [silence]


def test_speech_without_end_is_answered(trained, questions, monkeypatch):
    monkeypatch.setattr("minimind_o_hf.talk.LONGEST_TURN", RATE)
    talk, asked = talk_with(trained, SimpleNamespace(is_playing=False, stop=lambda: 0.0)), []
    monkeypatch.setattr(talk, "_ask", asked.append)
    talk.listen(FileMicrophone(np.concatenate([questions[1]] * 2), 500))
    assert len(asked) >= 2
    assert RATE <= len(asked[0]) < 1.1 * RATE


def test_an_answer_that_cannot_be_made_does_not_end_the_conversation(trained, questions, tmp_path, capsys):
    saved = {}
    loudspeaker = FileLoudspeaker(tmp_path / "reply.wav", lambda sound, path: saved.update({path.name: sound}))
    talk = talk_with(trained, loudspeaker, max_new_tokens=60)
    talk.conversation.max_positions = 70
    talk.listen(FileMicrophone(questions[0], 500))
    assert "error: The message takes" in capsys.readouterr().err
    assert not talk.is_answering
    talk.conversation.max_positions = 2048
    talk.listen(FileMicrophone(questions[0], 500))
    assert list(saved) == ["reply-2.wav"]
    assert talk.conversation.num_turns == 1


def test_watermark(nano, tmp_path):
    pytest.importorskip("perth")
    out = tmp_path / "reply.wav"
    run(options("--model", str(nano), "--input", str(PIG), "--out", str(out), "--max-new-tokens", "30", "--watermark"))
    sound = soundfile.read(tmp_path / "reply-1.wav")[0]
    assert len(sound) % 1920 == 0  # nothing is lost at the end


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--input", "nowhere.wav"], "nowhere.wav"),
        (["--input", str(PIG), "--silence", "-1"], "silence_duration_ms"),
        (["--input", str(PIG), "--adapter", "a", "--adapter", "b"], "one adapter"),
        (["--input", str(PIG), "--voice", "nobody"], "no voice 'nobody'"),
        (["--input", str(PIG), "--out", "reply.txt"], "must end in .wav"),
    ],
)
def test_what_is_wrong_is_said(nano, given, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(options("--model", str(nano), *given))


def test_missing_packages_are_named(monkeypatch):
    def missing(*_):
        raise ImportError("Turn taking needs silero-vad")

    monkeypatch.setattr("minimind_o_hf.server.turns.VoiceActivity._load", missing)
    with pytest.raises(ValueError, match=r"silero-vad.*pip install .minimind_o_hf\[server\]"):
        run(options("--input", str(PIG)))


# ---------------------------------------------------------------- a room


class Room:
    """
    A microphone and a loudspeaker whose clock is the sound itself: whenever the microphone is read, 20 ms pass. The
    microphone hears the loudspeaker 100 ms late.

    Args:
        first (`np.ndarray`): Said at the beginning.
        second (`np.ndarray`, *optional*): Said once `after` seconds of the first answer have been played.
        after (`float`): When.
        echo (`float`): How loud the microphone hears the loudspeaker.
    """

    is_live = True

    def __init__(self, first: np.ndarray, second: np.ndarray | None = None, after: float = 0.0, echo: float = 0.0):
        self.said, self.second, self.after, self.echo = first, second, int(after * RATE), echo
        self.waiting = self.played = np.zeros(0, dtype=np.float32)  # since the last stop
        self.air = np.zeros(RATE // 10, dtype=np.float32)  # what will be heard
        self.stops: list[float] = []
        self.ticks = self.began = self.interrupted = 0  # of now, of the second's beginning and of the first's end
        self.talk: Talk | None = None
        self.quiet = 0

    @property
    def is_playing(self) -> bool:
        return len(self.waiting) > 0

    def play(self, sound: np.ndarray) -> None:
        assert sound.dtype == np.float32
        self.waiting = np.append(self.waiting, sound)

    def stop(self) -> float:
        self.interrupted = self.interrupted or self.ticks
        self.stops.append(len(self.played) / RATE)
        self.waiting = self.played = np.zeros(0, dtype=np.float32)
        return self.stops[-1]

    def read(self) -> np.ndarray | None:
        is_answering = self.talk.is_answering
        if is_answering and not self.is_playing:
            time.sleep(0.002)  # the model is slower than the clock, which waits for it
            return np.zeros(0, dtype=np.float32)
        self.ticks += 1
        if self.second is not None and len(self.played) >= self.after > 0:
            self.said, self.second, self.began = self.second, None, self.ticks
        self.quiet = 0 if is_answering or len(self.said) else self.quiet + 1
        if self.quiet > 100:  # 2 s: it is over
            return None
        sounding, self.waiting = self.waiting[:TICK], self.waiting[TICK:]
        self.played = np.append(self.played, sounding)
        self.air = np.concatenate([self.air[TICK:], self._tick(sounding)])
        said, self.said = self.said[:TICK], self.said[TICK:]
        return self._tick(said) + np.float32(self.echo) * self.air[:TICK]

    @staticmethod
    def _tick(sound: np.ndarray) -> np.ndarray:
        return np.append(sound, np.zeros(TICK - len(sound), dtype=np.float32))


def hold(trained, room: Room, **settings) -> Talk:
    room.talk = talk_with(trained, room, max_new_tokens=60, **settings)
    room.talk.listen(room)
    return room.talk


def test_its_own_voice_does_not_interrupt_it(trained, questions, capsys):
    room = Room(questions[0], echo=0.1)
    talk = hold(trained, room)
    assert talk.turns == 1
    assert len(room.stops) == 1
    assert room.stops[0] == pytest.approx(0.08 * talk.conversation._turns[0].frames)
    assert "interrupted" not in capsys.readouterr().err


def test_barge_in(trained, questions, capsys):
    whole = talk_with(trained, FileLoudspeaker(Path("none"), lambda sound, path: None), max_new_tokens=60)
    whole.listen(FileMicrophone(questions[0], 500))
    uncut = whole.conversation.messages[-1]["content"]
    capsys.readouterr()

    room = Room(questions[0], questions[1], after=0.5)
    talk = hold(trained, room)
    assert talk.turns == 2
    heard, second = room.stops
    # It falls silent while the question is asked, not only when it has been.
    assert 0.5 <= heard < 1.5
    assert TICK / RATE * (room.interrupted - room.began) < 1
    printed = capsys.readouterr()
    kept = re.search(rf"\(interrupted after {heard:.1f} s: '(.*)' is remembered\)", printed.err)[1]
    assert 0 < len(kept) < len(uncut)
    assert uncut.startswith(kept)
    captions = printed.out.splitlines()
    assert captions[0].startswith(kept)
    assert captions[1] == talk.conversation.messages[-1]["content"]
    assert second == pytest.approx(0.08 * talk.conversation._turns[-1].frames)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("minimind-o")]


def test_speech_before_the_first_sound_leaves_nothing(trained, questions):
    room = Room(questions[0])
    talk = room.talk = talk_with(trained, room, max_new_tokens=200)
    ask = talk._ask

    def ask_and_be_interrupted(speech):
        ask(speech)
        talk.close()

    talk._ask = ask_and_be_interrupted
    talk.listen(room)
    assert room.stops == [0.0]
    assert [message["content"] for message in talk.conversation.messages[1:]] in ([""], [])


# ---------------------------------------------------------------- Ctrl-C


class Interrupting(Room):
    """Presses Ctrl-C when so much of an answer has been played, as often as asked."""

    def __init__(self, first: np.ndarray, times: int):
        super().__init__(first)
        self.times = times

    def read(self) -> np.ndarray | None:
        if self.times and (len(self.played) > RATE // 4 or self.times < 0 or self.stops):
            self.times -= 1
            signal.raise_signal(signal.SIGINT)
        return super().read()


def test_ctrl_c_ends_the_answer(trained, questions, capsys):
    room = Interrupting(questions[0], times=1)
    talk = hold(trained, room)
    assert len(room.stops) == 1
    assert 0.25 < room.stops[0] < 0.4
    assert "(interrupted after 0.3 s" in capsys.readouterr().err
    assert talk.conversation.num_turns == 1


def test_ctrl_c_without_an_answer_ends_the_conversation(trained, questions):
    with pytest.raises(KeyboardInterrupt):
        hold(trained, Interrupting(questions[0], times=2))


# ---------------------------------------------------------------- devices


class PortAudioError(Exception):
    """As sounddevice's."""


class Stream(SimpleNamespace):
    """A stream whose callback the test calls. Its latency is the one it was asked for."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def refuse(**settings):
    raise PortAudioError("Error querying device -1")


@pytest.fixture
def devices(monkeypatch):
    """A stand-in for sounddevice: no machine that runs tests has a microphone."""
    made = SimpleNamespace(InputStream=Stream, OutputStream=Stream, PortAudioError=PortAudioError)
    monkeypatch.setitem(sys.modules, "sounddevice", made)
    return made


def test_microphone_passes_on_what_its_callback_gets(devices):
    microphone = DeviceMicrophone()
    assert (microphone.stream.samplerate, microphone.stream.channels, microphone.stream.dtype) == (24000, 1, "float32")
    block = np.arange(4, dtype=np.float32)[:, None]
    microphone.stream.callback(block, 4, None, None)
    block[:] = 9  # PortAudio uses its memory again
    assert microphone.read().tolist() == [0, 1, 2, 3]


def test_a_microphone_that_is_pulled_out(devices, monkeypatch):
    monkeypatch.setattr("minimind_o_hf.talk.LOST_AFTER", 0.01)
    with pytest.raises(OSError, match="is it still there"):
        DeviceMicrophone().read()


def test_loudspeaker_counts_what_was_played(devices):
    loudspeaker = DeviceLoudspeaker()
    out = np.full((4800, 1), 9, dtype=np.float32)
    loudspeaker.stream.callback(out, 4800, None, None)
    assert not out.any()
    loudspeaker.play(np.full(3000, 0.25, dtype=np.float32))
    loudspeaker.play(np.full(3000, 0.5, dtype=np.float32))
    assert loudspeaker.is_playing
    loudspeaker.stream.callback(out, 4800, None, None)
    assert out[:, 0].tolist() == [0.25] * 3000 + [0.5] * 1800
    # 200 ms were taken, of which 60 ms have not been heard yet.
    assert loudspeaker.stop() == pytest.approx(0.14)
    assert not loudspeaker.is_playing
    loudspeaker.stream.callback(out, 4800, None, None)
    assert not out.any()
    loudspeaker.play(np.full(1200, 0.5, dtype=np.float32))
    loudspeaker.stream.callback(out, 4800, None, None)
    assert out[:, 0].tolist() == [0.5] * 1200 + [0] * 3600
    assert loudspeaker.stop() == pytest.approx(0.05)
    assert loudspeaker.stop() == 0


def test_no_portaudio(monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(OSError, match=r"pip install sounddevice.*PortAudio.*--input FILE.wav"):
        run(options())


@pytest.mark.parametrize(("kind", "name"), [("InputStream", "microphone"), ("OutputStream", "loudspeaker")])
def test_no_device(devices, kind, name):
    setattr(devices, kind, refuse)
    with pytest.raises(OSError, match=f"no {name} can be opened .*device -1.*--input FILE.wav"):
        run(options())


def test_talking_through_devices(devices, nano, questions, monkeypatch, capsys):
    """The whole command, the callbacks called by a thread in the place of PortAudio."""
    streams = {}
    for kind in ("InputStream", "OutputStream"):
        setattr(devices, kind, lambda kind=kind, **given: streams.setdefault(kind, Stream(**given)))
    sound = np.append(questions[0], np.zeros(RATE, dtype=np.float32))
    played, is_over = [], threading.Event()

    def portaudio():
        while len(streams) < 2 or "Speak:" not in capsys.readouterr().err:
            time.sleep(0.02)
        for block in np.split(sound, range(768, len(sound), 768)):
            streams["InputStream"].callback(block[:, None], len(block), None, None)
        while not is_over.is_set():
            out = np.zeros((768, 1), dtype=np.float32)
            streams["OutputStream"].callback(out, 768, None, None)
            played.append(out[:, 0])
            streams["InputStream"].callback(np.zeros((768, 1), dtype=np.float32), 768, None, None)
            if len(played) % 100 == 0 and np.concatenate(played).any():
                signal.raise_signal(signal.SIGINT)
            time.sleep(0.002)

    thread = threading.Thread(target=portaudio)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run(options("--model", str(nano), "--max-new-tokens", "20"))
    finally:
        is_over.set()
        thread.join()
    assert np.abs(np.concatenate(played)).max() > 0
