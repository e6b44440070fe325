"""Trains nano's Thinker and Talker: language model, text to speech, speech to speech, pictures.

    python training_scripts/nano/train_model.py WORK STAGE    (one of `STAGES`)

Each stage starts from the one before it and leaves a complete checkpoint in WORK/STAGE. One that was interrupted goes
on from its last save.
"""

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from corpus_words import POSITIONS, SHAPES
from draw_pictures import CENTRES, COLOURS
from optimizers import MuonTrainer
from safetensors.torch import load_file
from stages import corpus_seed, read_lines, run_stage, stage_arguments
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from train_vision_encoder import PATCH, SIDE, all_scenes, balanced, draw_batch
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.trainer_utils import get_last_checkpoint

from minimind_o_hf.data import (
    FeatureMasking,
    MiniMindODataCollator,
    MiniMindODataset,
    SampleSettings,
    SpeechAugmentation,
)
from minimind_o_hf.trainer import MiniMindOTrainingArguments
from minimind_o_hf.training_report import plot_training_curves, write_training_report

VERSION = 4
DRAWN_AT_ONCE = 48  # pictures
MAX_LENGTH = 192  # positions: a question of 40, an answer of 6 s

# A prompt of this model always holds an empty think block before the answer: training shows it as generation will.
AS_GENERATED = replace(
    SampleSettings(),
    max_length=MAX_LENGTH,
    drop_empty_think=0.0,
    system_prompt=0.05,
    speech_only=0.7,
    text_only=0.1,
    speech_then_text=0.1,
    text_then_speech=0.1,
    swap_text=0.0,  # a word that is not the one spoken teaches the Talker nothing
    augmentation=None,
)

# Rows as they are written, for what is measured.
AS_WRITTEN = replace(
    SampleSettings.deterministic(MAX_LENGTH), drop_empty_think=0.0, speech_only=1.0, speech_then_text=0.0
)

SOUND = ("audio_codes", "audio_labels")


class NanoTrainer(MuonTrainer):
    """
    The trainer of all stages.

    With `own_codes`, the Talker reads its own predictions at this share of the positions of an answer: scheduled
    sampling in two passes (Mihaylova and Martins 2019, https://arxiv.org/abs/1906.07651), the first of which reads
    what the batch holds. Speaking, it reads nothing else. Held-out losses are of the true codes.
    """

    own_codes = 0.0

    def compute_loss(self, model, inputs, *arguments, **options):
        """The step's share of the loss."""
        labels = inputs.get("audio_labels")
        if not (model.training and self.own_codes and labels is not None):
            return super().compute_loss(model, inputs, *arguments, **options)
        whole: Any = self.accelerator.unwrap_model(model)
        read = partial(read_own_codes, labels, self.own_codes, whole.config.audio_codebook_size)
        hook = whole.talker.register_forward_pre_hook(read, with_kwargs=True)
        try:
            return super().compute_loss(model, inputs, *arguments, **options)
        finally:
            hook.remove()


@torch.no_grad()
def read_own_codes(
    labels: torch.Tensor, share: float, size: int, talker: Any, arguments: tuple, options: dict
) -> tuple[tuple, dict]:
    """
    Replaces a share of the codes that the Talker is about to read.

    Args:
        labels (`torch.LongTensor` of shape `(batch_size, num_codebooks, length)`): -100 where there is no answer.
        share (`float`): Of the positions.
        size (`int`): Codes from here on are no sound.
        talker, arguments, options: Of the call, which the result replaces.
    """
    codes = options["audio_codes"]
    hidden = type(talker).forward(talker, *arguments, **options).last_hidden_state
    predicted = talker.lm_head(hidden[:, :-1]).argmax(-1)
    # What a position reads was predicted by the one before it; what is no sound, such as the stop, stays.
    both = (labels[:, :, 1:] >= 0) & (labels[:, :, 1:] < size) & (predicted < size)
    replaced = both & (torch.rand(len(codes), 1, codes.shape[-1] - 1, device=codes.device) < share)
    mixed = codes.clone()
    mixed[:, :, 1:] = torch.where(replaced, predicted, codes[:, :, 1:])
    return arguments, {**options, "audio_codes": mixed}


class SilentCollator(MiniMindODataCollator):
    """Batches without the answers' sound: the Talker has nothing to learn of them, and need not run."""

    def __call__(self, samples):
        batch = super().__call__(samples)
        return {name: value for name, value in batch.items() if name not in SOUND} | {"run_talker": False}


def folder_of(data: str) -> str:
    """The stage that makes the files of some data."""
    return data if data in ("text", "scenes") else "data"


