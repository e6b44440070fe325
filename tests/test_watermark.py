"""The inaudible watermark: it changes little, is found again, and streams as it does whole."""

import io
import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from minimind_o_hf.modeling.streaming_minimind_o import MiniMindOStreamEvent

from minimind_o_hf import load_audio, watermark
from minimind_o_hf.cli import main
from minimind_o_hf.watermark import THRESHOLD, Watermark, WatermarkStream

RECORDING = Path(__file__).parent / "data" / "espeak_why_is_the_sky_blue.flac"
RATE = 24000
LAG = 1296  # samples: 54 ms


@pytest.fixture(scope="module")
def speech() -> torch.Tensor:
    return torch.from_numpy(load_audio(RECORDING, target_rate=RATE))


@pytest.fixture(scope="module")
def marked(speech) -> torch.Tensor:
    return Watermark().apply(speech)


def signal_to_change(before: torch.Tensor, after: torch.Tensor) -> float:
    """In dB."""
    return 10 * torch.log10(before.square().sum() / (after - before).square().sum()).item()


def in_chunks(samples: torch.Tensor, *lengths: int) -> list[torch.Tensor]:
    """What a stream gives for chunks of these lengths, over and over, and at its end."""
    stream, outputs, position = WatermarkStream(), [], 0
    while position < len(samples):
        for length in lengths:
            outputs.append(stream.push(samples[position : position + length]))
            position += length
    return [*outputs, stream.flush()]


# --- Marking


def test_speech_is_marked_and_hardly_changed(speech, marked):
    assert marked.shape == speech.shape
    assert marked.dtype == torch.float32
    assert marked.abs().max() <= 1
    assert Watermark().detect(speech) < 0.1
    assert Watermark().detect(marked) > 0.9
    # The change follows the speech closely, so that little is enough to hide it.
    assert 15 < signal_to_change(speech, marked) < 17


def test_recorded_questions(shared_dir):
    files = sorted((shared_dir / "eval_omni").glob("*.mp3"))
    assert len(files) == 8
    for file in files:
        speech = load_audio(file, target_rate=RATE)
        marked = Watermark().apply(speech)
        assert isinstance(marked, np.ndarray)
        assert Watermark().detect(speech) < 0.1, file.name
        assert Watermark().detect(marked) > 0.9, file.name
        assert 14 < signal_to_change(torch.from_numpy(speech), torch.from_numpy(marked)) < 17, file.name


def test_nothing_changes_above_the_speech_band(speech, marked):
    spectrum, change = torch.fft.rfft(speech).abs(), torch.fft.rfft(marked - speech).abs()
    frequencies = torch.fft.rfftfreq(len(speech), 1 / RATE)
    low, high = frequencies < 2000, frequencies > 2500
    assert change[low].square().sum() > 1e4 * change[high].square().sum()
    assert spectrum[high].square().sum() > 1e3 * change[high].square().sum()


@pytest.mark.parametrize("rate", [8000, 16000, 32000, 48000])
def test_other_rates(speech, marked, rate):
    resampled = torchaudio.functional.resample(speech, RATE, rate)
    here = Watermark().apply(resampled, rate)
    assert here.shape == resampled.shape
    assert Watermark().detect(here, rate) > 0.9
    # The same change, whatever the rate.
    change = torchaudio.functional.resample(marked - speech, RATE, rate)[: len(here)]
    assert signal_to_change(change, here - resampled) > 60


@pytest.mark.parametrize("length", [0, 1, 100, LAG, 1920, 4000])
def test_short_sound_keeps_its_length(speech, length):
    short = speech[8000 : 8000 + length]
    assert Watermark().apply(short).shape == (length,)
    assert Watermark().apply(short.numpy()).shape == (length,)
    if length:
        assert 0 <= Watermark().detect(short) <= 1


def test_silence_stays_silent():
    silence = torch.zeros(RATE)
    assert torch.equal(Watermark().apply(silence), silence)
    assert Watermark().detect(silence) == 0


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (torch.zeros(2, 100), "mix channels"),
        (np.zeros(100, dtype=np.int16), "torch.int16.*turn integers"),
        (np.array([0.0, np.nan, np.inf]), "2 of 3 samples are NaN or infinite"),
    ],
)
def test_samples_that_are_refused(samples, message):
    with pytest.raises(ValueError, match=message):
        Watermark().apply(samples)


@pytest.mark.parametrize("rate", [0, 4000, 22050])
def test_rates_that_are_refused(rate):
    with pytest.raises(ValueError, match=f"multiple of 500 Hz, got {rate}"):
        Watermark().apply(torch.zeros(100), rate)


def test_what_was_long_before_changes_nothing(speech, marked, monkeypatch):
    monkeypatch.setattr(watermark, "HISTORY", 1000)
    torch.testing.assert_close(Watermark().apply(speech), marked, atol=1e-6, rtol=0)


# --- Detection


