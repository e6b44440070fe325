"""Voices: cloned, kept in files and libraries, imported, blended, heard, and given to the model."""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import filelock
import numpy as np
import pytest
import soundfile
import torch
from minimind_o_hf.processing.voices_minimind_o import check_voice, load_voices, weights_id
from safetensors import safe_open
from safetensors.torch import save_file

from minimind_o_hf import (
    CamPlusPlusConfig,
    CamPlusPlusFeatureExtractor,
    CamPlusPlusModel,
    MiniMindOForConditionalGeneration,
    MiniMindOProcessor,
    Voice,
    VoiceLibrary,
    voices,
)
from minimind_o_hf.chat import check_voice as chat_check_voice
from minimind_o_hf.cli import main
from minimind_o_hf.data.building import SpeakerEncoder
from minimind_o_hf.recordings import change_speed, prepare_recording, without_quiet_edges

CONSENT = "I am the speaker and agree to it."
RATE = 24000


def make(seed: int = 0, frames: int | None = 12, embedding: bool = True, **notes: str) -> Voice:
    """A voice that nobody has; its codes suit the `nano` codec."""
    random = torch.Generator().manual_seed(seed)
    return Voice(
        ref_codes=None if frames is None else torch.randint(512, (8, frames), generator=random),
        spk_emb=torch.randn(192, generator=random) if embedding else None,
        **{"name": f"voice{seed}", "consent": "Nobody has this voice.", **notes},
    )


def speech(seconds: float = 4.0, rate: int = RATE, level: float = 0.3, pitch: float = 120.0) -> np.ndarray:
    """Harmonics of a pitch that come and go four times a second, with pauses."""
    time = np.arange(round(seconds * rate)) / rate
    tones = sum(np.sin(2 * np.pi * pitch * n * time) / n for n in range(1, 12))
    loudness = np.clip(np.sin(2 * np.pi * 2 * time), 0, 1) + 0.01
    return (level * loudness * tones / np.abs(tones).max()).astype(np.float32)


def pitch_of(waveform: np.ndarray, rate: int) -> float:
    """Frequency in Hz of the strongest tone."""
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform)), 8 * len(waveform)))
    return spectrum.argmax() * rate / (8 * len(waveform))


