"""The training script: every recipe fits it, and it trains, saves, and goes on from files to a checkpoint."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor

from minimind_o_hf import MiniMindOConfig, MiniMindOForConditionalGeneration
from minimind_o_hf.presets import init_checkpoint

SCRIPTS = Path(__file__).resolve().parent.parent / "training_scripts"
RECIPES = sorted((SCRIPTS / "recipes").glob("*/*.yaml"))
STAGES = [path for path in RECIPES if path.parent.name != "voice"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_sft", SCRIPTS / "train_sft.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    return str(init_checkpoint("nano", tmp_path_factory.mktemp("script") / "nano"))


@pytest.fixture
def parquet(tmp_path):
    generator = np.random.default_rng(0)
    rows = {
        "conversations": [
            json.dumps([{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"It is {n}."}])
            for n in range(8)
        ],
        "answer_audios": [[generator.integers(512, size=8 * 6).tolist()] for _ in range(8)],
        "spk_emb": pa.array([[1.0] * 192] * 8, pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(rows), tmp_path / "train.parquet")
    return str(tmp_path / "train.parquet")


def test_there_is_a_recipe_for_every_stage():
    assert [path.stem for path in RECIPES if path.parent.name == "mini"] == ["1_t2a", "2_a2a_projector", "3_a2a"]
    assert len([path for path in RECIPES if path.parent.name == "full"]) == 7


@pytest.mark.parametrize("recipe", STAGES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipes_fit_the_script(script, tmp_path, recipe):
    options = ["--model", "some/model", "--train_files", "y", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    _, data, _, arguments = script.parse([str(recipe), *options])
    mode = {"projector": "audio_proj" if "a2a" in recipe.stem else "vision_proj"}.get(
        recipe.stem.split("_")[-1], "all"
    )
    assert arguments.mode == mode
    assert data.max_length in (512, 640, 768, 1024)
    assert arguments.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert arguments.weight_decay == 0.01


def test_unknown_options_of_a_recipe_are_named(script, tmp_path):
    (tmp_path / "bad.yaml").write_text("max_lenght: 512\n", encoding="utf-8")
    with pytest.raises(ValueError, match="max_lenght"):
        script.parse([str(tmp_path / "bad.yaml"), "--model", "some/model", "--train_files", "y", "--output_dir", "z"])


def run(script, nano, parquet, folder, *options):
    return script.main(
        [
            *("--model", nano, "--train_files", parquet, "--output_dir", str(folder), "--use_cpu", "true"),
            *(
                "--per_device_train_batch_size",
                "4",
                "--max_length",
                "128",
                "--report_to",
                "none",
                "--logging_steps",
                "1",
            ),
            *options,
        ]
    )


def test_from_a_file_to_a_complete_checkpoint(script, nano, parquet, tmp_path):
    options = ("--eval_files", parquet, "--augment", "false", "--learning_rate", "2e-3")
    trainer = run(script, nano, parquet, tmp_path / "run", "--max_steps", "6", *options)
    losses = [entry["audio_loss"] for entry in trainer.state.log_history if "audio_loss" in entry]
    assert losses[-1] < losses[0]
    metrics = json.loads((tmp_path / "run" / "eval_results.json").read_text(encoding="utf-8"))
    assert metrics["eval_audio_loss"] > 0
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / "run")
    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": "Say 3."}], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    answer = processor.decode(model.generate(**inputs, max_new_tokens=16, seeds=[0]))[0]
    assert answer.audio is not None


def test_an_interrupted_run_goes_on(script, nano, parquet, tmp_path):
    whole = run(script, nano, parquet, tmp_path / "whole", "--max_steps", "4")
    settings = ("--save_steps", "2", "--lr_scheduler_type", "cosine_with_min_lr")
    # As if killed after two of four steps: the second start finds the checkpoint.
    run(script, nano, parquet, tmp_path / "parts", "--max_steps", "4", *settings)
    shutil.rmtree(tmp_path / "parts" / "checkpoint-4")
    again = run(script, nano, parquet, tmp_path / "parts", "--max_steps", "4", *settings)
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], tensor, rtol=0, atol=1e-6)


def test_streaming_and_an_adapter(script, nano, parquet, tmp_path):
    trainer = run(
        script, nano, parquet, tmp_path / "run", "--max_steps", "3", "--streaming", "true", "--adapter", "talker"
    )
    assert trainer.state.global_step == 3
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def losses(folder):
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    logged = [entry for entry in state["log_history"] if "text_loss" in entry]
    return [(entry["text_loss"], entry["audio_loss"], entry["grad_norm"]) for entry in logged]


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_two_processes_read_what_one_reads(nano, mixed_parquet, tmp_path, streaming):
    """Speech, pictures and voices in some rows only, and a file that ends within a batch, over two epochs."""

    def start(name, batch_size, *launcher):
        options = ("--train_files", mixed_parquet, "--streaming", streaming, "--shuffle_buffer", "8")
        settings = {
            "model": nano,
            "output_dir": tmp_path / name,
            "max_steps": 5,
            "logging_steps": 1,
            "per_device_train_batch_size": batch_size,
            "augment": "false",
            "report_to": "none",
            "use_cpu": "true",
            "save_strategy": "no",
            "disable_tqdm": "true",
        }
        options += tuple(word for key, value in settings.items() for word in (f"--{key}", value))
        command = [sys.executable, *launcher, SCRIPTS / "train_sft.py", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        return losses(tmp_path / name)

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}")
    one, two = start("one", 10), start("two", 5, *launcher)
    assert len(one) == 5
    np.testing.assert_allclose(two, one, rtol=1e-3)


def test_a_mixture_of_experts_with_everything_on(script, tmp_path, nano, mixed_parquet):
    """Cached features, packing, samples, a held-out file, on a model with experts."""
    config = MiniMindOConfig.from_pretrained(nano, use_moe=True)
    shutil.copytree(nano, tmp_path / "moe")
    (tmp_path / "moe" / "model.safetensors").unlink()
    MiniMindOForConditionalGeneration(config).save_pretrained(tmp_path / "moe")
    trainer = run(
        *(script, str(tmp_path / "moe"), str(mixed_parquet), tmp_path / "run", "--max_steps", "4"),
        *("--cache_features", str(tmp_path / "cache"), "--packing", "true", "--pack_length", "200"),
        *("--eval_files", str(mixed_parquet), "--sample_steps", "2", "--sample_tokens", "12"),
        *("--sample_prompts", "Hello?", "--sample_voice", "alba"),
    )
    logged = set().union(*trainer.state.log_history)
    assert {"aux_loss", "text_loss", "audio_loss", "token_accuracy", "frame_accuracy", "sample_0"} <= logged
    folder = tmp_path / "run"
    assert (folder / "samples" / "step-4" / "0.wav").exists()
    assert len(list((tmp_path / "cache").glob("*/speech-*.arrow"))) == 1
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "| eval audio loss |" in card
    assert "| input speech | as it is |" in card
    again = MiniMindOForConditionalGeneration.from_pretrained(folder)
    assert again.config.use_moe
    assert AutoProcessor.from_pretrained(folder).audio_tokenizer is not None


def test_augmentation_of_cached_features_is_refused(script):
    options = ("--train_files", "y", "--output_dir", "z", "--augment", "true", "--cache_features", "c")
    with pytest.raises(ValueError, match="as it is"):
        script.parse(["--model", "some/model", *options])


def trained_losses(trainer):
    return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "text_loss" in entry]


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_finished_run_stays_as_it_is_and_a_resumed_one_is_the_same(script, nano, mixed_parquet, tmp_path, streaming):
    """Five steps over 24 rows: the second pass over the files is under way."""

    def start(folder, steps, *options):
        settings = ("--max_steps", steps, "--streaming", streaming, "--shuffle_buffer", "6", "--augment", "false")
        settings += ("--per_device_train_batch_size", "4", "--save_steps", "7")
        return run(script, nano, str(mixed_parquet), tmp_path / folder, *settings, *options)

    whole = start("whole", "9")
    before = (tmp_path / "whole" / "model.safetensors").read_bytes()
    again = start("whole", "9")
    assert again.state.global_step == 9
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == before
    # As if killed after step 7, in the second pass.
    shutil.copytree(tmp_path / "whole" / "checkpoint-7", tmp_path / "parts" / "checkpoint-7")
    parts = start("parts", "9")
    np.testing.assert_allclose(trained_losses(parts), trained_losses(whole), rtol=1e-5)


def test_streamed_batches_accumulate_over_the_end_of_a_pass(script, nano, mixed_parquet, tmp_path):
    settings = ("--max_steps", "8", "--streaming", "true", "--shuffle_buffer", "0", "--augment", "false")
    settings += ("--save_strategy", "no", "--max_length", "96")
    logs = []
    for name, size, steps in (("whole", "5", "1"), ("parts", "1", "5")):
        options = ("--per_device_train_batch_size", size, "--gradient_accumulation_steps", steps)
        logs.append(trained_losses(run(script, nano, str(mixed_parquet), tmp_path / name, *settings, *options)))
    np.testing.assert_allclose(logs[1], logs[0], rtol=2e-4)


def test_samples_leave_the_log_as_it_is(script, nano, parquet, tmp_path):
    options = ("--max_steps", "4", "--sample_steps", "2", "--sample_tokens", "4")
    trainer = run(script, nano, parquet, tmp_path / "run", *options)
    assert [step for step, _ in trained_losses(trainer)] == [1, 2, 3, 4]


def test_another_run_in_the_same_folder_is_refused(script, nano, parquet, mixed_parquet, tmp_path):
    run(script, nano, parquet, tmp_path / "run", "--max_steps", "2")
    with pytest.raises(ValueError, match="holds a run with another train_files"):
        run(script, nano, str(mixed_parquet), tmp_path / "run", "--max_steps", "2")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("streaming: true", "--streaming needs --max_steps"),
        ("adapter: foo", "thinker, talker, all, got 'foo'"),
        ("train_codec: true", "name one with --adapter"),
        ("{adapter: talker, mode: thinker}", "leave --mode"),
        ("{mode: talker, freeze_backbone: all}", "goes with mode 'all'"),
        ("swap_probability: 3", "from 0 to 1, got 3"),
        ("{cache_features: c, cache_dtype: float16}", "float32, bfloat16, got 'float16'"),
        ("stop_weight: -1", "at least 0, got -1"),
        ("codebook_weights: [0, 0, 0, 0, 0, 0, 0, 0]", "one above it"),
        ("model: nowhere", "no directory nowhere"),
        ("- a list", "must hold options"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(script, nano, tmp_path, settings, message):
    (tmp_path / "bad.yaml").write_text(settings, encoding="utf-8")
    options = ["--train_files", "y", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    options += [] if "nowhere" in settings else ["--model", nano]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        script.parse([str(tmp_path / "bad.yaml"), *options])


def test_nothing_in_a_recipe_is_nothing(script, nano, tmp_path):
    recipe = "cache_features: null\neval_files: []\nadapter: null\nlr_scheduler_kwargs: {min_lr_rate: 0.5}\n"
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    options = ["--model", nano, "--train_files", "y", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    model, data, _, arguments = script.parse([str(tmp_path / "recipe.yaml"), *options])
    assert (model.adapter, data.cache_features, data.eval_files, data.augment) == (None, None, None, True)
    assert arguments.lr_scheduler_kwargs == {"min_lr_rate": 0.5}