def saved(samples: torch.Tensor, **options) -> torch.Tensor:
    file = io.BytesIO()
    soundfile.write(file, samples.numpy(), RATE, **options)
    return torch.from_numpy(load_audio(file.getvalue(), target_rate=RATE))


def resampled(samples: torch.Tensor, rate: int) -> torch.Tensor:
    there = torchaudio.functional.resample(samples, RATE, rate)
    return torchaudio.functional.resample(there, rate, RATE)


SURVIVED = {
    "wav": lambda samples: saved(samples, format="WAV"),
    "8 bits": lambda samples: saved(samples, format="WAV", subtype="PCM_U8"),
    "ogg": lambda samples: saved(samples, format="OGG"),
    "opus": lambda samples: saved(samples, format="OGG", subtype="OPUS"),
    "mp3": lambda samples: saved(samples, format="MP3"),
    "16 kHz": lambda samples: resampled(samples, 16000),
    "8 kHz": lambda samples: resampled(samples, 8000),
    "quiet": lambda samples: 0.01 * samples,
    "loud": lambda samples: 2 * samples,
    "noise": lambda samples: samples + 10 ** (-30 / 20) * samples.std() * torch.randn(len(samples)),
    "silence": lambda samples: torch.nn.functional.pad(samples, (RATE, RATE)),
    "cut": lambda samples: samples[8000 : 8000 + RATE // 2],
}


@pytest.mark.parametrize("change", SURVIVED)
def test_what_it_survives(speech, marked, change):
    assert Watermark().detect(SURVIVED[change](marked)) >= THRESHOLD
    assert Watermark().detect(SURVIVED[change](speech)) < THRESHOLD


def test_another_speed_removes_it(marked):
    """As the documentation says: a test that fails here is good news."""
    assert Watermark().detect(torchaudio.functional.resample(marked, 11, 10)) < THRESHOLD


def test_a_marked_sentence_is_found_among_other_sound(marked):
    sound = 0.01 * torch.randn(40 * RATE)
    assert Watermark().detect(sound) < 0.1
    sound[27 * RATE : 27 * RATE + 4 * len(marked)] = marked.repeat(4)
    assert Watermark().detect(sound) >= THRESHOLD


def test_detect_takes_what_load_audio_takes(marked, tmp_path):
    soundfile.write(tmp_path / "stereo.wav", torch.stack([marked, marked], dim=1).numpy(), RATE)
    assert Watermark().detect(tmp_path / "stereo.wav") > 0.9
    assert Watermark().detect(marked.numpy()) == Watermark().detect(marked, RATE)
    with pytest.raises(ValueError, match="without samples"):
        Watermark().detect(torch.zeros(0))


# --- Streams


@pytest.mark.parametrize("lengths", [(1920,), (240,), (1,), (7, 5000, 1919), (1920, 3840, 7680), (10**6,)])
def test_chunks_do_not_matter(speech, marked, lengths):
    samples = speech[:4000] if lengths == (1,) else speech
    outputs = in_chunks(samples, *lengths)
    whole = marked if samples is speech else Watermark().apply(samples)
    assert torch.equal(torch.cat(outputs), whole)


def test_frames_of_the_codec_come_54_ms_later(speech):
    outputs = in_chunks(speech[: 10 * 1920], 1920)
    assert [len(output) for output in outputs] == [1920 - LAG] + 9 * [1920] + [LAG]


def test_the_lag_is_bounded_by_a_frame_more(speech):
    stream, given, taken = WatermarkStream(), 0, 0
    for chunk in speech.split(100):
        given, taken = given + len(chunk), taken + len(stream.push(chunk))
        assert LAG <= given - taken < LAG + 1920 or not taken
    assert len(stream.flush()) == given - taken


def test_borders_have_no_seams(speech, marked):
    """The change alone, of which any jump would stand out: it moves no faster at borders of chunks than inside."""
    steps = (marked - speech).diff().abs()
    borders = torch.arange(1920 - LAG, len(speech) - 1, 1920) - 1
    assert steps[borders].mean() < 1.5 * steps.mean()
    assert steps[borders].max() < steps.max()


def test_the_past_does_not_depend_on_the_future(speech, marked):
    other = speech.clone()
    other[20000:] = 0
    unchanged = 20000 - LAG - 1920
    assert torch.equal(Watermark().apply(other)[:unchanged], marked[:unchanged])


def test_a_stream_begins_anew_after_its_end(speech, marked):
    stream = WatermarkStream()
    for _ in range(2):
        assert torch.equal(torch.cat([stream.push(speech), stream.flush()]), marked)
    assert len(stream.flush()) == 0


def test_a_refused_chunk_leaves_the_stream_as_it_was(speech, marked):
    stream = WatermarkStream()
    first = stream.push(speech[:5000])
    with pytest.raises(ValueError, match="NaN"):
        stream.push(torch.tensor([float("nan")]))
    assert torch.equal(torch.cat([first, stream.push(speech[5000:]), stream.flush()]), marked)


def test_events_of_each_row_are_marked_by_themselves(speech, marked):
    rows = [speech, speech.flip(0)]
    events = [MiniMindOStreamEvent(0, text="a")]
    events += [MiniMindOStreamEvent(row, audio=rows[row][at : at + 3000]) for at in (0, 3000) for row in (0, 1)]
    events += [MiniMindOStreamEvent(0, audio=speech[6000:], is_last=True), MiniMindOStreamEvent(1, is_last=True)]
    answers = list(Watermark().apply_to_stream(iter(events)))
    assert [(event.row, event.text, event.is_last) for event in answers] == [
        (event.row, event.text, event.is_last) for event in events
    ]
    assert answers[0].audio is None
    sounds = [torch.cat([event.audio for event in answers[1:] if event.row == row]) for row in (0, 1)]
    assert torch.equal(sounds[0], marked)
    assert torch.equal(sounds[1], Watermark().apply(rows[1][:6000]))


def test_an_answer_is_marked_while_it_is_generated(nano, processor):
    from minimind_o_hf import MiniMindOForConditionalGeneration

    model = MiniMindOForConditionalGeneration.from_pretrained(nano).eval()
    inputs = processor(text="Hi.")
    settings = {"max_new_tokens": 25, "do_sample": False, "processor": processor}
    plain = torch.cat([event.audio for event in model.stream(**inputs, **settings) if event.audio is not None])
    events = Watermark().apply_to_stream(model.stream(**inputs, **settings))
    sound = torch.cat([event.audio for event in events if event.audio is not None])
    torch.testing.assert_close(sound, Watermark().apply(plain), atol=1e-4, rtol=0)

    threads = threading.active_count()
    events = Watermark().apply_to_stream(model.stream(**inputs, **settings))
    next(events)
    events.close()
    assert threading.active_count() == threads


# --- The library, and the command line


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "perth", None)  # as if it were not installed
    watermark._networks.cache_clear()
    yield
    watermark._networks.cache_clear()


