"""Speaks the nano corpus with flite: the answers, and the questions.

    python training_scripts/nano/make_speech.py WORK            (about 35 minutes on two cores)
    python training_scripts/nano/make_speech.py WORK --quick

It needs flite's library and voices (Debian, Ubuntu: apt install flite). Three voices are trained on; the
fourth, kal16, speaks only what is evaluated. WORK/speech gets

    answers.jsonl, questions.jsonl    `text`, `voice`, `split`, `kind`, `seconds` and `path` of each recording
    answers/VOICE/, questions/VOICE/  FLAC, 16 kHz, mono

Answers are spoken with their words on the codec's grid (see `flite.py`), questions as flite speaks: the model has to
understand those as they come. Training answers are spoken in one voice each, then in a second and a third, those of
the closed domain before the sentences to repeat; training questions in one voice each; what is evaluated, in all
four. The default budgets are enough for all; smaller ones leave out the last. Every recording begins with 80 ms of
silence, ends with 80 to 160 ms and lasts a whole number of 80 ms frames: so the same words give nearly the same codes.
"""

import functools
import hashlib
import itertools
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import flite
import numpy as np
import soundfile
from flite import FRAME, RATE
from stages import new_plot, read_lines, run_stage, save_plot, stage_arguments, write_lines

from minimind_o_hf.files import new_file

VERSION = 3
VOICES = ("slt", "rms", "awb")
HELD_OUT_VOICE = "kal16"

