"""What a run leaves to look at: spoken samples, curves, and its section of the model card."""

import re

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from minimind_o_hf import MiniMindOForConditionalGeneration
from minimind_o_hf.data import MiniMindODataCollator, MiniMindODataset, SampleSettings
from minimind_o_hf.trainer import MiniMindOTrainer, MiniMindOTrainingArguments
from minimind_o_hf.training_report import SECTION, SampleCallback, plot_training_curves, write_training_report


@pytest.fixture
def train(tmp_path, nano, mixed_parquet, processor, config):
    def run(sample_every=None, **settings):
        dataset = MiniMindODataset(mixed_parquet, processor, config, SampleSettings.deterministic(256))
        arguments = MiniMindOTrainingArguments(
            output_dir=str(tmp_path / "run"),
            use_cpu=True,
            save_strategy="no",
            logging_steps=1,
            max_steps=4,
            per_device_train_batch_size=2,
            disable_tqdm=True,
            **{"report_to": [], **settings},
        )
        trainer = MiniMindOTrainer(
            MiniMindOForConditionalGeneration.from_pretrained(nano),
            arguments,
            train_dataset=dataset,
            eval_dataset=dataset,
            data_collator=MiniMindODataCollator(processor, config),
        )
        if sample_every:
            callback = SampleCallback(
                trainer, processor, ["Hello?", [{"role": "user", "content": "你好"}]], sample_every, 24, "alba"
            )
            trainer.add_callback(callback)
        trainer.train()
        return trainer

    return run


def test_samples_are_written_and_logged(train, tmp_path):
    trainer = train(sample_every=2, report_to=["tensorboard"])
    folder = tmp_path / "run" / "samples"
    assert sorted(path.name for path in folder.iterdir()) == ["step-2", "step-4"]
    for step in ("step-2", "step-4"):
        assert sorted(path.name for path in (folder / step).iterdir()) == ["0.txt", "0.wav", "1.txt", "1.wav"]
        samples, rate = soundfile.read(folder / step / "0.wav")
        assert rate == 24000
        assert len(samples) >= 1920
        assert np.isfinite(samples).all()
    logged = [entry for entry in trainer.state.log_history if "sample_0" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    assert logged[0]["sample_0"] == (folder / "step-2" / "0.txt").read_text(encoding="utf-8")

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((tmp_path / "run").rglob("events.*"))))
    events.Reload()
    tags = events.Tags()
    assert {"samples/0", "samples/1"} <= set(tags["audio"])
    assert any("sample_0" in tag for tag in tags["tensors"])
    wanted = {"loss", "text_loss", "audio_loss", "codebook_7_loss", "token_accuracy", "frame_accuracy"}
    assert {f"train/{name}" for name in wanted | {"thinker_learning_rate"}} <= set(tags["scalars"])


def test_samples_do_not_change_the_training(train):
    plain, sampled = train(), train(sample_every=1)
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(sampled.model.state_dict()[name], tensor), name
    assert sampled.model.training


def test_bad_samples(train):
    trainer = train()
    for prompts, every in (([], 1), (["Hello?"], 0)):
        with pytest.raises(ValueError, match="Samples need prompts"):
            SampleCallback(trainer, trainer.data_collator.processor, prompts, every)


def test_curves_and_model_card(train, tmp_path):
    trainer = train(eval_strategy="steps", eval_steps=2, talker_learning_rate=1e-4)
    write_training_report(trainer, tmp_path / "run", {"base model": "some/base", "training data": ["a|b.parquet"]})
    with Image.open(tmp_path / "run" / "training_curves.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape[0] > 500
    # Lines are coloured, axes and text are grey.
    assert ((pixels.max(axis=-1) - pixels.min(axis=-1)) > 60).sum() > 1000
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "fine-tuned from `some/base`" in card
    assert r"| training data | a\|b.parquet |" in card
    assert "| optimiser steps | 4 |" in card
    assert "| talker learning rate | 0.0001 |" in card
    found = re.search(r"\| eval audio loss \| ([\d.]+) \| ([\d.]+) \|", card)
    metrics = [entry["eval_audio_loss"] for entry in trainer.state.log_history if "eval_audio_loss" in entry]
    assert [float(value) for value in found.groups()] == pytest.approx([metrics[0], metrics[-1]], abs=1e-4)
    assert str(tmp_path) not in card

    # Again, into a card with words of its own: they stay, and the section is replaced.
    (tmp_path / "run" / "README.md").write_text(f"Before.\n{card}\nAfter.\n", encoding="utf-8")
    write_training_report(trainer, tmp_path / "run")
    again = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert again.startswith("Before.\n")
    assert again.endswith("After.\n")
    assert [again.count(mark) for mark in SECTION] == [1, 1]


def test_curves_of_nothing(tmp_path):
    plot_training_curves([], tmp_path / "empty.png")
    with Image.open(tmp_path / "empty.png") as image:
        assert image.width > 500