@pytest.fixture
def library(tmp_path) -> VoiceLibrary:
    library = VoiceLibrary(tmp_path / "voices.safetensors")
    for index, name in enumerate(("ada", "ben")):
        library.add(make(index, language="en", licence="CC0", consent=f"{name} agreed"), name)
    return library


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A small speaker encoder with embeddings of the released size, random."""
    folder = tmp_path_factory.mktemp("campplus")
    sizes = {"front_end_channels": 4, "tdnn_channels": 8, "block_layers": [2, 1], "block_dilations": [1, 2]}
    config = CamPlusPlusConfig(**sizes, growth_rate=4, bottleneck_channels=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CamPlusPlusModel(config).save_pretrained(folder)
    CamPlusPlusFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(nano) -> MiniMindOForConditionalGeneration:
    return MiniMindOForConditionalGeneration.from_pretrained(nano).eval()


# --- A voice


@pytest.mark.parametrize("parts", [(12, True), (None, True), (12, False)])
def test_file_of_a_voice_is_read_as_written(parts, tmp_path):
    notes = {name: f"{name} ü 声\n" for name in voices.NOTES if name != "name"}
    voice = make(3, *parts, **notes, name="Zoë 声")
    path = tmp_path / "deep" / "voice.safetensors"
    voice.save(path)
    loaded = Voice.load(path)
    assert loaded == voice
    assert loaded.notes == notes | {"name": "Zoë 声"}
    for part, dtype in (("ref_codes", torch.int64), ("spk_emb", torch.float32)):
        assert (part in loaded) == (part in voice)
        if part in voice:
            assert loaded[part].dtype == dtype
            assert torch.equal(loaded[part], voice[part])
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    assert os.listdir(path.parent) == ["voice.safetensors"]
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["minimind_o_voice"])["consent"] == notes["consent"]


def test_voices_are_equal_where_all_of_them_is():
    voice = make(1)
    assert voice == make(1)
    assert voice != make(2, name="voice1")
    assert voice != dataclasses.replace(voice, consent="other")
    assert voice != dataclasses.replace(voice, spk_emb=None)
    assert voice != dict(voice)


def test_a_voice_does_not_change_with_what_it_was_made_of():
    embedding = torch.ones(192)
    voice = Voice(spk_emb=embedding)
    embedding.zero_()
    assert voice.spk_emb.sum() == 192


def test_saving_does_not_overwrite_silently(tmp_path):
    path = tmp_path / "voice.safetensors"
    make(1).save(path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="voice.safetensors exists"):
        make(2).save(path)
    assert path.read_bytes() == before
    make(2).save(path, overwrite=True)
    assert Voice.load(path) == make(2)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "neither"),
        ({"ref_codes": torch.zeros(7, 5, dtype=torch.long)}, r"must be \(8, frames\), got \(7, 5\)"),
        ({"ref_codes": torch.zeros(8, 0, dtype=torch.long)}, r"got \(8, 0\)"),
        ({"ref_codes": torch.full((8, 5), 2048)}, r"must lie in \[0, 2048\), got 2048 to 2048"),
        ({"ref_codes": torch.full((8, 5), -1)}, "got -1 to -1"),
        ({"ref_codes": torch.zeros(8, 5)}, "must be integers"),
        ({"spk_emb": torch.ones(191)}, "192 floats"),
        ({"spk_emb": torch.full((192,), float("nan"))}, "finite"),
        ({"spk_emb": torch.ones(192), "consent": None}, "`consent` of a voice must be a string, got None"),
        *(({"spk_emb": torch.ones(192), "name": name}, "voice's name") for name in ("a/b", "a\\b", "..", "\n", " ")),
    ],
)
def test_what_is_no_voice(parts, message):
    with pytest.raises(ValueError, match=message):
        Voice(**parts)


# --- The processor and the model


def test_the_processor_takes_voices(processor):
    chat = [{"role": "user", "content": "Hello"}]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    both, codes, embedding = make(1), make(2, 30, embedding=False), make(3, None)
    inputs = processor.apply_chat_template([chat] * 4, voice=[both, codes, embedding, None], **options)
    assert inputs["reference_codes"].shape == (4, 8, 30)
    assert torch.equal(inputs["reference_codes"][0, :, 18:], both.ref_codes)
    assert torch.equal(inputs["reference_codes"][1], codes.ref_codes)
    assert (inputs["reference_codes"][2:] == processor.audio_pad_code).all()
    expected = torch.stack([both.spk_emb, torch.zeros(192), embedding.spk_emb, torch.zeros(192)])
    assert torch.equal(inputs["speaker_embeddings"], expected)
    for_all = processor.apply_chat_template([chat] * 2, voice=both, **options)
    assert torch.equal(for_all["reference_codes"], both.ref_codes.expand(2, -1, -1))


@torch.no_grad()
def test_voices_of_a_batch_are_as_alone(model, processor):
    chats = [[{"role": "user", "content": text}] for text in ("Hello", "How are you today?", "Why?", "One, two")]
    rows = [make(1), make(2, 30, embedding=False), make(3, None), "alba"]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    settings = {"do_sample": False, "max_new_tokens": 14, "return_dict_in_generate": True}
    batch = model.generate(**processor.apply_chat_template(chats, voice=rows, **options), **settings)
    alone = []
    for row, (chat, voice) in enumerate(zip(chats, rows, strict=True)):
        one = model.generate(**processor.apply_chat_template([chat], voice=voice, **options), **settings)
        frames = int(one.audio_codes_mask.sum())
        assert frames > 0
        assert int(batch.audio_codes_mask[row].sum()) == frames
        assert torch.equal(batch.audio_codes[row, :, :frames], one.audio_codes[0, :, :frames])
        alone.append(one.audio_codes[0])
    other = model.generate(**processor.apply_chat_template(chats[:1], voice=rows[1], **options), **settings)
    assert not torch.equal(other.audio_codes[0], alone[0])


def test_a_processor_keeps_voices_among_its_own(nano, library, tmp_path):
    processor = MiniMindOProcessor.from_pretrained(nano)
    processor.add_voice("ada", library.get("ada"))
    processor.voices["ben"] = library.get("ben")  # as it is, with its notes
    processor.save_pretrained(tmp_path / "saved")
    saved = load_voices(tmp_path / "saved" / "voices.safetensors")
    assert sorted(saved) == ["ada", "alba", "ben", "bruno"]
    assert torch.equal(saved["ben"]["ref_codes"], library.get("ben").ref_codes)
    # The files of libraries and checkpoints are each other's.
    assert VoiceLibrary(tmp_path / "saved" / "voices.safetensors").names() == sorted(saved)
    assert torch.equal(load_voices(library.path)["ada"]["spk_emb"], library.get("ada").spk_emb)


def test_a_voice_of_another_codec_is_refused_with_both_names(processor):
    chat = [{"role": "user", "content": "Hello"}]
    own = weights_id(processor.audio_tokenizer)
    assert re.fullmatch("mimi:[0-9a-f]{16}", own)

    def prepare(voice):
        return processor.apply_chat_template(chat, voice=voice, tokenize=True, return_dict=True)

    assert "reference_codes" in prepare(make(1, codec=own))
    assert "reference_codes" in prepare(make(1, codec="kyutai/mimi"))  # a note, which cannot be compared
    assert "speaker_embeddings" in prepare(make(1, None, codec="mimi:0123456789abcdef"))  # no codes of any codec
    with pytest.raises(ValueError, match=f"voice 'voice1' was made with the codec dac:01, and this model's is {own}"):
        prepare(make(1, codec="dac:01"))
    with pytest.raises(ValueError, match=f"voice1.*was made with the codec dac:01, and this model's is {own}"):
        make(1, codec="dac:01").to_audio(processor)
    big = dataclasses.replace(make(1, codec="kyutai/mimi"), ref_codes=torch.full((8, 4), 600))
    with pytest.raises(ValueError, match=rf"voice1.*\[0, 512\), got 600.*codec: kyutai/mimi; this model's: {own}"):
        prepare(big)
    few = {"name": "few", "ref_codes": torch.zeros(4, 9, dtype=torch.long), "codec": "some/codec"}
    with pytest.raises(ValueError, match=rf"'few' must be \(8, frames\), got \(4, 9\).*some/codec; .*{own}"):
        prepare(few)
    with pytest.raises(ValueError, match="was made with the codec dac:01"):
        prepare(few | {"codec": "dac:01"})


def test_id_of_weights_is_the_same_in_every_dtype(nano):
    def load(**options):
        return MiniMindOProcessor.from_pretrained(nano, **options).audio_tokenizer

    codec = load()
    expected = weights_id(codec)
    assert weights_id(load(dtype=torch.bfloat16)) == weights_id(load(dtype=torch.float16)) == expected
    other = load()
    with torch.no_grad():
        next(other.parameters()).view(-1)[:1].neg_()
    assert weights_id(other) != expected


# --- Cloning


@pytest.mark.parametrize("consent", [None, "", " " * 20, "yes", True])
def test_no_consent_no_voice(processor, tmp_path, consent):
    for audio in (speech(), tmp_path / "missing.wav"):
        with pytest.raises(ValueError, match="needs a statement of consent"):
            Voice.from_audio(audio, consent, processor=processor)
    with pytest.raises(ValueError, match="needs a statement of consent"):
        Voice.from_audio(speech(), processor=processor)


def test_cloning(processor, encoder, tmp_path):
    path = tmp_path / "me.wav"
    soundfile.write(path, np.stack([speech(rate=44100), 0.5 * speech(rate=44100)], axis=1), 44100)
    voice = Voice.from_audio(path, CONSENT, processor=processor, speaker_encoder=encoder, name="me", language="en")
    assert voice.ref_codes.shape == (8, 34)  # 4 s / 1.5 at 12.5 frames/s
    assert voice.spk_emb.shape == (192,)
    loaded = SpeakerEncoder(str(encoder), 192)
    assert voice.notes | {"created": ""} == {
        "name": "me",
        "language": "en",
        "description": "",
        "licence": "",
        "consent": CONSENT,
        "source_hash": hashlib.sha256(path.read_bytes()).hexdigest(),
        "codec": weights_id(processor.audio_tokenizer),
        "speaker_encoder": weights_id(loaded.model),
        "created": "",
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", voice.created)
    again = Voice.from_audio(path.read_bytes(), CONSENT, codec=processor.audio_tokenizer, speaker_encoder=loaded)
    assert torch.equal(again.ref_codes, voice.ref_codes)
    assert torch.equal(again.spk_emb, voice.spk_emb)


def test_cloning_by_hand(processor, encoder):
    """The codes and the embedding are those of the sped-up samples."""
    samples = speech(5, RATE)
    fast = prepare_recording(samples, RATE, 1.5)
    voice = Voice.from_audio(samples, CONSENT, processor=processor, speaker_encoder=encoder)
    padded = torch.zeros(1, 1, -(-len(fast) // 1920) * 1920)
    padded[0, 0, : len(fast)] = torch.from_numpy(fast)
    with torch.no_grad():
        codes = processor.audio_tokenizer.encode(padded, num_quantizers=8).audio_codes[0]
    assert torch.equal(voice.ref_codes, codes)
    expected = SpeakerEncoder(str(encoder), 192)(fast, RATE)
    assert torch.equal(voice.spk_emb, torch.from_numpy(expected))
    assert not torch.equal(
        voice.ref_codes[:, :20], Voice.from_audio(samples, CONSENT, processor=processor, speed=1).ref_codes[:, :20]
    )
    assert voice.source_hash == hashlib.sha256(samples.tobytes()).hexdigest()


def test_codes_of_24_seconds_and_embedding_of_all(processor, encoder):
    samples = speech(30)
    changed = samples.copy()
    changed[25 * RATE :] = speech(5, pitch=300)
    both = [
        Voice.from_audio(item, CONSENT, processor=processor, speaker_encoder=encoder, speed=1)
        for item in (samples, changed)
    ]
    assert both[0].ref_codes.shape == (8, 300)
    assert torch.equal(both[0].ref_codes, both[1].ref_codes)
    assert not torch.equal(both[0].spk_emb, both[1].spk_emb)


def test_codes_alone_embedding_alone_and_nothing(processor, encoder):
    codes = Voice.from_audio(speech(), CONSENT, processor=processor)
    assert codes.spk_emb is None
    assert codes.speaker_encoder == ""
    embedding = Voice.from_audio(speech(), CONSENT, speaker_encoder=encoder)
    assert embedding.ref_codes is None
    assert embedding.codec == ""
    with pytest.raises(ValueError, match="pass a `processor`"):
        Voice.from_audio(speech(), CONSENT)
    with pytest.raises(ValueError, match="'created'"):
        Voice.from_audio(speech(), CONSENT, processor=processor, created="1999")


@pytest.mark.parametrize("rate", [8000, 22050, 48000])
def test_any_rate(processor, rate):
    voice = Voice.from_audio(speech(4, rate), CONSENT, processor=processor, sampling_rate=rate)
    assert voice.ref_codes.shape == (8, 34)


def test_recordings_that_cannot_be_read(processor, tmp_path):
    (tmp_path / "text.wav").write_text("no sound", encoding="utf-8")
    with pytest.raises(OSError, match=r"text.wav.*no readable audio"):
        Voice.from_audio(tmp_path / "text.wav", CONSENT, processor=processor)
    with pytest.raises(FileNotFoundError, match="missing.wav"):
        Voice.from_audio(tmp_path / "missing.wav", CONSENT, processor=processor)
    bad = speech()
    bad[100] = np.nan
    with pytest.raises(ValueError, match="1 of 96000 audio samples are NaN"):
        Voice.from_audio(bad, CONSENT, processor=processor)
    with pytest.raises(ValueError, match="NaN or infinite"):
        prepare_recording(bad, RATE, 1)


def test_the_gates_are_behind_the_speed_up(processor):
    assert Voice.from_audio(speech(2.7), CONSENT, processor=processor).ref_codes.shape == (8, 23)
    message = r"lasts 1.800 s after the speed-up by 1.5, and 1.8 s is the least: record at least 2.7 s"
    with pytest.raises(ValueError, match=message):
        Voice.from_audio(speech(2.7)[:-2], CONSENT, processor=processor)
    assert Voice.from_audio(speech(2.0), CONSENT, processor=processor, speed=1).ref_codes.shape == (8, 25)
    with pytest.raises(ValueError, match="cut out half a minute"):
        Voice.from_audio(np.zeros(451 * 100, np.float32), CONSENT, processor=processor, sampling_rate=100)


def levels(quiet: float, loud: float, seconds: float = 4.0) -> np.ndarray:
    """Frames of exactly these RMS, half of each: samples of one size and changing signs."""
    samples = np.full(round(seconds * 16000), np.float32(loud))
    samples[: len(samples) // 2] = np.float32(quiet)
    samples[::2] *= -1
    return samples


def beside(value: float, towards: float) -> float:
    """The next float32."""
    return float(np.nextafter(np.float32(value), np.float32(towards)))


@pytest.mark.parametrize(
    ("accepted", "refused", "message"),
    [
        (levels(0, 0.1, 1.8), levels(0, 0.1, 1.8)[:-1], "lasts 1.800 s, and 1.8 s is the least"),
        (levels(0, 0.008), levels(0, beside(0.008, 0)), "too quiet.* is 0.008, and 0.008 is the least"),
        (levels(0, 0.0081), levels(0, 0.0079), "too quiet.* is 0.0079, and 0.008 is the least: speak closer"),
        (levels(0.225, 0.5), levels(beside(0.225, 1), 0.5), "too noisy.* have 0.45 of .* 0.45 is the most: record in"),
        (levels(0.2, 0.5), levels(0.3, 0.5), "too noisy.* have 0.6 of "),
        (levels(0, 0.995), levels(0, beside(0.995, 1)), "clipped: its peak is 0.995, .* at a lower level"),
        (levels(0, 0.9), levels(0, 1), "clipped: its peak is 1, and 0.995 is the most"),
        (levels(0, 0.1), np.zeros(64000, np.float32), "too quiet.* is 0, "),
    ],
)
def test_gates_at_their_borders(accepted, refused, message):
    assert np.array_equal(prepare_recording(accepted, 16000, 1), accepted)
    with pytest.raises(ValueError, match=message):
        prepare_recording(refused, 16000, 1)


def test_percentiles_of_frames():
    """The 20th and 95th of 50 ms every 25 ms: 18 % of quiet frames are not enough, 22 % are."""
    samples = levels(0.4, 0.4, 10)
    samples[: round(0.18 * len(samples))] *= 0.1
    with pytest.raises(ValueError, match="too noisy"):
        prepare_recording(samples, 16000, 1)
    samples[: round(0.22 * len(samples))] = 0.01
    assert len(prepare_recording(samples, 16000, 1)) == 160000


# --- Speed


@pytest.mark.parametrize("speed", [0.75, 1.5, 2.0])
@pytest.mark.parametrize(("rate", "pitch"), [(24000, 90), (24000, 440), (16000, 1500)])
def test_a_tone_keeps_its_pitch(rate, pitch, speed):
    tone = (0.5 * np.sin(2 * np.pi * pitch * np.arange(3 * rate) / rate)).astype(np.float32)
    fast = change_speed(tone, rate, speed)
    assert fast.dtype == np.float32
    assert len(fast) == round(len(tone) / speed)
    assert pitch_of(fast, rate) == pytest.approx(pitch, abs=0.2)
    spectrum = np.abs(np.fft.rfft(fast * np.hanning(len(fast)))) ** 2
    frequencies = np.fft.rfftfreq(len(fast), 1 / rate)
    # What does not join would spread over other frequencies.
    assert spectrum[abs(frequencies - pitch) > 10].sum() < 1e-3 * spectrum.sum()
    middle = slice(rate // 10, -rate // 10)
    assert np.sqrt(np.square(fast[middle]).mean()) == pytest.approx(0.5 / 2**0.5, rel=0.01)


def test_speech_keeps_its_pitch_its_pauses_and_its_peak():
    samples = speech(6)
    fast = change_speed(samples, RATE, 1.5)
    assert pitch_of(fast, RATE) == pytest.approx(120, abs=1)
    assert np.abs(fast).max() <= np.abs(samples).max() + 1e-6
    # Two syllables a second become three.
    loudness = np.abs(fast)[: len(fast) // 240 * 240].reshape(-1, 240).mean(axis=1)
    assert pitch_of(loudness - loudness.mean(), 100) == pytest.approx(3, abs=0.1)
    assert np.array_equal(change_speed(samples, RATE, 1), samples)
    assert not change_speed(np.zeros(RATE, np.float32), RATE, 1.5).any()


@pytest.mark.parametrize("speed", [0, -1, 0.4, 3.1, float("nan"), float("inf")])
def test_bad_speeds(speed):
    with pytest.raises(ValueError, match="`speed` must be from 0.5 to 3.0"):
        prepare_recording(speech(), RATE, speed)
    with pytest.raises(ValueError, match="`speed` must be from 0.5 to 3.0"):
        change_speed(speech(), RATE, speed)


# --- Libraries


def test_a_library(library, tmp_path):
    empty = VoiceLibrary(tmp_path / "none.safetensors")
    assert empty.names() == []
    assert not empty.path.exists()
    assert library.names() == ["ada", "ben"]
    assert "ada" in library
    assert library.get("ben") == make(1, name="ben", language="en", licence="CC0", consent="ben agreed")
    before = library.path.read_bytes()
    for call, message in [
        (lambda: library.get("eve"), "no voice 'eve'.*has ada, ben"),
        (lambda: library.remove("eve"), "no voice 'eve'"),
        (lambda: library.rename("eve", "x"), "no voice 'eve'"),
        (lambda: library.rename("ada", "ben"), "has 'ben' already"),
        (lambda: library.rename("ada", "../ben"), "voice's name"),
        (lambda: library.add(make(5), "ada"), "has 'ada' already"),
        (lambda: library.add(make(5), "a/b"), "voice's name"),
        (lambda: library.add(make(5, name="")), "voice's name"),
        (lambda: library.blend("ada", "ben", 0.5, "../c"), "voice's name"),
        (lambda: library.blend("ada", "ben", 0.5, "ben"), "has 'ben' already"),
        (lambda: library.blend("ada", "eve", 0.5, "c"), "no voice 'eve'"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert library.path.read_bytes() == before
    library.rename("ada", "zoe")
    library.add(make(7), "ben", overwrite=True)
    assert library.names() == ["ben", "zoe"]
    assert library.get("zoe").consent == "ada agreed"
    assert library.get("ben") == make(7, name="ben")
    library.export("zoe", tmp_path / "zoe.safetensors")
    assert Voice.load(tmp_path / "zoe.safetensors") == library.get("zoe")
    with pytest.raises(FileExistsError):
        library.export("zoe", tmp_path / "zoe.safetensors")
    library.remove("zoe")
    library.remove("ben")
    assert library.names() == []
    library.add(make(1))
    assert library.names() == ["voice1"]


def test_the_same_voices_are_the_same_bytes(library, tmp_path):
    other = VoiceLibrary(tmp_path / "other.safetensors")
    for name in ("ben", "ada"):
        other.add(library.get(name))
    assert other.path.read_bytes() == library.path.read_bytes()


def test_default_library(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIMIND_O_CACHE", str(tmp_path / "cache"))
    assert VoiceLibrary().path == tmp_path / "cache" / "voices.safetensors"
    monkeypatch.delenv("MINIMIND_O_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert VoiceLibrary().path == tmp_path / "home" / ".local" / "share" / "minimind_o_hf" / "voices.safetensors"


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def header_only(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def foreign(path: Path) -> None:
    save_file({"model.embed_tokens.weight": torch.ones(2)}, path)


def bad_json(path: Path) -> None:
    save_file({"ada.spk_emb": torch.ones(192)}, path, metadata={"minimind_o_voices": "{"})


def bad_notes(path: Path) -> None:
    save_file({"ada.spk_emb": torch.ones(192)}, path, metadata={"minimind_o_voices": '{"ada": {"licence": 3}}'})


def bad_voice(path: Path) -> None:
    save_file({"ada.spk_emb": torch.ones(7)}, path)


def bad_name(path: Path) -> None:
    save_file({"../ada.spk_emb": torch.ones(192)}, path)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (truncated, OSError, "truncated, damaged, or no safetensors file"),
        (header_only, OSError, "truncated, damaged, or no safetensors file"),
        (lambda path: path.write_bytes(b""), OSError, "truncated, damaged"),
        (lambda path: path.write_text("voices", encoding="utf-8"), OSError, "truncated, damaged"),
        (foreign, ValueError, "no file of voices: it holds 1 other tensors.*embed_tokens"),
        (bad_json, ValueError, "no JSON"),
        (bad_notes, ValueError, "`licence` of a voice must be a string, got 3"),
        (bad_voice, ValueError, "must be 192 floats"),
        (bad_name, ValueError, "voice's name.*'../ada'"),
        (lambda path: make(1).save(path, overwrite=True), ValueError, "holds a single voice"),
    ],
)
def test_a_damaged_library_is_named_and_left_alone(library, damage, error, message):
    damage(library.path)
    before = library.path.read_bytes()
    for call in (library.names, lambda: library.add(make(9)), lambda: library.remove("ada")):
        with pytest.raises(error, match=message) as caught:
            call()
        assert str(library.path) in str(caught.value)
    assert library.path.read_bytes() == before


def test_what_is_no_file_of_one_voice(library, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.safetensors"):
        Voice.load(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="holds several voices"):
        Voice.load(library.path)
    path = tmp_path / "voice.safetensors"
    make(1).save(path)
    truncated(path)
    with pytest.raises(OSError, match="truncated"):
        Voice.load(path)
    foreign(path)
    with pytest.raises(ValueError, match="no file of voices"):
        Voice.load(path)
    save_file({}, path)
    with pytest.raises(ValueError, match="holds no voice"):
        Voice.load(path)


def test_no_consent_no_voice_in_a_library(tmp_path):
    library = VoiceLibrary(tmp_path / "voices.safetensors")
    for consent in ("", "yes"):
        with pytest.raises(ValueError, match="needs a statement of consent"):
            library.add(make(consent=consent))
    assert library.voices() == {}


CHILD = """
import os, signal, sys, time, torch
from minimind_o_hf import Voice, VoiceLibrary, voices
assert not {"datasets", "pyarrow"} & set(sys.modules)  # for training data alone, and slow to import
library, task, go = VoiceLibrary(sys.argv[1]), sys.argv[2], sys.argv[3]
print("ready", flush=True)
while not os.path.exists(go):
    time.sleep(0.001)
