"""The original's own numbers: logits, losses, gradients, greedy answers and rotary embeddings, from its own files.

The reference values were made in float32 on a CPU from weights that are a function of their names and shapes.
"""

import json

import pytest
import torch
from minimind_o_hf.modeling import MiniMindOConfig, MiniMindOForConditionalGeneration
from transformers import AutoModel, FunAsrNanoEncoderConfig, MimiConfig, SiglipVisionConfig
from transformers.models.mimi.modeling_mimi import MimiModel

ATOL = 1e-5


@pytest.fixture(scope="module")
def original(golden, tmp_path_factory):
    """Loads a reference model from a directory as the original writes it: a flat config and a `pytorch_model.bin`."""
    loaded = {}

    def load(name):
        if name not in loaded:
            directory = tmp_path_factory.mktemp(name)
            state = golden.fill.state_dict_from_manifest(
                golden.manifest(name), {"lm_head.weight": "model.embed_tokens.weight"}
            )
            torch.save(state, directory / "pytorch_model.bin")
            (directory / "config.json").write_text(json.dumps(golden.config(name)), encoding="utf-8")
            loaded[name] = MiniMindOForConditionalGeneration.from_pretrained(directory)
        return loaded[name].eval()

    return load


def omni_inputs(tensors):
    """The reference's inputs in our form: clips and pictures stacked over the batch, rows without one left out."""
    lengths = tensors["audio_lengths"]
    has_clip = lengths > 0
    has_picture = (tensors["input_ids"] == 12).any(dim=1)
    frames = torch.arange(tensors["audio_hidden_states"].shape[1])
    return {
        "input_ids": tensors["input_ids"],
        "audio_codes": tensors["audio_codes"],
        "audio_hidden_states": tensors["audio_hidden_states"][has_clip],
        "input_features_mask": (frames < lengths[:, None])[has_clip].long(),
        "image_hidden_states": tensors["image_hidden_states"][has_picture],
        "speaker_embeddings": tensors["speaker_embeddings"],
        "labels": tensors["labels"],
        "audio_labels": tensors["audio_labels"],
    }


def assert_close(value, expected, atol=ATOL):
    torch.testing.assert_close(value, expected.to(value.dtype).view_as(value), rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["tiny_dense", "tiny_moe"])
@torch.no_grad()
def test_text_only(original, golden, name):
    tensors = golden.tensors(name)
    positions = tensors["positions"]
    output = original(name)(tensors["input_ids"])
    assert_close(output.logits[:, positions], tensors["text_only.logits"])
    assert_close(output.audio_logits[:, :, positions[:2]], tensors["text_only.audio_logits"])


@pytest.mark.parametrize("name", ["tiny_dense", "tiny_moe"])
@torch.no_grad()
def test_speech_pictures_and_voices(original, golden, name):
    tensors = golden.tensors(name)
    positions = tensors["positions"]
    output = original(name)(**omni_inputs(tensors))
    assert_close(output.logits[:, positions], tensors["omni.logits"])
    assert_close(output.audio_logits[:, :, positions], tensors["omni.audio_logits"])
    assert_close(output.text_loss, tensors["omni.text_loss"])
    assert_close(output.audio_loss, tensors["omni.audio_loss"])
    assert_close(output.codebook_losses, tensors["omni.audio_loss_per_codebook"])
    assert output.aux_loss is None
    assert_close(output.loss, tensors["omni.text_loss"] + tensors["omni.audio_loss"])


@pytest.mark.parametrize("name", ["tiny_dense", "tiny_moe"])
def test_training(original, golden, name):
    tensors = golden.tensors(name)
    model = original(name).train()
    model.zero_grad()
    output = model(**omni_inputs(tensors))
    if name == "tiny_moe":
        assert_close(output.aux_loss, tensors["train.aux_loss"], atol=1e-7)
        assert output.aux_loss > 0
    else:
        assert output.aux_loss is None
    assert_close(output.loss, tensors["train.total_loss"])
    output.loss.backward()
    parameters = dict(model.named_parameters())
    prefix = "train.grad_norm."
    names = [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]
    assert names
    for tensor_name in names:
        norm = parameters[tensor_name].grad.norm()
        torch.testing.assert_close(norm, tensors[prefix + tensor_name].view(()), rtol=5e-4, atol=0)
    model.zero_grad()


