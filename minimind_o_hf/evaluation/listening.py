"""What recognisers of words and of voices make of sound."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from minimind_o_hf.data.building import SpeakerEncoder
from minimind_o_hf.processing import load_audio

from .journal import Journal

RATE = 16000


class Recogniser(Protocol):
    """Anything that transcribes: called with a float32 waveform `(num_samples,)` at 16 kHz, it returns the text."""

    def __call__(self, waveform: np.ndarray) -> str: ...


class PocketSphinx:
    """
    CMU Sphinx with the US English model of its package, which needs no network: any words, quick, and far less able
    than newer recognisers. A yardstick for small English models.

    Raises:
        ValueError: The package is missing.
    """

    def __init__(self):
        try:
            from pocketsphinx import Decoder
        except ImportError as error:
            raise ValueError(f"pocketsphinx is missing ({error}): pip install pocketsphinx") from error
        self.decoder = Decoder(samprate=RATE, loglevel="FATAL")

    def __call__(self, waveform: np.ndarray) -> str:
        # It adapts to what it hears: each recording starts from the same state.
        self.decoder.reinit_feat()
        self.decoder.start_utt()
        samples = (waveform.clip(-1, 1) * 32767).astype(np.int16)
        self.decoder.process_raw(samples.tobytes(), full_utt=True)
        self.decoder.end_utt()
        found = self.decoder.hyp()
        return found.hypstr if found else ""


class PipelineRecogniser:
    """
    A pipeline "automatic-speech-recognition" of transformers: Whisper, wav2vec 2.0 and others.

    Args:
        source (`str`): Directory or Hub id.
        device (`str`, defaults to `"cpu"`): Where it runs.
    """

    WINDOW = 30.0  # seconds: what Whisper takes at once

    def __init__(self, source: str, device: str = "cpu"):
        from transformers import pipeline

        self.pipeline: Any = pipeline("automatic-speech-recognition", model=source, device=device)

    def __call__(self, waveform: np.ndarray) -> str:
        settings = {"chunk_length_s": self.WINDOW} if len(waveform) > self.WINDOW * RATE else {}
        return self.pipeline({"raw": waveform, "sampling_rate": RATE}, **settings)["text"]


def load_recogniser(name: str, device: str = "cpu") -> Recogniser:
    """`"pocketsphinx"`, or the directory or Hub id of a transformers pipeline."""
    return PocketSphinx() if name == "pocketsphinx" else PipelineRecogniser(name, device)


def transcribe(path: Path, recogniser: Recogniser) -> str:
    """What a recogniser hears in a file; nothing where it is shorter than 25 ms."""
    waveform = load_audio(path, None, RATE)
    return recogniser(waveform).strip() if len(waveform) >= RATE // 40 else ""


def transcribe_all(files: Mapping[str, Path], recogniser: Recogniser, journal: Journal) -> dict[str, str]:
    """
    Transcribes files, those left that an interrupted run had not come to.

    Args:
        files (mapping): Paths by id.
        recogniser ([`Recogniser`]): Who listens.
        journal ([`Journal`]): Gets a `transcript` for each id.

    Returns:
        `dict[str, str]`: Transcripts by id.
    """
    for name, path in files.items():
        if name not in journal:
            journal.add({"id": name, "transcript": transcribe(path, recogniser)})
    return {name: journal.rows[name]["transcript"] for name in files}


def likeness(
    files: Mapping[str, Path], encoder: SpeakerEncoder, references: Mapping[str, np.ndarray], journal: Journal
) -> dict[str, dict[str, float]]:
    """
    How much recordings sound like each voice.

    Args:
        files (mapping): Paths by id.
        encoder ([`SpeakerEncoder`]): CAM++.
        references (mapping): Each voice's embedding, `(embedding_size,)`.
        journal ([`Journal`]): Gets the `cosines` for each id, none where a recording is too short for an embedding.

    Returns:
        `dict[str, dict[str, float]]`: Cosine to each voice's reference, by id; without those too short.
    """
    for name, path in files.items():
        if name not in journal:
            rate = encoder.extractor.sampling_rate
            embedding = encoder(load_audio(path, None, rate), rate)
            cosines = {} if embedding is None else cosines_to(embedding, references)
            journal.add({"id": name, "cosines": cosines})
    return {name: journal.rows[name]["cosines"] for name in files if journal.rows[name]["cosines"]}


def cosines_to(embedding: np.ndarray, references: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Cosines of an embedding to each of several."""
    norm = np.linalg.norm(embedding)
    return {
        name: round(float(embedding @ other / (norm * np.linalg.norm(other))), 5)
        for name, other in sorted(references.items())
    }


def sound_files(folder: Path) -> Iterable[Path]:
    """The sound files of a folder, in order."""
    return sorted(path for path in folder.iterdir() if path.suffix in (".wav", ".flac", ".ogg", ".mp3"))


__all__ = [
    "PipelineRecogniser",
    "PocketSphinx",
    "Recogniser",
    "cosines_to",
    "likeness",
    "load_recogniser",
    "sound_files",
    "transcribe",
    "transcribe_all",
]
