"""The model's contracts: files, initialisation, equivalences, modalities, losses, gradients, and what it refuses.

Inputs are written as one string a row: `t` is a text token, a digit a speech clip of that many frames, `P` a picture.
The contents are a function of the string, so a row is the same alone and in any batch.
"""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import zlib

import pytest
import torch
from minimind_o_hf.modeling import MiniMindOForConditionalGeneration, MiniMindOOutputWithPast, MiniMindOThinkerModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForTextToWaveform,
    DynamicCache,
    StaticCache,
)

import minimind_o_hf  # noqa: F401  (registers the Auto classes)

IMAGE, AUDIO = 12, 16
PAD, STOP, SPEAKER = 33, 34, 35  # codes of the toy configuration
VOCAB, CODES = 320, 40
LIVELY = {"initializer_range": 0.125}  # untrained weights at 0.02 say nearly the same whatever they read
MIX = ("ttt3tPt", "tttttttt", "tP2tttPtt", "1t4t")


@pytest.fixture(params=[False, True], ids=["dense", "moe"])
def use_moe(request):
    return request.param


@pytest.fixture
def model(tiny_model, use_moe):
    return tiny_model(use_moe, **LIVELY)


def make_inputs(*specs, side="left"):
    """Inputs of `forward` for a batch of rows, with codes, a speaker token and an embedding in each."""
    rows, clips, pictures, speakers = [], [], [], []
    for spec in specs:
        generator = torch.Generator().manual_seed(zlib.crc32(spec.encode()))
        ids = []
        for item in spec:
            if item == "t":
                ids.append(int(torch.randint(30, 230, (), generator=generator)))
            elif item == "P":
                ids += [IMAGE] * 4
                pictures.append(torch.randn(3, 64, 64, generator=generator))
            else:
                ids += [AUDIO] * int(item)
                clips.append(torch.randn(int(item), 560, generator=generator))
        codes = torch.randint(0, 32, (8, len(ids)), generator=generator)
        codes[:, 1:2] = SPEAKER
        rows.append((torch.tensor(ids), codes))
        speakers.append(torch.randn(12, generator=generator))
    length = max(len(ids) for ids, _ in rows)

    def pad(values, fill):
        missing = length - values.shape[-1]
        return nn.functional.pad(values, (missing, 0) if side == "left" else (0, missing), value=fill)

    inputs = {
        "input_ids": torch.stack([pad(ids, 0) for ids, _ in rows]),
        "attention_mask": torch.stack([pad(torch.ones_like(ids), 0) for ids, _ in rows]),
        "audio_codes": torch.stack([pad(codes, PAD) for _, codes in rows]),
        "speaker_embeddings": torch.stack(speakers),
    }
    if clips:
        frames = max(len(clip) for clip in clips)
        inputs["input_features"] = torch.stack(
            [nn.functional.pad(clip, (0, 0, 0, frames - len(clip)), value=7.0) for clip in clips]
        )
        inputs["input_features_mask"] = torch.tensor([[1] * len(c) + [0] * (frames - len(c)) for c in clips])
    if pictures:
        inputs["pixel_values"] = torch.stack(pictures)
    return inputs


def with_labels(inputs):
    """Labels of everything but padding and placeholders, and codes that end with a stop."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    labels = ids.masked_fill(~mask | (ids == IMAGE) | (ids == AUDIO), -100)
    audio_labels = inputs["audio_codes"].masked_fill(~mask[:, None] | (inputs["audio_codes"] >= 32), -100)
    last = mask.shape[1] - 1 - mask.long().flip(1).argmax(dim=1)
    audio_labels[torch.arange(len(mask)), :, last] = STOP
    return {**inputs, "labels": labels, "audio_labels": audio_labels}


def assert_close(value, expected, atol=1e-5):
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=atol)


def assert_same_scores(output, expected, where=None, atol=1e-5):
    """Text and code scores, at the positions of the mask `where` `(batch_size, sequence_length)`."""
    for value, wanted in (
        (output.logits, expected.logits),
        (output.audio_logits.transpose(1, 2), expected.audio_logits.transpose(1, 2)),
    ):
        assert_close(*((value, wanted) if where is None else (value[where], wanted[where])), atol=atol)


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- names and files ----


def expected_names(config, fuse_experts=False):
    """The original's tensor names, from its specification."""

    def stack(prefix, num_layers):
        for layer in range(num_layers):
            at = f"{prefix}layers.{layer}."
            yield from (f"{at}{norm}_layernorm.weight" for norm in ("input", "post_attention"))
            yield from (f"{at}self_attn.{part}.weight" for part in ("q_norm", "k_norm"))
            yield from (f"{at}self_attn.{part}_proj.weight" for part in "qkvo")
            kinds = ("gate", "up", "down")
            if not config.use_moe:
                yield from (f"{at}mlp.{kind}_proj.weight" for kind in kinds)
                continue
            yield f"{at}mlp.gate.weight"
            if fuse_experts:
                yield from (f"{at}mlp.experts.{part}" for part in ("gate_up_proj", "down_proj"))
            else:
                yield from (f"{at}mlp.experts.{e}.{k}_proj.weight" for e in range(config.num_experts) for k in kinds)
        yield f"{prefix}norm.weight"

    yield from stack("model.", config.num_hidden_layers)
    yield from stack("talker.", config.num_talker_hidden_layers)
    yield from ("model.embed_tokens.weight", "lm_head.weight", "talker.spk_proj.weight")
    yield from ("talker.text_scale", "talker.audio_scale")
    yield from ("talker.embed_tokens.base.weight", "talker.lm_head.base.weight")
    for i in range(config.num_codebooks):
        yield from (f"talker.{part}.adapters.{i}.{j}.weight" for part in ("embed_tokens", "lm_head") for j in (0, 2))
    for part in ("embed_proj", "codec_proj"):
        yield from (f"talker.{part}.{j}.{kind}" for j in (0, 2) for kind in ("weight", "bias"))
        yield f"talker.{part}.3.weight"
    for part in ("audio_proj", "vision_proj"):
        yield from (f"{part}.mlp.{j}.{kind}" for j in (0, 1, 3) for kind in ("weight", "bias"))


def test_module_names_are_the_originals(tiny_model, use_moe):
    model = tiny_model(use_moe, audio_config=None, vision_config=None)
    names = list(expected_names(model.config, fuse_experts=True))
    assert len(names) == len(set(names))
    assert set(model.state_dict()) == set(names)


def test_saved_names_are_the_originals(tiny_model, tmp_path, use_moe):
    model = tiny_model(use_moe, audio_config=None, vision_config=None)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    # A safetensors file holds a tied tensor once.
    assert set(saved) == set(expected_names(model.config)) - {"lm_head.weight"}
    if use_moe:
        experts = model.model.layers[1].mlp.experts
        for e in range(4):
            gate, up = experts.gate_up_proj[e].chunk(2)
            prefix = f"model.layers.1.mlp.experts.{e}."
            assert saved[prefix + "gate_proj.weight"].equal(gate)
            assert saved[prefix + "up_proj.weight"].equal(up)
            assert saved[prefix + "down_proj.weight"].equal(experts.down_proj[e])


@pytest.mark.parametrize("name", ["tiny_dense", "tiny_moe"])
def test_saved_names_and_shapes_are_the_references(golden, tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(golden.config(name)), encoding="utf-8")
    manifest = golden.manifest(name)
    torch.save({key: torch.zeros(shape) for key, shape in manifest.items()}, tmp_path / "pytorch_model.bin")
    model = MiniMindOForConditionalGeneration.from_pretrained(tmp_path)
    assert set(manifest) == set(expected_names(model.config))
    model.save_pretrained(tmp_path / "ours")
    saved = load_file(tmp_path / "ours" / "model.safetensors")
    assert {key: list(value.shape) for key, value in saved.items()} | {
        "lm_head.weight": manifest["lm_head.weight"]
    } == manifest