@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=["cache", "no cache", "static"]
)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tiny_dense_greedy", {"eos_token_id": None, "max_new_tokens": 40}),
        ("tiny_dense_greedy_eos", {"eos_token_id": 2042, "max_new_tokens": 48, "post_text_token_id": 201}),
    ],
)
def test_greedy_answers(original, golden, name, settings, options):
    tensors = golden.tensors(name)
    model = original("tiny_dense")
    # An end token of None cannot be told from one that was not passed.
    model.generation_config.eos_token_id = settings["eos_token_id"]
    output = model.generate(
        tensors["input_ids"],
        reference_codes=tensors["reference_codes"],
        speaker_embeddings=tensors["speaker_embeddings"],
        do_sample=False,
        **settings,
        **options,
    )
    prompt_length = tensors["input_ids"].shape[1]
    assert output.prompt_length == prompt_length
    assert output.sequences[:, :prompt_length].equal(tensors["input_ids"])
    assert output.sequences[0, prompt_length:].tolist() == tensors["generated_ids"].flatten().tolist()
    frames = tensors["frames"]
    assert output.audio_codes_mask.tolist() == [[True] * len(frames)]
    assert output.audio_codes[0].T.equal(frames)


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("use_yarn", [False, True])
def test_rotary_embeddings_of_both_stacks(golden, use_yarn, use_moe):
    tensors = golden.tensors("rope")
    config = MiniMindOConfig(
        hidden_size=192,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=1,
        talker_hidden_size=768,
        talker_intermediate_size=8,
        talker_moe_intermediate_size=8,
        num_talker_hidden_layers=1,
        use_moe=use_moe,
        inference_rope_scaling=use_yarn,
    )
    prefix = "yarn_" if use_yarn else ""
    model = MiniMindOForConditionalGeneration(config)
    for stack in (model.model, model.talker):
        cos, sin = stack.rotary_emb(torch.zeros(1, 1, 1), tensors["positions"][None])
        assert cos.shape[-1] == 96
        # The last bit of YaRN's blended frequencies depends on the order of its sums: 2 ** -29 radians a position. The
        # reference itself is 5e-4 from the exact values at the furthest position.
        slack = tensors["positions"] * 2**-29 if use_yarn else torch.zeros(len(tensors["positions"]))
        for value, expected in ((cos[0], tensors[f"{prefix}cos"]), (sin[0], tensors[f"{prefix}sin"])):
            assert ((value - expected).abs().amax(dim=1) <= slack.clamp(min=ATOL)).all()


# ---- sizes (millions of parameters, tied weights once) ----


def millions(module):
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize(
    ("use_moe", "total", "thinker", "talker"), [(False, 113.13, 63.91, 47.05), (True, 314.89, 198.42, 114.30)]
)
def test_number_of_parameters(use_moe, total, thinker, talker):
    with torch.device("meta"):
        model = MiniMindOForConditionalGeneration(MiniMindOConfig(use_moe=use_moe))
    assert millions(model.model) == pytest.approx(thinker, abs=0.01)
    assert millions(model.talker) == pytest.approx(talker, abs=0.01)
    assert millions(model.audio_proj) == pytest.approx(0.99, abs=0.01)
    assert millions(model.vision_proj) == pytest.approx(1.18, abs=0.01)
    assert millions(model) == pytest.approx(total, abs=0.01)


def test_number_of_parameters_of_the_frozen_modules():
    speech = FunAsrNanoEncoderConfig()
    vision = SiglipVisionConfig(image_size=256, patch_size=32)
    with torch.device("meta"):
        model = MiniMindOForConditionalGeneration(MiniMindOConfig(audio_config=speech, vision_config=vision))
        codec = MimiModel(MimiConfig())
    assert len(model.audio_tower.layers) == 70
    # The released module counts its unused transcription head as well: 25,055 tokens, and 16 query vectors.
    head = (25055 * (512 + 1) + 16 * 560) / 1e6
    assert millions(model.audio_tower) + head == pytest.approx(234.0, abs=0.01)
    assert millions(model.vision_tower) == pytest.approx(94.55, abs=0.01)
    # The codec's codebooks, 2,048 vectors of 256 each, and their usage are buffers.
    codebooks = 32 * 2048 * (256 + 1) / 1e6
    assert millions(codec) + codebooks == pytest.approx(96.15, abs=0.01)
    assert type(model.vision_tower) is type(AutoModel.from_config(model.vision_tower.config))
