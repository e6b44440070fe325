"""Trains nano's Thinker and Talker: language model, text to speech, speech to speech, pictures.

    python training_scripts/nano/train_model.py WORK STAGE    (lm, t2a, a2a_projector, a2a, i2t_projector, i2t)

Each stage starts from the one before it and leaves a complete checkpoint in WORK/STAGE. One that was interrupted goes
on from its last save.
"""

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from stages import run_stage, stage_arguments
from transformers import AutoModelForMultimodalLM, AutoProcessor
from transformers.trainer_utils import get_last_checkpoint

from minimind_o_hf.data import (
    FeatureMasking,
    MiniMindODataCollator,
    MiniMindODataset,
    SampleSettings,
    SpeechAugmentation,
)
from minimind_o_hf.trainer import MiniMindOTrainer, MiniMindOTrainingArguments
from minimind_o_hf.training_report import write_training_report

VERSION = 1
MAX_LENGTH = 192  # positions: a question of 40, an answer of 6 s

# A prompt of this model always holds an empty think block before the answer: training shows it as generation will.
AS_GENERATED = replace(
    SampleSettings(), max_length=MAX_LENGTH, drop_empty_think=0.0, system_prompt=0.05, augmentation=None
)


class TextCollator(MiniMindODataCollator):
    """Batches of text alone: the Talker has nothing to learn of them, and need not run."""

    def __call__(self, samples):
        batch = super().__call__(samples)
        return {name: value for name, value in batch.items() if not name.startswith("audio_")} | {"run_talker": False}


@dataclass(frozen=True)
class Stage:
    """
    One stage.

    Args:
        before (`str`): The stage it starts from.
        data (tuple of `str`): Files of WORK/data, without `_train.parquet`; the first is evaluated on.
        mode (`str`): What is trained, see [`MiniMindOTrainingArguments`].
        steps (`int`), batch (`int`), rate (`float`): Optimiser steps, rows a step, learning rate.
        talker_rate (`float`, *optional*): The Talker's.
        swap (`float`): Scheduled sampling.
        augment (`bool`): Whether input speech is augmented.
    """

    before: str
    data: tuple[str, ...]
    mode: str
    steps: int
    batch: int
    rate: float
    talker_rate: float | None = None
    swap: float = 0.02
    augment: bool = False


STAGES = {
    "lm": Stage("model", ("text",), "thinker", 2500, 32, 2e-3, swap=0.0),
    "t2a": Stage("lm", ("t2a",), "all", 10000, 32, 5e-4, talker_rate=2e-3),
    "a2a_projector": Stage("t2a", ("a2a",), "audio_proj", 400, 24, 2e-3, augment=True),
    "a2a": Stage("a2a_projector", ("a2a", "t2a"), "all", 3000, 24, 5e-4, augment=True),
    "i2t_projector": Stage("a2a", ("i2t",), "vision_proj", 400, 24, 2e-3),
    "i2t": Stage("i2t_projector", ("i2t", "a2a", "t2a"), "all", 3000, 24, 5e-4, augment=True),
}


def train(stage: Stage, before: Path, data: Path, folder: Path, quick: bool) -> dict[str, Any]:
    """Trains a stage and saves a checkpoint in `folder`; returns the held-out figures."""
    model = AutoModelForMultimodalLM.from_pretrained(before, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(before)
    settings = replace(
        AS_GENERATED,
        swap_codes=stage.swap,
        swap_text=stage.swap,
        augmentation=SpeechAugmentation() if stage.augment else None,
    )
    files = [str(data / f"{name}_train.parquet") for name in stage.data]
    train_set = MiniMindODataset(files, processor, model.config, settings, 0)
    unchanged = replace(SampleSettings.deterministic(MAX_LENGTH), drop_empty_think=0.0)
    held_out = MiniMindODataset([str(data / f"{stage.data[0]}_eval.parquet")], processor, model.config, unchanged, 0)
    steps = 3 if quick else stage.steps
    arguments = MiniMindOTrainingArguments(
        output_dir=str(folder / "run"),
        mode=stage.mode,
        learning_rate=stage.rate,
        talker_learning_rate=stage.talker_rate,
        max_steps=steps,
        per_device_train_batch_size=stage.batch,
        per_device_eval_batch_size=64,
        eval_strategy="steps",
        eval_steps=500,
        save_steps=500,
        save_total_limit=1,
        logging_steps=50,
        adam_beta2=0.98,
        use_cpu=not torch.cuda.is_available(),
        bf16=True,
        report_to="none",
        disable_tqdm=True,
        label_names=["labels"] if stage.mode == "thinker" else ["labels", "audio_labels"],
    )
    masking = FeatureMasking() if stage.augment else None
    collator_class = TextCollator if stage.mode == "thinker" else MiniMindODataCollator
    collator = collator_class(processor, model.config, feature_masking=masking)
    trainer = MiniMindOTrainer(
        model, arguments, train_dataset=train_set, eval_dataset=held_out, data_collator=collator
    )
    run = Path(arguments.output_dir)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(run)) if run.is_dir() else None)
    figures = trainer.evaluate()
    trainer.save_model(str(folder / "model"))
    processor.save_pretrained(folder / "model")
    trainer.save_state()
    (folder / "history.json").write_text(json.dumps(trainer.state.log_history), encoding="utf-8")
    write_training_report(
        trainer, folder / "model", {"base model": before.parent.name, "training data": list(stage.data)}
    )
    return {name: value for name, value in figures.items() if isinstance(value, float)}


def main(arguments: list[str] | None = None) -> None:
    """Trains one stage."""
    parser = stage_arguments(__doc__)
    parser.add_argument("stage", choices=STAGES)
    options = parser.parse_args(arguments)
    stage, work = STAGES[options.stage], options.work

    def make(folder: Path) -> dict:
        return train(stage, work / stage.before / "model", work / "data", folder, options.quick)

    settings = {"version": VERSION, "quick": options.quick, **asdict(stage)}
    run_stage(work / options.stage, [work / stage.before, work / "data"], settings, make)


if __name__ == "__main__":
    sys.exit(main())
