"""Draws the scenes of the nano corpus.

    python training_scripts/nano/draw_pictures.py WORK            (about a minute)
    python training_scripts/nano/draw_pictures.py WORK --quick

A scene only says what is where. Sizes, exact places, rotations, shades and the background differ from picture to
picture, so each scene is drawn several times. WORK/pictures gets PNG files of 128 × 128 pixels, and pictures.jsonl
with the `scene`, `split` ("eval" for scenes that no training conversation has), `seed` and `path` of each.
"""

import json
import math
import sys
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from corpus_words import SHAPES
from PIL import Image, ImageDraw
from stages import new_plot, read_lines, run_stage, save_plot, stage_arguments, write_lines

from minimind_o_hf.files import new_file

VERSION = 1
SIZE = 128  # pixels of a side
OVERSAMPLING = 2  # smooth edges

COLOURS = {
    "red": (215, 30, 35),
    "green": (30, 150, 50),
    "blue": (35, 70, 215),
    "yellow": (245, 225, 40),
    "black": (18, 18, 18),
    "white": (244, 244, 244),
    "orange": (248, 130, 20),
    "purple": (135, 45, 170),
}
SHADE = 12  # most that a colour's channels differ from these
BACKGROUND = (115, 185)  # greys: neither black nor white
CENTRES = {
    "left": (0.25, 0.5),
    "right": (0.75, 0.5),
    "top": (0.5, 0.25),
    "bottom": (0.5, 0.75),
    "middle": (0.5, 0.5),
}
JITTER = 0.04  # of the side, both ways


def outline(shape: str) -> np.ndarray:
    """The corners of a shape of about unit radius, `(num_corners, 2)`, y downwards."""
    if shape == "square":
        return 0.85 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    if shape == "triangle":
        return np.array([(0, -1.05), (1.05, 0.8), (-1.05, 0.8)])
    if shape == "star":
        angles = -math.pi / 2 + np.arange(10) * math.pi / 5
        radii = np.where(np.arange(10) % 2, 0.46, 1.15)[:, None]
        return radii * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    angles = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    if shape == "circle":
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if shape == "heart":
        x = 16 * np.sin(angles) ** 3
        y = 13 * np.cos(angles) - 5 * np.cos(2 * angles) - 2 * np.cos(3 * angles) - np.cos(4 * angles)
        return np.stack([x, -y - 2], axis=1) / 15
    raise ValueError(f"There is no shape {shape!r}: choose one of {', '.join(SHAPES)}.")


@dataclass(frozen=True)
class Drawn:
    """
    An object in a picture.

    Args:
        shape (`str`), colour (`str`): Of the scene.
        corners (`np.ndarray` of shape `(num_corners, 2)`): x and y, in parts of the side.
    """

    shape: str
    colour: str
    corners: np.ndarray


def place(scene: Sequence[dict], random: np.random.Generator) -> list[Drawn]:
    """Finds each object of a scene a size, a place and a small rotation; none overlaps another."""
    radius = random.uniform(0.12, 0.16) if scene[0]["where"] else random.uniform(0.095, 0.125)
    centres: list[np.ndarray] = []
    while len(centres) < len(scene):
        where = scene[len(centres)]["where"]
        if where:
            centre = np.array(CENTRES[where]) + random.uniform(-JITTER, JITTER, 2)
        else:
            centre = random.uniform(0.18, 0.82, 2)
        if where or all(np.linalg.norm(centre - other) > 2.6 * radius for other in centres):
            centres.append(centre)
        elif random.random() < 0.02:  # no room left: from the beginning
            centres.clear()
    objects = []
    for thing, centre in zip(scene, centres, strict=True):
        angle = random.uniform(-0.2, 0.2)
        turn = np.array([(math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))])
        size = radius * random.uniform(0.9, 1.1)
        objects.append(Drawn(thing["shape"], thing["colour"], centre + size * outline(thing["shape"]) @ turn))
    return objects


