"""Makes the evaluation suite `nano` of the package from what the corpus holds out.

    python training_scripts/nano/make_suite.py WORK [OUT.json]

The corpus must be there (make_corpus.py). Questions are typed (200 of the closed domain, 60 to repeat), spoken by
flite when the suite is run (150 in the trained voices and 30 in the held-out one, with wordings that no training
question has), and asked about drawn scenes (100).
"""

import base64
import io
import json
import sys
import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from draw_pictures import draw_scene
from make_speech import HELD_OUT_VOICE, VOICES
from stages import read_lines

from minimind_o_hf.files import new_file

DEFAULT = Path(__file__).resolve().parents[2] / "minimind_o_hf" / "evaluation" / "suites" / "nano.json"
TYPED, SPOKEN, UNSEEN, PICTURES, REPEATED = 200, 150, 30, 100, 60
UNSEEN_ASKER = f"asked by {HELD_OUT_VOICE}"
QUALITY = 90  # of the pictures, JPEG


def spread(rows: Sequence[dict], count: int) -> list[dict]:
    """So many rows, from all topics and kinds of novelty in turn; the same whenever the corpus is."""
    piles = defaultdict(list)
    for row in sorted(rows, key=lambda row: zlib.crc32(f"{row['question']} {row['answer']} {row['scene']}".encode())):
        piles[row["kind"], row["held"]].append(row)
    chosen = []
    while len(chosen) < count and any(piles.values()):
        chosen += [piles[key].pop() for key in sorted(piles) if piles[key]]
    return chosen[:count]


def picture_of(scene: Sequence[dict]) -> str:
    """A drawing of a scene as a `data:` URL."""
    buffer = io.BytesIO()
    draw_scene(scene, zlib.crc32(json.dumps(scene).encode())).save(buffer, format="JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def make_questions(conversations: Sequence[dict]) -> list[dict]:
    """The suite's questions."""
    held = [row for row in conversations if row["split"] == "eval"]
    closed = [row for row in held if row["kind"] not in ("picture", "repeat")]
    known = {row["question"] for row in conversations if row["split"] == "train"}
    spoken = spread([row for row in closed if row["question"] not in known], SPOKEN + UNSEEN)
    chosen = {
        "typed": spread(closed, TYPED),
        "repeat": spread([row for row in held if row["kind"] == "repeat"], REPEATED),
        "spoken": spoken[:SPOKEN],
        "spoken-unseen": [{**row, "kind": UNSEEN_ASKER} for row in spoken[SPOKEN:]],
        "picture": spread([row for row in held if row["kind"] == "picture"], PICTURES),
    }
    questions = []
    for name, rows in chosen.items():
        for number, row in enumerate(rows):
            question = {"id": f"{name}-{number:03d}", "kind": row["kind"], "held_out": row["held"]}
            if name.startswith("spoken"):
                asker = HELD_OUT_VOICE if row["kind"] == UNSEEN_ASKER else VOICES[number % len(VOICES)]
                question |= {"say": row["question"], "asker": asker}
            else:
                question["text"] = row["question"]
            if row["scene"]:
                question["image"] = picture_of(row["scene"])
            questions.append({**question, "answers": [row["answer"]]})
    return questions


def main(arguments: list[str] | None = None) -> None:
    """Writes the suite."""
    work, *rest = sys.argv[1:] if arguments is None else arguments
    suite = {
        "name": "nano",
        "language": "en",
        "voice_questions": 20,
        "buckets": [5, 7],
        "apart": ["repeat", UNSEEN_ASKER],
        "max_new_tokens": 96,
        "tts": "flite -voice {voice} -t {text} -o {out}",
        "tts_voices": [*VOICES, HELD_OUT_VOICE],
        "questions": make_questions(read_lines(Path(work) / "corpus" / "conversations.jsonl")),
    }
    with new_file(Path(rest[0]) if rest else DEFAULT) as temporary:
        temporary.write_text(json.dumps(suite, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