if task == "add":
    for number in range(25):
        library.add(Voice(spk_emb=torch.full((192,), 2.0 + number), consent="A number."), f"child{number}")
else:
    whole = voices.save_file
    def half(tensors, path, metadata):
        whole(tensors, path, metadata)
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    voices.save_file = half
    library.add(Voice(spk_emb=torch.ones(192), consent="A number."), "child")
"""


def start(library: VoiceLibrary, task: str, go: Path) -> subprocess.Popen:
    """Another process at the same library, which begins when the file `go` appears."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(library.path), task, str(go)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        text=True,
    )
    assert child.stdout.readline() == "ready\n", child.stderr.read()
    return child


def test_two_processes_lose_nothing(library, tmp_path):
    child = start(library, "add", tmp_path / "go")
    (tmp_path / "go").touch()
    for number in range(25):
        library.add(make(number), f"parent{number}")
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    found = library.voices()
    assert len(found) == 52
    for number in range(25):
        assert torch.equal(found[f"child{number}"].spk_emb, torch.full((192,), 2.0 + number))
        assert torch.equal(found[f"parent{number}"].ref_codes, make(number).ref_codes)
    assert found["ada"].consent == "ada agreed"


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_killed_while_writing_leaves_the_old_file(library, tmp_path):
    before = library.path.read_bytes()
    child = start(library, "die", tmp_path / "go")
    (tmp_path / "go").touch()
    assert child.wait(timeout=120) == -9
    child.communicate()
    assert library.path.read_bytes() == before
    library.add(make(4), "after")  # the lock died too
    assert library.names() == ["ada", "after", "ben"]