def settings_of(config):
    """All of a config but where it came from, and the precision that loading notes in the encoders' parts."""
    values = config if isinstance(config, dict) else config.to_dict()
    return {
        key: settings_of(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in ("_name_or_path", "dtype")
    }


def test_saved_and_loaded(model, tmp_path):
    inputs = make_inputs(*MIX)
    model.save_pretrained(tmp_path)
    expected = model(**inputs)
    for _ in range(2):  # memory left by the first could make the second right by chance
        loaded = MiniMindOForConditionalGeneration.from_pretrained(tmp_path)
        assert not loaded.training
        assert settings_of(loaded.config) == settings_of(model.config)
        for kind in ("named_parameters", "named_buffers"):
            ours, theirs = dict(getattr(model, kind)()), dict(getattr(loaded, kind)())
            assert list(ours) == list(theirs)
            for name, value in ours.items():
                assert value.dtype == theirs[name].dtype, name
                assert torch.equal(value, theirs[name]), name
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        output = loaded(**inputs)
        assert output.logits.equal(expected.logits)
        assert output.audio_logits.equal(expected.audio_logits)


def test_the_buffers_of_yarn_survive(tiny_model, tmp_path):
    model = tiny_model(max_position_embeddings=4096, inference_rope_scaling=True)
    model.save_pretrained(tmp_path)
    loaded = MiniMindOForConditionalGeneration.from_pretrained(tmp_path)
    plain = tiny_model()
    for ours, theirs, other in zip(
        (model.model, model.talker), (loaded.model, loaded.talker), (plain.model, plain.talker), strict=True
    ):
        assert ours.rotary_emb.inv_freq.equal(theirs.rotary_emb.inv_freq)
        assert not ours.rotary_emb.inv_freq.equal(other.rotary_emb.inv_freq)


def save_as_original(model, directory, dtype=None, remote_code="raise RuntimeError('remote code was run')"):
    """A directory as the original writes it: a flat config with an `auto_map`, and a pickled state dict by experts."""
    directory.mkdir(exist_ok=True)
    model.save_pretrained(directory)
    state = load_file(directory / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    (directory / "model.safetensors").unlink()
    (directory / "generation_config.json").unlink()
    if dtype is not None:
        state = {name: value.to(dtype) for name, value in state.items()}
    torch.save(state, directory / "pytorch_model.bin")
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {
        "architectures": ["MiniMindOmni"],
        "auto_map": {"AutoConfig": "model_omni.OmniConfig", "AutoModelForCausalLM": "model_omni.MiniMindOmni"},
    }
    if dtype is not None:
        config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config), encoding="utf-8")
    (directory / "model_omni.py").write_text(remote_code, encoding="utf-8")
    return directory


@pytest.mark.parametrize(
    "auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoModelForTextToWaveform]
)
def test_the_auto_classes_load_an_original_directory(tiny_model, tmp_path, auto_class):
    model = tiny_model(audio_config=None, vision_config=None)
    save_as_original(model, tmp_path)
    for options in ({}, {"trust_remote_code": True}):
        loaded = auto_class.from_pretrained(tmp_path, **options)
        assert type(loaded) is MiniMindOForConditionalGeneration
        for name, value in model.state_dict().items():
            assert value.equal(loaded.state_dict()[name]), name


def test_original_experts_are_fused(tiny_model, tmp_path):
    model = tiny_model(True, audio_config=None, vision_config=None)
    loaded = MiniMindOForConditionalGeneration.from_pretrained(save_as_original(model, tmp_path))
    for name, value in model.state_dict().items():
        assert value.equal(loaded.state_dict()[name]), name


@pytest.mark.parametrize("file_format", ["bin", "safetensors"])
@pytest.mark.parametrize(
    ("saved", "asked", "expected"),
    [
        (torch.float16, None, torch.float32),
        (torch.float16, "auto", torch.float32),
        (torch.float16, torch.float16, torch.float16),
        (torch.float16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, None, torch.float32),
    ],
)
def test_precision_of_a_checkpoint(tiny_model, tmp_path, saved, asked, expected, file_format):
    model = tiny_model(audio_config=None, vision_config=None)
    if file_format == "bin":
        save_as_original(model, tmp_path, dtype=saved)
    else:
        model.to(saved).save_pretrained(tmp_path)
    loaded = MiniMindOForConditionalGeneration.from_pretrained(tmp_path, **({} if asked is None else {"dtype": asked}))
    assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
    reference = model.model.layers[0].self_attn.q_proj.weight.detach().to(saved).to(expected)
    assert loaded.model.layers[0].self_attn.q_proj.weight.equal(reference)


@torch.no_grad()
@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_device_map(model, tmp_path, device_map):
    model.save_pretrained(tmp_path)
    inputs = make_inputs(*MIX)
    expected = model(**inputs)
    loaded = MiniMindOForConditionalGeneration.from_pretrained(tmp_path, device_map=device_map)
    output = loaded(**{name: value.to(loaded.device) for name, value in inputs.items()})
    output = MiniMindOOutputWithPast(logits=output.logits.cpu(), audio_logits=output.audio_logits.cpu())
    where = inputs["attention_mask"].bool()
    assert_same_scores(output, expected, where, atol=1e-5 if loaded.device.type == "cpu" else 1e-3)


def test_resized_vocabulary_stays_tied(model, tmp_path):
    before = model.model.embed_tokens.weight.detach().clone()
    model.resize_token_embeddings(VOCAB + 10)
    assert model.config.vocab_size == model.lm_head.out_features == VOCAB + 10
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.embed_tokens.weight[:VOCAB].equal(before)
    assert model(torch.tensor([[VOCAB + 9]])).logits.shape == (1, 1, VOCAB + 10)
    model.save_pretrained(tmp_path)
    loaded = MiniMindOForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.model.embed_tokens.weight.equal(model.model.embed_tokens.weight)


def test_the_saved_code_generates_without_the_package(tiny_model, tmp_path, monkeypatch):
    model = tiny_model(True, **LIVELY)
    monkeypatch.setattr(MiniMindOForConditionalGeneration, "_auto_class", None)
    monkeypatch.setattr(type(model.config), "_auto_class", None)
    MiniMindOForConditionalGeneration.register_for_auto_class("AutoModelForMultimodalLM")
    type(model.config).register_for_auto_class()
    model.save_pretrained(tmp_path / "model")
    program = """
import sys
sys.modules["minimind_o_hf"] = None  # an import of it fails
import torch
from transformers import AutoModelForMultimodalLM
model = AutoModelForMultimodalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
output = model.generate(torch.arange(40, 50)[None], do_sample=False, max_new_tokens=16)
print(type(model).__module__.split(".")[0], output.sequences[0].tolist(), output.audio_codes.tolist())
"""
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model")],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    output = model.generate(torch.arange(40, 50)[None], do_sample=False, max_new_tokens=16)
    expected = f"transformers_modules {output.sequences[0].tolist()} {output.audio_codes.tolist()}"
    assert result.stdout.strip() == expected


# ---- damaged files ----


def read(path):
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def write(path, state):
    if path.suffix == ".safetensors":
        save_file(state, path, metadata={"format": "pt"})
    else:
        torch.save(state, path)


@pytest.fixture(params=["model.safetensors", "pytorch_model.bin"])
def weights(request, tiny_model, tmp_path):
    """The weights file of a loadable directory, in either format."""
    model = tiny_model(audio_config=None, vision_config=None)
    if request.param == "model.safetensors":
        model.save_pretrained(tmp_path)
    else:
        save_as_original(model, tmp_path)
    return tmp_path / request.param


