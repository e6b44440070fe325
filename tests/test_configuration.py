"""The configuration: the original's flat `config.json`, the stacks made from it, and what it refuses."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from minimind_o_hf.modeling import MiniMindOConfig
from transformers import AutoConfig, DynamicCache, FunAsrNanoEncoderConfig, Qwen3Config, Qwen3MoeConfig
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig

import minimind_o_hf  # noqa: F401  (registers the Auto classes)

# As a release writes it: flat, with remote code that must not be run and settings that nobody reads.
ORIGINAL = {
    "architectures": ["MiniMindOmni"],
    "auto_map": {"AutoConfig": "model_omni.OmniConfig", "AutoModelForCausalLM": "model_omni.MiniMindOmni"},
    "model_type": "minimind-o",
    "dtype": "bfloat16",
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "talker_hidden_size": 384,
    "num_talker_hidden_layers": 3,
    "use_moe": True,
    "vocab_size": 6400,
    "flash_attn": True,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 1024},
    "rope_parameters": None,
    "inference_rope_scaling": False,
    "audio_ids": [16],
    "image_ids": [12],
    "audio_vocab_size": 2112,
    "think_end_ids": [26, 234, 234],
}


def write(directory, config):
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def test_the_defaults_are_the_released_dense_models():
    config = MiniMindOConfig()
    assert config.model_type == "minimind-o"
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (6400, 768, 8)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 96)
    assert config.intermediate_size == config.moe_intermediate_size == 2432
    assert (config.rms_norm_eps, config.rope_theta, config.max_position_embeddings) == (1e-6, 1e6, 32768)
    assert config.bridge_layer == 3
    assert (config.talker_hidden_size, config.num_talker_hidden_layers) == (768, 4)
    assert (config.talker_num_attention_heads, config.talker_num_key_value_heads, config.talker_head_dim) == (8, 4, 96)
    assert config.talker_intermediate_size == config.talker_moe_intermediate_size == 2432
    assert not config.use_moe
    assert (config.num_experts, config.num_experts_per_tok, config.norm_topk_prob) == (4, 1, True)
    assert config.router_aux_loss_coef == config.talker_router_aux_loss_coef == 5e-4
    assert (config.num_codebooks, config.audio_codebook_size, config.audio_vocab_size) == (8, 2048, 2112)
    assert (config.audio_pad_token, config.audio_stop_token, config.audio_spk_token) == (2049, 2050, 2051)
    assert (config.audio_adapter_rank, config.audio_stop_weight, config.spk_emb_size) == (256, 10.0, 192)
    assert (config.audio_hidden_size, config.image_hidden_size, config.image_token_len) == (512, 768, 64)
    assert (config.audio_token_id, config.image_token_id) == (16, 12)
    assert (config.audio_special_token, config.image_special_token) == ("<|audio_pad|>", "<|image_pad|>")
    assert (config.think_start_id, list(config.think_end_ids)) == (25, [26, 234, 234])
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert config.tie_word_embeddings
    assert config.initializer_range == 0.02
    assert config.audio_config is None
    assert config.vision_config is None


@pytest.mark.parametrize(
    ("hidden_size", "mlp", "head_dim"), [(768, 2432, 96), (512, 1664, 64), (384, 1216, 48), (64, 256, 8)]
)
def test_sizes_that_follow_from_the_width(hidden_size, mlp, head_dim):
    config = MiniMindOConfig(hidden_size=hidden_size, talker_hidden_size=hidden_size)
    assert config.head_dim == config.talker_head_dim == head_dim
    assert config.intermediate_size == config.moe_intermediate_size == mlp
    assert config.talker_intermediate_size == config.talker_moe_intermediate_size == mlp


@pytest.mark.parametrize(("layers", "bridge"), [(8, 3), (16, 7), (5, 1), (2, 0), (1, 0)])
def test_the_bridge_is_the_middle(layers, bridge):
    assert MiniMindOConfig(num_hidden_layers=layers).bridge_layer == bridge
    assert MiniMindOConfig(num_hidden_layers=layers, bridge_layer=layers - 1).bridge_layer == layers - 1


def test_an_original_config_loads_as_it_is(tmp_path):
    config = MiniMindOConfig.from_pretrained(write(tmp_path, ORIGINAL))
    assert (config.hidden_size, config.num_hidden_layers, config.bridge_layer) == (512, 6, 2)
    assert (config.talker_hidden_size, config.num_talker_hidden_layers, config.use_moe) == (384, 3, True)
    assert (config.intermediate_size, config.talker_intermediate_size) == (1664, 1216)
    assert (config.audio_codebook_size, config.num_codebooks, config.audio_adapter_rank) == (2048, 8, 256)


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_an_original_config_runs_no_remote_code(tmp_path, trust_remote_code):
    (tmp_path / "model_omni.py").write_text("raise RuntimeError('remote code was run')", encoding="utf-8")
    config = AutoConfig.from_pretrained(write(tmp_path, ORIGINAL), trust_remote_code=trust_remote_code)
    assert type(config) is MiniMindOConfig


@pytest.mark.parametrize("name", ["tiny_dense", "tiny_moe"])
def test_the_reference_configs(golden, tmp_path, name):
    flat = golden.config(name)
    config = MiniMindOConfig.from_pretrained(write(tmp_path, flat))
    # Every value comes through; what is null takes its default.
    ignored = {"rope_parameters", "architectures", "transformers_version", "id2label", "label2id"}
    for key, value in flat.items():
        if value is not None and key not in ignored:
            assert getattr(config, key) == value, key


def test_saved_and_loaded(tmp_path, tiny_config):
    for number, config in enumerate(
        [MiniMindOConfig(), tiny_config(use_moe=True, inference_rope_scaling=True), tiny_config(audio_config=None)]
    ):
        config.save_pretrained(tmp_path / str(number))
        loaded = MiniMindOConfig.from_pretrained(tmp_path / str(number))
        assert loaded.to_dict() == config.to_dict()
        assert type(loaded.audio_config) is type(config.audio_config)
        # The original reads a top-level `rope_theta`.
        saved = json.loads((tmp_path / str(number) / "config.json").read_text(encoding="utf-8"))
        assert saved["rope_theta"] == 1e6
        assert "rope_scaling" not in saved
        assert saved.get("rope_parameters") is None


def test_encoders_are_sub_configs(tiny_config):
    config = tiny_config()
    assert isinstance(config.audio_config, FunAsrNanoEncoderConfig)
    assert isinstance(config.vision_config, SiglipVisionConfig)
    assert config.audio_config.hidden_size == config.audio_hidden_size
    given = tiny_config(audio_config=config.audio_config, vision_config=None)
    assert given.audio_config.to_dict() == config.audio_config.to_dict()
    assert given.vision_config is None


def test_the_stacks(tiny_config):
    settings = {"hidden_act": "gelu", "rms_norm_eps": 1e-5, "dropout": 0.1, "rope_theta": 5e5}
    config = tiny_config(**settings)
    thinker, talker = config.thinker_config, config.talker_config
    assert type(thinker) is type(talker) is Qwen3Config
    assert (thinker.hidden_size, thinker.num_hidden_layers, thinker.intermediate_size) == (64, 3, 256)
    assert (thinker.num_attention_heads, thinker.num_key_value_heads, thinker.head_dim) == (4, 2, 16)
    assert (thinker.hidden_act, thinker.rms_norm_eps, thinker.attention_dropout) == ("gelu", 1e-5, 0.1)
    assert (talker.hidden_size, talker.num_hidden_layers, talker.intermediate_size) == (48, 2, 192)
    assert (talker.num_attention_heads, talker.num_key_value_heads, talker.head_dim) == (4, 2, 12)
    # Whatever the Thinker's settings are.
    assert (talker.hidden_act, talker.rms_norm_eps, talker.attention_dropout) == ("silu", 1e-6, 0.0)
    for stack in (thinker, talker):
        assert stack.max_position_embeddings == 512
        assert stack.rope_parameters == {"rope_theta": 5e5, "rope_type": "default"}
        assert not stack.attention_bias


def test_the_stacks_experts(tiny_config):
    config = tiny_config(use_moe=True, num_experts=6, num_experts_per_tok=2, norm_topk_prob=False)
    thinker, talker = config.thinker_config, config.talker_config
    assert type(thinker) is type(talker) is Qwen3MoeConfig
    assert (thinker.num_experts, thinker.num_experts_per_tok, thinker.norm_topk_prob) == (6, 2, False)
    assert (talker.num_experts, talker.num_experts_per_tok, talker.norm_topk_prob) == (4, 1, True)
    assert (thinker.moe_intermediate_size, talker.moe_intermediate_size) == (256, 192)


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 2048,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.0,
}


@pytest.mark.parametrize(
    ("max_positions", "switch", "is_yarn"),
    [(32768, False, False), (32768, True, True), (2049, True, True), (2048, True, False), (512, True, False)],
)
def test_yarn_has_one_switch(max_positions, switch, is_yarn):
    config = MiniMindOConfig(
        max_position_embeddings=max_positions,
        inference_rope_scaling=switch,
        rope_scaling={"rope_type": "linear", "factor": 3.0},
        rope_parameters={"rope_type": "dynamic", "factor": 3.0},
    )
    expected = YARN if is_yarn else {"rope_type": "default", "rope_theta": 1e6}
    assert config.thinker_config.rope_parameters == expected
    assert config.talker_config.rope_parameters == expected


def test_one_cache_holds_both_stacks(tiny_config):
    config = tiny_config()
    assert [layer.head_dim for layer in config.per_layer_config] == [16, 16, 16, 12, 12]
    assert len(DynamicCache(config=config).layers) == 5


def test_evaluation_does_not_gather_codes_and_caches():
    assert {"audio_logits", "past_key_values"} <= set(MiniMindOConfig.keys_to_ignore_at_inference)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": "wide"}, "hidden_size.*expected int, got str"),
        ({"hidden_size": 0}, "hidden_size[^$]*positive integer, got 0"),
        ({"talker_hidden_size": -1}, "talker_hidden_size[^$]*got -1"),
        ({"max_position_embeddings": 1.5}, "max_position_embeddings.*expected int, got float"),
        ({"use_moe": "yes"}, "use_moe.*expected bool"),
        ({"hidden_act": "sine"}, "got sine"),
        ({"dropout": 2.0}, "got 2.0"),
        ({"num_key_value_heads": 3}, r"`num_attention_heads` \(8\).*`num_key_value_heads` \(3\)"),
        ({"talker_num_attention_heads": 6}, r"`talker_num_attention_heads` \(6\).*`talker_num_key_value_heads` \(4\)"),
        ({"head_dim": 7}, r"`head_dim` \(7\) must be even"),
        ({"talker_head_dim": 0}, r"`talker_head_dim` \(0\) must be even and positive"),
        ({"num_experts_per_tok": 5}, r"`num_experts_per_tok` \(5\).*`num_experts` \(4\)"),
        ({"talker_num_experts": 1, "talker_num_experts_per_tok": 2}, r"per_tok` \(2\).*`talker_num_experts` \(1\)"),
        ({"bridge_layer": 8}, r"`bridge_layer` \(8\).*`num_hidden_layers` \(8\)"),
        ({"bridge_layer": -1}, r"`bridge_layer` \(-1\)"),
        ({"audio_pad_token": 2047}, r"`audio_pad_token` \(2047\).*`audio_codebook_size` \(2048\)"),
        ({"audio_stop_token": 2112}, r"`audio_stop_token` \(2112\).*`audio_vocab_size` \(2112\)"),
        ({"audio_vocab_size": 2051}, r"`audio_spk_token` \(2051\).*`audio_vocab_size` \(2051\)"),
        ({"audio_pad_token": 2050}, "special codes must differ.*2050"),
        ({"audio_ids": []}, r"`audio_ids` must hold one.*\[\]"),
        ({"image_ids": [6400]}, r"`image_ids`.*\(6400\), got \[6400\]"),
        ({"audio_ids": [16, 17]}, r"`audio_ids` must hold one.*\[16, 17\]"),
        ({"audio_ids": [12]}, "`audio_ids` and `image_ids` must differ, both are 12"),
        ({"think_end_ids": []}, "`think_end_ids` must not be empty"),
        (
            {"audio_config": {"model_type": "fun_asr_nano_encoder", "hidden_size": 64}},
            r"`audio_config.hidden_size` \(64\) must equal `audio_hidden_size` \(512\)",
        ),
        (
            {"vision_config": {"model_type": "siglip_vision_model", "hidden_size": 64}},
            r"`vision_config.hidden_size` \(64\) must equal `image_hidden_size` \(768\)",
        ),
        (
            {"vision_config": {"model_type": "siglip_vision_model", "image_size": 224, "patch_size": 16}},
            "196 tokens a picture, but `image_token_len` is 64",
        ),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(StrictDataclassError, match=message):
        MiniMindOConfig(**settings)


def test_a_smaller_codebook():
    config = MiniMindOConfig(
        audio_codebook_size=64, audio_vocab_size=72, audio_pad_token=65, audio_stop_token=66, audio_spk_token=67
    )
    assert config.talker_config.vocab_size == 72
