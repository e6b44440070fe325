"""Trains the nano vision encoder: a small `SiglipVisionModel` that sees what is where in a drawn scene.

    python training_scripts/nano/train_vision_encoder.py WORK            (about 15 minutes on one core)
    python training_scripts/nano/train_vision_encoder.py WORK --quick
    python training_scripts/nano/train_vision_encoder.py WORK --steps 6000 --start COPY.pt

The last line goes on from a copy of WORK/vision_encoder/training.pt.

Two sorts of heads, thrown away afterwards, tell it what its 36 tokens should know: a linear one asks every token which
shape and colour lies on its part of the picture; the other asks all tokens together, by attention, as the language
model will, how many objects there are, of which shapes and colours, and what lies at each of the five places.

Pictures are drawn as training goes, of all scenes that the corpus could have but those it holds out.
WORK/vision_encoder/model is what `SiglipVisionModel.from_pretrained` loads, in float16, with its image processor.
"""

import hashlib
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import make_corpus
import numpy as np
import torch
from corpus_words import POSITIONS, SHAPES
from draw_pictures import COLOURS, draw_scene, paint, place
from minimind_o_hf.processing.processing_minimind_o import IMAGE_PROCESSOR_DEFAULTS
from PIL import Image, ImageDraw
from stages import new_plot, run_stage, save_plot
from torch import nn
from torch.nn import functional
from training import encoder_arguments, load_start, steps_and_start, train
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from minimind_o_hf.files import new_directory

VERSION = 1
BATCH = 48
SIDE = 96
PATCH = 16
COVERED = 0.2  # a token answers for an object that covers this part of its patch
MOST = 5  # objects
SHAPE_IDS = {shape: index + 1 for index, shape in enumerate(SHAPES)}  # 0: nothing
COLOUR_IDS = {colour: index + 1 for index, colour in enumerate(COLOURS)}
PLACES = tuple(POSITIONS)
PATCH_SIZES = [len(SHAPES) + 1, len(COLOURS) + 1]


def vision_config() -> SiglipVisionConfig:
    """36 tokens of width 128: 0.76 M parameters."""
    return SiglipVisionConfig(
        image_size=SIDE,
        patch_size=PATCH,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        vision_use_head=False,
    )


def image_processor() -> SiglipImageProcessorPil:
    """The package's, for the smaller pictures of this encoder."""
    return SiglipImageProcessorPil(**{**IMAGE_PROCESSOR_DEFAULTS, "size": {"height": SIDE, "width": SIDE}})


class Heads(nn.Module):
    """
    What the tokens are asked.

    Args:
        width (`int`): Of a token.
    """

    def __init__(self, width: int):
        super().__init__()
        sizes = {"count": MOST, "shapes": len(SHAPES), "colours": len(COLOURS)}
        sizes |= {f"{kind} {where}": size for where in PLACES for kind, size in (("shape", 6), ("colour", 9))}
        self.names = list(sizes)
        self.patch = nn.Linear(width, sum(PATCH_SIZES))
        self.queries = nn.Parameter(torch.randn(len(sizes), width))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.answers = nn.ModuleList([nn.Linear(width, size) for size in sizes.values()])

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """From `(batch_size, 36, width)` the scores of each answer; those of "patch" for each token."""
        queries = self.queries.expand(len(tokens), -1, -1)
        found, _ = self.attention(queries, tokens, tokens, need_weights=False)
        heads = zip(self.names, self.answers, found.unbind(1), strict=True)
        scores = {name: head(answer) for name, head, answer in heads}
        return {"patch": self.patch(tokens), **scores}


def all_scenes(seed: int) -> dict[str, list[list[dict]]]:
    """Every scene that the corpus could have; held out are those that it holds out for this seed."""
    every = {item.scene for item in make_corpus.pictures(random.Random(seed), sys.maxsize) if item.scene}
    scenes: dict[str, list[list[dict]]] = {"train": [], "eval": []}
    for scene in sorted(every):
        held = make_corpus.draw(seed, scene) < make_corpus.HELD_OUT
        scenes["eval" if held else "train"].append(json.loads(scene))
    return scenes


