"""Recordings of a command-line TTS: what asks spoken questions, and what answers are compared with."""

import hashlib
import io
import shlex
import shutil
from pathlib import Path

import numpy as np
import soundfile

from minimind_o_hf.data.building import speak
from minimind_o_hf.files import new_file
from minimind_o_hf.processing import load_audio

RATE = 16000
SILENCE = 0.01  # of the peak
MARGIN = 0.08  # seconds of silence before and after
LOUDNESS = 0.08  # RMS


def trim(waveform: np.ndarray, rate: int = RATE) -> np.ndarray:
    """
    Cuts the silence around speech to 80 ms, and gives it an RMS of 0.08.

    Args:
        waveform (`np.ndarray` of shape `(num_samples,)`): Float samples.
        rate (`int`, defaults to 16000): Their rate in Hz.

    Returns:
        `np.ndarray` of dtype float32; empty where there is nothing but silence.
    """
    loud = np.flatnonzero(np.abs(waveform) > SILENCE * np.abs(waveform).max(initial=0))
    if not len(loud):
        return np.zeros(0, np.float32)
    speech, margin = waveform[loud[0] : loud[-1] + 1], round(MARGIN * rate)
    gain = min(LOUDNESS / np.sqrt(np.mean(np.square(speech, dtype=np.float64))), 0.99 / np.abs(speech).max())
    return np.pad(speech * gain, margin).astype(np.float32)


def is_installed(tts: str) -> bool:
    """Whether a TTS command's program is there."""
    return shutil.which(shlex.split(tts)[0]) is not None


def spoken(tts: str, text: str, voice: str, folder: Path) -> Path:
    """
    A recording of a text, trimmed, FLAC at 16 kHz; made once.

    Args:
        tts (`str`): A command with `{text}`, `{out}` and `{voice}`.
        text, voice (`str`): What is said, and by whom.
        folder (`Path`): Where recordings are kept.

    Raises:
        ValueError: The command failed, or spoke nothing but silence.
    """
    command = tts.replace("{voice}", voice)
    path = folder / voice / f"{hashlib.sha256(f'{command} {text}'.encode()).hexdigest()[:16]}.flac"
    if not path.is_file():
        try:
            waveform = trim(load_audio(speak(command, text), None, RATE))
        except ValueError as error:
            raise ValueError(
                f"{error}: install the program, or leave what it speaks out (`--only typed,picture`)"
            ) from error
        if not len(waveform):
            raise ValueError(f"the TTS was silent instead of saying {text!r:.60} in the voice {voice!r}")
        buffer = io.BytesIO()
        soundfile.write(buffer, waveform, RATE, format="FLAC")
        with new_file(path) as temporary:
            temporary.write_bytes(buffer.getvalue())
    return path


__all__ = ["is_installed", "spoken", "trim"]
