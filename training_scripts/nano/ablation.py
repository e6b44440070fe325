"""Trains Talkers of several widths, dense and with experts, and writes the table of their consistency.

    python training_scripts/nano/ablation.py WORK            (after `nano.py`; two hours on two cores)
    python training_scripts/nano/ablation.py WORK --quick

All six start from a Thinker that has learnt the language (the dense one of the recipe, and one with experts that is
trained here), keep it as it is, and are trained on the same speech for the same number of steps. WORK/ablation/NAME
holds each, and WORK/ablation/table what `minimind-o evaluate --table` makes of them, in the paper's layout.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from assemble_model import save_untrained
from minimind_o_hf.processing.voices_minimind_o import load_voices
from stages import run_stage, stage_arguments
from train_model import STAGES, VERSION, Stage, train
from transformers import AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer, MimiModel

from minimind_o_hf.cli import main as minimind_o
from minimind_o_hf.evaluation.tables import EMBEDDED
from minimind_o_hf.files import new_file

WIDTHS = {"full": 192, "2/3": 128, "1/2": 96}  # by their names in the table
STEPS = 1000


def run(work: Path, name: str, stage: Stage, quick: bool, speaks: bool = False) -> None:
    """Trains a stage of the model in WORK/`name`; one that speaks gets the codec and the voices."""

    def make(folder: Path) -> dict:
        figures = train(stage, work, folder, quick)
        if speaks:
            add_sound(work, folder / "model")
        return figures

    run_stage(work / name, stage.inputs(work), stage.settings(quick), make)


def start(work: Path, name: str, thinker: str | None, **changes: Any) -> None:
    """Writes an untrained model into WORK/`name`, with the Thinker of another stage where one is given."""

    def make(folder: Path) -> dict:
        tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer" / "model")
        parameters = save_untrained(folder / "model", tokenizer, 0, **changes)
        if thinker:
            model: Any = AutoModelForMultimodalLM.from_pretrained(folder / "model")
            trained: Any = AutoModelForMultimodalLM.from_pretrained(work / thinker / "model")
            model.model.load_state_dict(trained.model.state_dict())
            model.lm_head.load_state_dict(trained.lm_head.state_dict())
            model.save_pretrained(folder / "model")
        return {"parameters": parameters}

    inputs = [work / stage for stage in ("tokenizer", thinker) if stage]
    run_stage(work / name, inputs, {"version": VERSION, **changes}, make)


def add_sound(work: Path, folder: Path) -> None:
    """Gives a checkpoint the codec and the voices."""
    processor = AutoProcessor.from_pretrained(folder)
    processor.audio_tokenizer = MimiModel.from_pretrained(work / "codec" / "model", dtype="float32")
    for name, voice in load_voices(work / "data" / "voices.safetensors").items():
        processor.add_voice(name, voice)
    processor.save_pretrained(folder)


def write_table(work: Path, path: Path) -> None:
    """The package's table of widths, with these checkpoints in place of its examples."""
    table = yaml.safe_load((EMBEDDED / "talker_sizes.yaml").read_text(encoding="utf-8"))
    for row in table["rows"]:
        if "checkpoint" in row:
            kind, width = row["name"].split()
            row["checkpoint"] = str(work / "ablation" / f"{kind.lower()}-{WIDTHS[width]}" / "model")
    with new_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(table, sort_keys=False), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Trains all six and makes the table."""
    parser = stage_arguments(__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="of each Talker (default: %(default)s)")
    options = parser.parse_args(arguments)
    work, quick = options.work, options.quick
    for kind, use_moe in (("dense", False), ("moe", True)):
        thinker = "ablation/moe-lm" if use_moe else "lm"
        if use_moe:
            start(work, "ablation/moe-start", None, use_moe=True)
            run(work, thinker, replace(STAGES["lm"], before="ablation/moe-start"), quick)
        for size in WIDTHS.values():
            name = f"ablation/{kind}-{size}"
            start(work, f"{name}-start", thinker, use_moe=use_moe, talker_hidden_size=size)
            stage = replace(STAGES["t2a"], before=f"{name}-start", mode="talker", steps=options.steps)
            run(work, name, stage, quick, speaks=True)
    table = work / "ablation" / "table.yaml"
    write_table(work, table)
    limit = ["--limit", "2"] if quick else []
    return minimind_o(["evaluate", "--table", str(table), "--out", str(table.with_suffix("")), *limit])


if __name__ == "__main__":
    sys.exit(main())
