"""The checkpoint that the package carries, and what a checkpoint's folder holds beside its model."""

import json
import sys
from pathlib import Path

SPEAKER_ENCODER = "speaker_encoder"
HELD_OUT_VOICES = "held_out_voices.safetensors"


def default_checkpoint() -> Path:
    """
    The checkpoint that is used where none is named: the trained `nano` that the package carries.

    It is a closed-domain toy (its README.md says what it knows), with codec, voices and, in `speaker_encoder/`, the
    CAM++ that made their embeddings. `training_scripts/nano` made it.

    Returns:
        `Path`: its directory, to be read only.
    """
    return Path(__file__).parent / "nano"


def introduce_nano() -> str:
    """What the package's nano is, with figures of its evaluation (`provenance.json`) once it has been evaluated."""
    about = "nano, a toy that knows small talk, sums to twenty and a few facts."
    origin = json.loads((default_checkpoint() / "provenance.json").read_text(encoding="utf-8"))
    figures = origin.get("evaluation")
    if not figures:
        return about
    percent = {name: f"{100 * value:.0f} %" for name, value in figures.items() if isinstance(value, float)}
    right = ", ".join(f"{percent[f'accuracy, {kind}']} of {kind}" for kind in ("typed", "spoken", "picture"))
    return (
        f"{about} In its evaluation it answered {right} questions right, and a recogniser misheard "
        f"{percent['CER, all']} of the characters it spoke ({percent['CER of recordings, all']} of recordings)."
    )


def choose_checkpoint(model: str | None, using: str | None = None) -> str:
    """
    What `--model` names; the package's nano where nothing is named, which is then said on stderr.

    Args:
        model (`str`, *optional*): Directory or Hub id.
        using (`str`, *optional*): What of nano is used; what nano is, by default.

    Returns:
        `str`: directory or Hub id.
    """
    if model is not None:
        return model
    sys.stderr.write(f"No --model given: using {using or introduce_nano()}\n")
    return str(default_checkpoint())


def speaker_encoder_of(checkpoint: str | None) -> str | None:
    """
    A checkpoint's own speaker encoder.

    Args:
        checkpoint (`str`, *optional*): Directory or Hub id; the package's nano where omitted.

    Returns:
        `str`: its directory `speaker_encoder`; None where a checkpoint has none, or is a Hub id.
    """
    folder = Path(checkpoint or default_checkpoint()) / SPEAKER_ENCODER
    return str(folder) if folder.is_dir() else None


def held_out_voices_of(checkpoint: str | None) -> Path | None:
    """
    A checkpoint's file of voices that it was not trained with, for evaluation.

    Args:
        checkpoint (`str`, *optional*): Directory or Hub id; the package's nano where omitted.

    Returns:
        `Path`: its `held_out_voices.safetensors`; None where a checkpoint has none, or is a Hub id.
    """
    path = Path(checkpoint or default_checkpoint()) / HELD_OUT_VOICES
    return path if path.is_file() else None


__all__ = [
    "HELD_OUT_VOICES",
    "SPEAKER_ENCODER",
    "choose_checkpoint",
    "default_checkpoint",
    "held_out_voices_of",
    "introduce_nano",
    "speaker_encoder_of",
]
