"""Conversion from the original's layout and back, with stand-ins for the releases written by the tests."""

import json
import os
import pickle
import re

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForMultimodalLM,
    AutoProcessor,
    FunAsrNanoEncoder,
    FunAsrNanoEncoderConfig,
    MimiConfig,
    MimiModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from minimind_o_hf import MiniMindOConfig, MiniMindOForConditionalGeneration
from minimind_o_hf.convert import convert_checkpoint, export_original, load_sensevoice_encoder, read_am_mvn
from minimind_o_hf.presets import build_tokenizer

TINY = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "talker_hidden_size": 32,
    "num_talker_hidden_layers": 2,
    "talker_num_attention_heads": 2,
    "talker_num_key_value_heads": 1,
    "talker_head_dim": 24,
    "num_experts": 3,
    "talker_num_experts": 2,
    "audio_adapter_rank": 8,
    "audio_codebook_size": 256,
    "audio_vocab_size": 320,
    "audio_pad_token": 257,
    "audio_stop_token": 258,
    "audio_spk_token": 259,
    "audio_hidden_size": 64,
    "image_hidden_size": 48,
    "image_token_len": 4,
}
# What a tensor's shape cannot tell.
UNTOLD = {"image_token_len"}


def _same(found: dict, wanted: dict) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def _original_state(model: MiniMindOForConditionalGeneration) -> dict[str, torch.Tensor]:
    """A model's tensors under the original's names: one per expert, the head beside the embedding."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("mlp.experts.gate_up_proj"):
            for index, expert in enumerate(tensor):
                gate, up = expert.chunk(2)
                state[name.replace("gate_up_proj", f"{index}.gate_proj.weight")] = gate.clone()
                state[name.replace("gate_up_proj", f"{index}.up_proj.weight")] = up.clone()
        elif name.endswith("mlp.experts.down_proj"):
            for index, expert in enumerate(tensor):
                state[name.replace("down_proj", f"{index}.down_proj.weight")] = expert.clone()
        else:
            state[name] = tensor.clone()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    return state


def _write_original(directory, state, config, layout="bin"):
    """An original directory: flat config with an `auto_map`, weights, tokenizer, and remote code that must not run."""
    directory.mkdir()
    auto_map = {"AutoConfig": "remote.OmniConfig", "AutoModelForCausalLM": "remote.MiniMindOmni"}
    content = {**config, "architectures": ["MiniMindOmni"], "model_type": "minimind-o", "auto_map": auto_map}
    (directory / "config.json").write_text(json.dumps(content), encoding="utf-8")
    (directory / "remote.py").write_text("raise SystemExit('remote code was run')", encoding="utf-8")
    build_tokenizer().save_pretrained(directory)
    if layout == "bin":
        torch.save(state, directory / "pytorch_model.bin")
    elif layout == "safetensors":
        save_file(state, directory / "model.safetensors")
    else:
        names = sorted(state)
        shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
        for shard, keys in shards.items():
            save_file({key: state[key] for key in keys}, directory / shard)
        weight_map = {key: shard for shard, keys in shards.items() for key in keys}
        index = directory / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return directory


def _flat(config: MiniMindOConfig) -> dict:
    return {name: value for name, value in config.to_dict().items() if name not in ("audio_config", "vision_config")}


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def tiny(request):
    torch.manual_seed(0)
    model = MiniMindOForConditionalGeneration(MiniMindOConfig(**TINY, use_moe=request.param)).eval()
    return model, _original_state(model)


@pytest.fixture(scope="module")
def tiny_dense():
    torch.manual_seed(0)
    model = MiniMindOForConditionalGeneration(MiniMindOConfig(**TINY)).eval()
    return model, _original_state(model)


@pytest.fixture
def original(tiny_dense, tmp_path):
    model, state = tiny_dense
    return _write_original(tmp_path / "original", state, _flat(model.config))


@torch.no_grad()
def _logits(model):
    torch.manual_seed(1)
    inputs = {
        "input_ids": torch.randint(30, 1024, (2, 9)),
        "audio_codes": torch.randint(256, (2, 8, 9)),
        "speaker_embeddings": torch.randn(2, 192),
    }
    output = model(**inputs)
    return output.logits, output.audio_logits


# ---- SenseVoice ----


def _sensevoice_state(encoder: FunAsrNanoEncoder) -> dict[str, torch.Tensor]:
    """A SAN-M encoder's tensors under SenseVoice's names."""
    config = encoder.config
    num_main = config.num_hidden_layers - config.num_timestamp_prediction_layers
    renames = {
        "self_attn.o_proj": "self_attn.linear_out",
        "self_attn.fsmn.conv": "self_attn.fsmn_block",
        "mlp.fc1": "feed_forward.w_1",
        "mlp.fc2": "feed_forward.w_2",
        "input_layernorm": "norm1",
        "post_attention_layernorm": "norm2",
    }
    state = {}
    source = encoder.state_dict()
    for name, tensor in source.items():
        _, index, rest = name.split(".", 2)
        index, (module, kind) = int(index), rest.rsplit(".", 1)
        part = "encoders0.0" if index == 0 else f"encoders.{index - 1}"
        if index >= num_main:
            part = f"tp_encoders.{index - num_main}"
        if module == "final_layernorm":
            state[f"encoder.{'after_norm' if index < num_main else 'tp_norm'}.{kind}"] = tensor
        elif module == "self_attn.q_proj":
            fused = torch.cat([source[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
            state[f"encoder.{part}.self_attn.linear_q_k_v.{kind}"] = fused
        elif module in renames:
            state[f"encoder.{part}.{renames[module]}.{kind}"] = tensor
    state["ctc.ctc_lo.weight"] = torch.zeros(3, config.hidden_size)
    state["embed.weight"] = torch.zeros(2, 560)
    return state


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    config = FunAsrNanoEncoderConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=5,
        num_timestamp_prediction_layers=2,
        fsmn_kernel_size=7,
    )
    encoder = FunAsrNanoEncoder(config).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(std=0.3)
    return encoder


def _am_mvn(shift, scale):
    vectors = [" ".join(repr(value) for value in vector.tolist()) for vector in (shift, scale)]
    return (
        "<Nnet> \n<Splice> 560 560 \n[ 0 ]\n"
        f"<AddShift> 560 560 \n<LearnRateCoef> 0 [ {vectors[0]} ]\n"
        f"<Rescale> 560 560 \n<LearnRateCoef> 0 [ {vectors[1]} ]\n</Nnet> \n"
    )


@pytest.fixture
def sensevoice(encoder, tmp_path):
    directory = tmp_path / "SenseVoiceSmall"
    directory.mkdir()
    torch.save(_sensevoice_state(encoder), directory / "model.pt")
    generator = torch.Generator().manual_seed(2)
    shift, scale = torch.randn(560, generator=generator), torch.rand(560, generator=generator) + 0.1
    (directory / "am.mvn").write_text(_am_mvn(shift, scale), encoding="utf-8")
    return directory


@pytest.mark.parametrize("nesting", [None, "state_dict", "model", "model_state_dict"])
def test_sensevoice_loads_under_transformers_names(encoder, nesting, tmp_path):
    state = _sensevoice_state(encoder)
    torch.save(state if nesting is None else {nesting: state, "epoch": 3}, tmp_path / "model.pt")
    for path in (tmp_path, tmp_path / "model.pt", str(tmp_path)):
        loaded = load_sensevoice_encoder(path)
        assert _same(loaded.state_dict(), encoder.state_dict())
        assert not loaded.training
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_mel_bins"):
        assert getattr(loaded.config, name) == getattr(encoder.config, name)
    assert loaded.config.num_timestamp_prediction_layers == 2
    assert loaded.config.fsmn_kernel_size == 7
    features, mask = torch.randn(1, 6, 560), torch.ones(1, 6, dtype=torch.long)
    with torch.no_grad():
        wanted = encoder(features, input_features_mask=mask).last_hidden_state
        torch.testing.assert_close(loaded(features, input_features_mask=mask).last_hidden_state, wanted)


def test_sensevoice_equals_the_reference(golden, tmp_path):
    torch.save(golden.fill.state_dict_from_manifest(golden.manifest("sensevoice_encoder")), tmp_path / "model.pt")
    encoder = load_sensevoice_encoder(tmp_path)
    values = golden.tensors("sensevoice_encoder")
    features, lengths = values["input_features"], values["lengths"]
    mask = (torch.arange(features.shape[1]) < lengths[:, None]).long()
    with torch.no_grad():
        batch = encoder(features, input_features_mask=mask).last_hidden_state
        single = encoder(features[:1], input_features_mask=torch.ones_like(mask[:1])).last_hidden_state
    for row, length in enumerate(lengths.tolist()):
        wanted = values["last_hidden_state"][row, :length]
        torch.testing.assert_close(batch[row, :length], wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(single, values["last_hidden_state_single"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("encoder.tp_norm.bias"), r"lacks 1 tensors \(layers.4.final_layernorm.bias\)"),
        (lambda state: state.pop("encoder.encoders.1.norm2.weight"), "layers.2.post_attention_layernorm.weight"),
        (lambda state: state.pop("encoder.encoders0.0.norm1.weight"), "layers.0.input_layernorm.weight"),
        (lambda state: state.update({"encoder.strange": torch.zeros(2)}), "encoder.strange"),
        (lambda state: state.update({"encoder.encoders.0.norm3.bias": torch.zeros(2)}), "encoders.0.norm3.bias"),
        (lambda state: state.update({"encoder.after_norm.bias": torch.zeros(2)}), r"final_layernorm.bias \[2\]"),
        (
            lambda state: state.update({"encoder.encoders.0.self_attn.linear_q_k_v.bias": torch.zeros(100)}),
            "three equal parts",
        ),
        (lambda state: [state.pop(name) for name in list(state) if name.startswith("encoder.")], "starts with"),
        (
            lambda state: [state.pop(name) for name in list(state) if "tp_encoders" in name],
            "lacks.*encoder.tp_encoders",
        ),
        (lambda state: [state.pop(name) for name in list(state) if ".encoders.0." in name], "lacks encoders.0"),
    ],
)
def test_sensevoice_tensors_that_do_not_fit_are_named(encoder, change, message, tmp_path):
    state = _sensevoice_state(encoder)
    change(state)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=message):
        load_sensevoice_encoder(tmp_path)


def test_am_mvn_is_read_exactly(sensevoice):
    generator = torch.Generator().manual_seed(2)
    shift, scale = read_am_mvn(sensevoice / "am.mvn")
    assert torch.equal(shift, torch.randn(560, generator=generator))
    assert torch.equal(scale, torch.rand(560, generator=generator) + 0.1)
    assert shift.dtype == scale.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 3], "<AddShift>"),
        (lambda text: text.replace("<Rescale>", "<Scale>"), "<Rescale>"),
        (
            lambda text: text.replace("<AddShift> 560 560", "<AddShift> 560 80"),
            "560 and 80 values and holds 560",
        ),
        (lambda text: re.sub(r"0 \[ \S+", "0 [ nan", text), "not finite"),
        (lambda text: re.sub(r"0 \[ \S+", "0 [ one", text), "else than numbers"),
        (lambda text: "", "no am.mvn"),
    ],
)
def test_a_bad_am_mvn_is_refused(sensevoice, change, message):
    path = sensevoice / "am.mvn"
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_am_mvn(path)


def test_am_mvn_must_be_a_text_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_am_mvn(tmp_path / "am.mvn")
    (tmp_path / "am.mvn").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ValueError, match="no text file"):
        read_am_mvn(tmp_path / "am.mvn")


# ---- to a complete directory ----


@pytest.mark.parametrize("layout", ["bin", "safetensors", "sharded"])
def test_an_original_directory_converts_exactly(tiny, layout, tmp_path):
    model, state = tiny
    source = _write_original(tmp_path / "original", state, _flat(model.config), layout)
    directory = convert_checkpoint(source, tmp_path / "converted")
    assert directory == tmp_path / "converted"
    assert "auto_map" not in json.loads((directory / "config.json").read_text(encoding="utf-8"))
    loaded, info = AutoModelForMultimodalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert _same(loaded.state_dict(), model.state_dict())
    for found, wanted in zip(_logits(loaded), _logits(model), strict=True):
        assert torch.equal(found, wanted)
    # Saved under the original's names, the tied head once.
    saved = load_file(directory / "model.safetensors")
    assert _same(saved, {name: tensor for name, tensor in state.items() if name != "lm_head.weight"})
    assert loaded.generation_config.audio_top_k == 50
    assert (directory / "generation_config.json").is_file()
    assert not list(directory.glob("*.py"))


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
def test_a_bare_state_dict_tells_its_configuration(tiny, suffix, tmp_path):
    model, state = tiny
    path = tmp_path / f"omni{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    directory = convert_checkpoint(path, tmp_path / "converted", tokenizer=build_tokenizer())
    loaded = AutoModelForMultimodalLM.from_pretrained(directory)
    assert _same(loaded.state_dict(), model.state_dict())
    wanted = model.config
    unused = {"num_experts", "talker_num_experts"} if not wanted.use_moe else set()
    for name in set(TINY) - UNTOLD - unused | {"use_moe", "intermediate_size", "bridge_layer", "num_codebooks"}:
        assert getattr(loaded.config, name) == getattr(wanted, name), name
    for found, expected in zip(_logits(loaded), _logits(model), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["tiny_dense", "tiny_moe"])
def test_the_reference_checkpoints_convert_from_either_form(golden, shared_dir, name, tmp_path):
    manifest, config = golden.manifest(name), golden.config(name)
    state = golden.fill.state_dict_from_manifest(manifest, tied={"lm_head.weight": "model.embed_tokens.weight"})
    torch.save({key: value.half() for key, value in state.items()}, tmp_path / "omni.pth")
    _write_original(tmp_path / "original", state, config)
    tokenizer = shared_dir / "tokenizer"
    full = convert_checkpoint(tmp_path / "original", tmp_path / "full", tokenizer=tokenizer)
    bare = convert_checkpoint(tmp_path / "omni.pth", tmp_path / "bare", tokenizer=tokenizer)

    saved = {key: value for key, value in state.items() if key != "lm_head.weight"}
    assert _same(load_file(full / "model.safetensors"), saved)
    # float16 stays float16 on the disk.
    assert _same(load_file(bare / "model.safetensors"), {key: value.half() for key, value in saved.items()})
    contents = [json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (full, bare)]
    assert contents[1]["dtype"] == "float16"
    for key in (
        "hidden_size",
        "head_dim",
        "intermediate_size",
        "moe_intermediate_size",
        "num_experts",
        "bridge_layer",
    ):
        if config["use_moe"] or "moe" not in key:
            assert contents[0][key] == contents[1][key] == config[key], key

    values = golden.tensors(name)
    loaded = AutoModelForMultimodalLM.from_pretrained(full)
    with torch.no_grad():
        logits = loaded(input_ids=values["input_ids"]).logits[:, values["positions"]]
    torch.testing.assert_close(logits, values["text_only.logits"], rtol=1e-5, atol=1e-5)


def test_the_released_tokenizer_gets_the_packages_chat_template(golden, shared_dir, tmp_path):
    state = golden.fill.state_dict_from_manifest(
        golden.manifest("tiny_dense"), tied={"lm_head.weight": "model.embed_tokens.weight"}
    )
    source = _write_original(tmp_path / "original", state, golden.config("tiny_dense"))
    for path in (shared_dir / "tokenizer").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    processor = AutoProcessor.from_pretrained(convert_checkpoint(source, tmp_path / "converted"))
    assert len(processor.tokenizer) == 6400
    chat = [{"role": "user", "content": [{"type": "audio", "path": "x.wav"}, {"type": "text", "text": "hi"}]}]
    rendered = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert "<|audio_pad|>" in rendered
    assert rendered.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def _write_vision_encoder(directory, hidden_size):
    config = SiglipVisionConfig(
        image_size=64,
        patch_size=32,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    encoder = SiglipVisionModel(config)
    encoder.save_pretrained(directory)
    SiglipImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(directory)
    return encoder


@pytest.fixture
def parts(sensevoice, tmp_path):
    """Stand-ins for SenseVoice, SigLIP2 and Mimi at toy size."""
    torch.manual_seed(3)
    vision = _write_vision_encoder(tmp_path / "siglip", hidden_size=48)
    codec = MimiModel(
        MimiConfig(
            num_filters=4,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=32,
            upsample_groups=32,
            num_quantizers=9,
            codebook_size=256,
            codebook_dim=16,
            vector_quantization_hidden_dimension=16,
        )
    )
    codec.save_pretrained(tmp_path / "mimi")
    return {
        "audio_encoder": sensevoice,
        "vision_encoder": tmp_path / "siglip",
        "codec": str(tmp_path / "mimi"),
    }, (vision, codec)


def test_a_complete_directory_hears_sees_and_speaks(original, encoder, parts, tmp_path):
    arguments, (vision, codec) = parts
    directory = convert_checkpoint(original, tmp_path / "complete", **arguments)
    for gone in (original, *arguments.values()):
        os.rename(gone, f"{gone}.gone")  # it must load alone

    model, info = AutoModelForMultimodalLM.from_pretrained(directory, output_loading_info=True)
    processor = AutoProcessor.from_pretrained(directory)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert _same(model.audio_tower.state_dict(), encoder.state_dict())
    assert _same(model.vision_tower.state_dict(), vision.state_dict())
    assert _same(processor.audio_tokenizer.state_dict(), codec.state_dict())
    front_end, generator = processor.feature_extractor, torch.Generator().manual_seed(2)
    assert torch.equal(torch.tensor(front_end.cmvn_shift), torch.randn(560, generator=generator))
    assert torch.equal(torch.tensor(front_end.cmvn_scale), torch.rand(560, generator=generator) + 0.1)
    assert processor.image_processor.size == {"height": 64, "width": 64}
    assert (processor.image_token_len, processor.audio_codebook_size, processor.audio_pad_code) == (4, 256, 257)

    content = [
        {"type": "audio", "audio": torch.randn(8000).mul(0.1).numpy()},
        {"type": "image", "image": torch.randint(256, (30, 20, 3), dtype=torch.uint8).numpy()},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    output = model.generate(**inputs, max_new_tokens=12, return_dict_in_generate=True, seeds=[0])
    assert processor.decode(output)[0].audio.isfinite().all()


def test_a_bare_state_dict_takes_the_vision_encoders_picture_length(original, parts, tmp_path):
    source = original / "pytorch_model.bin"
    directory = convert_checkpoint(source, tmp_path / "made", vision_encoder=parts[0]["vision_encoder"])
    assert AutoModelForMultimodalLM.from_pretrained(directory).config.image_token_len == 4
    assert AutoProcessor.from_pretrained(directory).image_token_len == 4


def test_hub_ids_are_downloaded(original, parts, encoder, tmp_path, monkeypatch):
    # A real download cache, read offline.
    cache, revision = tmp_path / "hub", "0" * 40
    arguments = {"source": original, **parts[0]}
    for name, folder in arguments.items():
        repository = cache / f"models--owner--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(revision, encoding="utf-8")
        (repository / "snapshots").mkdir()
        os.rename(folder, repository / "snapshots" / revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    ids = {name: f"owner/{name}" for name in parts[0]}
    directory = convert_checkpoint("owner/source", tmp_path / "complete", **ids)
    assert _same(AutoModelForMultimodalLM.from_pretrained(directory).audio_tower.state_dict(), encoder.state_dict())
    _refused(tmp_path, OSError, "owner/nothing does not exist here and cannot be downloaded", "owner/nothing")


def test_parts_can_be_attached_one_after_the_other(original, parts, encoder, tmp_path):
    arguments, (vision, _) = parts
    first = convert_checkpoint(original, tmp_path / "first", codec=arguments["codec"])
    processor = AutoProcessor.from_pretrained(first)
    processor.voices["me"] = {"spk_emb": torch.ones(192)}
    processor.save_pretrained(first)
    second = convert_checkpoint(first, tmp_path / "second", audio_encoder=arguments["audio_encoder"])
    third = convert_checkpoint(second, tmp_path / "third", vision_encoder=arguments["vision_encoder"])

    at_once = convert_checkpoint(original, tmp_path / "at_once", **arguments)
    assert _same(load_file(third / "model.safetensors"), load_file(at_once / "model.safetensors"))
    processor = AutoProcessor.from_pretrained(third)
    assert processor.audio_tokenizer is not None
    assert processor.feature_extractor.cmvn_shift is not None
    assert torch.equal(processor.voices["me"]["spk_emb"], torch.ones(192))
    # A part that is there is replaced.
    state = {name: tensor + 1 for name, tensor in _sensevoice_state(encoder).items()}
    torch.save(state, arguments["audio_encoder"] / "model.pt")
    fourth = convert_checkpoint(third, tmp_path / "fourth", audio_encoder=arguments["audio_encoder"])
    loaded = AutoModelForMultimodalLM.from_pretrained(fourth)
    assert _same(loaded.audio_tower.state_dict(), {k: v + 1 for k, v in encoder.state_dict().items()})
    assert _same(loaded.vision_tower.state_dict(), vision.state_dict())


def test_generation_settings_of_the_source_are_kept(original, tmp_path):
    settings = {"temperature": 0.3, "max_new_tokens": 7}
    (original / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    directory = convert_checkpoint(original, tmp_path / "converted")
    config = AutoModelForMultimodalLM.from_pretrained(directory).generation_config
    assert (config.temperature, config.max_new_tokens, config.audio_temperature) == (0.3, 7, 0.2)


def test_dtype_is_the_sources_unless_given(tiny_dense, tmp_path):
    model, state = tiny_dense
    half = {name: tensor.half() for name, tensor in state.items()}
    source = _write_original(tmp_path / "original", half, _flat(model.config) | {"dtype": "float16"})
    kept = load_file(convert_checkpoint(source, tmp_path / "kept") / "model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float16}
    given = load_file(convert_checkpoint(source, tmp_path / "given", dtype=torch.bfloat16) / "model.safetensors")
    assert {tensor.dtype for tensor in given.values()} == {torch.bfloat16}


# ---- and back ----


def test_the_original_layout_comes_back_exactly(tiny, tmp_path):
    model, state = tiny
    source = _write_original(tmp_path / "original", state, _flat(model.config))
    directory = convert_checkpoint(source, tmp_path / "converted")
    path = export_original(directory, tmp_path / "out" / "omni.pth", dtype=torch.float32)
    written = torch.load(path, weights_only=True)
    assert _same(written, state)
    # No expert drags its layer's fused tensor along.
    assert path.stat().st_size < 1.2 * sum(4 * tensor.numel() for tensor in state.values())
    again = convert_checkpoint(path, tmp_path / "again", tokenizer=build_tokenizer())
    assert _same(load_file(again / "model.safetensors"), load_file(directory / "model.safetensors"))


def test_export_is_float16_and_leaves_the_encoders_out(original, parts, tiny_dense, tmp_path):
    directory = convert_checkpoint(original, tmp_path / "complete", **parts[0])
    written = torch.load(export_original(directory, tmp_path / "omni.pth"), weights_only=True)
    assert _same(written, {name: tensor.half() for name, tensor in tiny_dense[1].items()})
    assert not list(tmp_path.glob(".*"))


def test_export_keeps_an_existing_file_unless_told(original, tmp_path):
    path = tmp_path / "omni.pth"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError):
        export_original(original, path)
    assert path.read_text(encoding="utf-8") == "mine"
    with pytest.raises(FileExistsError):
        export_original(original, tmp_path, overwrite=True)
    export_original(original, path, overwrite=True)
    assert torch.load(path, weights_only=True)["talker.text_scale"] == 3


def test_export_refuses_what_float16_cannot_hold(tiny_dense, tmp_path):
    model, state = tiny_dense
    state = {**state, "talker.norm.weight": torch.full((32,), 1e5)}
    source = _write_original(tmp_path / "original", state, _flat(model.config))
    with pytest.raises(ValueError, match=r"talker.norm.weight are not finite in torch.float16"):
        export_original(source, tmp_path / "omni.pth")
    assert not (tmp_path / "omni.pth").exists()
    export_original(source, tmp_path / "omni.pth", dtype=torch.bfloat16)


# ---- bad input ----


def _refused(tmp_path, error, message, source, **kwargs):
    target = tmp_path / "target" / "converted"
    with pytest.raises(error, match=message):
        convert_checkpoint(source, target, **kwargs)
    assert not target.exists()
    assert not target.parent.exists() or list(target.parent.iterdir()) == []


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("talker.codec_proj.0.bias"), "lacks.*talker.codec_proj.0.bias"),
        (lambda state: state.pop("model.embed_tokens.weight"), "lacks.*model.embed_tokens.weight"),
        (lambda state: state.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight"),
        (lambda state: state.update({"talker.extra": torch.zeros(2)}), r"1 unknown tensors \(talker.extra\)"),
        (lambda state: state.update({"model.norm.weight": torch.zeros(3)}), r"model.norm.weight \[3\] for \[64\]"),
        (lambda state: state.update({"lm_head.weight": torch.zeros(1024, 64)}), "tied, but differ"),
        (lambda state: state.update({"talker.norm.weight": torch.ones(32, dtype=torch.long)}), "no floats"),
        (lambda state: state.clear(), "holds no tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tiny_dense, bare, change, message, tmp_path):
    model, state = tiny_dense
    state = dict(state)
    change(state)
    source = _write_original(tmp_path / "original", state, _flat(model.config))
    _refused(tmp_path, ValueError, message, source / "pytorch_model.bin" if bare else source)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("model.layers.1.mlp.experts.2.up_proj.weight"),
        lambda state: state.pop("model.layers.1.mlp.experts.2.down_proj.weight"),
        lambda state: state.pop("talker.layers.0.mlp.gate.weight"),
        lambda state: state.update({"model.layers.1.mlp.experts.1.down_proj.weight": torch.zeros(64, 8)}),
        lambda state: state.update({"model.layers.1.mlp.experts.3.down_proj.weight": torch.zeros(64, 256)}),
    ],
)
def test_missing_and_odd_experts_are_refused(change, tmp_path):
    model = MiniMindOForConditionalGeneration(MiniMindOConfig(**TINY, use_moe=True))
    state = _original_state(model)
    change(state)
    source = _write_original(tmp_path / "original", state, _flat(model.config))
    _refused(tmp_path, ValueError, "(?s)mlp", source)


class _Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_objects_are_not_loaded(original, sensevoice, tmp_path):
    canary = tmp_path / "canary"
    for path in (original / "pytorch_model.bin", sensevoice / "model.pt"):
        torch.save({"model.norm.weight": torch.ones(2), "x": _Malicious(canary)}, path)
    _refused(tmp_path, ValueError, "pickled objects", original)
    _refused(tmp_path, ValueError, "pickled objects", original / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled objects"):
        load_sensevoice_encoder(sensevoice)
    (tmp_path / "bare.pth").write_bytes(pickle.dumps({"x": _Malicious(canary)}, protocol=2))
    _refused(tmp_path, (ValueError, OSError), "bare.pth", tmp_path / "bare.pth")
    assert not canary.exists()


@pytest.mark.parametrize("content", [{"step": 3}, {"model.norm.weight": [1.0, 2.0]}, [torch.ones(2)], torch.ones(2)])
def test_a_file_that_is_no_state_dict_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "omni.pth")
    _refused(tmp_path, ValueError, "state dict|dictionary", tmp_path / "omni.pth", tokenizer=build_tokenizer())


@pytest.mark.parametrize("layout", ["bin", "safetensors", "sharded"])
@pytest.mark.parametrize("length", [0, 100, 5000, -1000])
def test_truncated_weights_are_refused(tiny_dense, layout, length, tmp_path):
    model, state = tiny_dense
    source = _write_original(tmp_path / "original", state, _flat(model.config), layout)
    path = next(source.glob("*.bin" if layout == "bin" else "*.safetensors"))
    path.write_bytes(path.read_bytes()[:length])
    _refused(tmp_path, OSError, "truncated|damaged", source)


def test_what_is_missing_is_said(original, sensevoice, tmp_path):
    _refused(tmp_path, OSError, "no Hub id", tmp_path / "nowhere")
    (sensevoice / "am.mvn").unlink()
    _refused(tmp_path, OSError, "am.mvn", original, audio_encoder=sensevoice)
    _refused(tmp_path, OSError, "the audio encoder", original, audio_encoder=tmp_path / "nowhere")
    _refused(tmp_path, OSError, "the vision encoder.*nowhere", original, vision_encoder=tmp_path / "nowhere")
    _refused(tmp_path, OSError, "the codec.*nowhere", original, codec=tmp_path / "nowhere")
    (original / "tokenizer.json").unlink()
    _refused(tmp_path, ValueError, "tokenizer", original)
    (original / "pytorch_model.bin").unlink()
    _refused(tmp_path, OSError, "no model.safetensors", original)
    (original / "config.json").unlink()
    _refused(tmp_path, OSError, "no config.json", original)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"vocab_size": 1000}, "vocab_size"),
        ({"hidden_size": 128}, "do not fit"),
        ({"audio_ids": [17]}, "'<\\|audio_pad\\|>' is 16, the model's 17"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(original, change, message, tmp_path):
    path = original / "config.json"
    content = json.loads(path.read_text(encoding="utf-8")) | change
    path.write_text(json.dumps(content), encoding="utf-8")
    _refused(tmp_path, ValueError, message, original)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_damaged_configuration_is_refused(original, text, tmp_path):
    (original / "config.json").write_text(text, encoding="utf-8")
    _refused(tmp_path, ValueError, "config.json", original)


def test_a_shard_outside_the_directory_is_refused(tiny_dense, tmp_path):
    model, state = tiny_dense
    source = _write_original(tmp_path / "original", state, _flat(model.config), "sharded")
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../secret.safetensors"}}), encoding="utf-8")
    _refused(tmp_path, ValueError, "outside its directory", source)


@pytest.mark.parametrize("part", ["vision_encoder", "codec"])
def test_a_truncated_part_is_refused(original, parts, part, tmp_path):
    path = next((tmp_path / {"vision_encoder": "siglip", "codec": "mimi"}[part]).glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1000])
    _refused(tmp_path, OSError, "truncated or damaged", original, **{part: parts[0][part]})
    save_file({"strange": torch.zeros(2)}, path, metadata={"format": "pt"})
    _refused(tmp_path, ValueError, "it lacks", original, **{part: parts[0][part]})


@pytest.mark.parametrize(
    ("sizes", "message"), [({"codebook_size": 512}, "512 codes.*256"), ({"num_quantizers": 4}, "4 .*8")]
)
def test_a_codec_that_does_not_fit_is_refused(original, parts, sizes, message, tmp_path):
    config = MimiConfig(**{**parts[1][1].config.to_dict(), **sizes})
    MimiModel(config).save_pretrained(tmp_path / "other")
    _refused(tmp_path, ValueError, message, original, codec=tmp_path / "other")


def test_an_encoder_of_another_width_is_refused(original, tmp_path):
    _write_vision_encoder(tmp_path / "siglip", hidden_size=32)
    message = r"\(32\) must equal `image_hidden_size` \(48\)"
    _refused(tmp_path, ValueError, message, original, vision_encoder=tmp_path / "siglip")


def test_an_existing_directory_is_untouched(original, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(FileExistsError):
        convert_checkpoint(original, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    made = convert_checkpoint(original, tmp_path / "made")
    (made / "stale").touch()
    convert_checkpoint(original, made, overwrite=True)
    assert not (made / "stale").exists()
    with pytest.raises(ValueError, match="is the source"):
        convert_checkpoint(made, made, overwrite=True)
