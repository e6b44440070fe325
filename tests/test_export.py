"""The Thinker as a plain Qwen3 checkpoint: transformers alone loads it, and it says the same."""

import json
import subprocess
import sys

import pytest
import torch
from jinja2 import TemplateError
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from minimind_o_hf import MiniMindOConfig, MiniMindOForConditionalGeneration, MiniMindOProcessor, default_checkpoint
from minimind_o_hf.cli import main
from minimind_o_hf.export import export_thinker, load_whole, thinker_as_qwen3

QUESTION = [{"role": "user", "content": "What is three plus four?"}]


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """The packaged nano's Thinker."""
    return export_thinker(default_checkpoint(), tmp_path_factory.mktemp("export") / "thinker")


@pytest.fixture(scope="module")
def whole():
    """The packaged nano."""
    return load_whole(default_checkpoint())


@pytest.fixture
def checkpoint(tmp_path, tiny_model, processor):
    """Saves a toy model with a tokenizer: `checkpoint(use_moe, **overrides)`."""

    def make(use_moe: bool = False, **overrides):
        model = tiny_model(use_moe, **{"vocab_size": 1024, **overrides})
        MiniMindOProcessor.save_pretrained(processor, tmp_path / "whole")
        model.save_pretrained(tmp_path / "whole")
        return tmp_path / "whole", model

    return make


@torch.no_grad()
def logits(model, input_ids):
    return model(input_ids=input_ids, **({"run_talker": False} if hasattr(model, "talker") else {})).logits


def test_nano_has_the_same_logits_and_text(thinker, whole):
    qwen3 = AutoModelForCausalLM.from_pretrained(thinker)
    assert type(qwen3).__name__ == "Qwen3ForCausalLM"
    assert qwen3.lm_head.weight is qwen3.model.embed_tokens.weight
    input_ids = torch.randint(whole.config.vocab_size, (2, 50))
    assert torch.equal(logits(qwen3, input_ids), logits(whole, input_ids))
    inputs = AutoTokenizer.from_pretrained(thinker).apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    said = whole.generate(**inputs, do_sample=False, generation_mode="text").sequences
    assert torch.equal(qwen3.generate(**inputs, do_sample=False), said)


