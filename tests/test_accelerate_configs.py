"""The `accelerate` configurations: accelerate reads them, they fit the model, and what they start trains as one
process does."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file

from minimind_o_hf import MiniMindOForConditionalGeneration

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {path.stem: path for path in sorted((ROOT / "training_scripts" / "accelerate").glob("*.yaml"))}
LAYERS = {False: "Qwen3DecoderLayer", True: "Qwen3MoeDecoderLayer"}


def commands(name):
    """The commands that a file's comments show."""
    lines = CONFIGS[name].read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("#").strip() for line in lines if line.startswith("#   accelerate launch")]


def parse(*arguments):
    return _validate_launch_command(launch_command_parser().parse_args(list(arguments)))[0]


def test_all_kinds_are_there():
    types = {name: load_config_from_file(str(path)).distributed_type.value for name, path in CONFIGS.items()}
    assert types == {"one_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_are_known(name, tmp_path):
    settings = yaml.safe_load(CONFIGS[name].read_text(encoding="utf-8"))
    known = {action.dest for action in launch_command_parser()._actions}
    for section in ("fsdp_config", "deepspeed_config"):
        # accelerate checks the keys of the first level only.
        assert set(settings.get(section, {})) <= known
    # The recipe says; a second opinion is refused by DeepSpeed's configuration.
    assert settings["mixed_precision"] == "no"
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump({**settings, "number_of_machines": 2}), encoding="utf-8")
    with pytest.raises(ValueError, match="number_of_machines"):
        load_config_from_file(str(changed))