def scene_labels(scene: Sequence[dict]) -> dict[str, Any]:
    """What the heads are to answer; -100 where the scene does not say."""
    labels: dict[str, Any] = {"count": len(scene) - 1}
    labels["shapes"] = [float(shape in {thing["shape"] for thing in scene}) for shape in SHAPES]
    labels["colours"] = [float(colour in {thing["colour"] for thing in scene}) for colour in COLOURS]
    there = {thing["where"]: thing for thing in scene}
    for where in PLACES:
        known, thing = None not in there, there.get(where)
        labels[f"shape {where}"] = SHAPE_IDS[thing["shape"]] if thing else 0 if known else -100
        labels[f"colour {where}"] = COLOUR_IDS[thing["colour"]] if thing else 0 if known else -100
    return labels


def draw_labelled(scene: Sequence[dict], generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A picture `(96, 96, 3)`, and the shape and colour that lie on each patch, both `(36,)`, 0 for none."""
    objects = place(scene, generator)
    picture = np.asarray(paint(objects, generator, SIDE))
    shapes, colours = np.zeros(36, dtype=np.int64), np.zeros(36, dtype=np.int64)
    for thing in objects:
        mask = Image.new("1", (SIDE, SIDE))
        ImageDraw.Draw(mask).polygon([tuple(corner) for corner in (thing.corners * SIDE).tolist()], fill=1)
        parts = np.asarray(mask).reshape(SIDE // PATCH, PATCH, SIDE // PATCH, PATCH).mean((1, 3)).reshape(-1)
        shapes[parts > COVERED] = SHAPE_IDS[thing.shape]
        colours[parts > COVERED] = COLOUR_IDS[thing.colour]
    return picture, shapes, colours


def draw_batch(scenes: Sequence[list[dict]], generator: np.random.Generator) -> tuple[torch.Tensor, dict]:
    """Pictures as the image processor gives them, `(batch_size, 3, 96, 96)`, and their labels."""
    pictures, shapes, colours = zip(*(draw_labelled(scene, generator) for scene in scenes), strict=True)
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    rows = [scene_labels(scene) for scene in scenes]
    labels = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    labels["patch"] = torch.from_numpy(np.stack([np.stack(shapes), np.stack(colours)]))
    return pixels, labels


def balanced(scenes: Sequence[list[dict]], count: int, generator: np.random.Generator) -> list[list[dict]]:
    """So many scenes, of one object, of two different ones and of several equal ones alike."""
    kinds = [
        [scene for scene in scenes if (len(scene), scene[0]["where"] is None) == kind]
        for kind in ((1, False), (2, False))
    ]
    kinds.append([scene for scene in scenes if scene[0]["where"] is None])
    return [kind[generator.integers(len(kind))] for kind in (kinds[number % 3] for number in range(count))]


def loss_of(scores: dict[str, torch.Tensor], labels: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean over what is asked; tokens' shapes count more, as they are learnt last and the rest follows from them."""
    losses = []
    for part, own in zip(scores["patch"].split(PATCH_SIZES, dim=-1), labels["patch"], strict=True):
        rare = torch.ones(part.shape[-1])
        rare[0] = 0.1  # most tokens see nothing but background
        losses.append(functional.cross_entropy(part.transpose(1, 2), own, weight=rare))
    losses[0] = 4 * losses[0]
    for name, values in scores.items():
        if name in ("shapes", "colours"):
            losses.append(4 * functional.binary_cross_entropy_with_logits(values, labels[name]))
        elif name != "patch":
            losses.append(functional.cross_entropy(values, labels[name]))
    return torch.stack(losses).mean()


def count_right(scores: dict[str, torch.Tensor], labels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Which pictures are answered rightly, by attribute: 1, 0, or NaN where the scene does not say."""
    right = {"count": (scores["count"].argmax(-1) == labels["count"]).float()}
    for name in ("shapes", "colours"):
        right[name] = ((scores[name] > 0) == labels[name].bool()).all(-1).float()
    whole = torch.stack([scores[name].argmax(-1) == labels[name] for name in scores if name.split()[-1] in PLACES])
    said = labels[f"shape {PLACES[0]}"] >= 0
    right["places"] = torch.where(said, whole.all(0).float(), torch.nan)
    shapes, colours = scores["patch"].split(PATCH_SIZES, dim=-1)
    both = (shapes.argmax(-1) == labels["patch"][0]) & (colours.argmax(-1) == labels["patch"][1])
    right["tokens"] = both.float().mean(-1)
    return right


class VisionTraining:
    """
    The encoder, its heads and what they see.

    Args:
        folder (`Path`): The stage's.
        scenes (`dict`): See `all_scenes`.
        settings (`dict`): See `main`.
    """

    def __init__(self, folder: Path, scenes: dict[str, list[list[dict]]], settings: dict):
        self.folder, self.scenes, self.settings = folder, scenes, settings
        torch.manual_seed(settings["seed"])
        self.encoder: Any = SiglipVisionModel(vision_config())
        self.heads = Heads(self.encoder.config.hidden_size)
        self.network = nn.ModuleDict({"encoder": self.encoder, "heads": self.heads})
        generator = np.random.default_rng([settings["seed"], 1])
        self.held_out = draw_batch(balanced(self.scenes["eval"], settings["held out"], generator), generator)

    def scores(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.heads(self.encoder(pixels).last_hidden_state)

    def loss_at(self, step: int) -> torch.Tensor:
        generator = np.random.default_rng([self.settings["seed"], 2, step])
        pixels, labels = draw_batch(balanced(self.scenes["train"], BATCH, generator), generator)
        return loss_of(self.scores(pixels), labels)

    @torch.no_grad()
    def check(self) -> float:
        pixels, labels = self.held_out
        return loss_of(self.scores(pixels), labels).item()

    def train(self) -> list[dict]:
        steps, rate = self.settings["steps"], self.settings["rate"]
        return train("training", self.folder, self.network, self.loss_at, self.check, steps, rate)

    def save(self) -> None:
        with new_directory(self.folder / "model", overwrite=True) as temporary:
            saved = SiglipVisionModel(self.encoder.config)
            saved.load_state_dict(self.encoder.state_dict())
            saved.half().save_pretrained(temporary)
            image_processor().save_pretrained(temporary)

    @torch.no_grad()
    def judge(self) -> dict:
        """Accuracy on held-out scenes, each drawn several times at full size and read as the model will read it."""
        encoder: Any = SiglipVisionModel.from_pretrained(self.folder / "model", dtype=torch.float32)
        processor = image_processor()
        right: dict[str, list[torch.Tensor]] = {}
        for scene in self.scenes["eval"]:
            seeds = range(self.settings["drawings"])
            pixels = processor([draw_scene(scene, seed) for seed in seeds], return_tensors="pt")["pixel_values"]
            labels = {name: torch.tensor([value] * len(seeds)) for name, value in scene_labels(scene).items()}
            labels["patch"] = torch.zeros(2, len(seeds), 36)
            for name, values in count_right(self.heads(encoder(pixels).last_hidden_state), labels).items():
                right.setdefault(name, []).append(values)
        del right["tokens"]  # where exactly things lie is not known here
        return {name: round(torch.cat(values).nanmean().item(), 4) for name, values in right.items()}


def plot(history: Sequence[dict], accuracy: dict[str, float], path: Path) -> None:
    figure, (losses, bars) = new_plot(1, 2)
    losses.plot([row["step"] for row in history], [row["train"] for row in history], label="training")
    losses.plot([row["step"] for row in history], [row["held out"] for row in history], label="held-out scenes")
    losses.set(xlabel="step", ylabel="loss", yscale="log")
    losses.legend()
    bars.bar(list(accuracy), list(accuracy.values()))
    bars.set(ylim=(0, 1), ylabel="accuracy, held-out scenes")
    save_plot(figure, path)


def main(arguments: list[str] | None = None) -> None:
    """Trains the encoder and has it judged."""
    parser = encoder_arguments(__doc__, 4000, 4)
    parser.add_argument("--corpus-seed", type=int, default=0, help="it decides what is held out; default: %(default)s")
    options = parser.parse_args(arguments)
    scenes = all_scenes(options.corpus_seed)
    settings = {
        "version": VERSION,
        "seed": 0,
        "scenes": hashlib.sha256(json.dumps(scenes).encode()).hexdigest(),
        **steps_and_start(options),
        "rate": 1e-3,
        "held out": 24 if options.quick else 240,
        "drawings": 1 if options.quick else 8,
    }

    def make(folder: Path) -> dict:
        training = VisionTraining(folder, scenes, settings)
        load_start(training.network, options.start)
        history = training.train()
        training.save()
        accuracy = training.judge()
        plot(history, accuracy, folder / "figures.png")
        return {
            "parameters": sum(parameter.numel() for parameter in training.encoder.parameters()),
            "tokens": (SIDE // PATCH) ** 2,
            "scenes": {split: len(scenes) for split, scenes in training.scenes.items()},
            "training": history[-1],
            "accuracy": accuracy,
        }

    run_stage(options.work / "vision_encoder", [], settings, make)


if __name__ == "__main__":
    sys.exit(main())
