"""Reading speech and pictures, writing sound: every kind of source, exact values where they are known, bad input."""

import base64
import http.server
import io
import threading
from functools import partial

import numpy as np
import PIL.Image
import pytest
import soundfile
import torch
from minimind_o_hf.processing import load_audio
from minimind_o_hf.processing.audio_minimind_o import split_clips
from minimind_o_hf.processing.image_minimind_o import load_image, split_images


def tone(seconds=0.5, rate=16000, frequency=440.0):
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def encoded(samples, rate=16000, file_format="WAV", subtype=None):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=file_format, subtype=subtype)
    return buffer.getvalue()


@pytest.fixture
def server(tmp_path):
    """A web server on this machine that serves `tmp_path`."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    handler.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_wav_file_comes_back_exactly(tmp_path):
    path = tmp_path / "tone.wav"
    path.write_bytes(encoded(tone(), subtype="FLOAT"))
    for source in (path, str(path), path.read_bytes()):
        samples = load_audio(source)
        assert samples.dtype == np.float32
        np.testing.assert_array_equal(samples, tone())


@pytest.mark.parametrize(("file_format", "tolerance"), [("FLAC", 1e-4), ("OGG", 0.05), ("MP3", 0.05)])
def test_other_formats(file_format, tolerance):
    samples = load_audio(encoded(tone(), file_format=file_format))
    assert samples.shape == (8000,)
    assert np.abs(samples - tone())[500:-500].max() < tolerance


def test_urls(server, tmp_path):
    (tmp_path / "tone.wav").write_bytes(encoded(tone(), subtype="FLOAT"))
    np.testing.assert_array_equal(load_audio(f"{server}/tone.wav"), tone())
    data = "data:audio/wav;base64," + base64.b64encode(encoded(tone(), subtype="FLOAT")).decode()
    np.testing.assert_array_equal(load_audio(data), tone())
    with pytest.raises(OSError, match="could not fetch .*/missing.wav"):
        load_audio(f"{server}/missing.wav")


def test_arrays_and_their_scale():
    expected = np.array([0.5, -1.0], dtype=np.float32)
    for samples in (
        expected,
        expected.astype(np.float64),
        torch.from_numpy(expected),
        torch.from_numpy(expected).bfloat16(),
        [0.5, -1.0],
        np.array([16384, -32768], dtype=np.int16),
        torch.tensor([2**30, -(2**31)], dtype=torch.int32),
        np.array([64, -128], dtype=np.int8),
        np.array([192, 0], dtype=np.uint8),
    ):
        result = load_audio(samples)
        assert result.dtype == np.float32
        np.testing.assert_array_equal(result, expected)


def test_the_source_is_left_alone():
    samples = tone()
    load_audio(samples)[:] = 7
    load_audio(torch.from_numpy(samples))[:] = 7
    np.testing.assert_array_equal(samples, tone())


@pytest.mark.parametrize("shape", ["channels first", "channels last", "file"])
def test_stereo_is_averaged(shape):
    left, right = tone(frequency=300), tone(frequency=500)
    stereo = np.stack([left, right])
    source = {"channels first": stereo, "channels last": stereo.T, "file": encoded(stereo.T, subtype="FLOAT")}[shape]
    np.testing.assert_allclose(load_audio(source), (left + right) / 2, atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 44101, 48000, 96000, 22050.5])
def test_any_rate_keeps_the_tone(rate):
    samples = load_audio(tone(1.0, rate), rate)
    assert abs(len(samples) - 16000) <= 2
    assert np.abs(samples[1000:15000] - tone(1.0)[1000:15000]).max() < 5e-3


def test_a_files_own_rate_wins_and_the_target_can_change():
    assert len(load_audio(encoded(tone(1.0, 48000), 48000), sampling_rate=8000)) == 16000
    assert len(load_audio(tone(1.0, 16000), 16000, target_rate=24000)) == 24000


@pytest.mark.parametrize(
    "samples",
    [
        [],
        np.zeros((2, 0), np.float32),
        np.zeros(10, bool),
        np.zeros(10, np.complex64),
        np.zeros(10, np.int64),
        np.array(["a"]),
        np.array([None, 1.0], dtype=object),
        [[0.1, 0.2], [0.3]],
        np.zeros((9, 9), np.float32),
        np.zeros((1, 1, 5), np.float32),
        np.float32(0.5),
        None,
        np.array([0.0, np.nan], np.float32),
        np.array([0.0, np.inf], np.float32),
        np.array([0.0, 1e300]),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_bad_arrays(samples):
    with pytest.raises(ValueError, match="audio|sampl"):
        load_audio(samples)


@pytest.mark.parametrize("rate", [0, -16000, float("nan"), float("inf"), 2e9])
def test_bad_rates(rate):
    with pytest.raises(ValueError, match="positive number of Hz"):
        load_audio(tone(), rate)


def test_bad_files(tmp_path):
    with pytest.raises(OSError, match="missing.wav"):
        load_audio(tmp_path / "missing.wav")
    with pytest.raises(OSError, match=tmp_path.name):
        load_audio(tmp_path)
    (tmp_path / "empty.wav").write_bytes(b"")
    with pytest.raises(OSError, match="empty.wav is empty"):
        load_audio(tmp_path / "empty.wav")
    (tmp_path / "text.wav").write_text("this is no sound\n" * 100, encoding="utf-8")
    with pytest.raises(OSError, match="text.wav is no readable audio file"):
        load_audio(tmp_path / "text.wav")
    with pytest.raises(OSError, match="12 bytes passed as audio"):
        load_audio(b"not a sound!")
    with pytest.raises(ValueError, match="holds no samples"):
        load_audio(encoded(np.zeros(0, np.float32)))


@pytest.mark.parametrize("file_format", ["WAV", "FLAC", "MP3", "OGG"])
@pytest.mark.parametrize("kept", [0.9, 0.6, 0.3, 0.02])
def test_truncated_files(file_format, kept):
    data = encoded(tone(3.0), file_format=file_format)
    with pytest.raises((OSError, ValueError), match="truncated|no readable audio"):
        load_audio(data[: int(len(data) * kept)])


def test_a_wav_from_a_pipe_announces_no_length():
    data = bytearray(encoded(tone()))
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    assert data[36:40] == b"data"
    assert len(load_audio(bytes(data))) == 8000


def test_split_clips():
    a, b = np.zeros(3), np.ones(3)
    assert split_clips(None) == ([], None)
    assert split_clips("x.wav") == (["x.wav"], None)
    assert split_clips([0.1, 0.2]) == ([[0.1, 0.2]], None)
    assert split_clips(["x.wav", b"y"]) == (["x.wav", b"y"], None)
    assert split_clips([["x", "y"], None, [], "z", ["w"]]) == (["x", "y", "z", "w"], [2, 0, 0, 1, 1])
    clips, rows = split_clips([[a], [b, [0.5, 0.5]]])
    assert rows == [1, 2]
    assert clips[0] is a
    assert clips[2] == [0.5, 0.5]


def test_released_questions(shared_dir):
    for path in sorted((shared_dir / "eval_omni").glob("*.mp3")):
        samples = load_audio(path)
        assert 0.2 < len(samples) / 16000 < 20
        assert 0.01 < np.abs(samples).max() <= 1.5


# ---------------------------------------------------------------- pictures


def picture(size=(4, 2)):
    image = PIL.Image.new("RGB", size)
    image.putpixel((0, 0), (255, 0, 0))
    return image


def picture_bytes(image, file_format="PNG", **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **kwargs)
    return buffer.getvalue()


def test_picture_sources(server, tmp_path):
    data = picture_bytes(picture())
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (data, path, str(path), f"{server}/picture.png", url, picture(), picture().convert("RGBA")):
        image = load_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture()))
    array = np.asarray(picture())
    assert load_image(array) is array


def test_the_orientation_of_a_photograph_is_applied():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert load_image(picture_bytes(picture(), exif=exif)).size == (2, 4)


def test_bad_pictures(tmp_path):
    with pytest.raises(OSError, match="missing.png"):
        load_image(tmp_path / "missing.png")
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    with pytest.raises(OSError, match="text.png is no readable picture"):
        load_image(tmp_path / "text.png")
    noise = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for file_format in ("PNG", "JPEG"):
        data = picture_bytes(noise, file_format)
        with pytest.raises(OSError, match="no readable picture"):
            load_image(data[: len(data) // 2])
    with pytest.raises(OSError, match="0 bytes passed as a picture"):
        load_image(b"")
    for array in (np.zeros((4, 4)), np.zeros((4, 4, 1)), np.zeros((3, 0, 4)), np.full((3, 4, 4), np.nan)):
        with pytest.raises(ValueError, match="a picture passed as an array"):
            load_image(array)
    with pytest.raises(ValueError, match="from a int"):
        load_image(3)


def test_split_images():
    assert split_images(None) == ([], None)
    assert split_images("a") == (["a"], None)
    assert split_images(["a", "b"]) == (["a", "b"], None)
    assert split_images([["a"], None, ["b", "c"]]) == (["a", "b", "c"], [1, 0, 2])
