"""Writes the sources of the CPU-sized recipe: questions, written and spoken, with their answers, and drawn pictures.

    python training_scripts/cpu/make_cpu_data.py DIR [--tts "espeak-ng -w {out} -- {text}"]

A small closed world, in which a toy model can learn to answer: the colours of some things, each asked for in some
ways, and coloured shapes on a grey ground. What is held out is new as a whole but made of known parts: each thing in
one wording in which only other things are asked for, and shapes in sizes and places that were not drawn before. DIR
gets, for `minimind-o data build` (with `--tts`, which speaks the answers),

    t2a_train.txt, t2a_eval.txt        question TAB answer; to be built with `--text-questions`
    a2a_train.jsonl, a2a_eval.jsonl    `messages` and `audios`: the same questions, as recordings and not as text
    i2t_train.jsonl, i2t_eval.jsonl    `messages` and `images`
    recordings/, pictures/             what these name

The same seed draws the same pictures.
"""

import argparse
import itertools
import json
import random
import shlex
import shutil
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from minimind_o_hf.data.building import speak
from minimind_o_hf.files import new_directory

TTS = "espeak-ng -w {out} -- {text}"

THINGS = {
    "the sky": "blue",
    "the sea": "blue",
    "grass": "green",
    "a frog": "green",
    "snow": "white",
    "milk": "white",
    "coal": "black",
    "the night": "black",
    "a lemon": "yellow",
    "the sun": "yellow",
    "a tomato": "red",
    "blood": "red",
    "a carrot": "orange",
    "a pumpkin": "orange",
    "wood": "brown",
    "an elephant": "grey",
}
WORDINGS = (
    "What colour is {thing}?",
    "Tell me the colour of {thing}.",
    "Do you know which colour {thing} has?",
    "Look at {thing}. Which colour do you see?",
    "Please name the colour of {thing}.",
)

PICTURE_SIZE = 128  # pixels
GROUND = (128, 128, 128)
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 220, 40),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
}
SHAPES = ("circle", "square", "triangle")
PICTURE_QUESTIONS = ("What is this?", "What do you see?", "What is in the picture?")
PICTURES = 6  # of each shape in each colour, and one more that is held out


def make_questions() -> dict[str, list[tuple[str, str]]]:
    """Questions and answers: `train`, and `eval` with one wording of each thing."""
    questions: dict[str, list[tuple[str, str]]] = {"train": [], "eval": []}
    for number, (thing, colour) in enumerate(THINGS.items()):
        answer = f"{thing[0].upper()}{thing[1:]} is {colour}."
        for index, wording in enumerate(WORDINGS):
            split = "eval" if index == number % len(WORDINGS) else "train"
            questions[split].append((wording.format(thing=thing), answer))
    return questions


def write_questions(folder: Path, tts: str) -> None:
    """Writes the questions as text, and speaks them."""
    (folder / "recordings").mkdir()
    for split, questions in make_questions().items():
        write_lines(folder / f"t2a_{split}.txt", [f"{question}\t{answer}" for question, answer in questions])
        rows = []
        for number, (question, answer) in enumerate(questions):
            name = f"recordings/{split}_{number}.wav"
            (folder / name).write_bytes(speak(tts, question))
            # No text beside the recording: the model has to listen.
            messages = [{"role": "user", "content": "<audio>"}, {"role": "assistant", "content": answer}]
            rows.append(json.dumps({"messages": messages, "audios": [name]}))
        write_lines(folder / f"a2a_{split}.jsonl", rows)


def draw(shape: str, colour: str, generator: random.Random) -> Image.Image:
    """
    Draws one shape somewhere.

    Args:
        shape (`str`): One of `SHAPES`; the triangle points up.
        colour (`str`): One of `COLOURS`.
        generator (`random.Random`): Its size and place come from it.
    """
    picture = Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), GROUND)
    radius = generator.randint(PICTURE_SIZE // 4, PICTURE_SIZE * 3 // 8)
    x, y = (generator.randint(radius, PICTURE_SIZE - 1 - radius) for _ in range(2))
    box = (x - radius, y - radius, x + radius, y + radius)
    pen = ImageDraw.Draw(picture)
    if shape == "circle":
        pen.ellipse(box, fill=COLOURS[colour])
    elif shape == "square":
        pen.rectangle(box, fill=COLOURS[colour])
    else:
        pen.polygon([(x, box[1]), (box[0], box[3]), (box[2], box[3])], fill=COLOURS[colour])
    return picture


def write_pictures(folder: Path, generator: random.Random) -> None:
    """Draws the pictures, and writes what is asked about them."""
    (folder / "pictures").mkdir()
    rows: dict[str, list[str]] = {"train": [], "eval": []}
    for shape, colour, number in itertools.product(SHAPES, COLOURS, range(PICTURES + 1)):
        split = "train" if number < PICTURES else "eval"
        name = f"pictures/{split}_{colour}_{shape}_{number}.png"
        draw(shape, colour, generator).save(folder / name)
        messages = [
            {"role": "user", "content": f"<image>{generator.choice(PICTURE_QUESTIONS)}"},
            {"role": "assistant", "content": f"A {colour} {shape}."},
        ]
        rows[split].append(json.dumps({"messages": messages, "images": [name]}))
    for split, lines in rows.items():
        write_lines(folder / f"i2t_{split}.jsonl", lines)


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Writes everything, or nothing."""
    parser = argparse.ArgumentParser(description="Write the sources of the CPU-sized recipe.")
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--tts", default=TTS, metavar="CMD", help="speaks {text} into {out} (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures (default: %(default)s)")
    options = parser.parse_args(arguments)
    program = shlex.split(options.tts)[0]
    if not shutil.which(program):
        sys.exit(
            f"There is no program {program!r} to speak with: install it (Debian, Ubuntu: apt install espeak-ng; "
            'macOS: brew install espeak-ng), or set TTS to another command, such as TTS="my-tts {text} {out}".'
        )
    try:
        with new_directory(options.directory) as folder:
            write_questions(folder, options.tts)
            write_pictures(folder, random.Random(options.seed))
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
