"""The Trainer: what it trains, how it divides its losses, what it logs, and that it can be stopped anywhere."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toy_training import SETTINGS, collate, make_samples

from minimind_o_hf.trainer import (
    MiniMindOTrainer,
    MiniMindOTrainingArguments,
    initialize_talker_from_thinker,
    set_trainable,
)


@pytest.fixture
def train(tiny_model, tmp_path):
    """Trains a fresh toy model; returns it and what was logged."""

    def run(use_moe=False, model=None, samples=None, collator=collate, **settings):
        model = model or tiny_model(use_moe, audio_config=None, vision_config=None)
        arguments = MiniMindOTrainingArguments(output_dir=str(tmp_path), **{**SETTINGS, "max_steps": 3, **settings})
        trainer = MiniMindOTrainer(model, arguments, train_dataset=samples or make_samples(24), data_collator=collator)
        trainer.train()
        return trainer

    return run


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry and "loss" in entry]


@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
def test_accumulated_is_one_batch(train, use_moe):
    whole = train(use_moe, per_device_train_batch_size=8)
    for size, steps in ((1, 8), (2, 4)):
        parts = train(use_moe, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        # The auxiliary loss is not linear in the batch; its share moves the rest by what it weighs.
        tolerance = 3e-3 if use_moe else 1e-5
        for name in ("loss", "grad_norm", "text_loss", "audio_loss", "codebook_3_loss"):
            assert logged(parts, name) == pytest.approx(logged(whole, name), rel=tolerance), name
    assert bool(logged(whole, "aux_loss")) == use_moe


def test_one_stream_alone_accumulates_the_same(train):
    samples = make_samples(8)

    def collate_text(batch):
        return {name: value for name, value in collate(batch).items() if name != "audio_labels"}

    def losses(size, steps):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 2}
        return train(samples=samples, collator=collate_text, **settings)

    whole, parts = losses(8, 1), losses(1, 8)
    for name in ("loss", "grad_norm"):
        assert logged(parts, name) == pytest.approx(logged(whole, name), rel=1e-5)
    assert not logged(whole, "audio_loss")
    with pytest.raises(ValueError, match="neither `labels` nor `audio_labels`"):
        train(samples=samples, collator=lambda batch: {"input_ids": collate_text(batch)["input_ids"]})


def test_loss_is_the_sum_of_its_parts(train):
    trainer = train(per_device_train_batch_size=4)
    for entry in trainer.state.log_history[:3]:
        assert entry["loss"] == pytest.approx(entry["text_loss"] + entry["audio_loss"], rel=1e-5)
        assert entry["audio_loss"] == pytest.approx(sum(entry[f"codebook_{i}_loss"] for i in range(8)) / 8, rel=1e-5)


def test_weights_of_codebooks_and_of_the_stop(train, tiny_model):
    equal = train(per_device_train_batch_size=4, max_steps=1)
    first = train(per_device_train_batch_size=4, max_steps=1, codebook_weights=[1.0] + [0.0] * 7)
    assert logged(first, "audio_loss") == pytest.approx(logged(equal, "codebook_0_loss"), rel=1e-5)
    model = tiny_model(audio_config=None, vision_config=None)
    train(model=model, max_steps=1, stop_weight=1.0)
    assert model.config.audio_stop_weight == 1.0
    with pytest.raises(ValueError, match="8 numbers"):
        train(codebook_weights=[1.0])


PARTS = {
    "thinker": ("model.", "lm_head."),
    "talker": ("talker.",),
    "audio_proj": ("audio_proj.",),
    "vision_proj": ("vision_proj.",),
}


@pytest.mark.parametrize("mode", ["all", "thinker", "talker", "audio_proj", "vision_proj"])
def test_modes(tiny_model, mode):
    model = tiny_model()
    set_trainable(model, mode)
    wanted = PARTS[mode] if mode in PARTS else tuple(prefix for part in PARTS.values() for prefix in part)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith(wanted), name


def test_frozen_backbone(tiny_model):
    model = tiny_model()
    set_trainable(model, "all", "all")
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.startswith(("model.", "lm_head")))
    assert all(p.requires_grad for p in model.talker.parameters())
    set_trainable(model, "all", "last1")
    free = {name for name, parameter in model.model.named_parameters() if parameter.requires_grad}
    assert free == {name for name, _ in model.model.named_parameters() if name.startswith("layers.2.")}
    with pytest.raises(ValueError, match="mode"):
        set_trainable(model, "everything")
    with pytest.raises(ValueError, match="freeze_backbone"):
        set_trainable(model, "all", "some")


def test_only_the_mode_s_part_changes(train, tiny_model):
    model = tiny_model(audio_config=None, vision_config=None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model=model, mode="talker", learning_rate=1e-2)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith("talker.") for name in changed)


def test_each_part_has_its_learning_rate_and_a_cosine_to_a_tenth(train):
    trainer = train(learning_rate=1e-3, talker_learning_rate=2e-3, projector_learning_rate=3e-3, max_steps=10)
    assert {group["part"] for group in trainer.optimizer.param_groups} == {"thinker", "talker", "projectors"}
    for part, rate in (("thinker", 1e-3), ("talker", 2e-3), ("projectors", 3e-3)):
        rates = logged(trainer, f"{part}_learning_rate")
        assert rates[-1] == pytest.approx(0.1 * rate, rel=1e-6)
        assert rates == sorted(rates, reverse=True)
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.01}


def test_talker_starts_from_the_thinker_s_last_layers(tiny_model):
    model = tiny_model(talker_hidden_size=64, intermediate_size=256, talker_intermediate_size=256)
    assert initialize_talker_from_thinker(model)
    for talker, thinker in zip(model.talker.layers, model.model.layers[-2:], strict=True):
        for name, tensor in talker.state_dict().items():
            assert torch.equal(tensor, thinker.state_dict()[name]), name
    other = tiny_model()
    before = {name: tensor.clone() for name, tensor in other.talker.state_dict().items()}
    assert not initialize_talker_from_thinker(other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.talker.state_dict().items())


def test_evaluation_counts_labels(train):
    trainer = train()
    trainer.args.per_device_eval_batch_size = 5
    samples = make_samples(13, seed=9)
    metrics = trainer.evaluate(samples)
    model = trainer.model.eval()
    with torch.no_grad():
        whole = model(**{k: v for k, v in collate(samples).items() if k != "row_ids"})
    assert metrics["eval_text_loss"] == pytest.approx(whole.text_loss.item(), rel=1e-4)
    assert metrics["eval_audio_loss"] == pytest.approx(whole.audio_loss.item(), rel=1e-4)
    assert metrics["eval_codebook_5_loss"] == pytest.approx(whole.codebook_losses[5].item(), rel=1e-4)
    assert 0 <= metrics["eval_token_accuracy"] <= 1
    assert 0 <= metrics["eval_code_accuracy"] <= 1


def test_a_loss_that_is_not_finite_names_its_rows(train, tiny_model):
    model = tiny_model(audio_config=None, vision_config=None)
    with torch.no_grad():
        model.model.embed_tokens.weight[300] = torch.nan
    samples = make_samples(4)
    samples[2]["input_ids"][0] = 300
    with pytest.raises(ValueError, match=r"loss is nan at step 0 in a batch of the rows \[.*2.*\]"):
        train(model=model, samples=samples, per_device_train_batch_size=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "sing"}, "mode"),
        ({"freeze_backbone": "half"}, "freeze_backbone"),
        ({"min_learning_rate_ratio": 2.0}, "min_learning_rate_ratio"),
    ],
)
def test_bad_arguments(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        MiniMindOTrainingArguments(output_dir=str(tmp_path), **settings)


@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
def test_gradient_checkpointing_and_bfloat16(train, use_moe):
    plain = train(use_moe)
    checkpointed = train(use_moe, gradient_checkpointing=True)
    assert logged(checkpointed, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)
    assert logged(checkpointed, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-4)
    half = train(use_moe, bf16=True)
    assert logged(half, "loss") == pytest.approx(logged(plain, "loss"), rel=0.02)


@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
def test_overfitted_conversations_are_answered_exactly(tiny_model, tmp_path, use_moe):
    """
    Eight conversations learnt by heart: greedy generation gives their text and their codes. A codebook that has
    stopped goes on in generation, and what it says is fed back; in training there is pad. So that the others learn not
    to listen, what follows a stop is random here.
    """
    from minimind_o_hf import apply_delay_pattern

    model = tiny_model(
        use_moe, audio_config=None, vision_config=None, hidden_size=128, talker_hidden_size=128, audio_adapter_rank=32
    )
    config = model.config
    generator = torch.Generator().manual_seed(1)
    samples, answers = [], []
    for index in range(8):
        prompt = torch.tensor([1, 40 + index, 60 + index, 234])
        text = torch.cat([torch.randint(70, 320, (4,), generator=generator), torch.tensor([2, 234])])
        codes = torch.randint(0, 32, (1, 8, 5), generator=generator)
        start, frames = len(prompt), codes.shape[-1]
        length = start + 1 + 8 + frames
        delayed, is_speech = apply_delay_pattern(
            codes, torch.tensor([start + 1]), length, config.audio_pad_token, config.audio_stop_token
        )
        ids = torch.cat([prompt, text, torch.zeros(length - len(prompt) - len(text), dtype=torch.long)])
        labels = ids.clone()
        labels[:start] = -100
        labels[start + len(text) :] = -100
        samples.append(
            {
                "input_ids": ids,
                "labels": labels,
                "audio_codes": delayed[0],
                "audio_labels": delayed[0].masked_fill(~is_speech[0], -100),
                "row_ids": torch.tensor(index),
            }
        )
        answers.append((prompt, text[:-1], codes[0]))
    arguments = MiniMindOTrainingArguments(
        output_dir=str(tmp_path),
        **{**SETTINGS, "logging_steps": 20},
        max_steps=160,
        per_device_train_batch_size=8,
        learning_rate=4e-3,
        weight_decay=0.0,
    )

    def collate_with_noise(batch):
        batch = collate(batch)
        codes = batch["audio_codes"]
        has_stopped = (codes == config.audio_stop_token).long().cumsum(dim=-1) - (
            codes == config.audio_stop_token
        ).long()
        batch["audio_codes"] = torch.where(has_stopped > 0, torch.randint(0, 36, codes.shape), codes)
        return batch

    trainer = MiniMindOTrainer(model, arguments, train_dataset=samples, data_collator=collate_with_noise)
    trainer.train()
    assert logged(trainer, "text_loss")[-1] < 0.05
    assert logged(trainer, "audio_loss")[-1] < 0.05
    model.eval()
    outputs = model.generate(
        torch.stack([prompt for prompt, _, _ in answers]),
        do_sample=False,
        max_new_tokens=40,
        audio_repetition_penalty=1.0,
    )
    for index, (_, text, codes) in enumerate(answers):
        row = outputs.sequences[index, 4:]
        assert row[: len(text)].tolist() == text.tolist()
        assert outputs.audio_codes_mask[index].sum() == codes.shape[1]
        assert torch.equal(outputs.audio_codes[index, :, : codes.shape[1]], codes)


def test_accuracies_count_labels(train, tiny_model):
    model = tiny_model(audio_config=None, vision_config=None)
    samples = make_samples(8)
    trainer = train(model=model, samples=samples, per_device_train_batch_size=8, max_steps=1, learning_rate=0.0)
    batch = {name: value for name, value in collate(samples).items() if name != "row_ids"}
    with torch.no_grad():
        output = model.eval()(**batch, return_predictions=True)
    labels, codes = batch["labels"][:, 1:], batch["audio_labels"][:, :, 1:]
    right = output.logits[:, :-1].argmax(-1) == labels
    right_codes = output.audio_logits[:, :, :-1].argmax(-1) == codes
    logs = trainer.state.log_history[0]
    assert logs["token_accuracy"] == pytest.approx((right[labels != -100]).float().mean().item())
    assert logs["code_accuracy"] == pytest.approx((right_codes[codes != -100]).float().mean().item())
    # Aligned with the labels, and nothing where there is none.
    assert torch.equal(
        output.predictions[batch["labels"] == -100],
        output.predictions.new_full((1,), -100).expand(int((batch["labels"] == -100).sum())),
    )
    assert torch.equal(output.predictions[:, 1:][labels != -100], output.logits[:, :-1].argmax(-1)[labels != -100])


def test_frames_are_diagonals(train, tiny_config):
    trainer = train(max_steps=1)
    stop = tiny_config().audio_stop_token
    # Codebook i of frame f stands at position 2 + i + f: three frames, then stops.
    labels = torch.full((1, 8, 16), -100)
    for codebook in range(8):
        labels[0, codebook, 2 + codebook : 5 + codebook] = torch.tensor([1, 2, 3])
        labels[0, codebook, 5 + codebook] = stop
    predictions = labels.clone()
    predictions[0, 4, 2 + 4 + 1] = 9  # one code of the second frame is wrong
    counts = trainer._zeros()
    output = SimpleNamespace(predictions=None, audio_predictions=predictions)
    trainer._count(counts, {"audio_labels": labels}, output)
    assert {name: int(value) for name, value in counts.items()} == {
        "codes": 32,
        "right_codes": 31,
        "frames": 3,
        "right_frames": 2,
    }


def test_figures_without_labels_are_left_out(train):
    silent = make_samples(12)
    for sample in silent:
        sample["audio_labels"] = torch.full_like(sample["audio_labels"], -100)
    trainer = train(samples=silent, per_device_train_batch_size=4)
    for entry in trainer.state.log_history[:3]:
        assert "text_loss" in entry
        assert not {"audio_loss", "code_accuracy", "codebook_0_loss"} & entry.keys()
    metrics = trainer.evaluate(silent)
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_text_loss"])
    assert "eval_audio_loss" not in metrics


@pytest.mark.parametrize("use_moe", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["dense", "moe"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_is_the_same(train, backend, use_moe):
    plain = train(use_moe, per_device_train_batch_size=8)
    torch.compiler.reset()
    compiled = train(
        use_moe, per_device_train_batch_size=8, torch_compile=True, torch_compile_backend=backend, max_steps=3
    )
    for name in ("loss", "text_loss", "audio_loss", "grad_norm"):
        assert logged(compiled, name) == pytest.approx(logged(plain, name), rel=1e-3 if use_moe else 1e-4), name


SCRIPT = """
import json, sys
from pathlib import Path
import torch
import toy_training
from minimind_o_hf import MiniMindOConfig, MiniMindOForConditionalGeneration
from minimind_o_hf.trainer import MiniMindOTrainer, MiniMindOTrainingArguments
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

