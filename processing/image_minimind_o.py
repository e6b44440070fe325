"""Reads pictures: a file, a URL, encoded bytes or a PIL image become an upright RGB image."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.image_utils import load_image as load_remote_image

from .optional_minimind_o import optional_module

pillow = optional_module("PIL.Image", "pillow")
image_ops = optional_module("PIL.ImageOps", "pillow")

# Any: `PIL.Image.Image`, where pillow is installed.
ImageSource = str | os.PathLike | bytes | np.ndarray | torch.Tensor | Any


def load_image(source: ImageSource) -> Any:
    """Return one picture as the image processor takes it.

    Args:
        source (`str`, `os.PathLike`, `bytes`, `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
            A path, an http(s) or `data:` URL, the bytes of an image file, or a decoded picture: an array has 3
            channels, first or last, and values of 0 to 255.

    Returns:
        `PIL.Image.Image` in RGB with the EXIF orientation applied; arrays and tensors as they are.

    Raises:
        `OSError`: a missing, unreadable, truncated or non-image file.
        `ValueError`: an array of another shape or with NaN or infinite values, or another type.
    """
    if isinstance(source, (np.ndarray, torch.Tensor)):
        if source.ndim != 3 or 3 not in (source.shape[0], source.shape[-1]) or 0 in source.shape:
            raise ValueError(f"a picture passed as an array must have 3 channels, got shape {tuple(source.shape)}")
        finite = torch.isfinite(source) if isinstance(source, torch.Tensor) else np.isfinite(source)
        if not finite.all():
            raise ValueError("a picture passed as an array has NaN or infinite values")
        return source
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)[:200]
    elif isinstance(source, (bytes, bytearray, memoryview)):
        name = f"the {len(source)} bytes passed as a picture"
    elif isinstance(source, pillow.Image):
        name = "the PIL image"
    else:
        raise ValueError(f"cannot read a picture from a {type(source).__name__}")
    try:
        if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
            return load_remote_image(source)
        if isinstance(source, pillow.Image):
            image = source
        else:
            data = Path(source).read_bytes() if isinstance(source, (str, os.PathLike)) else bytes(source)
            image = pillow.open(io.BytesIO(data))
        image = image_ops.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey, which `convert` would clip to white
            image = image.point(lambda value: value / 256).convert("L")
        return image.convert("RGB")
    except (FileNotFoundError, ImportError):
        raise
    except Exception as error:  # a broken file raises SyntaxError, ValueError, struct.error, ... by its format
        raise OSError(f"{name} is no readable picture: {error}") from error


def split_images(images) -> tuple[list[ImageSource], list[int] | None]:
    """Flatten one picture, a list of them, or a list with a list (or None) for each row.

    Returns:
        `tuple(list, list[int] or None)`: the pictures in reading order; for nested input the number in each row.
    """
    if images is None:
        return [], None
    if not isinstance(images, (list, tuple)):
        return [images], None
    if not any(item is None or isinstance(item, (list, tuple)) for item in images):
        return list(images), None
    rows = [list(item or []) if item is None or isinstance(item, (list, tuple)) else [item] for item in images]
    return [image for row in rows for image in row], [len(row) for row in rows]


__all__ = ["ImageSource", "load_image", "split_images"]
