"""Voices: what one is, how it is checked, and its file."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

VOICES_NAME = "voices.safetensors"
PARTS = ("ref_codes", "spk_emb")

Voice = Mapping[str, torch.Tensor | np.ndarray | None]


def check_voice(
    voice: Voice, num_codebooks: int = 8, codebook_size: int = 2048, embedding_size: int = 192, name: str = "the voice"
) -> dict[str, torch.Tensor]:
    """Return a voice's parts as tensors on the CPU, the missing ones left out.

    Args:
        voice (`dict`):
            `ref_codes`, integers of shape `(num_codebooks, num_frames)` in `[0, codebook_size)` at 12.5 frames/s, and
            `spk_emb`, floats of shape `(embedding_size,)`. Either may be missing or None.
        num_codebooks, codebook_size, embedding_size (`int`):
            What the model expects.
        name (`str`):
            How messages call the voice.

    Returns:
        `dict` with `ref_codes` (`torch.LongTensor`) and `spk_emb` (`torch.FloatTensor`), where the voice has them.

    Raises:
        `ValueError`: anything else.
    """
    if not isinstance(voice, Mapping) or not set(voice) <= set(PARTS):
        found = sorted(map(str, voice)) if isinstance(voice, Mapping) else type(voice).__name__
        raise ValueError(f"{name} must be a name or a mapping with `ref_codes` and `spk_emb`, got {found}")
    try:
        parts = {key: torch.as_tensor(voice[key]).detach().cpu() for key in PARTS if voice.get(key) is not None}
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must hold arrays: {error}") from error
    if not parts:
        raise ValueError(f"{name} has neither `ref_codes` nor `spk_emb`")
    if (codes := parts.get("ref_codes")) is not None:
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise ValueError(f"`ref_codes` of {name} must be integers, got {codes.dtype}")
        if codes.ndim != 2 or codes.shape[0] != num_codebooks or codes.shape[1] == 0:
            raise ValueError(f"`ref_codes` of {name} must be ({num_codebooks}, frames), got {tuple(codes.shape)}")
        codes = codes.long()
        if codes.min() < 0 or codes.max() >= codebook_size:
            raise ValueError(
                f"`ref_codes` of {name} must lie in [0, {codebook_size}), got {codes.min()} to {codes.max()}"
            )
        parts["ref_codes"] = codes
    if (embedding := parts.get("spk_emb")) is not None:
        if not embedding.is_floating_point() or embedding.shape != (embedding_size,):
            raise ValueError(
                f"`spk_emb` of {name} must be {embedding_size} floats, got {embedding.dtype} of shape "
                f"{tuple(embedding.shape)}"
            )
        if not embedding.isfinite().all() or not embedding.any():
            raise ValueError(f"`spk_emb` of {name} must be finite and not all zero")
        parts["spk_emb"] = embedding.float()
    return parts


def check_voice_name(name: str) -> str:
    """Return `name`, or raise a `ValueError` where it cannot be part of a tensor's or a file's name."""
    if not isinstance(name, str) or not name.strip() or set(name) & set("./\\"):
        raise ValueError(
            f"a voice's name must be a string that is not empty and has no '.', '/' or '\\', got {name!r}"
        )
    return name


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a temporary sibling to write, which replaces `path` when the block ends without an exception."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_voices(voices: Mapping[str, Mapping[str, torch.Tensor]], path: str | os.PathLike) -> None:
    """Write voices to a safetensors file with tensors `NAME.ref_codes` and `NAME.spk_emb`, all or nothing."""
    path = Path(path)
    tensors = {
        f"{check_voice_name(name)}.{key}": tensor.contiguous()
        for name, parts in voices.items()
        for key, tensor in parts.items()
    }
    with written_whole(path) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})


def load_voices(path: str | os.PathLike) -> dict[str, dict[str, torch.Tensor]]:
    """Read the voices of a file that `save_voices` wrote, unchecked; `OSError` where it is no such file."""
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise OSError(f"{path} is no readable file of voices: {error}") from error
    voices: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        voices.setdefault(name, {})[part] = tensor
    return voices


__all__ = ["VOICES_NAME", "Voice", "check_voice", "check_voice_name", "load_voices", "save_voices", "written_whole"]
