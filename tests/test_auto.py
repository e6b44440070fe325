"""Importing the package is enough: the Auto classes load its checkpoints and the original release's, without remote
code."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForTextToWaveform,
    AutoProcessor,
)

from minimind_o_hf import (
    MiniMindOConfig,
    MiniMindOFeatureExtractor,
    MiniMindOForConditionalGeneration,
    MiniMindOProcessor,
)
from minimind_o_hf.presets import build_tokenizer

AUTO_MODELS = [AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoModelForTextToWaveform]


@pytest.fixture
def original_directory(tmp_path, tiny_model):
    """The release's layout: a flat config with an `auto_map` to code that must not run, a pickle, no encoders."""
    model = tiny_model(audio_config=None, vision_config=None)
    config = {
        name: value
        for name, value in model.config.to_dict().items()
        if not name.startswith(("talker_num", "talker_h", "talker_i", "talker_m", "talker_n", "talker_r"))
    }
    config |= {name: getattr(model.config, name) for name in ("talker_hidden_size", "talker_num_attention_heads")}
    config["talker_num_key_value_heads"] = model.config.talker_num_key_value_heads
    config["auto_map"] = {
        "AutoConfig": "model_omni.OmniConfig",
        "AutoModelForCausalLM": "model_omni.MiniMindOmni",
    }
    config["architectures"] = ["MiniMindOmni"]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "model_omni.py").write_text("raise SystemExit('remote code was run')", encoding="utf-8")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    build_tokenizer().save_pretrained(tmp_path)
    return tmp_path, model


@pytest.mark.parametrize("auto_class", AUTO_MODELS, ids=lambda auto_class: auto_class.__name__)
@pytest.mark.parametrize("trust_remote_code", [True, False, None])
def test_original_directory_needs_no_remote_code(original_directory, auto_class, trust_remote_code):
    directory, model = original_directory
    loaded = auto_class.from_pretrained(directory, trust_remote_code=trust_remote_code)
    assert type(loaded) is MiniMindOForConditionalGeneration
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_original_directory_gives_config_and_processor(original_directory):
    directory, _ = original_directory
    assert type(AutoConfig.from_pretrained(directory, trust_remote_code=True)) is MiniMindOConfig
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    assert type(processor) is MiniMindOProcessor
    assert type(processor.feature_extractor) is MiniMindOFeatureExtractor


@pytest.mark.parametrize("auto_class", AUTO_MODELS, ids=lambda auto_class: auto_class.__name__)
def test_auto_models(nano, auto_class):
    assert type(auto_class.from_pretrained(nano)) is MiniMindOForConditionalGeneration


def test_auto_model_from_config(tiny_config):
    assert type(AutoModel.from_config(tiny_config())) is MiniMindOForConditionalGeneration


def test_auto_processor_and_parts(nano):
    assert type(AutoConfig.from_pretrained(nano)) is MiniMindOConfig
    assert type(AutoProcessor.from_pretrained(nano)) is MiniMindOProcessor
    assert type(AutoFeatureExtractor.from_pretrained(nano)) is MiniMindOFeatureExtractor


@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
def test_generates_where_the_package_is_not_installed(nano, tmp_path, use_moe):
    """A directory saved after `register_for_auto_class()` carries its code: it gives the same codes elsewhere."""
    script = tmp_path / "save.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, torch
            from transformers import AutoModel, AutoProcessor
            import minimind_o_hf
            from minimind_o_hf import *

            source, target, use_moe = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
            MiniMindOForConditionalGeneration.register_for_auto_class()
            MiniMindOProcessor.register_for_auto_class()
            model, processor = AutoModel.from_pretrained(source), AutoProcessor.from_pretrained(source)
            if use_moe:
                torch.manual_seed(0)
                config = model.config.to_dict() | {"use_moe": True, "num_hidden_layers": 2, "bridge_layer": 0}
                model = MiniMindOForConditionalGeneration(MiniMindOConfig(**config)).eval()
            model.save_pretrained(target)
            processor.save_pretrained(target)
            """
        )
        + (
            generate := textwrap.dedent(
                """
                chat = [{"role": "user", "content": "Hello"}]
                inputs = processor.apply_chat_template(
                    chat, tokenize=True, return_dict=True, add_generation_prompt=True,
                    voice=sorted(processor.voices)[0]
                )
                outputs = model.generate(**inputs, seeds=[1], max_new_tokens=24)
                print(outputs.sequences.tolist(), outputs.audio_codes.tolist())
                """
            )
        ),
        encoding="utf-8",
    )
    load = tmp_path / "load.py"
    load.write_text(
        textwrap.dedent(
            """
            import sys

            class Blocked:
                def find_spec(self, name, path=None, target=None):
                    if name.split(".")[0] == "minimind_o_hf":
                        raise ImportError("minimind_o_hf is not installed here")

            sys.meta_path.insert(0, Blocked())
            from transformers import AutoModel, AutoProcessor
            model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
            processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
            assert type(model).__module__.startswith("transformers_modules."), type(model)
            """
        )
        + generate,
        encoding="utf-8",
    )

    def run(*command):
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            capture_output=True,
            text=True,
            env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
            cwd=tmp_path,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().splitlines()[-1]

    here = run(script, nano, tmp_path / "published", use_moe)
    there = run(load, tmp_path / "published")
    assert there == here
    assert "[[[" in here
