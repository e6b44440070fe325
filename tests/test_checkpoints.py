"""Checkpoints: whole or not there, on a full disk and when the process is killed while it writes."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from safetensors import safe_open
from toy_training import SETTINGS, collate, make_samples

from minimind_o_hf import MiniMindOForConditionalGeneration
from minimind_o_hf.checkpoints import STAGING
from minimind_o_hf.trainer import MiniMindOTrainer, MiniMindOTrainingArguments


@pytest.fixture
def train(tiny_model, tmp_path):
    """Trains a toy model for four steps, saving every second."""

    def run(resume=False, **settings):
        settings = {**SETTINGS, "save_strategy": "steps", "save_steps": 2, "max_steps": 4, **settings}
        trainer = MiniMindOTrainer(
            tiny_model(audio_config=None, vision_config=None),
            MiniMindOTrainingArguments(output_dir=str(tmp_path / "run"), **settings),
            train_dataset=make_samples(24),
            eval_dataset=make_samples(8, seed=1),
            data_collator=collate,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_names_and_rotation(train, tmp_path):
    train(save_steps=1, save_total_limit=2)
    assert names(tmp_path / "run") == ["checkpoint-3", "checkpoint-4"]
    kept = names(tmp_path / "run" / "checkpoint-4")
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"} <= set(kept)


def test_the_best_is_known_by_its_name(train, tmp_path):
    trainer = train(
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        learning_rate=1e-2,
    )
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path / "run"
    assert best.is_dir()
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        assert STAGING not in (state["best_model_checkpoint"] or "")


def test_what_was_left_half_written_is_removed_and_not_resumed_from(train, tmp_path):
    train()
    left = tmp_path / "run" / STAGING / "checkpoint-6"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    trainer = train(resume=True, max_steps=6)
    assert trainer.state.global_step == 6
    assert names(tmp_path / "run") == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_saving_a_step_again_replaces_it(train, tmp_path):
    trainer = train()
    trainer._save_checkpoint(trainer.model, None)
    assert names(tmp_path / "run") == ["checkpoint-2", "checkpoint-4"]
    with safe_open(tmp_path / "run" / "checkpoint-4" / "model.safetensors", "pt") as file:
        assert "talker.norm.weight" in file.keys()  # noqa: SIM118


def test_the_last_model_is_written_beside_and_renamed(train, tmp_path):
    trainer = train(save_strategy="no")
    trainer.save_model()
    first = (tmp_path / "run" / "model.safetensors").stat().st_ino
    trainer.save_model()
    assert (tmp_path / "run" / "model.safetensors").stat().st_ino != first
    assert STAGING not in names(tmp_path / "run")
    MiniMindOForConditionalGeneration.from_pretrained(tmp_path / "run")
    trainer.save_model(str(tmp_path / "elsewhere"))
    MiniMindOForConditionalGeneration.from_pretrained(tmp_path / "elsewhere")


# The model takes 1 MB, its optimiser's state 2 MB.
PROGRAM = """
import json, os, resource, signal, sys, threading, time
from pathlib import Path
import torch
from toy_training import SETTINGS, collate, make_samples
from minimind_o_hf import MiniMindOConfig, MiniMindOForConditionalGeneration
from minimind_o_hf.trainer import MiniMindOTrainer, MiniMindOTrainingArguments

folder, what = Path(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
model = MiniMindOForConditionalGeneration(MiniMindOConfig(**json.loads((folder / "config.json").read_text())))
arguments = MiniMindOTrainingArguments(
    output_dir=str(folder / "run"), **{**SETTINGS, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
)

class Trainer(MiniMindOTrainer):
    def _save_checkpoint(self, *args):
        if self.state.global_step == 4:
            # A limit on the size of files, in place of a full disk: writing more fails all the same.
            if what.startswith("full"):
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(what[4:]), resource.RLIM_INFINITY))
            elif what.startswith("kill"):
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel kills it in the middle of a write
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(what[4:]), resource.RLIM_INFINITY))
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        super()._save_checkpoint(*args)

trainer = Trainer(model, arguments, train_dataset=make_samples(24), data_collator=collate)
last = (folder / "run").is_dir() and any((folder / "run").glob("checkpoint-*"))
trainer.train(resume_from_checkpoint=last)
losses = [entry["loss"] for entry in trainer.state.log_history if "text_loss" in entry]
(folder / f"{what}.json").write_text(json.dumps(losses))
"""


@pytest.fixture
def program(tmp_path, tiny_config):
    config = tiny_config(audio_config=None, vision_config=None).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM), encoding="utf-8")

    def run(what):
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, str(tmp_path / "program.py"), str(tmp_path), what],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
            timeout=120,
        )

    return run


@pytest.mark.parametrize(
    ("what", "status"),
    # In the weights; in the optimiser's state, which is written after them; killed in either.
    [
        pytest.param("full300000", 1, marks=pytest.mark.slow),
        ("full1500000", 1),
        pytest.param("kill300000", -signal.SIGXFSZ, marks=pytest.mark.slow),
        ("kill1500000", -signal.SIGXFSZ),
    ],
)
def test_a_full_disk_and_a_kill_while_saving(program, tmp_path, what, status):
    done = program(what)
    assert done.returncode == status, done.stderr[-2000:]
    if status == 1:
        assert "The checkpoint of step 4 could not be written" in done.stderr
        assert "checkpoint-2" in done.stderr.splitlines()[-1]
        assert names(tmp_path / "run") == ["checkpoint-2"]
    else:
        assert [name for name in names(tmp_path / "run") if name != STAGING] == ["checkpoint-2"]
    again = program("whole")
    assert again.returncode == 0, again.stderr[-2000:]
    assert names(tmp_path / "run") == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert len(json.loads((tmp_path / "whole.json").read_text(encoding="utf-8"))) == 6