def test_a_lock_that_is_not_given_back(library, monkeypatch):
    monkeypatch.setattr(voices, "LOCK_SECONDS", 0.1)
    with (
        filelock.FileLock(library.path.with_name(".voices.safetensors.lock")),
        pytest.raises(OSError, match="another process has been writing"),
    ):
        library.add(make(5))
    assert library.names() == ["ada", "ben"]


def test_a_link_has_the_lock_of_its_target(library, tmp_path):
    link = tmp_path / "link.safetensors"
    link.symlink_to(library.path)
    linked = VoiceLibrary(link)
    assert linked.path == library.path
    linked.add(make(5), "new")
    assert link.is_symlink()
    assert "new" in library


# --- Blends


def test_a_blend_lies_between():
    a, b = make(1, language="en", licence="CC0", consent="a agreed"), make(2, language="en", consent="b agreed")
    b = dataclasses.replace(b, spk_emb=3 * b.spk_emb)
    norms = [a.spk_emb.norm(), b.spk_emb.norm()]
    for weight in (0.0, 0.25, 0.5, 1.0):
        blend = a.blend(b, weight, "ab")
        torch.testing.assert_close(blend.spk_emb.norm(), (1 - weight) * norms[0] + weight * norms[1])
        mixed = (1 - weight) * a.spk_emb + weight * b.spk_emb
        torch.testing.assert_close(blend.spk_emb / blend.spk_emb.norm(), mixed / mixed.norm())
        assert blend.ref_codes is None
    torch.testing.assert_close(a.blend(b, 0).spk_emb, a.spk_emb)
    torch.testing.assert_close(a.blend(b, 1).spk_emb, b.spk_emb)
    blend = a.blend(b, 0.25, "ab", keep_codes=True)
    assert torch.equal(blend.ref_codes, a.ref_codes)
    assert torch.equal(a.blend(b, 0.75, keep_codes=True).ref_codes, b.ref_codes)
    assert blend.name == "ab"
    assert blend.language == "en"
    assert blend.description == "blend: 75% voice1, 25% voice2"
    assert blend.licence == "voice1: CC0; voice2: not stated"
    assert blend.consent == "voice1: a agreed; voice2: b agreed"


