"""What went wrong once, or would have gone wrong silently."""

import copy
import json
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from minimind_o_hf.processing.image_minimind_o import load_image
from transformers import AutoProcessor, LogitsProcessor, StaticCache, StoppingCriteria

from minimind_o_hf import MiniMindOForConditionalGeneration, MiniMindOTalkerModel, MiniMindOThinkerModel
from minimind_o_hf.presets import init_checkpoint


class EndsAt(LogitsProcessor):
    """Makes the text end at a step of the answer."""

    def __init__(self, length, eos=50):
        self.length, self.eos = length, eos

    def __call__(self, input_ids, scores):
        scores[:, self.eos] = 1e4 if input_ids.shape[1] >= self.length else -torch.inf
        return scores


class RowEndsAt(StoppingCriteria):
    """Ends one row at a length."""

    def __init__(self, row, length):
        self.row, self.length = row, length

    def __call__(self, input_ids, scores, **kwargs):
        rows = torch.arange(len(input_ids)) == self.row
        return rows & (input_ids.shape[1] >= self.length)


@pytest.fixture
def model(tiny_model):
    return tiny_model(audio_config=None, vision_config=None)


def test_a_conversation_goes_on_from_the_returned_cache(model):
    """Speech outlasts its text; the cache is cut where the text ends, so that every new word is read."""
    prompt = torch.tensor([[1, 40, 41, 42]])
    output = model.generate(
        prompt, seeds=[0], max_new_tokens=20, logits_processor=[EndsAt(6)], eos_token_id=50, do_sample=True
    )
    assert output.sequences.shape[1] == 7
    assert output.past_key_values.get_seq_length() == 7
    answers = []
    for word in (60, 61):
        ids = torch.cat([output.sequences, torch.tensor([[1, word, 62, 63, 64]])], dim=1)
        cache = copy.deepcopy(output.past_key_values)
        warm = model.generate(
            ids, past_key_values=cache, do_sample=False, max_new_tokens=3, output_logits=True, eos_token_id=None
        )
        answers.append(warm.logits[0])
    assert not torch.allclose(answers[0], answers[1], atol=1e-4)
    with pytest.raises(ValueError, match="whole prompt"):
        model.generate(torch.tensor([[1, 60]]), past_key_values=output.past_key_values, max_new_tokens=2)


def test_speech_does_not_go_on_from_a_text_cache(model):
    prompt = torch.tensor([[1, 40, 41, 42]])
    output = model.generate(prompt, max_new_tokens=4, generation_mode="text", eos_token_id=None)
    ids = torch.cat([output.sequences, torch.tensor([[60, 61]])], dim=1)
    with pytest.raises(ValueError, match="of the Thinker and 0 of the Talker"):
        model.generate(ids, past_key_values=copy.deepcopy(output.past_key_values), max_new_tokens=2)
    again = model.generate(ids, past_key_values=output.past_key_values, max_new_tokens=2, generation_mode="text")
    assert again.audio_codes is None


def test_a_criterion_ends_the_text_of_its_row(model):
    prompts = torch.tensor([[1, 40, 41, 42], [1, 43, 44, 45]])
    settings = {"max_new_tokens": 12, "eos_token_id": None, "stopping_criteria": [RowEndsAt(0, 7)]}
    together = model.generate(prompts, seeds=[1, 2], **settings)
    alone = model.generate(prompts[:1], seeds=[1], **settings)
    assert alone.sequences.shape[1] == 7
    assert torch.equal(together.sequences[0, :7], alone.sequences[0])
    assert (together.sequences[0, 7:] == 0).all()
    assert (together.sequences[1] != 0).all()


def test_a_chosen_max_length_is_kept(model, tmp_path):
    model.generation_config.max_new_tokens = None
    model.generation_config.max_length = 15
    model.save_pretrained(tmp_path)
    for each in (model, MiniMindOForConditionalGeneration.from_pretrained(tmp_path)):
        output = each.generate(torch.tensor([[1, 40, 41, 42]]), eos_token_id=None)
        assert output.sequences.shape[1] == 15


def test_a_cache_that_is_too_small_is_refused_before_it_is_full(model):
    cache = StaticCache(config=model.config, max_cache_len=10)
    with pytest.raises(ValueError, match="room for 10 positions"):
        model.generate(torch.tensor([[1, 40, 41, 42]]), past_key_values=cache, max_new_tokens=20)


@pytest.mark.parametrize(
    "settings",
    [
        {"audio_top_k": True},
        {"audio_repetition_penalty": "a"},
        {"post_text_token_id": "a"},
        {"post_text_token_id": 23.5},
        {"seeds": 3},
    ],
)
def test_settings_of_another_type(model, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        model.generate(torch.tensor([[1, 40]]), max_new_tokens=2, **settings)


def test_parts_load_from_a_whole_checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path)
    for part, cls in ((model.model, MiniMindOThinkerModel), (model.talker, MiniMindOTalkerModel)):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is cls
        for name, tensor in part.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        with pytest.raises(ValueError, match="part of a model"):
            loaded.save_pretrained(tmp_path / "part")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, "layers that its configuration does not have"),
        ({"bridge_layer": 99}, "bridge_layer"),
        ({"hidden_size": "64"}, "hidden_size"),
    ],
)
def test_a_config_that_does_not_belong_to_its_weights(model, tmp_path, changes, message):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        MiniMindOForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize(("damage", "error"), [("missing", ValueError), ("cut", OSError)])
def test_a_damaged_codec_is_refused(tmp_path, damage, error):
    from safetensors.torch import load_file, save_file

    directory = init_checkpoint("nano", tmp_path / "nano")
    file = directory / "audio_tokenizer" / "model.safetensors"
    if damage == "missing":
        tensors = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("decoder.layers.0")}
        save_file(tensors, file, {"format": "pt"})
    else:
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(error, match="codec"):
        AutoProcessor.from_pretrained(directory)
    shutil.rmtree(directory)


def test_16_bit_grey_pictures_keep_their_shades(tmp_path):
    shades = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    PIL.Image.fromarray(shades).save(tmp_path / "grey.png")
    picture = np.asarray(load_image(tmp_path / "grey.png"))
    assert np.abs(picture[..., 0].astype(int) - shades // 256).max() <= 1


def test_integer_inputs_are_refused(tiny_model):
    model = tiny_model()
    with pytest.raises(ValueError, match="pixel_values.*uint8"):
        model.get_image_features(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="input_features.*int64"):
        model.get_audio_features(torch.zeros(1, 4, 560, dtype=torch.long))