def test_missing_tensors_are_named(weights):
    state = read(weights)
    del state["talker.layers.1.self_attn.k_proj.weight"], state["audio_proj.mlp.0.bias"]
    write(weights, state)
    with pytest.raises(ValueError, match=r"lacks 2 tensors.*audio_proj\.mlp\.0\.bias.*allow_missing=True"):
        MiniMindOForConditionalGeneration.from_pretrained(weights.parent)
    loaded, info = MiniMindOForConditionalGeneration.from_pretrained(
        weights.parent, allow_missing=True, output_loading_info=True
    )
    assert len(info["missing_keys"]) == 2
    assert loaded.audio_proj.mlp[0].bias.equal(torch.zeros(32))


def test_a_missing_expert_is_no_zero(tiny_model, tmp_path):
    tiny_model(True, audio_config=None, vision_config=None).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = read(path)
    del state["model.layers.1.mlp.experts.2.up_proj.weight"]
    write(path, state)
    with pytest.raises((ValueError, OSError)):
        MiniMindOForConditionalGeneration.from_pretrained(tmp_path)


def test_tensors_of_another_shape_are_named(weights):
    state = read(weights)
    state["talker.spk_proj.weight"] = torch.zeros(48, 13)
    write(weights, state)
    with pytest.raises(ValueError, match=r"talker\.spk_proj\.weight.*\(48, 13\).*\(48, 12\)"):
        MiniMindOForConditionalGeneration.from_pretrained(weights.parent)
    loaded = MiniMindOForConditionalGeneration.from_pretrained(
        weights.parent, allow_missing=True, ignore_mismatched_sizes=True
    )
    assert loaded.talker.spk_proj.weight.shape == (48, 12)


@pytest.mark.parametrize("kept", [0.0, 0.0005, 0.3, 0.999])
def test_truncated_weights(weights, kept):
    content = weights.read_bytes()
    weights.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises((ValueError, OSError)):
        MiniMindOForConditionalGeneration.from_pretrained(weights.parent)


@pytest.mark.parametrize(
    "content", [b"not a checkpoint", b"\xff" * 4096, b"version https://git-lfs.github.com/spec/v1"]
)
def test_other_files_under_the_weights_name(weights, content):
    weights.write_bytes(content)
    with pytest.raises((ValueError, OSError)):
        MiniMindOForConditionalGeneration.from_pretrained(weights.parent)


def test_a_flipped_header(weights):
    content = bytearray(weights.read_bytes())
    content[:16] = bytes(255 - byte for byte in content[:16])
    weights.write_bytes(content)
    with pytest.raises((ValueError, OSError)):
        MiniMindOForConditionalGeneration.from_pretrained(weights.parent)


class Payload:
    """Would create a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_is_not_run(tiny_model, tmp_path):
    save_as_original(tiny_model(audio_config=None, vision_config=None), tmp_path)
    torch.save({"lm_head.weight": Payload(tmp_path / "proof")}, tmp_path / "pytorch_model.bin")
    with pytest.raises((ValueError, OSError)):
        MiniMindOForConditionalGeneration.from_pretrained(tmp_path)
    assert not (tmp_path / "proof").exists()


def test_a_missing_weights_file(weights):
    weights.unlink()
    with pytest.raises(OSError, match="model.safetensors"):
        MiniMindOForConditionalGeneration.from_pretrained(weights.parent)


def test_a_missing_shard(tiny_model, tmp_path):
    tiny_model(audio_config=None, vision_config=None).save_pretrained(tmp_path, max_shard_size="300KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    with pytest.raises((ValueError, OSError)):
        MiniMindOForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_broken_config(weights, content):
    (weights.parent / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises((ValueError, OSError)):
        MiniMindOForConditionalGeneration.from_pretrained(weights.parent)


# ---- initialisation ----


def assert_initialised(model):
    """The Thinker normal with std 0.02, the Talker and the projectors as PyTorch's modules start."""
    for name, parameter in model.named_parameters():
        if "tower" in name:
            assert torch.isfinite(parameter).all(), name
            continue
        value = parameter.detach()
        is_thinker = name.startswith(("model.", "lm_head."))
        owner = model.get_submodule(name.rpartition(".")[0])
        if name in ("talker.text_scale", "talker.audio_scale"):
            assert float(value) == {"talker.text_scale": 3.0, "talker.audio_scale": 1.0}[name]
        elif "norm" in name or isinstance(owner, nn.LayerNorm) or name.endswith("_proj.3.weight"):
            assert value.equal(torch.zeros_like(value) if name.endswith("bias") else torch.ones_like(value)), name
        elif is_thinker or isinstance(owner, nn.Embedding):
            std = 0.02 if is_thinker else 1.0
            assert float(value.std()) == pytest.approx(std, rel=6 / math.sqrt(2 * value.numel())), name
            assert abs(float(value.mean())) < 6 * std / math.sqrt(value.numel()), name
        else:
            fan_in = owner.in_features if name.endswith("bias") else value.shape[-1]
            bound = 1 / math.sqrt(fan_in)
            assert float(value.abs().max()) <= bound, name
            std = bound / math.sqrt(3)
            assert float(value.std()) == pytest.approx(std, rel=6 / math.sqrt(2 * value.numel())), name


def test_initialisation(tiny_model, use_moe):
    assert_initialised(tiny_model(use_moe))


def test_initialisation_from_a_language_model_alone(tiny_model, tmp_path, use_moe):
    model = tiny_model(use_moe, seed=3)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    write(path, {name: value for name, value in read(path).items() if name.startswith("model.")})
    loaded, info = MiniMindOForConditionalGeneration.from_pretrained(
        tmp_path, allow_missing=True, output_loading_info=True
    )
    assert any(name.startswith("talker.layers.0.mlp") for name in info["missing_keys"])
    for name, value in model.model.state_dict().items():
        assert value.equal(loaded.model.state_dict()[name]), name
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_initialised(loaded)
    for (name, ours), (_, theirs) in zip(model.named_buffers(), loaded.named_buffers(), strict=True):
        assert ours.equal(theirs), name


def test_on_the_meta_device(tiny_config, use_moe):
    with torch.device("meta"):
        model = MiniMindOForConditionalGeneration(tiny_config(use_moe))
    assert {value.device.type for value in model.parameters()} == {"meta"}
    materialised = MiniMindOForConditionalGeneration(tiny_config(use_moe))
    assert {n: v.shape for n, v in model.state_dict().items()} == {
        n: v.shape for n, v in materialised.state_dict().items()
    }


# ---- equivalences ----


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_its_rows(model, side):
    batch = make_inputs(*MIX, side=side)
    output = model(**batch)
    for row, spec in enumerate(MIX):
        alone = model(**make_inputs(spec))
        real = batch["attention_mask"][row].bool()
        assert_close(output.logits[row, real], alone.logits[0])
        assert_close(output.audio_logits[row][:, real], alone.audio_logits[0])


@torch.no_grad()
def test_left_padding_does_not_change_a_row(model):
    alone = make_inputs("tttttttt")
    expected = model(**alone)
    padded = {
        "input_ids": nn.functional.pad(alone["input_ids"], (5, 0), value=77),  # whatever stands there
        "attention_mask": nn.functional.pad(alone["attention_mask"], (5, 0)),
        "audio_codes": nn.functional.pad(alone["audio_codes"], (5, 0), value=3),
        "speaker_embeddings": alone["speaker_embeddings"],
    }
    output = model(**padded)
    assert_close(output.logits[:, 5:], expected.logits)
    assert_close(output.audio_logits[:, :, 5:], expected.audio_logits)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_eager_is_sdpa(tiny_config, tiny_model, use_moe, side):
    sdpa = tiny_model(use_moe, **LIVELY)
    assert sdpa.model.config._attn_implementation == sdpa.talker.config._attn_implementation == "sdpa"
    eager = MiniMindOForConditionalGeneration._from_config(tiny_config(use_moe), attn_implementation="eager").eval()
    assert eager.model.config._attn_implementation == eager.talker.config._attn_implementation == "eager"
    eager.load_state_dict(sdpa.state_dict())
    inputs = make_inputs(*MIX, side=side)
    assert_same_scores(eager(**inputs), sdpa(**inputs), where=inputs["attention_mask"].bool())