def test_what_cannot_be_blended():
    a = make(1, speaker_encoder="campplus:1")
    for other, weight, message in [
        (make(2), -0.1, "`weight` must be from 0 to 1, got -0.1"),
        (make(2), float("nan"), "`weight` must be"),
        (make(2, embedding=False), 0.5, "'voice1' and 'voice2' need a speaker embedding"),
        (make(2, speaker_encoder="campplus:2"), 0.5, "different speaker encoders, campplus:1 and campplus:2"),
        (dataclasses.replace(a, spk_emb=-a.spk_emb), 0.5, "opposite directions"),
    ]:
        with pytest.raises(ValueError, match=message):
            a.blend(other, weight)


# --- Imports


def test_released_voices(shared_dir, library, tmp_path):
    for name, count in (("voices", 5), ("voices_unseen", 7)):
        path = shared_dir / "voices" / f"{name}.pt"
        if not path.is_file():
            pytest.skip("the released voices are not on this machine")
        originals = torch.load(path, weights_only=True)
        names = library.import_file(path, licence="as released", consent="as the release states")
        assert names == sorted(originals)
        assert len(names) == count
        for name in names:
            voice = library.get(name)
            assert torch.equal(voice.ref_codes, originals[name]["ref_codes"])
            assert torch.equal(voice.spk_emb, originals[name]["spk_emb"])
            assert voice.source_hash == hashlib.sha256(path.read_bytes()).hexdigest()
            assert (voice.licence, voice.consent) == ("as released", "as the release states")
    assert len(library.names()) == 14
    blend = library.blend("dylan", "momo", 0.5, "both")
    assert 11 <= blend.spk_emb.norm() <= 15  # as the released ones