LOUDNESS = 0.08  # RMS of what is not silence
SILENCE = 0.01  # of the peak
AT_ONCE = 256
# As many as this stage is given cores (see nano.py).
PROCESSES = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def trim(waveform: np.ndarray) -> np.ndarray:
    """
    Brings a recording into the common form.

    Args:
        waveform (`np.ndarray` of shape `(num_samples,)`): At 16 kHz, with silence around the speech.

    Returns:
        `np.ndarray` of shape `(num_frames * 1280,)`: A frame of silence, the speech at the common loudness, and at
        least a frame of silence.

    Raises:
        ValueError: There is nothing but silence.
    """
    peak = np.abs(waveform).max(initial=0)
    loud = np.flatnonzero(np.abs(waveform) > SILENCE * peak)
    if not len(loud):
        raise ValueError("the recording is silent")
    begin, end = loud[0], loud[-1] + 1
    length = -(-(end - begin) // FRAME) * FRAME + 2 * FRAME
    padded = np.pad(waveform, (FRAME, length))[begin : begin + length]
    # Outside the speech flite's own faint noise fades out, so that every recording begins and ends in the same way.
    fade = np.zeros(length)
    fade[FRAME : FRAME + end - begin] = 1
    ramp = np.linspace(0, 1, FRAME // 4)
    fade[FRAME - len(ramp) : FRAME] = ramp
    fade[FRAME + end - begin :][: len(ramp)] = ramp[::-1]
    gain = LOUDNESS / np.sqrt(np.mean(np.square(waveform[begin:end], dtype=np.float64)))
    return (padded * fade * min(gain, 0.99 / peak)).astype(np.float32)


def name_of(text: str) -> str:
    """A file's name, which only depends on its text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def speak_row(row: dict, folder: Path, on_grid: bool) -> dict:
    """A row with its recording, which is made unless it is there."""
    path = folder / row["voice"] / f"{name_of(row['text'])}.flac"
    if not path.is_file():
        text, voice = row["text"], row["voice"]
        waveform = flite.speak_on_grid(text, voice) if on_grid else trim(flite.speak_text(text, voice))
        with new_file(path) as temporary:
            soundfile.write(temporary, waveform, RATE, format="FLAC")
    length = soundfile.info(path).frames / RATE
    return {**row, "seconds": length, "path": str(path.relative_to(folder.parent))}


def shuffled(rows: Sequence[dict]) -> list[dict]:
    """In an order that only depends on the texts."""
    return sorted(rows, key=lambda row: name_of(row["text"]))


def distinct(conversations: Sequence[dict], field: str, split: str) -> list[dict]:
    """The different questions or answers of a split, shuffled."""
    rows = {row[field]: row["kind"] for row in conversations if row["split"] == split}
    return shuffled([{"text": text, "kind": kind, "split": split} for text, kind in rows.items()])


def in_voices(rows: Sequence[dict], passes: int) -> Iterator[dict]:
    """Each row in one voice, then each in the next, and so on."""
    for number, row in itertools.product(range(passes), rows):
        index = (int(name_of(row["text"]), 16) + number) % len(VOICES)
        yield {**row, "voice": VOICES[index]}


def plan_answers(conversations: Sequence[dict], evaluated: int) -> tuple[list[dict], list[dict]]:
    """What is to be spoken for training, in order, and what for evaluation."""
    train = distinct(conversations, "answer", "train")
    closed = [row for row in train if row["kind"] != "repeat"]
    repeated = [row for row in train if row["kind"] == "repeat"]
    known = {row["text"] for row in train}
    new = [row for row in distinct(conversations, "answer", "eval") if row["text"] not in known]
    first = [*in_voices(closed, 1), *in_voices(repeated, 1)]
    further = [row for rows in (closed, repeated) for row in list(in_voices(rows, len(VOICES)))[len(rows) :]]
    return first + further, in_all_voices(new[:evaluated])


def plan_questions(conversations: Sequence[dict], evaluated: int) -> tuple[list[dict], list[dict]]:
    """The same for the questions; pictures are asked about with the same few, so each counts once."""
    train = distinct(conversations, "question", "train")
    known = {row["text"] for row in train}
    new = [row for row in distinct(conversations, "question", "eval") if row["text"] not in known]
    return list(in_voices(train, 1)), in_all_voices(new[:evaluated])


def in_all_voices(rows: Sequence[dict]) -> list[dict]:
    return [{**row, "voice": voice} for row in rows for voice in (*VOICES, HELD_OUT_VOICE)]


def few(conversations: Sequence[dict]) -> list[dict]:
    """Some of each split, with and without a scene: of a quick run, both question and answer of these are spoken."""
    groups = defaultdict(list)
    for row in conversations:
        groups[row["split"], row["scene"] is None].append(row)
    return [row for (split, _), rows in groups.items() for row in rows[: 32 if split == "train" else 6]]


def speak_rows(rows: Sequence[dict], folder: Path, minutes: float, on_grid: bool = False) -> list[dict]:
    """Speaks rows one after another until the budget is used up; what is there already is kept."""
    done: list[dict] = []
    seconds = 0.0
    speak = functools.partial(speak_row, folder=folder, on_grid=on_grid)
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        for start in range(0, len(rows), AT_ONCE):
            if seconds >= minutes * 60:
                break
            done += pool.map(speak, rows[start : start + AT_ONCE], chunksize=AT_ONCE // 8)
            seconds = sum(row["seconds"] for row in done)
    return done


def count_figures(rows: Sequence[dict]) -> dict:
    minutes = Counter()
    for row in rows:
        minutes[f"{row['split']} {row['voice']}"] += row["seconds"] / 60
    lengths = [row["seconds"] for row in rows]
    return {
        "recordings": len(rows),
        "texts": len({row["text"] for row in rows}),
        "minutes": {name: round(value, 1) for name, value in sorted(minutes.items())},
        "seconds": dict(zip(("5%", "50%", "95%"), np.percentile(lengths, [5, 50, 95]).round(2).tolist(), strict=True)),
    }


def plot_lengths(rows: dict[str, list[dict]], path: Path) -> None:
    figure, axes = new_plot(1, len(rows))
    for axis, (name, chosen) in zip(axes, rows.items(), strict=True):
        for voice in (*VOICES, HELD_OUT_VOICE):
            axis.hist([row["seconds"] for row in chosen if row["voice"] == voice], 40, histtype="step", label=voice)
        axis.set_xlabel(f"seconds of {name}")
        axis.legend()
    save_plot(figure, path)


def main(arguments: list[str] | None = None) -> None:
    """Speaks answers and questions."""
    parser = stage_arguments(__doc__)
    parser.add_argument("--minutes", type=float, help="of training answers (default: 1200, quick: 2)")
    parser.add_argument("--question-minutes", type=float, help="of training questions (default: 2000, quick: 1)")
    options = parser.parse_args(arguments)
    if not flite.is_installed():
        sys.exit("There is no flite to speak with: install it (Debian, Ubuntu: apt install flite).")
    settings = {
        "version": VERSION,
        "minutes": options.minutes or (2 if options.quick else 1200),
        "question minutes": options.question_minutes or (1 if options.quick else 2000),
        "evaluated": 8 if options.quick else 240,
    }
    corpus = options.work / "corpus"

    def make(folder: Path) -> dict:
        conversations = read_lines(corpus / "conversations.jsonl")
        if options.quick:
            conversations = few(conversations)
        plans = {
            "answers": (plan_answers(conversations, settings["evaluated"]), settings["minutes"]),
            "questions": (plan_questions(conversations, settings["evaluated"]), settings["question minutes"]),
        }
        spoken = {}
        for name, ((train, evaluation), minutes) in plans.items():
            # Without a budget: all of it.
            spoken[name] = speak_rows(evaluation, folder / name, float("inf"), name == "answers")
            spoken[name] += speak_rows(train, folder / name, minutes, name == "answers")
            write_lines(folder / f"{name}.jsonl", spoken[name])
        plot_lengths(spoken, folder / "figures.png")
        return {name: count_figures(rows) for name, rows in spoken.items()}

    run_stage(options.work / "speech", [corpus], settings, make, ["answers.jsonl", "questions.jsonl"])


if __name__ == "__main__":
    sys.exit(main())