def paint(objects: Sequence[Drawn], random: np.random.Generator, size: int) -> Image.Image:
    """Draws placed objects on a grey background that is a little coloured, uneven and noisy."""
    large = size * OVERSAMPLING
    base = random.uniform(*BACKGROUND) + random.uniform(-10, 10, 3)
    slope = random.uniform(-15, 15, 2)
    ramp = np.linspace(-0.5, 0.5, large)
    shade = slope[0] * ramp[:, None] + slope[1] * ramp[None, :]
    picture = Image.fromarray((base + shade[..., None]).clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for thing in objects:
        colour = np.array(COLOURS[thing.colour]) + random.integers(-SHADE, SHADE + 1, 3)
        corners = [tuple(corner) for corner in (thing.corners * large).tolist()]
        pen.polygon(corners, fill=tuple(colour.clip(0, 255).tolist()))
    picture = picture.reduce(OVERSAMPLING)
    noise = random.normal(0, random.uniform(0, 4), (size, size, 1)).astype(np.float32)
    return Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8))


def draw_scene(scene: Sequence[dict], seed: int, size: int = SIZE) -> Image.Image:
    """
    Draws a scene.

    Args:
        scene (list of `dict`): Of the corpus: objects with `shape`, `colour` and `where`, which is None of several
            equal ones.
        seed (`int`): Of everything that the scene leaves open.
        size (`int`): Pixels of a side.

    Returns:
        `Image.Image`: RGB.

    Raises:
        ValueError: A shape is unknown.
    """
    random = np.random.default_rng(seed)
    return paint(place(scene, random), random, size)


def plan_pictures(conversations: Sequence[dict], train: int, evaluation: int) -> list[dict]:
    """Which pictures there are to be: so many of each scene of a split."""
    scenes = {json.dumps(row["scene"]): row["split"] for row in conversations if row["scene"]}
    return [
        {"scene": json.loads(scene), "split": split, "seed": zlib.crc32(f"{scene} {number}".encode())}
        for scene, split in sorted(scenes.items())
        for number in range(train if split == "train" else evaluation)
    ]


def show(pictures: Sequence[tuple[str, Image.Image]], path: Path) -> None:
    """Some pictures beside each other, with their titles."""
    figure, axes = new_plot(2, 6, 12, 4.5)
    for axis in axes:
        axis.axis("off")
    for axis, (title, picture) in zip(axes, pictures, strict=False):
        axis.imshow(picture)
        axis.set_title(title, fontsize=8)
    save_plot(figure, path)


def title_of(scene: Sequence[dict]) -> str:
    return "\n".join(
        f"{count} {colour} {shape}, {where or 'anywhere'}"
        for (shape, colour, where), count in Counter((o["shape"], o["colour"], o["where"]) for o in scene).items()
    )


def main(arguments: list[str] | None = None) -> None:
    """Draws all scenes."""
    options = stage_arguments(__doc__).parse_args(arguments)
    settings = {
        "version": VERSION,
        "size": SIZE,
        "train": 1 if options.quick else 8,
        "eval": 1 if options.quick else 4,
    }
    corpus = options.work / "corpus"

    def make(folder: Path) -> dict:
        rows = plan_pictures(read_lines(corpus / "conversations.jsonl"), settings["train"], settings["eval"])
        for row in rows:
            row["path"] = f"{row['split']}/{row['seed']:08x}.png"
            path = folder / row["path"]
            if not path.is_file():
                with new_file(path) as temporary:
                    draw_scene(row["scene"], row["seed"]).save(temporary, format="PNG")
        write_lines(folder / "pictures.jsonl", rows)
        shown = rows[:: max(1, len(rows) // 12)][:12]
        show([(title_of(row["scene"]), Image.open(folder / row["path"])) for row in shown], folder / "figures.png")
        return {
            "pictures": dict(Counter(row["split"] for row in rows)),
            "scenes": len({json.dumps(row["scene"]) for row in rows}),
            "megabytes": round(sum((folder / row["path"]).stat().st_size for row in rows) / 1e6, 1),
        }

    run_stage(options.work / "pictures", [corpus], settings, make)


if __name__ == "__main__":
    sys.exit(main())
