"""Voices: what one is, how it is checked, and its file."""

import contextlib
import hashlib
import os
import secrets
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

VOICES_NAME = "voices.safetensors"
PARTS = ("ref_codes", "spk_emb")
NOTES = ("name", "codec")

Voice = Mapping[str, torch.Tensor | np.ndarray | str | None]

_ids: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def weights_id(model: PreTrainedModel) -> str:
    """
    What a frozen model, a codec or a speaker encoder, is known by: `"mimi:6f1c0e9b2a7d4835"`.

    It is its `model_type` and a hash of the signs of its weights, which loading in another dtype leaves as they are.
    It is taken once for each model, so weights must not change afterwards.
    """
    if model not in _ids:
        digest = hashlib.sha256()
        for name, tensor in sorted(model.state_dict().items()):
            if tensor.is_floating_point():
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(np.packbits(tensor.detach().signbit().cpu().numpy()).tobytes())
        _ids[model] = f"{model.config.model_type}:{digest.hexdigest()[:16]}"
    return _ids[model]


def check_voice(
    voice: Voice,
    num_codebooks: int = 8,
    codebook_size: int = 2048,
    embedding_size: int = 192,
    name: str = "the voice",
    codec: PreTrainedModel | None = None,
) -> dict[str, torch.Tensor]:
    """Return a voice's parts as tensors on the CPU, the missing ones left out.

    Args:
        voice (`dict`):
            `ref_codes`, integers of shape `(num_codebooks, num_frames)` in `[0, codebook_size)` at 12.5 frames/s, and
            `spk_emb`, floats of shape `(embedding_size,)`. Either may be missing or None. It may say its `name`, and
            its `codec`: the `weights_id` of what made the codes. Ids without a colon are notes for people.
        num_codebooks, codebook_size, embedding_size (`int`):
            What the model expects.
        name (`str`):
            How messages call a voice that does not say its name.
        codec ([`MimiModel`], *optional*):
            The model's codec. Codes that another one made are refused.

    Returns:
        `dict` with `ref_codes` (`torch.LongTensor`) and `spk_emb` (`torch.FloatTensor`), where the voice has them.

    Raises:
        `ValueError`: anything else.
    """
    if not isinstance(voice, Mapping) or not set(voice) <= {*PARTS, *NOTES}:
        found = sorted(map(str, voice)) if isinstance(voice, Mapping) else type(voice).__name__
        raise ValueError(f"{name} must be a name or a mapping with `ref_codes` and `spk_emb`, got {found}")
    if voice.get("name"):
        name = f"voice {voice['name']!r}"
    try:
        parts = {key: torch.as_tensor(voice[key]).detach().cpu() for key in PARTS if voice.get(key) is not None}
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must hold arrays: {error}") from error
    if not parts:
        raise ValueError(f"{name} has neither `ref_codes` nor `spk_emb`")
    if (codes := parts.get("ref_codes")) is not None:
        _check_codes(codes, name, num_codebooks, codebook_size, str(voice.get("codec") or ""), codec)
        parts["ref_codes"] = codes.long()
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


def _check_codes(
    codes: torch.Tensor,
    name: str,
    num_codebooks: int,
    codebook_size: int,
    made_with: str,
    codec: PreTrainedModel | None,
) -> None:
    if ":" in made_with and codec is not None and made_with != weights_id(codec):
        raise ValueError(
            f"{name} was made with the codec {made_with}, and this model's is {weights_id(codec)}: make the voice "
            "again with this one, or pass its `spk_emb` alone"
        )
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise ValueError(f"`ref_codes` of {name} must be integers, got {codes.dtype}")
    if codes.ndim != 2 or codes.shape[0] != num_codebooks or codes.shape[1] == 0:
        problem = f"be ({num_codebooks}, frames), got {tuple(codes.shape)}"
    elif codes.min() < 0 or codes.max() >= codebook_size:
        problem = f"lie in [0, {codebook_size}), got {codes.min()} to {codes.max()}"
    else:
        return
    codecs = "" if codec is None else f" (its codec: {made_with or 'unknown'}; this model's: {weights_id(codec)})"
    raise ValueError(f"`ref_codes` of {name} must {problem}{codecs}")


def check_voice_name(name: str) -> str:
    """Return `name`, or raise a `ValueError` where it cannot be part of a tensor's or a file's name."""
    if not isinstance(name, str) or not name.strip() or not name.isprintable() or set(name) & set("./\\"):
        raise ValueError(f"a voice's name must be printable, not empty, and without '.', '/' and '\\', got {name!r}")
    return name


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a temporary sibling to write, which replaces `path` when the block ends without an exception."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def voice_tensors(voices: Mapping[str, Mapping]) -> dict[str, torch.Tensor]:
    """The tensors of a file of voices: `NAME.ref_codes` and `NAME.spk_emb`."""
    return {
        f"{check_voice_name(name)}.{key}": parts[key].contiguous()
        for name, parts in voices.items()
        for key in PARTS
        if parts.get(key) is not None
    }


def save_voices(voices: Mapping[str, Mapping], path: str | os.PathLike) -> None:
    """Write voices to a safetensors file with tensors `NAME.ref_codes` and `NAME.spk_emb`, all or nothing."""
    path = Path(path)
    with written_whole(path) as partial:
        save_file(voice_tensors(voices), partial, metadata={"format": "pt"})


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


__all__ = [
    "PARTS",
    "VOICES_NAME",
    "Voice",
    "check_voice",
    "check_voice_name",
    "load_voices",
    "save_voices",
    "voice_tensors",
    "weights_id",
    "written_whole",
]