@dataclass(frozen=True)
class Stage:
    """
    One stage.

    Args:
        before (`str`): The stage it starts from.
        data (tuple of `str`): Files of WORK/text, WORK/scenes or WORK/data, without `_train.parquet`; one named twice
            counts twice.
        mode (`str`): What is trained, see [`MiniMindOTrainingArguments`].
        steps (`int`), batch (`int`), rate (`float`): Optimiser steps, rows a step, learning rate.
        talker_rate (`float`, *optional*): The Talker's.
        codebook_weights (tuple of `float`, *optional*): In the audio loss; equal without.
        floor (`float`): What the cosine of the rates ends at, as a share of them; 1 for constant ones.
        swap (`float`): Scheduled sampling of codes.
        augment (`bool`): Whether input speech is augmented, beside the masking of its features.
        silent (`bool`): Whether the answers' sound is left out: the Talker does not run.
        own_codes (`float`): See [`NanoTrainer`].
        encoder (`str`, *optional*): A trained encoder's stage: until this one, the model's own was random.
    """

    before: str
    data: tuple[str, ...]
    mode: str
    steps: int
    batch: int
    rate: float
    talker_rate: float | None = None
    codebook_weights: tuple[float, ...] | None = None
    floor: float = 0.1
    swap: float = 0.05
    augment: bool = False
    silent: bool = False
    own_codes: float = 0.0
    encoder: str | None = None

    def inputs(self, work: Path) -> list[Path]:
        """Folders of the stages that it reads: first the model's, then the data's."""
        folders = [self.before, *sorted({folder_of(name) for name in self.data})]
        return [work / name for name in (*folders, self.encoder) if name]

    def settings(self, quick: bool) -> dict[str, Any]:
        """What its result depends on beside its inputs."""
        return {
            "version": VERSION,
            "quick": quick,
            "samples": asdict(AS_GENERATED),
            "optimiser": "muon",
            **asdict(self),
        }

    def files(self, work: Path, split: str) -> list[str]:
        """Of its data; each once for evaluation."""
        names = self.data if split == "train" else dict.fromkeys(self.data)
        return [str(work / folder_of(name) / f"{name}_{split}.parquet") for name in names]


# What is said is in the first four codebooks: with the others predicted and these true, a recogniser makes as few
# errors as with all of them true. The others must not fall far behind: they have to learn where speech ends.
WORDS_FIRST = (3.0, 2.0, 1.5, 1.0, 0.5, 0.4, 0.3, 0.3)

SPEAKING = {"mode": "all", "batch": 32, "codebook_weights": WORDS_FIRST, "swap": 0.08}
PROJECTING = {"steps": 200, "batch": 24, "rate": 3e-3, "swap": 0.0, "silent": True}
# Understanding is learnt from text: no other loss has a say, and a step takes two thirds of one with sound.
UNDERSTANDING = {"mode": "all", "batch": 32, "rate": 1e-3, "swap": 0.0, "silent": True}

STAGES = {
    "lm": Stage("model", ("text",), "thinker", 1500, 32, 2e-3, swap=0.0, silent=True),
    "t2a": Stage("lm", ("t2a",), steps=4000, rate=1e-3, talker_rate=3e-3, **SPEAKING),
    "a2a_projector": Stage("t2a", ("a2a",), "audio_proj", encoder="speech_encoder", **PROJECTING),
    "a2a": Stage("a2a_projector", ("a2a",) * 3 + ("t2a",), steps=1000, augment=True, **UNDERSTANDING),
    "i2t_projector": Stage("a2a", ("i2t",), "vision_proj", encoder="vision_encoder", **PROJECTING),
    # Everything at once: Thinker and Talker learn to work together.
    "i2t": Stage(
        "i2t_projector",
        ("t2a",) * 3 + ("i2t",) * 3 + ("a2a",),
        steps=4000,
        rate=8e-4,
        talker_rate=2.5e-3,
        **SPEAKING,
    ),
    # The audio loss is a hundred times the text's, and has the last word in the layers that both need. So what is said
    # is learnt after that, and how to say it once more after this, by a Talker alone.
    "understanding": Stage("i2t", ("scenes",) * 2 + ("a2a",) * 2 + ("t2a",), steps=3000, **UNDERSTANDING),
    "talker": Stage(
        "understanding",
        ("t2a",) * 3 + ("i2t",) * 2 + ("a2a",),
        steps=5000,
        rate=2.5e-3,
        own_codes=0.25,
        **{**SPEAKING, "mode": "talker"},
    ),
}