@torch.no_grad()
def test_the_attention_of_a_loaded_model_can_be_changed(model, tmp_path):
    inputs = make_inputs(*MIX)
    expected = model(**inputs)
    model.set_attn_implementation("eager")
    assert model.model.config._attn_implementation == model.talker.config._attn_implementation == "eager"
    for stack in (model.model, model.talker):
        assert {layer.self_attn.config._attn_implementation for layer in stack.layers} == {"eager"}
    output = model(**inputs, output_attentions=True)
    assert output.attentions[0] is not None
    assert output.talker_attentions[0] is not None
    assert_same_scores(output, expected, where=inputs["attention_mask"].bool())
    model.save_pretrained(tmp_path)
    loaded = MiniMindOForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.model.config._attn_implementation == loaded.talker.config._attn_implementation == "eager"


@pytest.mark.slow  # transformers compiles it
@torch.no_grad()
def test_flex_attention_is_sdpa(tiny_model, use_moe):
    model = tiny_model(use_moe, audio_config=None, vision_config=None, **LIVELY)
    inputs = make_inputs("tttttttttttttttt", "tttttttt")
    expected = model(**inputs)
    model.set_attn_implementation("flex_attention")
    assert model.model.config._attn_implementation == model.talker.config._attn_implementation == "flex_attention"
    assert_same_scores(model(**inputs), expected, where=inputs["attention_mask"].bool())


def test_flex_attention_beside_encoders_that_have_none(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    loaded = MiniMindOForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="flex_attention")
    assert loaded.model.config._attn_implementation == loaded.talker.config._attn_implementation == "flex_attention"
    assert loaded.audio_tower.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_the_future_does_not_change_the_past(model):
    inputs = make_inputs("ttttt3ttttt", "ttttttttttttt")
    expected = model(**inputs)
    t = 9
    changed = {name: value.clone() for name, value in inputs.items()}
    changed["input_ids"][:, t] += 1
    output = model(**changed)
    assert_close(output.logits[:, :t], expected.logits[:, :t])
    assert_close(output.audio_logits[:, :, :t], expected.audio_logits[:, :, :t])
    assert not torch.allclose(output.logits[:, t:], expected.logits[:, t:], atol=1e-3)
    assert not torch.allclose(output.audio_logits[:, :, t:], expected.audio_logits[:, :, t:], atol=1e-3)
    changed = {name: value.clone() for name, value in inputs.items()}
    changed["audio_codes"][:, :, t] = (changed["audio_codes"][:, :, t] + 1) % 32
    output = model(**changed)
    # The Thinker reads no codes at all.
    assert output.logits.equal(expected.logits)
    assert_close(output.audio_logits[:, :, :t], expected.audio_logits[:, :, :t])
    difference = (output.audio_logits - expected.audio_logits).abs().amax(dim=(0, 1, 3))
    assert (difference[t:] > 1e-4).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("batch", [("ttt3ttttt",), ("ttt3ttttt", "tttt")], ids=["single", "left padded"])
def test_cached_steps_are_one_call(model, kind, batch):
    inputs = make_inputs(*batch)
    expected = model(**inputs, use_cache=False)
    assert expected.past_key_values is None
    length, prefill = inputs["input_ids"].shape[1], 7
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=16)
    logits, audio_logits = [], []
    for start, end in [(0, prefill)] + [(t, t + 1) for t in range(prefill, length)]:
        clips = {name: inputs[name] for name in ("input_features", "input_features_mask")} if start == 0 else {}
        output = model(
            input_ids=inputs["input_ids"][:, start:end],
            audio_codes=inputs["audio_codes"][:, :, start:end],
            attention_mask=inputs["attention_mask"][:, :end],
            speaker_embeddings=inputs["speaker_embeddings"],
            past_key_values=cache,
            **clips,
        )
        assert output.past_key_values is cache
        logits.append(output.logits)
        audio_logits.append(output.audio_logits)
    for layer in range(len(model.model.layers) + len(model.talker.layers)):
        assert int(cache.get_seq_length(layer)) == length
    steps = MiniMindOOutputWithPast(logits=torch.cat(logits, 1), audio_logits=torch.cat(audio_logits, 2))
    assert_same_scores(steps, expected, where=inputs["attention_mask"].bool())


@torch.no_grad()
def test_cached_chunks_are_one_call(model):
    inputs = make_inputs("tttttttttttt")
    expected = model(**inputs)
    cache = DynamicCache(config=model.config)
    outputs = [
        model(
            input_ids=inputs["input_ids"][:, part],
            audio_codes=inputs["audio_codes"][:, :, part],
            speaker_embeddings=inputs["speaker_embeddings"],
            past_key_values=cache,
        )
        for part in (slice(0, 5), slice(5, 6), slice(6, 12))
    ]
    assert_close(torch.cat([o.logits for o in outputs], 1), expected.logits)
    assert_close(torch.cat([o.audio_logits for o in outputs], 2), expected.audio_logits)


@torch.no_grad()
def test_logits_to_keep(model):
    inputs = make_inputs(*MIX)
    expected = model(**inputs)
    output = model(**inputs, logits_to_keep=2)
    assert output.logits.shape == (4, 2, VOCAB)
    assert output.audio_logits.shape == (4, 8, 2, CODES)
    assert_close(output.logits, expected.logits[:, -2:])
    assert_close(output.audio_logits, expected.audio_logits[:, :, -2:])
    positions = torch.tensor([0, 5, 3])
    output = model(**inputs, logits_to_keep=positions)
    assert_close(output.logits, expected.logits[:, positions])
    assert_close(output.audio_logits, expected.audio_logits[:, :, positions])


@torch.no_grad()
def test_embeddings_in_place_of_tokens(model):
    inputs = make_inputs(*MIX)
    expected = model(**inputs)
    ids = inputs.pop("input_ids")
    assert_same_scores(model(inputs_embeds=model.get_input_embeddings()(ids), **inputs), expected)


@torch.no_grad()
def test_position_ids(model):
    inputs = make_inputs("tttttttt")
    expected = model(**inputs)
    positions = torch.arange(8)[None]
    assert_same_scores(model(**inputs, position_ids=positions), expected)
    # Rotary embeddings are relative: a shift changes nothing, a stretch does.
    assert_same_scores(model(**inputs, position_ids=positions + 100), expected)
    stretched = model(**inputs, position_ids=positions * 3)
    assert not torch.allclose(stretched.logits, expected.logits, atol=1e-2)
    assert not torch.allclose(stretched.audio_logits, expected.audio_logits, atol=1e-2)


def test_heads_at_labelled_positions_alone_give_the_same_losses_and_gradients(model):
    inputs = with_labels(make_inputs(*MIX))
    model.train()
    whole = model(**inputs, skip_logits=False)
    whole.loss.backward()
    expected = {name: gradient.clone() for name, gradient in grads(model).items()}
    model.zero_grad()
    part = model(**inputs)
    assert part.logits is None
    assert part.audio_logits is None
    part.loss.backward()
    for name in ("loss", "text_loss", "audio_loss", "codebook_losses"):
        assert_close(getattr(part, name), getattr(whole, name))
    for name, gradient in grads(model).items():
        assert_close(gradient, expected[name])
    assert model(**{**inputs, "labels": torch.full_like(inputs["labels"], -100)}).text_loss == 0
    assert model.eval()(**inputs).logits is not None
    assert model(**inputs, skip_logits=True).logits is None


