"""Builds the training data of the nano model: rows of the original's schema from corpus, speech, pictures and codec.

    python training_scripts/nano/build_data.py WORK text       (the language model's, seconds)
    python training_scripts/nano/build_data.py WORK scenes     (more to look at, minutes)
    python training_scripts/nano/build_data.py WORK speech     (everybody else's, minutes)

WORK/text gets text_train.parquet and text_eval.parquet, conversations without sound. WORK/scenes gets
scenes_train.parquet and scenes_eval.parquet, with pictures and without sound, of every scene that the corpus could
have (held out are those that it holds out): the few hundred that it has do not teach which of two objects has what.
WORK/data gets, for each split,

    t2a_train.parquet       written questions, spoken answers
    a2a_train.parquet       spoken questions, spoken answers
    i2t_train.parquet       written questions about pictures, spoken answers
    voices.safetensors      the voices: codes of a recording, and an embedding

An answer that several conversations share is spoken in turn by the voices that have recorded it. Written questions of
training come once more where a voice is left, so that every recording is learnt from. A question about a scene is put
with one of its pictures.
"""

import io
import json
import random
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import draw_pictures
import make_corpus
import numpy as np
import pyarrow as pa
import torch
from make_speech import PROCESSES, VOICES
from minimind_o_hf.processing.voices_minimind_o import save_voices
from pyarrow import parquet
from safetensors.torch import load_file
from stages import corpus_seed, digest_of_files, plot_counts, read_lines, run_stage, stage_arguments
from train_codec import make_fast, read_waveform
from train_vision_encoder import all_scenes
from transformers import MimiModel

from minimind_o_hf.data.building import SCHEMA, encode_speech
from minimind_o_hf.data.samples import IMAGE_MARK
from minimind_o_hf.files import new_file

VERSION = 3
CODEBOOKS = 8
REFERENCE_FRAMES = (24, 36)  # two to three seconds
BATCH = 8  # recordings encoded at a time
_codec: Any = None  # of a process that encodes


def open_codec(folder: Path) -> None:
    """Prepares a process for [`encode_batch`]."""
    global _codec
    torch.set_num_threads(1)
    _codec = MimiModel.from_pretrained(folder, dtype=torch.float32)
    make_fast(_codec.encoder)  # 3 of 400,000 codes differ from those with PyTorch's ELU


def encode_batch(rows: Sequence[dict], folder: Path) -> list[np.ndarray]:
    """Codes of recordings, `(8, num_frames)` each."""
    return encode_speech(_codec, [read_waveform(folder / row["path"]) for row in rows], CODEBOOKS)


def encode(codec_folder: Path, folder: Path, rows: Sequence[dict]) -> dict[tuple[str, str], np.ndarray]:
    """
    Codes of recordings, by text and voice.

    Args:
        codec_folder (`Path`): What `MimiModel.from_pretrained` loads.
        folder (`Path`): What the rows' paths start from.
        rows (list of `dict`): With `text`, `voice`, `seconds` and `path`.
    """
    # Of similar lengths, and small enough for a core's cache: with 256 at once it takes twice as long.
    ordered = sorted(rows, key=lambda row: row["seconds"])
    batches = [ordered[start : start + BATCH] for start in range(0, len(ordered), BATCH)]
    with ProcessPoolExecutor(PROCESSES, get_context("spawn"), open_codec, (codec_folder,)) as pool:
        codes = [code for batch in pool.map(partial(encode_batch, folder=folder), batches) for code in batch]
    return {(row["text"], row["voice"]): code for row, code in zip(ordered, codes, strict=True)}


def make_voices(rows: Sequence[dict], codes: dict, embeddings: dict[str, torch.Tensor]) -> dict[str, dict]:
    """Each voice's reference: the first training recording of a fitting length."""
    voices = {}
    for voice in VOICES:
        reference = next(
            codes[row["text"], voice]
            for row in rows
            if row["voice"] == voice
            and row["split"] == "train"
            and REFERENCE_FRAMES[0] <= codes[row["text"], voice].shape[1] <= REFERENCE_FRAMES[1]
        )
        voices[voice] = {"ref_codes": torch.from_numpy(reference).long(), "spk_emb": embeddings[voice]}
    return voices