def put_encoder(folder: Path, model: Any, processor: Any) -> None:
    """Puts a trained encoder, and what prepares its inputs, in the place of the model's own."""
    encoder = AutoModel.from_pretrained(folder, dtype=torch.float32)
    encoder.config.name_or_path = ""  # a path of this machine
    if folder.parent.name == "speech_encoder":
        processor.feature_extractor = AutoFeatureExtractor.from_pretrained(folder)
        model.audio_tower, model.config.audio_config = encoder, encoder.config
    else:
        processor.image_processor = AutoImageProcessor.from_pretrained(folder)
        model.vision_tower, model.config.vision_config = encoder, encoder.config


def start_speech_projector(model: Any, processor: Any, work: Path, clips: int) -> float:
    """
    Brings the speech projector near to what the Thinker can read: of each frame it gives the embedding of the token
    that the encoder's CTC head hears in it, and of `<|audio_pad|>` where that is none. From a random start the
    Thinker hears no more than a question's topic for thousands of steps.

    Args:
        model, processor: With the trained speech encoder.
        work (`Path`): Of all stages.
        clips (`int`): Recorded questions to learn it from.

    Returns:
        `float`: The share of the embeddings' variance that is missed.
    """
    head = load_file(work / "speech_encoder" / "heads.safetensors")
    rows = [row for row in read_lines(work / "speech" / "questions.jsonl") if row["split"] == "train"]
    embeddings = model.get_input_embeddings().weight.detach()
    frames, targets = [], []
    with torch.no_grad():
        for row in rows[:: max(1, len(rows) // clips)]:
            waveform = soundfile.read(work / "speech" / row["path"], dtype="float32")[0]
            inputs = processor.feature_extractor(waveform, sampling_rate=processor.feature_extractor.sampling_rate)
            mask = inputs.input_features_mask
            heard = model.audio_tower(inputs.input_features, input_features_mask=mask).last_hidden_state[0]
            scores = (heard @ head["tokens.weight"].T + head["tokens.bias"]).softmax(-1)
            blank = scores[:, -1:] * embeddings[model.config.audio_token_id]
            frames.append(heard)
            targets.append(scores[:, :-1] @ embeddings[: scores.shape[1] - 1] + blank)
    return fit_projector(model.audio_proj, torch.cat(frames), torch.cat(targets))


def start_vision_projector(model: Any, processor: Any, pictures: int, seed: int) -> float:
    """
    Does the same for the vision projector: a token that sees an object becomes the sum of the embeddings of its shape,
    its colour and its place, as in "green", "star", "top". From a random start the Thinker sees what is in a picture,
    but not which of two objects has what, though a linear map of the encoder's tokens tells all of it.

    Args:
        model, processor: With the trained vision encoder.
        pictures (`int`): To be drawn, of training scenes.
        seed (`int`): Of the corpus.

    Returns:
        `float`: The share of the embeddings' variance that is missed.
    """
    embeddings = model.get_input_embeddings().weight.detach()

    def of_words(words: Iterable[str]) -> torch.Tensor:
        ids = [processor.tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words]
        return torch.stack([embeddings[word].mean(0) for word in ids])

    side = SIDE // PATCH
    centres = (torch.arange(side) + 0.5) / side
    places = torch.cartesian_prod(centres, centres).flip(-1)  # of each token: x, y
    nearest = torch.cdist(places, torch.tensor([CENTRES[where] for where in POSITIONS])).argmin(1)
    shapes, colours, where = of_words(SHAPES), of_words(COLOURS), of_words(POSITIONS)[nearest]
    generator = np.random.default_rng(0)
    scenes = all_scenes(seed)["train"]
    tokens, targets = [], []
    with torch.no_grad():
        for _ in range(0, pictures, DRAWN_AT_ONCE):
            pixels, labels = draw_batch(balanced(scenes, DRAWN_AT_ONCE, generator), generator)
            shape, colour = labels["patch"]
            seen = shape > 0
            wanted = shapes[shape - 1] + colours[colour - 1] + where
            wanted = torch.where(seen[..., None], wanted, embeddings[model.config.image_token_id])
            # Most tokens see nothing: as many of them as of the others are enough.
            chosen = seen | (torch.from_numpy(generator.random(seen.shape)) < seen.float().mean())
            tokens.append(model.vision_tower(pixels).last_hidden_state[chosen])
            targets.append(wanted[chosen])
    return fit_projector(model.vision_proj, torch.cat(tokens), torch.cat(targets))


def fit_projector(projector: Any, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Trains a projector alone to give `targets` for `inputs`; returns the share of the variance that is missed."""
    projector.train().requires_grad_(True)
    steps = 1500
    optimizer = torch.optim.AdamW(projector.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (1024,), generator=generator)
        loss = torch.nn.functional.mse_loss(projector(inputs[chosen]), targets[chosen]) / targets.var()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


def train(stage: Stage, work: Path, folder: Path, quick: bool) -> dict[str, float]:
    """
    Trains a stage and saves a checkpoint in `folder`; returns the held-out figures.

    On CPUs with a process for each core, which share each batch: at this size two threads of one process are no faster
    than one.
    """
    processes = 1 if torch.cuda.is_available() else torch.get_num_threads()
    if processes == 1:
        return train_in_process(stage, work, folder, quick)
    config = LaunchConfig(1, 1, processes, run_id=folder.name, rdzv_backend="c10d", rdzv_endpoint="localhost:0")
    return elastic_launch(config, train_in_process)(stage, work, folder, quick)[0]


def train_in_process(stage: Stage, work: Path, folder: Path, quick: bool) -> dict[str, float]:
    """A process's share of `train`."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        torch.set_num_threads(1)
    before = work / stage.before / "model"
    # On CPUs, eager attention's backward takes a tenth of the time of PyTorch's fused one at these lengths.
    attention = None if torch.cuda.is_available() else "eager"
    model: Any = AutoModelForMultimodalLM.from_pretrained(before, dtype=torch.float32, attn_implementation=attention)
    processor = AutoProcessor.from_pretrained(before)
    if stage.encoder:
        put_encoder(work / stage.encoder / "model", model, processor)
        missed = (
            start_speech_projector(model, processor, work, 20 if quick else 2000)
            if stage.encoder == "speech_encoder"
            else start_vision_projector(model, processor, 48 if quick else 2400, corpus_seed(work))
        )
        sys.stderr.write(f"the projector starts with {missed:.3f} of the variance missed\n")
    settings = replace(
        AS_GENERATED,
        swap_codes=stage.swap,
        augmentation=SpeechAugmentation() if stage.augment else None,
    )
    train_set = MiniMindODataset(stage.files(work, "train"), processor, model.config, settings, 0)
    held_out = MiniMindODataset(stage.files(work, "eval"), processor, model.config, AS_WRITTEN, 0)
    steps = 3 if quick else stage.steps
    arguments = MiniMindOTrainingArguments(
        output_dir=str(folder / "run"),
        mode=stage.mode,
        learning_rate=stage.rate,
        talker_learning_rate=stage.talker_rate,
        min_learning_rate_ratio=stage.floor,
        codebook_weights=list(stage.codebook_weights) if stage.codebook_weights else None,
        max_steps=steps,
        per_device_train_batch_size=stage.batch // processes,
        per_device_eval_batch_size=64,
        eval_strategy="steps",
        eval_steps=1000,
        save_steps=1000,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        logging_steps=50,
        adam_beta2=0.98,
        use_cpu=not torch.cuda.is_available(),
        bf16=True,
        report_to="none",
        disable_tqdm=True,
        label_names=["labels"] if stage.silent else ["labels", "audio_labels"],
    )
    collator_class = SilentCollator if stage.silent else MiniMindODataCollator
    # Few different lengths: the CPU's kernels are compiled for each.
    collator = collator_class(processor, model.config, feature_masking=FeatureMasking(), pad_to_multiple_of=8)
    trainer = NanoTrainer(model, arguments, train_dataset=train_set, eval_dataset=held_out, data_collator=collator)
    trainer.own_codes = stage.own_codes
    if stage.silent:
        model.talker.requires_grad_(False)
    run = Path(arguments.output_dir)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(run)) if run.is_dir() else None)
    figures = trainer.evaluate()
    trainer.save_model(str(folder / "model"))
    trainer.save_state()
    if trainer.is_world_process_zero():
        processor.save_pretrained(folder / "model")
        (folder / "history.json").write_text(json.dumps(trainer.state.log_history), encoding="utf-8")
        plot_training_curves(trainer.state.log_history, folder / "figures.png")
        made_of = {"base model": stage.before, "training data": list(stage.data)}
        write_training_report(trainer, folder / "model", made_of)
    return {name: value for name, value in figures.items() if isinstance(value, float)}


def main(arguments: list[str] | None = None) -> None:
    """Trains one stage."""
    parser = stage_arguments(__doc__)
    parser.add_argument("stage", choices=STAGES)
    options = parser.parse_args(arguments)
    stage, work = STAGES[options.stage], options.work

    def make(folder: Path) -> dict:
        return train(stage, work, folder, options.quick)

    run_stage(work / options.stage, stage.inputs(work), stage.settings(options.quick), make)


if __name__ == "__main__":
    sys.exit(main())