@pytest.mark.parametrize("length", [20, 129])
def test_predictions_at_labelled_positions_are_those_of_all_positions(model, length):
    """129: as many scores as there are positions to predict, with the positions rounded up that have a label."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(40, 320, (1, length), generator=generator)
    codes = torch.randint(0, 32, (1, 8, length), generator=generator)
    labels, audio_labels = torch.full_like(ids, -100), torch.full_like(codes, -100)
    labels[:, 5:15], audio_labels[:, :, 7:18] = ids[:, 5:15], codes[:, :, 7:18]
    inputs = {"input_ids": ids, "audio_codes": codes, "labels": labels, "audio_labels": audio_labels}
    whole = model(**inputs, skip_logits=False, return_predictions=True)
    part = model(**inputs, skip_logits=True, return_predictions=True)
    assert (whole.predictions != -100).sum() == 10
    assert torch.equal(part.predictions, whole.predictions)
    assert torch.equal(part.audio_predictions, whole.audio_predictions)


def test_bfloat16_is_finite(model):
    inputs = with_labels(make_inputs(*MIX))
    expected = model(**inputs)
    model.to(torch.bfloat16).train()
    output = model(**inputs, skip_logits=False)
    assert output.logits.dtype == output.audio_logits.dtype == torch.bfloat16
    assert torch.isfinite(output.logits).all()
    assert torch.isfinite(output.audio_logits).all()
    assert output.text_loss.item() == pytest.approx(expected.text_loss.item(), rel=0.05)
    assert output.audio_loss.item() == pytest.approx(expected.audio_loss.item(), rel=0.05)
    output.loss.backward()
    for name, gradient in grads(model).items():
        assert torch.isfinite(gradient).all(), name


def test_gradient_checkpointing_changes_nothing(model):
    inputs = with_labels(make_inputs(*MIX))
    model.train()
    expected = model(**inputs)
    expected.loss.backward()
    expected_grads = grads(model)
    model.zero_grad()
    model.activation_checkpointing_enable()
    assert model.model.gradient_checkpointing
    assert model.talker.gradient_checkpointing
    runs = []
    hook = model.talker.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    output = model(**inputs)
    assert output.past_key_values is None
    assert_close(output.loss, expected.loss)
    if model.config.use_moe:
        assert output.aux_loss > 0
        assert_close(output.aux_loss, expected.aux_loss)
    output.loss.backward()
    hook.remove()
    assert len(runs) == 2  # forward, and again for the backward
    recomputed = grads(model)
    assert recomputed.keys() == expected_grads.keys()
    for name, value in expected_grads.items():
        torch.testing.assert_close(recomputed[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# The tracer alone: what its graph is lowered to is PyTorch's business (the slow test below).
@pytest.mark.usefixtures("fresh_dynamo")
@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
def test_compiled_as_one_graph(model, use_cache):
    ids = make_inputs("tttttttt", "tttttttt")["input_ids"]
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    output = compiled(ids, use_cache=use_cache)
    assert_same_scores(output, model(ids))
    assert (output.past_key_values is not None) == use_cache


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@torch.no_grad()
def test_compiled_with_speech_and_pictures(model):
    inputs = make_inputs(*MIX)
    compiled = torch.compile(model.forward, backend="eager")
    assert_same_scores(compiled(**inputs), model(**inputs), where=inputs["attention_mask"].bool())


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@torch.no_grad()
def test_compiled_by_inductor(model):
    ids = make_inputs("tttttttt", "tttttttt")["input_ids"]
    compiled = torch.compile(model.forward, fullgraph=True)
    assert_same_scores(compiled(ids, use_cache=False), model(ids))


@torch.no_grad()
def test_hidden_states_and_attentions_of_both_stacks(tiny_model, use_moe):
    model = tiny_model(use_moe)
    model.set_attn_implementation("eager")
    inputs = make_inputs("tttttttttt", "tttt")
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in output.hidden_states] == [(2, 10, 64)] * 4
    assert [tuple(h.shape) for h in output.talker_hidden_states] == [(2, 10, 48)] * 3
    assert [tuple(a.shape) for a in output.attentions] == [(2, 4, 10, 10)] * 3
    assert [tuple(a.shape) for a in output.talker_attentions] == [(2, 4, 10, 10)] * 2
    # Attention is causal and sums to one.
    for attention in output.attentions + output.talker_attentions:
        assert_close(attention[0].sum(-1), torch.ones(4, 10))
        assert not attention[0].triu(1).any()
    plain = model(**inputs)
    assert plain.hidden_states is None
    assert plain.talker_attentions is None


@torch.no_grad()
def test_the_bridge_is_the_output_of_its_layer(tiny_model, use_moe):
    for bridge_layer in (0, 1, 2):
        model = tiny_model(use_moe, bridge_layer=bridge_layer, **LIVELY)
        seen = []
        hook = model.model.layers[bridge_layer].register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        output = model.model(input_ids=torch.arange(40, 48)[None])
        hook.remove()
        assert output.bridge_hidden_state.equal(seen[0])
        assert not output.bridge_hidden_state.equal(output.last_hidden_state)


@torch.no_grad()
def test_without_the_talker(model):
    inputs = make_inputs(*MIX)
    calls = []
    hook = model.talker.register_forward_hook(lambda *_: calls.append(1))
    output = model(**inputs, run_talker=False)
    hook.remove()
    assert calls == []
    assert output.audio_logits is None
    assert_close(output.logits, model(**inputs).logits)


def test_tuples(model):
    inputs = with_labels(make_inputs("tttttttt"))
    output = model(**inputs)
    as_tuple = model(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert as_tuple[0].equal(output.loss)


# ---- speech, pictures, voices ----


def embeddings_read_by_the_thinker(model, **inputs):
    seen = []
    hook = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen[0]


@torch.no_grad()
def test_projected_features_stand_in_reading_order(model):
    specs = ("t2tP3tP", "tttt", "P1Pt4", "t")
    inputs = make_inputs(*specs)
    embeds = embeddings_read_by_the_thinker(model, **inputs)
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    clip = picture = 0
    for row, spec in enumerate(specs):
        position = int((~real[row]).sum())
        for item in spec:
            if item == "t":
                expected = model.model.embed_tokens(ids[row, position])[None]
            elif item == "P":
                pixels = inputs["pixel_values"][picture][None]
                expected = model.vision_proj(model.vision_tower(pixels).last_hidden_state)[0]
                picture += 1
            else:
                features = inputs["input_features"][clip][None, : int(item)]
                mask = torch.ones(1, int(item), dtype=torch.long)
                hidden = model.audio_tower(features, input_features_mask=mask).last_hidden_state
                expected = model.audio_proj(hidden)[0]
                clip += 1
            assert_close(embeds[row, position : position + len(expected)], expected)
            position += len(expected)
        assert position == ids.shape[1]
    assert (clip, picture) == (4, 4)


@torch.no_grad()
def test_the_order_of_clips_and_pictures_matters(model):
    inputs = make_inputs("t3t3tPP")
    expected = model(**inputs)
    for name in ("input_features", "pixel_values"):
        swapped = model(**{**inputs, name: inputs[name].flip(0)})
        assert not torch.allclose(swapped.logits, expected.logits, atol=1e-3)


@torch.no_grad()
def test_encoder_outputs_in_place_of_raw_inputs(model):
    inputs = make_inputs(*MIX)
    expected = model(**inputs)
    mask = inputs["input_features_mask"]
    audio = model.get_audio_features(inputs["input_features"], mask)
    image = model.get_image_features(inputs["pixel_values"])
    assert audio.shape == (*mask.shape, 32)
    assert image.shape == (3, 4, 32)
    del inputs["input_features"], inputs["pixel_values"]
    audio = audio.masked_fill(~mask.bool()[..., None], 99.0)  # padding is not read
    assert_same_scores(model(**inputs, audio_hidden_states=audio, image_hidden_states=image), expected)


@torch.no_grad()
def test_clips_without_a_mask_are_whole(model):
    inputs = make_inputs("t3t3", "3ttttt")
    expected = model(**inputs)
    del inputs["input_features_mask"]
    assert_same_scores(model(**inputs), expected, where=inputs["attention_mask"].bool())


@torch.no_grad()
def test_audio_codes_default_to_pad(model):
    inputs = make_inputs(*MIX)
    codes = torch.full_like(inputs.pop("audio_codes"), PAD)
    assert_same_scores(model(**inputs), model(**inputs, audio_codes=codes))


@torch.no_grad()
def test_the_speaker_token(model):
    inputs = make_inputs("tttttttt", "ttttt")
    start = 1 + (inputs["attention_mask"] == 0).sum(dim=1)
    speakers = inputs.pop("speaker_embeddings")
    without = model(**inputs).audio_logits
    # A row of zeros keeps the embedding of its code, whatever the other rows have.
    mixed = model(**inputs, speaker_embeddings=torch.stack([speakers[0], torch.zeros(12)])).audio_logits
    assert_close(mixed[1], without[1])
    assert_close(mixed[0, :, : start[0]], without[0, :, : start[0]])
    assert not torch.allclose(mixed[0, :, start[0] :], without[0, :, start[0] :], atol=1e-2)
    both = model(**inputs, speaker_embeddings=speakers).audio_logits
    assert_close(both[0], mixed[0])
    assert not torch.allclose(both[1, :, start[1] :], without[1, :, start[1] :], atol=1e-2)
    # The embedding matters where the token stands and nowhere else.
    codes = inputs["audio_codes"].masked_fill(inputs["audio_codes"] == SPEAKER, 5)
    changed = {**inputs, "audio_codes": codes}
    assert_close(
        model(**changed, speaker_embeddings=speakers).audio_logits,
        model(**changed).audio_logits,
    )


@torch.no_grad()
def test_the_talkers_input_by_the_specification(model):
    talker = model.talker
    codes = torch.randint(0, CODES, (2, 8, 3))
    codes[:, :, 1] = SPEAKER
    bridge, speaker = torch.randn(2, 3, 64), torch.randn(2, 12)
    seen = []
    hook = talker.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    talker(bridge_hidden_state=bridge, audio_codes=codes, speaker_embeddings=speaker)
    hook.remove()

    def project(layers, x):
        x = layers[2](nn.functional.gelu(layers[0](x)))
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps) * layers[3].weight

    table = talker.embed_tokens
    for row in range(2):
        for t in range(3):
            codec = torch.stack(
                [
                    table.base.weight[codes[row, i, t]]
                    + table.adapters[i][2].weight @ nn.functional.gelu(table.adapters[i][0].weight[codes[row, i, t]])
                    for i in range(8)
                ]
            ).mean(0)
            if t == 1:
                codec = talker.spk_proj.weight @ speaker[row]
            expected = (
                project(talker.embed_proj, bridge[row, t]) * talker.text_scale
                + project(talker.codec_proj, codec) * talker.audio_scale
            )
            assert_close(seen[0][row, t], expected)
    hidden = torch.randn(1, 48)
    scores = talker.lm_head(hidden[None])[0, :, 0]
    for i in range(8):
        adapter = talker.lm_head.adapters[i]
        inner = nn.functional.gelu(adapter[0].weight @ hidden[0])
        assert_close(scores[i], talker.lm_head.base.weight @ hidden[0] + adapter[2].weight @ inner)


# ---- losses ----


def reference_losses(output, labels, audio_labels):
    """The specification's sums, one position at a time."""
    batch_size, length = labels.shape
    text = [
        -float(output.logits[b, t - 1].log_softmax(-1)[labels[b, t]])
        for b in range(batch_size)
        for t in range(1, length)
        if labels[b, t] != -100
    ]
    codebooks = []
    for i in range(8):
        terms = [
            -float(output.audio_logits[b, i, t - 1].log_softmax(-1)[label]) * (10 if label == STOP else 1)
            for b in range(batch_size)
            for t in range(1, length)
            if (label := int(audio_labels[b, i, t])) != -100
        ]
        codebooks.append(sum(terms) / len(terms) if terms else 0.0)
    return (sum(text) / len(text) if text else 0.0), codebooks