def choose(conversation: dict, options: Sequence[Any]) -> Any:
    """One of some, the same at every run."""
    return options[zlib.crc32(f"{conversation['id']}".encode()) % len(options)]


def make_rows(conversations: Iterable[dict], codes: dict[tuple[str, str], np.ndarray], voices: dict) -> list[dict]:
    """
    Rows with spoken answers, each with its conversation as `conversation`, and whether it is there for its voice alone
    as `again`.

    Args:
        conversations (list of `dict`): Of the corpus; those whose answer nobody has recorded are left out.
        codes (`dict`): Of the answers, by text and voice.
        voices (`dict`): See `make_voices`.
    """
    recorded, asked = defaultdict(list), defaultdict(list)
    for text, voice in codes:
        if voice in voices:
            recorded[text].append(voice)
    for conversation in conversations:
        asked[conversation["answer"]].append(conversation)
    rows = []
    for answer, those in asked.items():
        names = sorted(recorded[answer])
        first = zlib.crc32(answer.encode())  # otherwise rare answers would all be in the same voice
        for number in range(max(len(those), len(names)) if names else 0):
            conversation = those[number % len(those)]
            voice = names[(first + number) % len(names)]
            row = {
                "answer_audios": [codes[answer, voice].T.reshape(-1).tolist()],
                "ref_audios": voices[voice]["ref_codes"].T.reshape(-1).tolist(),
                "spk_emb": voices[voice]["spk_emb"].tolist(),
            }
            again = number >= len(those)
            rows.append({"conversation": conversation, "again": again, **text_row(conversation), **row})
    return rows


def ask_aloud(rows: Iterable[dict], recorded: dict[str, list[Path]]) -> list[dict]:
    """The rows whose question somebody has recorded, with the recording."""
    found = []
    for row in rows:
        if recordings := recorded.get(row["conversation"]["question"]):
            found.append({**row, "question_audios": [choose(row["conversation"], recordings).read_bytes()]})
    return found


def show_pictures(rows: Iterable[dict], pictures: Sequence[dict], folder: Path) -> list[dict]:
    """The rows with a picture of their scene; `pictures` are lines of pictures.jsonl, whose files are in `folder`."""
    by_scene = defaultdict(list)
    for picture in pictures:
        by_scene[json.dumps(picture["scene"])].append(folder / picture["path"])
    found = []
    for row in rows:
        conversation = row["conversation"]
        path = choose(conversation, by_scene[json.dumps(conversation["scene"])])
        shown = text_row({**conversation, "question": f"{IMAGE_MARK}\n{conversation['question']}"})
        found.append({**row, **shown, "image_bytes": [path.read_bytes()]})
    return found


def text_row(conversation: dict) -> dict:
    """A conversation without sound."""
    turns = [
        {"role": "user", "content": conversation["question"]},
        {"role": "assistant", "content": conversation["answer"]},
    ]
    return {"conversations": json.dumps(turns)}


def write(path: Path, rows: list[dict]) -> int:
    """Writes a parquet file, in a mixed order; returns its number of rows. None at all is an error."""
    if not rows:
        raise ValueError(f"There are no rows for {path.name}: no conversation has all recordings that it needs.")
    order = np.random.default_rng(0).permutation(len(rows))
    names = {name for row in rows for name in row}
    schema = pa.schema([column for column in SCHEMA if column.name in names])
    with new_file(path) as temporary:
        parquet.write_table(
            pa.Table.from_pylist([rows[index] for index in order], schema), temporary, row_group_size=512
        )
    return len(rows)


def read_conversations(work: Path) -> dict[str, list[dict]]:
    """Those of the corpus, by split."""
    rows = read_lines(work / "corpus" / "conversations.jsonl")
    return {split: [row for row in rows if row["split"] == split] for split in ("train", "eval")}