def original(path: Path, **voices_of_file) -> Path:
    torch.save(voices_of_file, path)
    return path


def test_originals_are_imported_with_licence_and_consent(library, tmp_path):
    path = original(tmp_path / "o.pt", eve={"spk_emb": torch.ones(192)}, kim={"ref_codes": make(1).ref_codes})
    before = library.path.read_bytes()
    for statements, message in [
        ({}, "a statement of licence"),
        ({"licence": "CC0"}, "a statement of consent"),
        ({"consent": CONSENT}, "a statement of licence"),
        ({"licence": "", "consent": CONSENT}, "a statement of licence"),
        ({"licence": "CC0", "consent": "yes"}, "a statement of consent"),
    ]:
        with pytest.raises(ValueError, match=message):
            library.import_file(path, **statements)
    assert library.path.read_bytes() == before
    assert library.import_file(path, "CC0", CONSENT, language="en") == ["eve", "kim"]
    assert library.get("kim").language == "en"
    assert library.get("kim").spk_emb is None
    with pytest.raises(ValueError, match="has 'eve', 'kim' already"):
        library.import_file(path, "CC0", CONSENT)
    with pytest.raises(ValueError, match="holds 2 voices, which cannot all be named 'one'"):
        library.import_file(path, "CC0", CONSENT, name="one")
    assert library.import_file(path, "CC-BY", CONSENT, overwrite=True) == ["eve", "kim"]
    assert library.get("eve").licence == "CC-BY"