@torch.no_grad()
def test_losses_against_a_plain_loop(model):
    inputs = with_labels(make_inputs(*MIX))
    inputs["audio_labels"][:, 5] = -100  # a codebook without labels
    inputs["audio_labels"][1:, 3] = -100
    output = model(**inputs)
    text, codebooks = reference_losses(output, inputs["labels"], inputs["audio_labels"])
    assert float(output.text_loss) == pytest.approx(text, abs=1e-5)
    assert output.codebook_losses.tolist() == pytest.approx(codebooks, abs=1e-4)
    assert float(output.audio_loss) == pytest.approx(sum(codebooks) / 8, abs=1e-4)
    assert float(output.loss) == pytest.approx(text + sum(codebooks) / 8, abs=1e-4)
    assert output.aux_loss is None  # in training only


@torch.no_grad()
def test_losses_of_uniform_scores(model):
    model.lm_head.weight.zero_()
    for parameter in model.talker.lm_head.parameters():
        parameter.zero_()
    ids = torch.arange(40, 46)[None]
    audio_labels = torch.full((1, 8, 6), -100)
    audio_labels[0, 0, 2:5] = torch.tensor([7, 8, STOP])
    audio_labels[0, 3, 5] = STOP
    audio_labels[0, 4, 0] = 7  # nothing predicts the first position
    output = model(ids, labels=ids, audio_labels=audio_labels)
    assert float(output.text_loss) == pytest.approx(math.log(VOCAB))
    expected = [math.log(CODES) * weight for weight in (12 / 3, 0, 0, 10, 0, 0, 0, 0)]
    assert output.codebook_losses.tolist() == pytest.approx(expected)
    assert float(output.audio_loss) == pytest.approx(sum(expected) / 8)


@torch.no_grad()
def test_the_stop_weight_is_a_setting(tiny_model):
    model = tiny_model(audio_stop_weight=1.0)
    inputs = with_labels(make_inputs("tttttttt"))
    output = model(**inputs)
    losses = nn.functional.cross_entropy(
        output.audio_logits[:, :, :-1].flatten(0, 2), inputs["audio_labels"][:, :, 1:].flatten(), reduction="none"
    ).view(8, -1)
    labelled = inputs["audio_labels"][0, :, 1:] != -100
    assert_close(output.codebook_losses, losses.sum(1) / labelled.sum(1))


def test_labels_are_shifted_inside(model):
    inputs = make_inputs("tttttttt", "tttttttt")
    labels = torch.full((2, 8), -100)
    labels[1, 5] = 99
    audio_labels = torch.full((2, 8, 8), -100)
    audio_labels[0, 2, 3] = 7
    output = model(**inputs, labels=labels, audio_labels=audio_labels)
    output.logits.retain_grad()
    output.audio_logits.retain_grad()
    output.loss.backward()
    assert output.logits.grad.abs().sum(-1).nonzero().tolist() == [[1, 4]]
    assert output.audio_logits.grad.abs().sum(-1).nonzero().tolist() == [[0, 2, 2]]


