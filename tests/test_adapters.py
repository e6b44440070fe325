"""LoRA adapters: they train, are saved small, load onto a fresh base, and merge into the same voice."""

import peft
import pytest
import torch
from safetensors import safe_open

from minimind_o_hf import MiniMindOForConditionalGeneration
from minimind_o_hf.adapters import lora_config
from minimind_o_hf.trainer import MiniMindOTrainer, MiniMindOTrainingArguments


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(40, 320, (4, 12), generator=generator)
    codes = torch.randint(0, 32, (4, 8, 12), generator=generator)
    return {"input_ids": ids, "labels": ids, "audio_codes": codes, "audio_labels": codes}


def trained(base, config, batch, folder):
    model = peft.get_peft_model(base, config)
    samples = [{name: value[index] for name, value in batch.items()} for index in range(4)]
    arguments = MiniMindOTrainingArguments(
        output_dir=str(folder / "run"),
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        max_steps=5,
        learning_rate=2e-2,
        per_device_train_batch_size=4,
    )
    MiniMindOTrainer(model, arguments, train_dataset=samples).train()
    return model


@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize(
    ("preset", "train_codec"), [("thinker", False), ("talker", False), ("all", False), ("all", True), ("talker", True)]
)
def test_trained_saved_loaded_and_merged(tiny_model, tmp_path, batch, preset, train_codec, use_moe):
    def base():
        return tiny_model(use_moe, audio_config=None, vision_config=None)

    model = trained(base(), lora_config(preset, rank=4, train_codec=train_codec), batch, tmp_path)
    adapted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted = {"thinker": ("model.model.layers.",), "talker": ("model.talker.",)}.get(preset)
    for name in adapted:
        assert wanted is None or name.startswith(tuple(f"base_model.{prefix}" for prefix in wanted)), name
    assert any(".lm_head" in name for name in adapted) == train_codec
    model.save_pretrained(tmp_path / "adapter")
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        saved = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert saved == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    model.eval()
    prompt = batch["input_ids"][:2, :5]
    settings = {"seeds": [1, 2], "max_new_tokens": 16}
    with torch.no_grad():
        expected, plain = model(**batch), base()(**batch)
    assert not torch.allclose(expected.logits, plain.logits, atol=1e-3) or preset == "talker"
    assert not torch.allclose(expected.audio_logits, plain.audio_logits, atol=1e-3)
    spoken = model.generate(prompt, **settings)

    fresh = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    with torch.no_grad():
        loaded = fresh(**batch)
    assert torch.equal(loaded.logits, expected.logits)
    assert torch.equal(loaded.audio_logits, expected.audio_logits)

    merged = fresh.merge_and_unload()
    assert type(merged) is MiniMindOForConditionalGeneration
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).audio_logits, expected.audio_logits, rtol=0, atol=1e-4)
    said = merged.generate(prompt, **settings)
    assert torch.equal(said.sequences, spoken.sequences)
    assert torch.equal(said.audio_codes, spoken.audio_codes)
    merged.save_pretrained(tmp_path / "merged")
    again = MiniMindOForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert torch.equal(again.generate(prompt, **settings).audio_codes, spoken.audio_codes)


def test_bad_presets():
    with pytest.raises(ValueError, match="thinker, talker, all"):
        lora_config("ears")
    with pytest.raises(ValueError, match="train_codec"):
        lora_config("thinker", train_codec=True)