@pytest.mark.parametrize("name", CONFIGS)
def test_commands_in_the_comments(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    shown = [shlex.split(command) for command in commands(name)]
    machines = []
    for words in shown:
        args = parse(*words[2:])
        assert Path(args.config_file).resolve() == CONFIGS[name]
        assert Path(args.training_script).is_file()
        assert args.training_script_args == ["RECIPE.yaml", "..."]
        machines.append(args.num_machines)
        if args.num_machines > 1:
            assert (args.num_processes, args.machine_rank, args.main_process_ip) == (8, 0, "10.0.0.1")
    assert (2 in machines) == (name != "one_gpu")


def test_fsdp2_wraps_the_decoder_layers(tiny_model, monkeypatch):
    monkeypatch.chdir(ROOT)
    wrapped = []
    for command in commands("fsdp2"):
        environment = prepare_multi_gpu_env(parse(*shlex.split(command)[2:], "--main_process_port", "0"))
        assert environment["ACCELERATE_USE_FSDP"] == "true"
        assert environment["FSDP_VERSION"] == "2"
        assert environment["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
        wrapped.append(environment["FSDP_TRANSFORMER_CLS_TO_WRAP"])
    assert wrapped == [LAYERS[False], LAYERS[False], LAYERS[True]]
    for use_moe, name in LAYERS.items():
        model = tiny_model(use_moe)
        names = [type(module).__name__ for module in model.modules()]
        assert names.count(name) == len(model.model.layers) + len(model.talker.layers)


def test_deepspeed_leaves_to_the_trainer_what_the_trainer_decides():
    args = parse("--config_file", str(CONFIGS["deepspeed"]), "--main_process_port", "0", "script.py")
    args.deepspeed_fields_from_accelerate_config = ""
    command, environment = prepare_deepspeed_cmd_env(args)
    assert command is None  # no ssh: torch's launcher, as of the others
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
    # The Trainer compares numbers here with its own, and fills in `auto`.
    assert environment["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "auto"
    assert environment["ACCELERATE_GRADIENT_CLIPPING"] == "auto"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    for what in ("OPTIMIZER", "PARAM"):
        assert environment[f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE"] == "none"


PROGRAM = """
import json, os, sys
from pathlib import Path
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from toy_training import SETTINGS, collate, make_samples
from minimind_o_hf import MiniMindOConfig, MiniMindOForConditionalGeneration
from minimind_o_hf.trainer import MiniMindOTrainer, MiniMindOTrainingArguments
from transformers.trainer_utils import get_last_checkpoint

folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
config = MiniMindOConfig(**json.loads((folder / "config.json").read_text()))

# Some samples have speech or a voice, so that processes differ in what their batches have.
samples = make_samples(24)
generator = torch.Generator().manual_seed(5)
for index, sample in enumerate(samples):
    if index % 4 == 0:
        sample["input_ids"][1:3] = config.audio_token_id
        sample["clip"] = torch.randn(2, config.audio_hidden_size, generator=generator)
    if index % 5 == 0:
        sample["audio_codes"][0, 1] = config.audio_spk_token
        sample["voice"] = torch.randn(config.spk_emb_size, generator=generator)

def collate_all(samples):
    batch = collate(samples)
    clips = [sample["clip"] for sample in samples if "clip" in sample]
    if clips:
        batch["audio_hidden_states"] = torch.stack(clips)
    if any("voice" in sample for sample in samples):
        none = torch.zeros(config.spk_emb_size)
        batch["speaker_embeddings"] = torch.stack([sample.get("voice", none) for sample in samples])
    return batch

class OnCpu(MiniMindOTrainer):
    def create_accelerator_and_postprocess(self):
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            # accelerate has FSDP for accelerators only, and without a word makes DDP of it on a CPU.
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()

torch.manual_seed(0)
model = MiniMindOForConditionalGeneration(config)
out = folder / "out"
arguments = MiniMindOTrainingArguments(output_dir=str(out), **{**SETTINGS, **settings})
trainer = OnCpu(model, arguments, train_dataset=samples, data_collator=collate_all)
trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)) if out.is_dir() else None)
trainer.save_model()
if trainer.is_world_process_zero():
    keys = ("loss", "text_loss", "audio_loss", "grad_norm")
    log = {
        "type": trainer.accelerator.distributed_type.value,
        "parameters": sorted({type(parameter).__name__ for parameter in trainer.model.parameters()}),
        "zero_stage": trainer.deepspeed.zero_optimization_stage() if trainer.is_deepspeed_enabled else None,
        "entries": [{key: entry[key] for key in keys} for entry in trainer.state.log_history if "text_loss" in entry],
    }
    (folder / "log.json").write_text(json.dumps(log))
if torch.distributed.is_initialized():
    # gloo's threads may abort a process that takes itself apart; what is tested has been written.
    torch.distributed.barrier()
    os._exit(0)
"""

# Plain gradient descent: AdamW's steps would not show whether gradients are clipped.
COMMON = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.5}
ONE = {**COMMON, "per_device_train_batch_size": 8}
TWO = {**COMMON, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_config):
    """Trains a toy model in a folder: `run(settings, *launchers, folder=None, use_moe=False)`, one launcher a
    machine; returns what it logged and the folder."""

    def launch(settings, *launchers, folder=None, use_moe=False):
        folder = folder or tmp_path_factory.mktemp("run")
        config = tiny_config(use_moe, audio_config=None, vision_config=None).to_dict()
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (folder / "program.py").write_text(PROGRAM, encoding="utf-8")
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}",
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        program = [str(folder / "program.py"), str(folder), json.dumps(settings)]
        started = []
        for index, launcher in enumerate(launchers or ((),)):
            with (folder / f"machine_{index}.txt").open("w", encoding="utf-8") as output:
                command = [sys.executable, *launcher, *program]
                started.append(subprocess.Popen(command, stdout=output, stderr=output, env=environment))
        try:
            codes = [process.wait(timeout=120) for process in started]
        finally:
            for process in started:
                process.kill()
        assert not any(codes), (folder / f"machine_{codes.index(max(codes, key=abs))}.txt").read_text("utf-8")[-5000:]
        return json.loads((folder / "log.json").read_text(encoding="utf-8")), folder

    return launch


@pytest.fixture(scope="module")
def one(run):
    """What one process does with the whole batch."""
    return run(ONE)


def launcher(name, *options):
    return "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS[name]), "--num_processes", "2", *options


def on_this_machine(name, *options):
    return launcher(name, "--main_process_port", str(free_port()), *options)


def on_two_machines(name):
    address = ("--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()))
    return [launcher(name, *address, "--machine_rank", str(rank)) for rank in range(2)]


def assert_same(found, expected):
    """The same logs, and the same tensors in a checkpoint that can be loaded."""
    (found, found_folder), (expected, expected_folder) = found, expected
    assert len(found["entries"]) == len(expected["entries"]) > 0
    for entry, wanted in zip(found["entries"], expected["entries"], strict=True):
        assert entry == pytest.approx(wanted, rel=1e-4)
    tensors, wanted = (load_file(folder / "out" / "model.safetensors") for folder in (found_folder, expected_folder))
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tensor.shape for name, tensor in wanted.items()
    }
    assert max(float((tensors[name] - wanted[name]).abs().max()) for name in wanted) < 1e-4
    model = MiniMindOForConditionalGeneration.from_pretrained(found_folder / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_gradients_are_clipped_here(one):
    assert min(entry["grad_norm"] for entry in one[0]["entries"]) > COMMON["max_grad_norm"]


def test_ddp_on_two_machines_is_one_process(run, one):
    found = run(TWO, *on_two_machines("ddp"))
    assert found[0]["type"] == "MULTI_CPU"
    assert_same(found, one)


def test_fsdp2_is_one_process(run, one):
    found = run(TWO, on_this_machine("fsdp2"))
    assert found[0]["type"] == "FSDP"
    assert found[0]["parameters"] == ["DTensor"]
    assert_same(found, one)


def run_twice(run, launch):
    """A run, and one that goes on from the checkpoint in its middle."""
    settings = {**TWO, "optim": "adamw_torch", "learning_rate": 5e-4, "max_steps": 4, "save_strategy": "steps"}
    whole, folder = run({**settings, "save_steps": 2}, launch())
    written = (folder / "out" / "model.safetensors").read_bytes()
    (folder / "out" / "model.safetensors").unlink()
    shutil.rmtree(folder / "out" / "checkpoint-4")
    resumed, _ = run({**settings, "save_steps": 2}, launch(), folder=folder)
    assert resumed["entries"] == whole["entries"]
    assert (folder / "out" / "model.safetensors").read_bytes() == written


@pytest.mark.slow
def test_fsdp2_resumes(run):
    run_twice(run, lambda: on_this_machine("fsdp2"))


@pytest.mark.slow
def test_fsdp2_mixture_of_experts_is_ddp(run):
    # Not one process: the auxiliary loss is not linear in the batch.
    expected = run(TWO, on_this_machine("ddp"), use_moe=True)
    layer = ("--fsdp_transformer_layer_cls_to_wrap", LAYERS[True])
    assert_same(run(TWO, on_this_machine("fsdp2", *layer), use_moe=True), expected)


@pytest.mark.slow
def test_fsdp2_logs_losses_that_are_not_rounded(run):
    # Of the precision of bfloat16, losses near 10 are multiples of 1 / 16.
    found, _ = run({**TWO, "bf16": True}, on_this_machine("fsdp2"))
    assert any(entry["loss"] * 16 % 1 for entry in found["entries"])
    expected, _ = run({**TWO, "bf16": True}, on_this_machine("ddp"))
    for entry, wanted in zip(found["entries"], expected["entries"], strict=True):
        assert entry == pytest.approx(wanted, rel=0.01)


@pytest.mark.slow
def test_deepspeed_is_one_process(run, one):
    pytest.importorskip("deepspeed")
    found = run(TWO, *on_two_machines("deepspeed"))
    assert (found[0]["type"], found[0]["zero_stage"]) == ("DEEPSPEED", 2)
    assert_same(found, one)


@pytest.mark.slow
def test_deepspeed_resumes(run):
    pytest.importorskip("deepspeed")
    run_twice(run, lambda: on_this_machine("deepspeed"))