def test_transformers_alone_loads_it(thinker, whole, tmp_path):
    program = f"""
import sys
sys.modules["minimind_o_hf"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(thinker)!r})
tokenizer = AutoTokenizer.from_pretrained({str(thinker)!r})
ids = tokenizer.apply_chat_template({QUESTION!r}, add_generation_prompt=True, return_tensors="pt", return_dict=True)
with torch.no_grad():
    save_file({{"ids": ids["input_ids"], "logits": model(**ids).logits}}, {str(tmp_path / "out.safetensors")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)
    found = load_file(tmp_path / "out.safetensors")
    wanted = MiniMindOProcessor.from_pretrained(default_checkpoint()).apply_chat_template(
        QUESTION, add_generation_prompt=True, tokenize=True, return_tensors="pt", return_dict=True
    )
    assert torch.equal(found["ids"], wanted["input_ids"])
    # Another process may sum in another order.
    torch.testing.assert_close(found["logits"], logits(whole, wanted["input_ids"]), atol=1e-5, rtol=0)


def test_files_name_nothing_of_this_package(thinker):
    assert {file.name for file in thinker.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    texts = [file.read_text(encoding="utf-8") for file in thinker.glob("*.json")]
    assert not any("minimind" in text.lower() for text in texts)
    config = json.loads((thinker / "config.json").read_text(encoding="utf-8"))
    assert (config["eos_token_id"], config["bos_token_id"], config["use_cache"]) == (2, 1, True)
    settings = json.loads((thinker / "generation_config.json").read_text(encoding="utf-8"))
    assert settings["suppress_tokens"] == [12, 16]
    assert not any(name.startswith("audio") for name in settings)


@pytest.mark.parametrize(
    ("use_moe", "overrides"),
    [
        (False, {"tie_word_embeddings": False, "head_dim": 24}),
        (False, {"inference_rope_scaling": True, "max_position_embeddings": 4096}),
        (False, {"rms_norm_eps": 1e-3, "hidden_act": "gelu", "rope_theta": 1e4}),
        (True, {}),
        (True, {"num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": False, "moe_intermediate_size": 96}),
        (True, {"tie_word_embeddings": False, "inference_rope_scaling": True, "max_position_embeddings": 4096}),
    ],
)
def test_every_setting_is_carried_over(checkpoint, tmp_path, use_moe, overrides):
    source, model = checkpoint(use_moe, **overrides)
    qwen3 = AutoModelForCausalLM.from_pretrained(export_thinker(source, tmp_path / "thinker"))
    assert type(qwen3).__name__ == ("Qwen3MoeForCausalLM" if use_moe else "Qwen3ForCausalLM")
    # Beyond YaRN's original length of 2,048, where that is on.
    input_ids = torch.randint(1024, (1, 2100 if model.config.inference_rope_scaling else 60))
    assert torch.equal(logits(qwen3, input_ids), logits(model, input_ids))


def test_experts_are_saved_one_by_one(checkpoint, tmp_path):
    """The layout of every released Qwen3-MoE, which other engines read."""
    source, model = checkpoint(True)
    with safe_open(export_thinker(source, tmp_path / "thinker") / "model.safetensors", "pt") as file:
        gate = file.get_tensor("model.layers.1.mlp.experts.3.gate_proj.weight")
        assert "model.layers.1.mlp.gate.weight" in file.keys()  # noqa: SIM118 - not a dict
    size = model.config.moe_intermediate_size
    assert torch.equal(gate, model.model.layers[1].mlp.experts.gate_up_proj[3, :size])


def test_the_dtype_stays(checkpoint, tmp_path):
    source, model = checkpoint()
    model.to(torch.bfloat16).save_pretrained(source)
    state = load_file(export_thinker(source, tmp_path / "thinker") / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    config = json.loads((tmp_path / "thinker" / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "bfloat16"


def test_speech_and_pictures_are_refused(thinker):
    tokenizer = AutoTokenizer.from_pretrained(thinker)
    content = [{"type": "text", "text": "What is three plus four?"}]
    as_list = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    assert as_list == tokenizer.apply_chat_template(QUESTION, tokenize=False)
    content.append({"type": "audio", "path": "question.wav"})
    with pytest.raises(TemplateError, match="reads text only, got audio"):
        tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)


def test_quantised_weights_are_refused(checkpoint, tmp_path):
    source, _ = checkpoint()
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "torchao"}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"quantised \(torchao\): export the checkpoint they were made from"):
        export_thinker(source, tmp_path / "thinker")
    assert not (tmp_path / "thinker").exists()


def test_an_adapter_is_refused(tiny_model):
    from peft import LoraConfig

    model = tiny_model()
    model.add_adapter(LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(ValueError, match="Merge adapters into the model first"):
        thinker_as_qwen3(model)


def test_another_models_tokenizer_is_refused(checkpoint, tmp_path):
    source, _ = checkpoint(vocab_size=320)
    with pytest.raises(ValueError, match="has 1024 tokens, and the model a vocabulary of 320"):
        export_thinker(source, tmp_path / "thinker")
    assert not (tmp_path / "thinker").exists()


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "thinker", str(default_checkpoint()), "--to", "qwen3"]) == 0
    assert capsys.readouterr().out == "nano-qwen3: done.\n"
    assert (tmp_path / "nano-qwen3" / "model.safetensors").is_file()
    assert main(["export", "thinker", str(default_checkpoint()), "--to", "qwen3"]) == 1
    assert "exists and is not empty" in capsys.readouterr().err
    assert main(["export", "thinker", str(default_checkpoint()), "--to", "qwen3", "--overwrite"]) == 0
    with pytest.raises(SystemExit):
        main(["export", "thinker", str(default_checkpoint()), "--to", "llama"])


def test_the_model_itself_is_left_as_it_was(tiny_model):
    model = tiny_model(True)
    input_ids = torch.randint(320, (1, 8))
    before = logits(model, input_ids)
    config = MiniMindOConfig.from_dict(model.config.to_dict()).to_dict()
    thinker_as_qwen3(model)
    assert torch.equal(logits(model, input_ids), before)
    assert MiniMindOConfig.from_dict(model.config.to_dict()).to_dict() == config
    assert isinstance(model, MiniMindOForConditionalGeneration)