def build_text(work: Path, folder: Path) -> dict[str, int]:
    """Conversations without scenes."""
    figures = {}
    for split, conversations in read_conversations(work).items():
        rows = [text_row(row) for row in conversations if not row["scene"]]
        figures[split] = write(folder / f"text_{split}.parquet", rows)
    return figures


def build_speech(work: Path, folder: Path) -> dict[str, int]:
    """Encodes all answers and writes everything but the text."""
    answers = read_lines(work / "speech" / "answers.jsonl")
    recorded = defaultdict(list)
    for row in read_lines(work / "speech" / "questions.jsonl"):
        if row["voice"] in VOICES:
            recorded[row["text"]].append(work / "speech" / row["path"])
    codes = encode(work / "codec" / "model", work / "speech", answers)
    voices = make_voices(answers, codes, load_file(work / "speaker_encoder" / "voices.safetensors"))
    save_voices(voices, folder / "voices.safetensors")
    pictures = read_lines(work / "pictures" / "pictures.jsonl")
    figures = {}
    for split, conversations in read_conversations(work).items():
        spoken = make_rows(conversations, codes, voices)
        once = [row for row in spoken if not row["again"]]
        scenes = [row for row in once if row["conversation"]["scene"]]
        t2a = [row for row in (spoken if split == "train" else once) if not row["conversation"]["scene"]]
        drawn = [row for row in pictures if row["split"] == split]
        for name, rows in {
            "t2a": t2a,
            "a2a": ask_aloud([row for row in t2a if not row["again"]], recorded),
            "i2t": show_pictures(scenes, drawn, work / "pictures"),
        }.items():
            figures[f"{name} {split}"] = write(folder / f"{name}_{split}.parquet", rows)
    return figures


def build_scenes(work: Path, folder: Path, every: int) -> dict[str, int]:
    """Questions about all scenes, each with a picture of its own; one of so many questions."""
    seed = corpus_seed(work)
    items = make_corpus.pictures(random.Random(seed), sys.maxsize)
    asked = [(item, question) for item in items for question in item.wordings]
    figures = {}
    for split, scenes in all_scenes(seed).items():
        names = {json.dumps(scene) for scene in scenes}
        chosen = [one for one in asked if one[0].scene in names][::every]
        rows = []
        for number, (item, question) in enumerate(chosen):
            picture = draw_pictures.draw_scene(
                json.loads(item.scene), zlib.crc32(f"{item.scene} {question} {number}".encode())
            )
            file = io.BytesIO()
            picture.save(file, format="PNG")
            shown = text_row({"question": f"{IMAGE_MARK}\n{question}", "answer": item.answer})
            rows.append({**shown, "image_bytes": [file.getvalue()]})
        figures[split] = write(folder / f"scenes_{split}.parquet", rows)
    return figures


PARTS = {
    "text": ("text", build_text, ["corpus"]),
    "scenes": ("scenes", build_scenes, ["corpus"]),
    "speech": ("data", build_speech, ["corpus", "speech", "pictures", "codec", "speaker_encoder"]),
}


def main(arguments: list[str] | None = None) -> None:
    """Writes the files of one part."""
    parser = stage_arguments(__doc__)
    parser.add_argument("part", choices=PARTS)
    options = parser.parse_args(arguments)
    name, build, before = PARTS[options.part]
    work = options.work
    settings: dict[str, Any] = {"version": VERSION}
    if options.part == "scenes":
        settings |= {"every": 200 if options.quick else 1, "drawn by": digest_of_files(draw_pictures.__file__)}
        build = partial(build_scenes, every=settings["every"])
    kinds = ("t2a", "a2a", "i2t") if options.part == "speech" else (options.part,)
    outputs = [f"{kind}_{split}.parquet" for kind in kinds for split in ("train", "eval")]
    inputs = [work / stage for stage in before]

    def make(folder: Path) -> dict:
        figures = build(work, folder)
        plot_counts(figures, "rows", folder / "figures.png")
        return figures

    run_stage(work / name, inputs, settings, make, outputs)


if __name__ == "__main__":
    sys.exit(main())