@pytest.mark.usefixtures("no_library")
def test_a_missing_library_is_named(nano, tmp_path, capsys):
    assert not watermark.is_watermark_available()
    for make in (Watermark, WatermarkStream):
        with pytest.raises(ValueError, match=r'pip install "minimind_o_hf\[watermark\]"'):
            make()
    out = tmp_path / "reply.wav"
    assert main(["say", "Hi.", "--model", str(nano), "--watermark", "--out", str(out)]) == 1
    assert 'pip install "minimind_o_hf[watermark]"' in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.usefixtures("no_library")
def test_inspect_without_the_library_reads_the_mark(processor, marked, tmp_path, capsys):
    processor.save_audio(marked, tmp_path / "said.wav")
    assert main(["inspect", str(tmp_path / "said.wav")]) == 0
    assert "watermark" not in json.loads(capsys.readouterr().out)


def inspect(path, capsys) -> str:
    assert main(["inspect", str(path)]) == 0
    return capsys.readouterr().out


def test_inspect_says_what_it_finds(processor, speech, marked, tmp_path, capsys):
    for name, sound in (("plain", speech), ("marked", marked)):
        processor.save_audio(sound, tmp_path / f"{name}.ogg")
        soundfile.write(tmp_path / f"{name}.mp3", sound.numpy(), RATE)
    assert json.loads(inspect(tmp_path / "plain.ogg", capsys))["watermark"] is False
    assert json.loads(inspect(tmp_path / "marked.ogg", capsys))["watermark"] is True
    assert inspect(tmp_path / "plain.mp3", capsys).endswith("plain.mp3: no mark, no watermark\n")
    assert inspect(tmp_path / "marked.mp3", capsys).endswith("marked.mp3: no mark, but a watermark\n")


def test_inspect_reads_the_mark_of_a_file_cut_short(processor, marked, tmp_path, capsys):
    processor.save_audio(marked, tmp_path / "said.wav", voice="alba")
    content = (tmp_path / "said.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(content[: len(content) // 2])
    assert main(["inspect", str(tmp_path / "cut.wav")]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["voice"] == "alba"
    assert "not searched for a watermark" in printed.err
    assert "truncated" in printed.err


@pytest.mark.parametrize("command", [["say", "Hi."], ["chat", "--text", "Hi."]])
def test_commands_mark_what_they_speak(nano, tmp_path, capsys, command):
    options = ["--model", str(nano), "--seed", "0", "--max-new-tokens", "40"]
    for name, more in (("plain", []), ("marked", ["--watermark"])):
        assert main([*command, *options, *more, "--out", str(tmp_path / f"{name}.wav")]) == 0
    capsys.readouterr()
    plain, marked = (soundfile.read(tmp_path / f"{name}.wav", dtype="float32")[0] for name in ("plain", "marked"))
    np.testing.assert_allclose(marked, Watermark().apply(plain), atol=2e-3)
    assert json.loads(inspect(tmp_path / "marked.wav", capsys))["watermark"] is True
    assert json.loads(inspect(tmp_path / "plain.wav", capsys))["watermark"] is False
