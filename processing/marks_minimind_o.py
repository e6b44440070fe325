"""The mark of generated sound: fields in a file's own metadata that say so to people and to programs."""

import datetime
import json
import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .optional_minimind_o import optional_module

soundfile = optional_module("soundfile", "soundfile")

TITLE = "AI-generated speech"
PACKAGE = "minimind_o_hf"
MAX_NAME = 100  # characters


def make_mark(model: str | None = None, voice: str | None = None) -> dict[str, Any]:
    """
    What is said of generated sound.

    Args:
        model (`str`, *optional*): Name of the model that spoke; 100 characters of it.
        voice (`str`, *optional*): Name of the voice it spoke with, likewise.

    Returns:
        `dict` with `ai_generated` (True), `model`, `voice`, `date` (UTC, ISO 8601) and `software`.
    """
    try:
        software = f"{PACKAGE} {version(PACKAGE)}"
    except PackageNotFoundError:  # a published checkpoint carries this file where the package is not installed
        software = PACKAGE
    # A WAV drops fields that are longer than it has room for.
    model, voice = (name and name[:MAX_NAME] for name in (model, voice))
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"ai_generated": True, "model": model, "voice": voice, "date": now, "software": software}


def write_mark(file: Any, mark: dict[str, Any]) -> None:
    """Puts a mark into a `soundfile.SoundFile` that is open for writing, before any sound: INFO fields of a WAV,
    comments of FLAC and OGG."""
    file.title = TITLE
    file.software = mark["software"]
    file.date = mark["date"]
    if mark["model"]:
        file.artist = mark["model"]
    # All of it once more, for programs.
    file.comment = json.dumps(mark)


def read_mark(path: str | os.PathLike) -> dict[str, Any] | None:
    """
    The mark of a file, or None where it has none.

    Raises:
        `OSError`: it is no sound file, or cannot be read.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with soundfile.SoundFile(path) as file:
            comment = file.comment
    except soundfile.SoundFileError as error:
        raise OSError(f"{path} is no readable sound file: {error}") from error
    try:
        mark = json.loads(comment)
    except (ValueError, RecursionError):  # somebody else's comment
        return None
    return mark if isinstance(mark, dict) and mark.get("ai_generated") is True else None


__all__ = ["make_mark", "read_mark", "write_mark"]
