"""Reads speech: a file, a URL, encoded bytes or samples become a mono waveform at the rate the model hears."""

import base64
import io
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torchaudio
from huggingface_hub import get_session

from .optional_minimind_o import optional_module

soundfile = optional_module("soundfile", "soundfile")

AudioSource = str | os.PathLike | bytes | np.ndarray | torch.Tensor | Sequence[float]

MIN_RATE = 100
# Above what converters record at: a header of 50 KB that claims 2 GHz would ask for 20 GB to resample.
MAX_RATE = 1_000_000
MAX_CHANNELS = 8
URL_TIMEOUT = 30.0  # seconds


def load_audio(source: AudioSource, sampling_rate: float | None = None, target_rate: int = 16000) -> np.ndarray:
    """Return one recording as a mono float32 waveform at `target_rate`.

    Args:
        source (`str`, `os.PathLike`, `bytes`, `np.ndarray`, `torch.Tensor` or `list[float]`):
            A path, an http(s) or `data:` URL, the bytes of an audio file (WAV, FLAC, OGG, MP3: what libsndfile reads),
            or samples of shape `(num_samples,)`, `(channels, num_samples)` or `(num_samples, channels)` with at most 8
            channels. Channels are averaged. Floating-point samples are in [-1, 1]; integer ones are scaled by the
            range of their dtype.
        sampling_rate (`float`, *optional*, defaults to `target_rate`):
            Rate in Hz of samples passed as an array. Encoded audio says its own and ignores it.
        target_rate (`int`, *optional*, defaults to 16000):
            Rate in Hz of the result.

    Returns:
        `np.ndarray` of shape `(num_samples,)` and dtype float32.

    Raises:
        `OSError`: a missing, unreadable, truncated or non-audio file.
        `ValueError`: no samples, NaN or infinite samples, a shape, dtype or rate that makes no sense.
    """
    rate = target_rate if sampling_rate is None else sampling_rate
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        samples, rate = _decode(read_bytes(name), name if len(name) <= 200 else f"{name[:200]}...")
    elif isinstance(source, (bytes, bytearray, memoryview)):
        samples, rate = _decode(bytes(source), f"the {len(source)} bytes passed as audio")
    else:
        samples = _samples_to_float(source)
    return _resample(_to_mono(samples), rate, target_rate)


def split_clips(audio) -> tuple[list[AudioSource], list[int] | None]:
    """Flatten one recording, a list of them, or a list with a list (or None) for each row.

    Returns:
        `tuple(list, list[int] or None)`: the recordings in reading order; for nested input the number in each row.
    """
    if audio is None:
        return [], None
    if not isinstance(audio, (list, tuple)) or _is_waveform(audio):
        return [audio], None
    is_row = [item is None or (isinstance(item, (list, tuple)) and not _is_waveform(item)) for item in audio]
    if not any(is_row):
        return list(audio), None
    rows = [list(item or []) if row else [item] for item, row in zip(audio, is_row, strict=True)]
    return [clip for row in rows for clip in row], [len(row) for row in rows]


