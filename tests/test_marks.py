"""Generated sound says so: in every format, on every path that writes it, for people and for programs."""

import datetime
import json

import numpy as np
import pytest
import soundfile

from minimind_o_hf import read_mark
from minimind_o_hf.cli import main

SOUND = np.sin(np.arange(4800) / 20).astype(np.float32) / 2


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_every_format_carries_the_mark(processor, tmp_path, suffix):
    path = tmp_path / f"said.{suffix}"
    before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    processor.save_audio(SOUND, path, model="nano", voice="alba")
    mark = read_mark(path)
    assert (mark["ai_generated"], mark["model"], mark["voice"]) == (True, "nano", "alba")
    assert before <= datetime.datetime.fromisoformat(mark["date"]) <= datetime.datetime.now(datetime.UTC)
    assert mark["software"].startswith("minimind_o_hf ")
    # What players show.
    with soundfile.SoundFile(path) as file:
        assert file.title == "AI-generated speech"
        assert file.artist == "nano"
        assert len(file.read()) == len(SOUND)


def test_the_mark_does_not_change_the_sound(processor, tmp_path):
    processor.save_audio(SOUND, tmp_path / "marked.wav")
    processor.save_audio(SOUND, tmp_path / "plain.wav", generated=False)
    marked, plain = (soundfile.read(tmp_path / f"{name}.wav")[0] for name in ("marked", "plain"))
    assert np.array_equal(marked, plain)
    assert read_mark(tmp_path / "plain.wav") is None
    assert read_mark(tmp_path / "marked.wav")["model"] is None


def test_a_wav_holds_info_fields(processor, tmp_path):
    """As the RIFF standard has them, for programs that know nothing of this package."""
    processor.save_audio(SOUND, tmp_path / "said.wav", model="nano")
    content = (tmp_path / "said.wav").read_bytes()
    start = content.index(b"LIST")
    assert content[start + 8 : start + 12] == b"INFO"
    assert all(field in content[start:] for field in (b"INAM", b"ISFT", b"ICMT", b"ICRD", b"AI-generated speech"))


def test_an_mp3_holds_id3_fields(processor, tmp_path):
    processor.save_audio(SOUND, tmp_path / "said.mp3", model="nano", voice="alba")
    content = (tmp_path / "said.mp3").read_bytes()
    assert content.startswith(b"ID3")
    assert all(field in content for field in (b"TIT2", b"TPE1", b"COMM", b"AI-generated speech"))


def test_a_file_written_as_sound_comes_is_marked(processor, tmp_path):
    with processor.open_audio(tmp_path / "said.flac", model="nano") as file:
        for chunk in np.split(SOUND, 4):
            file.write(chunk)
        assert not (tmp_path / "said.flac").exists()
    assert read_mark(tmp_path / "said.flac")["model"] == "nano"
    processor.save_audio(SOUND, tmp_path / "at_once.flac")
    streamed, whole = (soundfile.read(tmp_path / f"{name}.flac")[0] for name in ("said", "at_once"))
    assert np.array_equal(streamed, whole)

    def interrupted():
        with processor.open_audio(tmp_path / "half.wav") as file:
            file.write(SOUND)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(ValueError, match="the suffix must be one of .wav, .flac, .ogg, .mp3"):
        processor.open_audio(tmp_path / "said.txt").__enter__()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["at_once.flac", "said.flac"]


def test_chat_marks_what_it_speaks(nano, tmp_path):
    out = tmp_path / "reply.wav"
    options = ["--text", "Hi.", "--voice", "alba", "--seed", "0", "--out", str(out)]
    assert main(["chat", "--model", str(nano), *options]) == 0
    mark = read_mark(out)
    assert (mark["model"], mark["voice"]) == ("nano", "alba")


def test_inspect(processor, tmp_path, capsys):
    processor.save_audio(SOUND, tmp_path / "said.wav", voice="alba")
    soundfile.write(tmp_path / "recorded.wav", SOUND, 16000)
    assert main(["inspect", str(tmp_path / "said.wav")]) == 0
    assert json.loads(capsys.readouterr().out)["voice"] == "alba"
    assert main(["inspect", str(tmp_path / "recorded.wav")]) == 0
    assert "no mark" in capsys.readouterr().out
    (tmp_path / "text.wav").write_text("no sound", encoding="utf-8")
    for name, message in (("text.wav", "no readable sound file"), ("none.wav", "there is no file")):
        assert main(["inspect", str(tmp_path / name)]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("comment", ["", "a song", "[1]", '{"ai_generated": "yes"}', "{"])
def test_other_comments_are_no_marks(tmp_path, comment):
    with soundfile.SoundFile(tmp_path / "a.wav", "w", 16000, 1) as file:
        if comment:
            file.comment = comment
        file.write(SOUND)
    assert read_mark(tmp_path / "a.wav") is None


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_long_names_and_foreign_comments(processor, tmp_path, suffix):
    name = "声" * 2000
    processor.save_audio(SOUND, tmp_path / f"said.{suffix}", model=name, voice=name)
    mark = read_mark(tmp_path / f"said.{suffix}")
    assert (mark["model"], mark["voice"]) == (name[:100], name[:100])
    with soundfile.SoundFile(tmp_path / f"other.{suffix}", "w", 24000, 1) as file:
        file.comment = "[" * (10_000 if suffix == "wav" else 200_000)
        file.write(SOUND)
    assert read_mark(tmp_path / f"other.{suffix}") is None


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_nothing_written_is_a_short_silence(processor, tmp_path, suffix):
    with processor.open_audio(tmp_path / f"said.{suffix}"):
        pass
    assert soundfile.info(tmp_path / f"said.{suffix}").frames == 1920
