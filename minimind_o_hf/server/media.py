"""What clients send and get: speech and pictures out of a request, sound into one of the formats they ask for."""

import base64
import binascii
import io
import struct
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image

from minimind_o_hf.processing import load_audio
from minimind_o_hf.processing.marks_minimind_o import make_mark, write_mark

from .settings import ServerSettings

# Name in the API: content type, and libsndfile's format and subtype.
FORMATS = {
    "wav": ("audio/wav", "WAV", "PCM_16"),
    "pcm": ("audio/pcm", None, None),
    "pcm16": ("audio/pcm", None, None),
    "flac": ("audio/flac", "FLAC", "PCM_16"),
    "mp3": ("audio/mpeg", "MP3", "MPEG_LAYER_III"),
    "opus": ("audio/ogg", "OGG", "OPUS"),
}
LISTENING_RATE = 16000  # Hz, of the speech encoder
RATES = (4000, 384_000)  # Hz, of recordings: a few bytes that claim 2 GHz would take 20 GB to resample
UNKNOWN_LENGTH = 0xFFFFFFFF


def decode_base64(text: Any, limit: int) -> bytes:
    """Bytes of a base64 text, at most `limit` of them."""
    if not isinstance(text, str):
        raise ValueError(f"Base64 is a string, got {type(text).__name__}.")
    if len(text) > limit * 4 // 3 + 4:
        raise ValueError(f"{len(text)} characters of base64 are more than the {limit} bytes that are taken at once.")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"This is no base64: {error}.") from error


def read_speech(data: bytes, max_seconds: float) -> np.ndarray:
    """
    Speech out of an audio file, without decoding more of it than is taken.

    Args:
        data (`bytes`): WAV, FLAC, OGG or MP3.
        max_seconds (`float`): The longest that is taken.

    Returns:
        `np.ndarray` of shape `(num_samples,)`: float32 at 16 kHz.

    Raises:
        ValueError: It is no audio, of an odd rate, or too long.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if not RATES[0] <= file.samplerate <= RATES[1]:
                raise ValueError(f"A recording has {RATES[0]} to {RATES[1]} samples a second, got {file.samplerate}.")
            limit = int(max_seconds * file.samplerate)
            samples = file.read(limit + 1, dtype="float32", always_2d=True)
            rate = file.samplerate
    except (soundfile.SoundFileError, OSError, MemoryError) as error:
        raise ValueError(
            f"The {len(data)} bytes are no audio file that can be read (WAV, FLAC, OGG or MP3)."
        ) from error
    if len(samples) > limit:
        raise ValueError(f"The recording is longer than {max_seconds:g} s.")
    return load_audio(samples.mean(axis=1), rate, LISTENING_RATE)


def read_pcm16(data: bytes) -> np.ndarray:
    """Little-endian 16-bit samples as float32 in [-1, 1)."""
    if len(data) % 2:
        raise ValueError(f"16-bit samples take an even number of bytes, got {len(data)}.")
    return np.frombuffer(data, dtype="<i2").astype(np.float32) / 32768


def to_pcm16(samples: torch.Tensor) -> bytes:
    """Samples in [-1, 1] as little-endian 16-bit ones."""
    return (samples.clamp(-1, 1) * 32767).round().to(torch.int16).numpy().astype("<i2").tobytes()


def read_picture(url: Any, settings: ServerSettings) -> Image.Image:
    """
    The picture in a `data:` URL.

    Raises:
        ValueError: Another URL (nothing is fetched for clients), no picture, or one that is too large.
    """
    head, _, body = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not head.startswith("data:image/") or not head.endswith(";base64"):
        raise ValueError("A picture is passed as a URL like data:image/png;base64,...; others are not fetched.")
    data = decode_base64(body, settings.max_body)
    try:
        picture = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP", "GIF", "BMP"))
        width, height = picture.size
        if width * height > settings.max_pixels:
            raise ValueError(
                f"The picture has {width} x {height} pixels, more than {settings.max_pixels}: send a smaller one."
            )
        picture.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"The {len(data)} bytes are no picture that can be read.") from error
    return picture


class _Drain(io.BytesIO):
    """A file that gives away what was written to it since the last time. What is rewritten later stays as it was."""

    def __init__(self):
        super().__init__()
        self.given = 0

    def take(self) -> bytes:
        data = self.getbuffer()[self.given :].tobytes()
        self.given += len(data)
        return data


class SoundEncoder:
    """
    Sound in one of the API's formats, piece by piece. Files say in their metadata that a machine speaks.

    Args:
        format (`str`): One of [`FORMATS`].
        sampling_rate (`int`): In Hz.
        model, voice (`str`, *optional*): For the mark.
    """

    def __init__(self, format: str, sampling_rate: int, model: str | None = None, voice: str | None = None):
        if format not in FORMATS:
            raise ValueError(f"The format must be one of {', '.join(FORMATS)}, got {format!r}.")
        self.content_type, container, subtype = FORMATS[format]
        self._file: soundfile.SoundFile | None = None
        self._head = b""
        self._drain = _Drain()
        if container is None:
            return
        # Players tell an MP3's length from its bit rate where its head does not say it.
        constant = {"bitrate_mode": "CONSTANT", "compression_level": 0.5} if container == "MP3" else {}
        file = soundfile.SoundFile(self._drain, "w", sampling_rate, 1, subtype, format=container, **constant)
        if container != "MP3":  # whose tags libsndfile writes in front of what has been sent by then
            write_mark(file, make_mark(model, voice))
        if container == "WAV":
            file.close()
            self._head = _open_ended(self._drain.getvalue())
        else:
            self._file = file

    def push(self, samples: torch.Tensor) -> bytes:
        """
        Args:
            samples (`torch.Tensor` of shape `(num_samples,)`): The next ones, float32 in [-1, 1].
        """
        pcm = to_pcm16(samples)
        if self._file is None:
            head, self._head = self._head, b""
            return head + pcm
        self._file.buffer_write(pcm, dtype="int16")
        self._file.flush()
        return self._drain.take()

    def end(self) -> bytes:
        """What is left."""
        if self._file is None:
            head, self._head = self._head, b""
            return head
        self._file.close()
        return self._drain.take()

    def close(self) -> None:
        """Of sound that is not wanted any more."""
        if self._file is not None:
            self._file.close()


def _open_ended(wav: bytes) -> bytes:
    """The head of a WAV without samples, for any number of them."""
    at = wav.rindex(b"data")
    unknown = struct.pack("<I", UNKNOWN_LENGTH)
    return wav[:4] + unknown + wav[8 : at + 4] + unknown


def encode_whole(samples: torch.Tensor, format: str, sampling_rate: int, model: str, voice: str | None) -> bytes:
    """A whole answer as a file, whose head says how long it is."""
    _, container, subtype = FORMATS[format]
    if container is None:
        return to_pcm16(samples)
    data = io.BytesIO()
    with soundfile.SoundFile(data, "w", sampling_rate, 1, subtype, format=container) as file:
        write_mark(file, make_mark(model, voice))
        file.buffer_write(to_pcm16(samples), dtype="int16")
    return data.getvalue()


__all__ = [
    "FORMATS",
    "LISTENING_RATE",
    "SoundEncoder",
    "decode_base64",
    "encode_whole",
    "read_pcm16",
    "read_picture",
    "read_speech",
    "to_pcm16",
]