def test_voices_and_libraries_are_imported_with_what_they_say(library, tmp_path):
    library.export("ada", tmp_path / "ada.safetensors")
    other = VoiceLibrary(tmp_path / "other.safetensors")
    assert other.import_file(tmp_path / "ada.safetensors", name="ann") == ["ann"]
    assert other.get("ann").consent == "ada agreed"
    assert other.get("ann").source_hash == hashlib.sha256((tmp_path / "ada.safetensors").read_bytes()).hexdigest()
    assert other.import_file(library.path) == ["ada", "ben"]
    assert other.names() == ["ada", "ann", "ben"]
    make(4).save(tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="a statement of licence"):
        other.import_file(tmp_path / "bare.safetensors")


def test_what_is_not_imported(library, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, ("echo unpickled",))

    good = {"spk_emb": torch.ones(192)}
    files = {
        "evil": (original(tmp_path / "evil.pt", eve=Evil()), ValueError, "pickled objects"),
        "slash": (original(tmp_path / "slash.pt", **{"good": good, "../eve": good}), ValueError, "voice's name"),
        "codes": (original(tmp_path / "codes.pt", eve={"codes": torch.ones(192)}), ValueError, "'eve' holds"),
        "tensor": (original(tmp_path / "tensor.pt", eve=torch.ones(192)), ValueError, "'eve' holds Tensor"),
        "short": (original(tmp_path / "short.pt", good=good, eve={"spk_emb": torch.ones(5)}), ValueError, "192"),
        "empty": (original(tmp_path / "empty.pt"), ValueError, "holds no voice"),
        "missing": (tmp_path / "missing.pt", FileNotFoundError, "missing.pt"),
        "cut": (tmp_path / "cut.pt", OSError, "cut.pt"),
        "zip": (tmp_path / "zip.pt", OSError, "zip.pt"),
    }
    whole = original(tmp_path / "whole.pt", eve=good).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("a", "b")
    before = library.path.read_bytes()
    for path, error, message in files.values():
        with pytest.raises(error, match=message):
            library.import_file(path, "CC0", CONSENT)
    assert library.path.read_bytes() == before


# --- Hearing


def test_codes_become_sound(processor):
    voice = make(1)
    waveform = voice.to_audio(processor)
    assert waveform.shape == (12 * 1920,)
    assert torch.equal(waveform, processor.decode_audio(voice.ref_codes[None])[0])
    with pytest.raises(ValueError, match="'voice1' has an embedding alone"):
        make(1, None).to_audio(processor)