def test_one_stream_alone(model):
    inputs = with_labels(make_inputs(*MIX))
    both = model(**inputs)
    labels, audio_labels = inputs.pop("labels"), inputs.pop("audio_labels")
    text = model(**inputs, labels=labels)
    assert text.audio_loss is None
    assert_close(text.loss, both.text_loss)
    audio = model(**inputs, audio_labels=audio_labels)
    assert audio.text_loss is None
    assert_close(audio.loss, both.audio_loss)
    without_text = model(**inputs, labels=torch.full_like(labels, -100), audio_labels=audio_labels)
    assert float(without_text.text_loss) == 0
    assert_close(without_text.loss, both.audio_loss)
    nothing = model(**inputs, labels=torch.full_like(labels, -100), audio_labels=torch.full_like(audio_labels, -100))
    assert float(nothing.loss) == 0
    nothing.loss.backward()
    assert all(torch.isfinite(gradient).all() for gradient in grads(model).values())
    assert model(**inputs).loss is None


def test_the_auxiliary_loss(tiny_model):
    coefficients = {"router_aux_loss_coef": 0.5, "talker_router_aux_loss_coef": 0.25}
    model = tiny_model(True, num_experts_per_tok=2, **coefficients, **LIVELY).train()
    inputs = make_inputs("tttttttt", "tttt")
    scores = {"model": [], "talker": []}
    hooks = [
        layer.mlp.gate.register_forward_hook(
            lambda module, args, _, seen=scores[name]: seen.append(
                nn.functional.linear(args[0].reshape(-1, module.weight.shape[1]), module.weight).softmax(-1)
            )
        )
        for name in scores
        for layer in getattr(model, name).layers
    ]
    output = model(**inputs, labels=inputs["input_ids"])
    for hook in hooks:
        hook.remove()
    expected = 0.0
    for name, coefficient, per_token in (("model", 0.5, 2), ("talker", 0.25, 1)):
        for layer in scores[name]:
            assert layer.shape == (16, 4)  # padding counts
            load = [0.0] * 4
            for token in layer:
                for expert in token.topk(per_token).indices.tolist():
                    load[expert] += 1 / 16
            expected += coefficient * 4 * sum(x * float(y) for x, y in zip(load, layer.mean(0), strict=True))
    assert float(output.aux_loss) == pytest.approx(expected, rel=1e-5)
    assert_close(output.loss, output.text_loss + output.aux_loss)
    output.aux_loss.backward()
    for name in scores:
        assert all(layer.mlp.gate.weight.grad.abs().sum() > 0 for layer in getattr(model, name).layers)


