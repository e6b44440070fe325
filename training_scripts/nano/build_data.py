"""Builds the training data of the nano model: rows of the original's schema from the corpus, the speech and the codec.

    python training_scripts/nano/build_data.py WORK

WORK/data gets

    text_train.parquet, text_eval.parquet    conversations without sound
    t2a_train.parquet, t2a_eval.parquet      written questions, spoken answers
    a2a_train.parquet, a2a_eval.parquet      spoken questions, spoken answers
    voices.safetensors                       the voices: codes of a recording, and an embedding

An answer is spoken in one of the voices that have recorded it, chosen by a hash of the conversation.
"""

import json
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from make_speech import VOICES
from minimind_o_hf.processing.voices_minimind_o import save_voices
from pyarrow import parquet
from safetensors.torch import load_file
from stages import read_lines, run_stage, stage_arguments
from train_codec import read_waveform
from transformers import MimiModel

from minimind_o_hf.data.building import SCHEMA, encode_speech
from minimind_o_hf.files import new_file

VERSION = 1
CODEBOOKS = 8
REFERENCE_FRAMES = (24, 36)  # two to three seconds
BATCH = 256  # recordings encoded at a time


def encode(codec: MimiModel, folder: Path, rows: Sequence[dict]) -> dict[tuple[str, str], np.ndarray]:
    """Codes of recordings, `(8, num_frames)`, by text and voice."""
    codes = {}
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        found = encode_speech(codec, [read_waveform(folder / row["path"]) for row in batch], CODEBOOKS)
        codes |= {(row["text"], row["voice"]): value for row, value in zip(batch, found, strict=True)}
    return codes


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


def make_rows(
    conversations: Iterable[dict],
    codes: dict[tuple[str, str], np.ndarray],
    voices: dict[str, dict],
    questions: dict[str, list[Path]] | None,
) -> list[dict]:
    """
    Rows with spoken answers.

    Args:
        conversations (list of `dict`): Of the corpus.
        codes (`dict`): Of the answers, by text and voice.
        voices (`dict`): See `make_voices`.
        questions (`dict`, *optional*): Recordings by text; without, questions are written.
    """
    by_text = defaultdict(list)
    for text, voice in codes:
        if voice in voices:
            by_text[text].append(voice)
    rows = []
    for conversation in conversations:
        question, answer = conversation["question"], conversation["answer"]
        if not by_text[answer] or (questions is not None and question not in questions):
            continue
        voice = choose(conversation, sorted(by_text[answer]))
        row = {
            **text_row(conversation),
            "answer_audios": [codes[answer, voice].T.reshape(-1).tolist()],
            "ref_audios": voices[voice]["ref_codes"].T.reshape(-1).tolist(),
            "spk_emb": voices[voice]["spk_emb"].tolist(),
        }
        if questions is not None:
            row["question_audios"] = [choose(conversation, questions[question]).read_bytes()]
        rows.append(row)
    return rows


def text_row(conversation: dict) -> dict:
    """A conversation without sound."""
    turns = [
        {"role": "user", "content": conversation["question"]},
        {"role": "assistant", "content": conversation["answer"]},
    ]
    return {"conversations": json.dumps(turns)}


def write(path: Path, rows: list[dict]) -> int:
    """Writes a parquet file, in a mixed order; returns its number of rows."""
    order = np.random.default_rng(0).permutation(len(rows))
    names = {name for row in rows for name in row}
    schema = pa.schema([column for column in SCHEMA if column.name in names])
    with new_file(path) as temporary:
        parquet.write_table(
            pa.Table.from_pylist([rows[index] for index in order], schema), temporary, row_group_size=512
        )
    return len(rows)


def main(arguments: list[str] | None = None) -> None:
    """Encodes all answers and writes the files."""
    options = stage_arguments(__doc__).parse_args(arguments)
    work = options.work

    def make(folder: Path) -> dict:
        answers = read_lines(work / "speech" / "answers.jsonl")
        recorded = defaultdict(list)
        for row in read_lines(work / "speech" / "questions.jsonl"):
            if row["voice"] in VOICES:
                recorded[row["text"]].append(work / "speech" / row["path"])
        codec: Any = MimiModel.from_pretrained(work / "codec" / "model", dtype=torch.float32)
        codes = encode(codec, work / "speech", answers)
        voices = make_voices(answers, codes, load_file(work / "speaker_encoder" / "voices.safetensors"))
        save_voices(voices, folder / "voices.safetensors")
        conversations = [row for row in read_lines(work / "corpus" / "conversations.jsonl") if not row["scene"]]
        figures = {}
        for split in ("train", "eval"):
            chosen = [row for row in conversations if row["split"] == split]
            figures[f"text {split}"] = write(folder / f"text_{split}.parquet", [text_row(row) for row in chosen])
            for name, questions in (("t2a", None), ("a2a", recorded)):
                rows = make_rows(chosen, codes, voices, questions)
                figures[f"{name} {split}"] = write(folder / f"{name}_{split}.parquet", rows)
        return figures

    inputs = [work / name for name in ("corpus", "speech", "codec", "speaker_encoder")]
    run_stage(work / "data", inputs, {"version": VERSION}, make)


if __name__ == "__main__":
    sys.exit(main())