def read_clips(audio, sampling_rate: float | None, target_rate: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Number and samples `(num_samples,)` of each clip of a batch, one by one; `ValueError` names the clip, or says
    that there is none."""
    clips, _ = split_clips(audio)
    if not clips:
        raise ValueError("there is no audio to extract features from: the list of clips is empty")
    for index, clip in enumerate(clips):
        try:
            waveform = torch.from_numpy(load_audio(clip, sampling_rate, target_rate))
        except ValueError as error:
            raise ValueError(f"audio clip {index}: {error}") from error
        yield index, waveform


def _is_waveform(item) -> bool:
    return isinstance(item, (list, tuple)) and len(item) > 0 and isinstance(item[0], (int, float, np.number))


def read_bytes(name: str) -> bytes:
    """The bytes of a file, given its path or an http(s) or `data:` URL; `OSError` where it cannot be read."""
    if name.startswith("data:"):
        return base64.b64decode(name.partition(",")[2])
    if not name.startswith(("http://", "https://")):
        return Path(name).read_bytes()
    try:
        response = get_session().get(name, follow_redirects=True, timeout=URL_TIMEOUT)
        response.raise_for_status()
    except Exception as error:  # the client's exceptions differ between versions of huggingface_hub
        raise OSError(f"could not fetch {name}: {error}") from error
    return response.content


def _decode(data: bytes, name: str) -> tuple[np.ndarray, int]:
    """Decode a whole audio file to samples `(channels, num_samples)` and its rate in Hz."""
    if not data:
        raise OSError(f"{name} is empty")
    if _missing_wav_bytes(data):
        raise OSError(f"{name} is truncated: {_missing_wav_bytes(data)} bytes of its samples are missing")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            announced, rate = file.frames, file.samplerate
            samples = file.read(dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise OSError(f"{name} is no readable audio file (WAV, FLAC, OGG or MP3): {error}") from error
    # An MP3 announces its length in a Xing or Info header; without one libsndfile only estimates it.
    if len(samples) < announced and (b"Xing" in data[:4096] or b"Info" in data[:4096]):
        raise OSError(f"{name} is truncated: it announces {announced} samples and holds {len(samples)}")
    if len(samples) == 0:
        raise ValueError(f"{name} holds no samples (empty or truncated)")
    return samples.T, rate


def _missing_wav_bytes(data: bytes) -> int:
    """How many bytes of samples a RIFF file announces beyond its end; libsndfile reads on as if they were not."""
    if data[:4] != b"RIFF":
        return 0
    position = 12
    while position + 8 <= len(data):
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        if data[position : position + 4] == b"data":
            # Programs that write to a pipe put a value near the maximum: the length is not known then.
            return max(0, position + 8 + size - len(data)) if size < 0x7FFF0000 else 0
        position += 8 + size + size % 2
    return 0


def _samples_to_float(source) -> np.ndarray:
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy()
    try:
        samples = np.asarray(source)
    except ValueError as error:
        raise ValueError(f"audio samples must form a regular array, got a ragged {type(source).__name__}") from error
    if samples.size == 0:
        raise ValueError(f"audio without samples: an array of shape {samples.shape}")
    kind, width = samples.dtype.kind, samples.dtype.itemsize
    if kind == "f":
        return samples.astype(np.float32)
    # A 64-bit integer is what Python's own integers become, so its range says nothing about the samples' scale.
    if kind not in "iu" or width > 4:
        raise ValueError(
            f"audio samples must be floats in [-1, 1] or integers of 8, 16 or 32 bits, got {samples.dtype} from a "
            f"{type(source).__name__}"
        )
    half = 2.0 ** (8 * width - 1)
    return ((samples.astype(np.float64) - (half if kind == "u" else 0.0)) / half).astype(np.float32)


def _to_mono(samples: np.ndarray) -> np.ndarray:
    if samples.ndim == 2 and min(samples.shape) <= MAX_CHANNELS:
        samples = samples.mean(axis=int(np.argmin(samples.shape)))
    if samples.ndim != 1:
        raise ValueError(
            f"audio samples must have shape (num_samples,) or one with at most {MAX_CHANNELS} channels, got "
            f"{samples.shape}"
        )
    bad = len(samples) - int(np.isfinite(samples).sum())
    if bad:
        raise ValueError(f"{bad} of {len(samples)} audio samples are NaN or infinite")
    return samples


def _resample(samples: np.ndarray, rate: float, target_rate: int) -> np.ndarray:
    for value in (rate, target_rate):
        # A second of samples at 1 Hz would become hours at 24 kHz.
        if not MIN_RATE <= value <= MAX_RATE:
            raise ValueError(
                f"a sampling rate must be a positive number of Hz, got {value}: from {MIN_RATE} to {MAX_RATE}"
            )
    if rate == target_rate:
        return np.ascontiguousarray(samples)
    # The filter bank has a kernel for each step of the reduced ratio: 44101 Hz would need 16,000 long ones. With at
    # most 1,000 the pitch is off by less than one millionth.
    ratio = Fraction(max(rate, target_rate)) / Fraction(min(rate, target_rate))
    ratio = ratio.limit_denominator(1000)
    new, old = (ratio.denominator, ratio.numerator) if rate > target_rate else (ratio.numerator, ratio.denominator)
    return torchaudio.functional.resample(torch.from_numpy(np.ascontiguousarray(samples)), old, new).numpy()


__all__ = ["AudioSource", "load_audio", "read_bytes", "read_clips", "split_clips"]