def test_accumulated_batches_are_one_batch(tiny_model):
    model = tiny_model(**LIVELY).train()
    specs = ["tt" + "t" * n + tail for n, tail in enumerate(("", "2t", "P", "", "3", "", "t", "1P"))]
    whole = with_labels(make_inputs(*specs, side="right"))
    # Rows of very different numbers of labels, and a codebook that only two of them label.
    whole["audio_labels"][2:, 6] = -100
    whole["audio_labels"][4] = -100
    expected = model(**whole)
    expected.loss.backward()
    expected_grads = grads(model)
    model.zero_grad()
    counts = {
        "num_items_in_batch": (whole["labels"][:, 1:] != -100).sum(),
        "num_audio_items_in_batch": (whole["audio_labels"][:, :, 1:] != -100).sum(dim=(0, 2)),
    }
    text, codebooks, total = 0.0, 0.0, 0.0
    for row, spec in enumerate(specs):
        inputs = make_inputs(spec)
        length = inputs["input_ids"].shape[1]
        output = model(
            **inputs,
            labels=whole["labels"][row : row + 1, :length],
            audio_labels=whole["audio_labels"][row : row + 1, :, :length],
            **counts,
        )
        output.loss.backward()
        text, codebooks = text + output.text_loss.detach(), codebooks + output.codebook_losses.detach()
        total = total + output.loss.detach()
    assert_close(text, expected.text_loss.detach())
    accumulated = grads(model)
    assert accumulated.keys() == expected_grads.keys()
    assert_close(codebooks, expected.codebook_losses.detach())
    assert_close(total, expected.loss.detach())
    for name, value in expected_grads.items():
        torch.testing.assert_close(accumulated[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_one_batch_is_learnt(tiny_model, use_moe):
    model = tiny_model(use_moe, audio_config=None, vision_config=None).train()
    inputs = make_inputs("tttttttttt", "ttttttt")
    inputs = with_labels(inputs)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(120):
        output = model(**inputs)
        if output.text_loss < 0.04 and output.audio_loss < 0.04:
            break
        optimizer.zero_grad()
        output.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert output.text_loss < 0.05
    assert output.audio_loss < 0.05


# ---- encoders ----


def towers(model):
    return {"audio": model.audio_tower, "vision": model.vision_tower}


def assert_frozen(model):
    for tower in towers(model).values():
        assert not any(parameter.requires_grad for parameter in tower.parameters())
        assert not any(module.training for module in tower.modules())


def test_encoders_are_frozen(model, tmp_path):
    model.train()
    assert model.model.training
    assert model.talker.training
    assert_frozen(model)
    inputs = with_labels(make_inputs(*MIX))
    first = model(**inputs)
    first.loss.backward()
    assert model(**inputs).loss.equal(first.loss)  # no dropout
    assert all(p.grad is None for tower in towers(model).values() for p in tower.parameters())
    for projector in (model.audio_proj, model.vision_proj):
        assert all(p.grad.abs().sum() > 0 for p in projector.parameters())
    model.save_pretrained(tmp_path)
    assert_frozen(MiniMindOForConditionalGeneration.from_pretrained(tmp_path).train())


@pytest.mark.parametrize("name", ["audio", "vision"])
def test_encoders_can_be_unfrozen(tiny_model, tmp_path, name):
    tiny_model().save_pretrained(tmp_path)
    model = MiniMindOForConditionalGeneration.from_pretrained(tmp_path)
    tower = towers(model).pop(name)
    tower.requires_grad_(True)
    model.train()
    assert tower.training
    others = [other for key, other in towers(model).items() if key != name]
    assert not others[0].training
    inputs = with_labels(make_inputs(*MIX))
    model(**inputs).loss.backward()
    assert sum(float(p.grad.abs().sum()) for p in tower.parameters() if p.grad is not None) > 0
    assert all(p.grad is None for p in others[0].parameters())
    tower.requires_grad_(False)
    assert_frozen(model.train())


@pytest.mark.parametrize("name", ["audio", "vision"])
def test_one_parameter_of_an_encoder_can_be_unfrozen(tiny_model, name):
    model = tiny_model()
    tower = towers(model)[name]
    parameter = list(tower.parameters())[-1] if name == "audio" else tower.post_layernorm.weight
    parameter.requires_grad_(True)
    model.train()
    assert tower.training
    model(**with_labels(make_inputs(*MIX))).loss.backward()
    assert parameter.grad is not None
    assert parameter.grad.abs().sum() > 0


def test_without_an_encoder_it_says_how_to_attach_one(tiny_model):
    model = tiny_model(audio_config=None, vision_config=None)
    assert model.audio_tower is None
    assert model.vision_tower is None
    inputs = make_inputs("ttP", "t3t")
    pictures = inputs.pop("pixel_values")
    clips = {name: inputs.pop(name) for name in ("input_features", "input_features_mask")}
    with pytest.raises(ValueError, match="no speech encoder.*--audio-encoder.*audio_hidden_states"):
        model(**inputs, **clips)
    with pytest.raises(ValueError, match="no vision encoder.*--vision-encoder.*image_hidden_states"):
        model(**inputs, pixel_values=pictures)
    # The projectors are there, and take an encoder's outputs.
    output = model(**inputs, audio_hidden_states=torch.randn(1, 3, 32), image_hidden_states=torch.randn(1, 4, 32))
    assert torch.isfinite(output.logits).all()


def test_the_longest_clip(model):
    frames = model.config.audio_config.max_position_embeddings - 1
    assert model.get_audio_features(torch.randn(1, frames, 560)).shape == (1, frames, 32)
    with pytest.raises(ValueError, match=f"{frames + 1} frames is longer than the encoder's {frames}"):
        model.get_audio_features(torch.randn(1, frames + 1, 560))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("spec", "changes", "message"),
    [
        ("t5t", {"audio_hidden_states": (1, 6, 32)}, r"5 speech placeholders.*1 speech inputs with 6 features"),
        ("t5t", {"audio_hidden_states": (2, 5, 32)}, r"5 speech placeholders.*2 speech inputs with 10 features"),
        ("tttt", {"audio_hidden_states": (1, 3, 32)}, r"0 speech placeholders.*3 features"),
        ("tPt", {"image_hidden_states": (2, 4, 32)}, r"4 picture placeholders.*2 picture inputs with 8 features"),
        ("tPPt", {"image_hidden_states": (1, 4, 32)}, r"8 picture placeholders.*1 picture inputs with 4 features"),
        ("t5t", {"audio_hidden_states": (0, 5, 32)}, r"5 speech placeholders.*0 speech inputs"),
        ("t5t", {"audio_hidden_states": (5, 32)}, r"\(clips, frames, 32\), got \(5, 32\)"),
        ("t5t", {"audio_hidden_states": (1, 5, 31)}, r"\(clips, frames, 32\), got \(1, 5, 31\)"),
        ("tPt", {"image_hidden_states": (1, 5, 32)}, r"\(pictures, 4, 32\), got \(1, 5, 32\)"),
        ("tPt", {"image_hidden_states": (4, 32)}, r"\(pictures, 4, 32\), got \(4, 32\)"),
        ("t5t", {"input_features": (1, 5, 560), "audio_hidden_states": (1, 5, 32)}, "not both"),
        ("tPt", {"pixel_values": (1, 3, 64, 64), "image_hidden_states": (1, 4, 32)}, "not both"),
    ],
)
def test_clips_and_pictures_that_do_not_fit(tiny_model, spec, changes, message):
    ids = make_inputs(spec)["input_ids"]
    with pytest.raises(ValueError, match=message):
        tiny_model()(ids, **{name: torch.randn(shape) for name, shape in changes.items()})


@pytest.mark.parametrize(
    ("spec", "changes"),
    [
        ("t5t", {"input_features": (5, 560)}),
        ("t5t", {"input_features": (1, 5, 80)}),
        ("tPt", {"pixel_values": (3, 64, 64)}),
        ("tPt", {"pixel_values": (1, 1, 64, 64)}),
        ("tPt", {"pixel_values": (1, 3, 96, 96)}),
        ("tPt", {"pixel_values": (1, 3, 32, 64)}),
    ],
)
def test_raw_inputs_of_another_shape(tiny_model, spec, changes):
    ids = make_inputs(spec)["input_ids"]
    (name, shape), *_ = changes.items()
    with pytest.raises(ValueError, match=re.escape(f"got {shape}")) as error:
        tiny_model()(ids, **{name: torch.randn(shape)})
    assert f"`{name}` must have the shape" in str(error.value)


def test_masks_that_do_not_fit(tiny_model):
    model = tiny_model()
    inputs = make_inputs("t3t2t")
    with pytest.raises(ValueError, match=r"\(2, 3\), got \(2, 4\)"):
        model(**{**inputs, "input_features_mask": torch.ones(2, 4)})
    with pytest.raises(ValueError, match=r"needs a frame, got \[3, 0\]"):
        model(**{**inputs, "input_features_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])})


@pytest.mark.parametrize(
    ("specs", "lengths"), [(("t3", "t5"), (5, 3)), (("t3", "tttt", "t5"), (4, 4)), (("t4", "t4"), (8,))]
)
def test_a_row_holds_whole_clips(tiny_model, specs, lengths):
    frames = max(lengths)
    mask = torch.tensor([[1] * n + [0] * (frames - n) for n in lengths])
    with pytest.raises(ValueError, match="do not line up"):
        tiny_model()(
            make_inputs(*specs)["input_ids"],
            audio_hidden_states=torch.randn(len(lengths), frames, 32),
            input_features_mask=mask,
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"audio_codes": torch.zeros(2, 8, 6)}, "integers, got torch.float32"),
        ({"audio_codes": torch.zeros(2, 8, 6, dtype=torch.bool)}, "integers, got torch.bool"),
        ({"audio_codes": torch.zeros(2, 7, 6, dtype=torch.long)}, r"\(2, 8, 6\), got \(2, 7, 6\)"),
        ({"audio_codes": torch.zeros(2, 8, 5, dtype=torch.long)}, r"\(2, 8, 6\), got \(2, 8, 5\)"),
        ({"audio_codes": torch.zeros(8, 6, dtype=torch.long)}, r"\(2, 8, 6\), got \(8, 6\)"),
        ({"audio_codes": torch.full((2, 8, 6), 40)}, "codes from 0 to 39, got values from 40 to 40"),
        ({"audio_codes": torch.full((2, 8, 6), -1)}, "codes from 0 to 39, got values from -1 to -1"),
        ({"speaker_embeddings": torch.zeros(2, 13)}, r"\(2, 12\) or \(2, 6, 12\), got \(2, 13\)"),
        ({"speaker_embeddings": torch.zeros(1, 12)}, r"\(2, 12\) or \(2, 6, 12\), got \(1, 12\)"),
        ({"speaker_embeddings": torch.zeros(12)}, r"\(2, 12\) or \(2, 6, 12\), got \(12,\)"),
        ({"labels": torch.zeros(2, 5, dtype=torch.long)}, r"\(2, 6\), got \(2, 5\)"),
        ({"labels": torch.zeros(2, 6)}, "labels.*integers, got torch.float32"),
        ({"audio_labels": torch.zeros(2, 8, 7, dtype=torch.long)}, r"\(2, 8, 6\), got \(2, 8, 7\)"),
        ({"audio_labels": torch.zeros(2, 8, 6)}, "integers, got torch.float32"),
        ({"audio_labels": torch.full((2, 8, 6), 40)}, "audio_labels.*39.*40"),
        ({"audio_labels": torch.full((2, 8, 6), -1)}, "audio_labels.*-1"),
        ({"audio_labels": torch.zeros(2, 8, 6, dtype=torch.long), "run_talker": False}, "run_talker=True"),
        ({"labels": torch.zeros(2, 6, dtype=torch.long), "logits_to_keep": 1}, "logits_to_keep=1"),
        ({"inputs_embeds": torch.zeros(2, 6, 64)}, "exactly one"),
        ({"input_ids": None}, "exactly one"),
        ({"input_ids": torch.zeros(2, 6)}, "input_ids.*integer"),
        ({"input_ids": torch.zeros(6, dtype=torch.long)}, "input_ids.*shape"),
    ],
)
def test_wrong_inputs(tiny_model, changes, message):
    inputs = {"input_ids": torch.full((2, 6), 50), **changes}
    with pytest.raises(ValueError, match=message):
        tiny_model()(**inputs)


def test_the_thinker_alone(tiny_config):
    thinker = MiniMindOThinkerModel(tiny_config()).eval()
    ids = torch.arange(40, 46)[None]
    output = thinker(ids, use_cache=True)
    assert output.last_hidden_state.shape == output.bridge_hidden_state.shape == (1, 6, 64)
    assert output.past_key_values.get_seq_length() == 6
    with pytest.raises(ValueError, match="exactly one"):
        thinker()


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.inference_mode])
def test_it_runs_in_inference_mode_and_trains_after(tiny_model, mode):
    # A rotary or mask tensor kept from inference mode would break a later backward.
    model = tiny_model()
    inputs = with_labels(make_inputs(*MIX))
    with mode():
        model(**inputs)
    model.train()(**inputs).loss.backward()
    assert model.talker.spk_proj.weight.grad.abs().sum() > 0