folder, settings, kill_at = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])

class Stop(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        self.kill(state)
    def on_step_begin(self, args, state, control, **kwargs):
        self.kill(state)
    def kill(self, state):
        if state.global_step == kill_at:
            import os, signal
            os.kill(os.getpid(), signal.SIGKILL)

torch.manual_seed(0)
model = MiniMindOForConditionalGeneration(MiniMindOConfig(**json.loads(Path(folder, "config.json").read_text())))
arguments = MiniMindOTrainingArguments(output_dir=folder + "/out", **{**toy_training.SETTINGS, **settings})
trainer = MiniMindOTrainer(
    model, arguments, train_dataset=toy_training.make_samples(24), data_collator=toy_training.collate,
    callbacks=[Stop()]
)
last = get_last_checkpoint(folder + "/out") if Path(folder, "out").is_dir() else None
trainer.train(resume_from_checkpoint=last)
metrics = trainer.evaluate(toy_training.make_samples(11, seed=1))
if trainer.is_world_process_zero():
    Path(folder, "eval.json").write_text(json.dumps(metrics))
    keys = ("loss", "text_loss", "audio_loss", "grad_norm", "step")
    logs = [{k: e[k] for k in keys} for e in trainer.state.log_history if "text_loss" in e]
    Path(folder, "log.json").write_text(json.dumps(logs))
if torch.distributed.is_initialized():
    # gloo's threads may abort a process that takes itself apart; what is tested has been written.
    import os
    torch.distributed.barrier()
    os._exit(0)
"""


@pytest.fixture
def run_script(tmp_path, tiny_config):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    config = tiny_config(audio_config=None, vision_config=None).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parent.parent}",
        "OMP_NUM_THREADS": "1",
    }

    def run(settings, kill_at=-1, launcher=(), check=True):
        command = [
            sys.executable,
            *launcher,
            str(tmp_path / "script.py"),
            str(tmp_path),
            json.dumps(settings),
            str(kill_at),
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
        if check:
            assert done.returncode == 0, done.stderr[-3000:]
            return json.loads((tmp_path / "log.json").read_text(encoding="utf-8"))
        return done.returncode

    return run


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def assert_same_log(found, expected, rel=1e-5):
    assert [entry["step"] for entry in found] == [entry["step"] for entry in expected]
    for name in ("loss", "text_loss", "audio_loss", "grad_norm"):
        assert [entry[name] for entry in found] == pytest.approx([entry[name] for entry in expected], rel=rel), name


def test_two_processes_are_one_with_the_same_batch(run_script, tmp_path):
    # Evaluated on 11 samples, which do not fill the last batches of two processes.
    settings = {"max_steps": 3, "per_device_eval_batch_size": 2}

    def evaluated():
        metrics = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
        return {name: value for name, value in metrics.items() if "loss" in name or "accuracy" in name}

    one = run_script({**settings, "per_device_train_batch_size": 8})
    whole = evaluated()
    two = run_script(
        {**settings, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"},
        launcher=("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"),
    )
    assert_same_log(two, one, rel=1e-4)
    assert len(whole) >= 14
    assert evaluated() == pytest.approx(whole, rel=1e-4)


def test_a_killed_run_resumes_with_the_same_losses(run_script, tmp_path):
    settings = {"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole = run_script(settings)
    settings = {**settings, "save_strategy": "steps", "save_steps": 2}
    for kill_at in (3, 5):
        assert run_script(settings, kill_at, check=False) == -signal.SIGKILL
    assert_same_log(run_script(settings), whole)