def test_without_a_loudspeaker_a_file_is_offered(processor, monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", None)  # makes the import fail
    with pytest.raises(OSError, match="pip install sounddevice.*--out"):
        make(1).play(processor)


# --- Command line


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs `minimind-o` with the user's library in a fresh folder; returns status, output and errors."""
    monkeypatch.setenv("MINIMIND_O_CACHE", str(tmp_path / "cache"))

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


def test_commands(run, nano, encoder, tmp_path):
    soundfile.write(tmp_path / "me.wav", speech(3, 16000), 16000)
    model = ("--model", nano)
    clone = ("voices", "clone", tmp_path / "me.wav", "me", *model, "--speaker-encoder", encoder)
    status, _, errors = run(*clone)
    assert status == 1
    assert "needs a statement of consent" in errors
    status, out, _ = run(*clone, "--consent", CONSENT, "--language", "en", "--licence", "CC0")
    assert (status, "me is there" in out) == (0, True)
    assert run(*clone, "--consent", CONSENT)[0] == 1
    library = VoiceLibrary()
    assert library.get("me").consent == CONSENT
    path = original(tmp_path / "o.pt", eve={"spk_emb": torch.ones(192)})
    assert run("voices", "import", path)[0] == 1
    assert run("voices", "import", path, "--licence", "CC0", "--consent", CONSENT)[0] == 0
    assert run("voices", "rename", "eve", "kim")[0] == 0
    assert run("voices", "blend", "me", "kim", "mixed", "--weight", "0.3", "--keep-codes")[0] == 0
    assert torch.equal(library.get("mixed").ref_codes, library.get("me").ref_codes)
    status, out, _ = run("voices", "list")
    assert [line.partition(":")[0] for line in out.splitlines()] == ["kim", "me", "mixed"]
    assert "me: 2.0 s of codes and embedding; en; licence: CC0; consent: I am" in out
    assert run("voices", "export", "me", tmp_path / "out.safetensors")[0] == 0
    assert Voice.load(tmp_path / "out.safetensors") == library.get("me")
    assert run("voices", "export", "me", tmp_path / "out.safetensors")[0] == 1
    assert run("voices", "remove", "kim")[0] == 0
    assert library.names() == ["me", "mixed"]
    assert run("voices", "play", "me", "--out", tmp_path / "heard.wav", *model)[0] == 0
    assert soundfile.info(tmp_path / "heard.wav").frames == 25 * 1920
    other = tmp_path / "other.safetensors"
    assert run("voices", "import", tmp_path / "out.safetensors", "--library", other, "--name", "ann")[0] == 0
    assert VoiceLibrary(other).names() == ["ann"]
    status, _, errors = run("voices", "remove", "nobody")
    assert (status, "there is no voice 'nobody'" in errors) == (1, True)
    status, out, errors = run("voices", "list", "--library", tmp_path / "none.safetensors")
    assert (status, out) == (0, "")
    assert "has no voices" in errors


def test_what_a_file_says_does_not_steer_the_terminal(run, tmp_path):
    VoiceLibrary().add(make(1, description="\x1b[2J", consent="a\nb, both of us"))
    _, out, _ = run("voices", "list")
    assert "\x1b" not in out
    assert len(out.splitlines()) == 1


def test_say_and_chat_find_voices_of_the_library(run, nano, tmp_path):
    VoiceLibrary().add(make(1), "me")
    settings = ("--model", nano, "--seed", 0, "--max-new-tokens", 12, "--out", tmp_path / "said.wav")
    sounds = {}
    for voice in (["--voice", "me"], []):
        status, out, errors = run("say", "Hello there", *voice, *settings)
        assert status == 0, errors
        sounds["me" if voice else None] = (out, soundfile.read(tmp_path / "said.wav")[0])
    assert not np.array_equal(sounds["me"][1], sounds[None][1])
    chat = ("chat", "--text", "Read this aloud: Hello there", "--voice", "me", *settings)
    status, out, _ = run(*chat)
    assert status == 0
    assert out == sounds["me"][0]
    said = soundfile.read(tmp_path / "said.wav")[0]
    # How the sound is cut into chunks is a matter of time, and so is the rounding of a sample.
    assert said.shape == sounds["me"][1].shape
    assert np.abs(said - sounds["me"][1]).max() <= 1 / 32768
    assert run(*chat, "--text-only")[0] == 0
    for arguments, message in [
        (("say", "Hello", "--voice", "nobody"), "the checkpoint has alba, bruno, the library"),
        (("say", " "), "nothing to say"),
        (("say", "Hello", "--prompt", "Say it"), "no field {text}"),
        (("say", "Hello", "--language", "xx"), "no prompt in the language 'xx'"),
    ]:
        status, _, errors = run(*arguments, *settings)
        assert status == 1
        assert message in errors


def test_chat_refuses_a_voice_of_another_codec(run, processor):
    VoiceLibrary().add(make(1, codec="mimi:0123456789abcdef"), "foreign")
    with pytest.raises(ValueError, match="'foreign' was made with the codec mimi:0123456789abcdef"):
        chat_check_voice("foreign", processor)
    assert "foreign" not in processor.voices
    assert check_voice(VoiceLibrary().get("foreign"))["spk_emb"].shape == (192,)


def test_quiet_edges_are_taken_off():
    speech = np.sin(np.arange(1600)).astype(np.float32)
    quiet = 0.001 * np.ones(8000, dtype=np.float32)
    heard = without_quiet_edges(np.concatenate([quiet, speech, quiet, speech, quiet]), 16000)
    assert len(heard) == 2 * 1600 + 8000 + 2 * 1280  # 80 ms are left on each side, and what lies between
    assert np.array_equal(heard[1280:2880], speech)
    for nothing in (np.zeros(0, np.float32), np.zeros(100, np.float32), np.zeros(5000, np.float32)):
        assert np.array_equal(without_quiet_edges(nothing, 16000), nothing)
