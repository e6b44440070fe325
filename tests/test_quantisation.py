"""Loading in 8 bits with torchao: what is quantised, what is not, that it can be saved, and what cannot be had."""

import pytest
import torch
from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
from transformers import TorchAoConfig

from minimind_o_hf import MiniMindOForConditionalGeneration, default_checkpoint
from minimind_o_hf.export import load_whole
from minimind_o_hf.quantisation import KEPT_IN_FULL_PRECISION


def test_every_kept_name_is_a_module():
    modules = dict(load_whole(default_checkpoint()).named_modules())
    assert set(KEPT_IN_FULL_PRECISION) <= modules.keys()


def test_a_kind_that_cannot_be_had_is_not_taken_for_a_damaged_checkpoint():
    # Its layout is for GPUs.
    settings = TorchAoConfig(Int4WeightOnlyConfig(), modules_to_not_convert=KEPT_IN_FULL_PRECISION)
    with pytest.raises(ValueError, match="could not be quantised as `quantization_config` says"):
        MiniMindOForConditionalGeneration.from_pretrained(default_checkpoint(), quantization_config=settings)


def test_8_bits(tmp_path):
    settings = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=KEPT_IN_FULL_PRECISION)
    full = load_whole(default_checkpoint())
    model = MiniMindOForConditionalGeneration.from_pretrained(default_checkpoint(), quantization_config=settings)
    quantised = {name for name, value in model.named_parameters() if type(value.data) is not torch.Tensor}
    linears = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    assert quantised == {
        name for name in linears if not any(name.startswith(f"{kept}.") for kept in KEPT_IN_FULL_PRECISION)
    }
    assert "model.layers.0.mlp.down_proj.weight" in quantised
    inputs = {"input_ids": torch.randint(40, 1280, (2, 30)), "audio_codes": torch.randint(512, (2, 8, 30))}
    with torch.no_grad():
        outputs, wanted = model(**inputs), full(**inputs)
        # Of the likelihood of the likeliest, a few hundredths.
        for have, want in ((outputs.logits, wanted.logits), (outputs.audio_logits, wanted.audio_logits)):
            assert 0 < (have.softmax(-1) - want.softmax(-1)).abs().max() < 0.1
        model.save_pretrained(tmp_path)
        again = MiniMindOForConditionalGeneration.from_pretrained(tmp_path)(**inputs)
    assert torch.equal(again.logits, outputs.logits)
    assert torch.equal(again.audio_logits, outputs.audio_logits)
    assert (tmp_path / "model.safetensors").stat().st_size < 0.65 * sum(4 * part.numel() for part in full.parameters())
    with pytest.raises(ValueError, match=r"quantised \(torchao\)"):
        load_whole(tmp_path)
