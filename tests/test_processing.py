"""The processor: chat template, placeholders, voices, sound, files, and what it refuses."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import soundfile
import torch
from minimind_o_hf.processing import CHAT_TEMPLATE, MiniMindOAnswer, MiniMindOFeatureExtractor, MiniMindOProcessor
from minimind_o_hf.processing.processing_minimind_o import IMAGE_PROCESSOR_DEFAULTS, default_image_processor
from transformers import AutoTokenizer, MimiConfig, MimiModel
from transformers.utils import ModelOutput

from minimind_o_hf.presets import build_tokenizer

CODEBOOK_SIZE = 64
EMPTY_THINK = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    config = MimiConfig(
        hidden_size=32,
        num_filters=4,
        num_residual_layers=1,
        codebook_size=CODEBOOK_SIZE,
        codebook_dim=16,
        vector_quantization_hidden_dimension=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=32,
        upsample_groups=32,
    )
    model = MimiModel(config).eval()
    for name, buffer in model.named_buffers():  # untrained codebooks are all zero: every code would sound alike
        if name.endswith("embed_sum"):
            buffer.normal_()
    return model


def make_voice(frames=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        "ref_codes": torch.randint(0, CODEBOOK_SIZE, (8, frames), generator=generator),
        "spk_emb": torch.randn(192, generator=generator),
    }


@pytest.fixture
def processor(tokenizer, codec):
    return MiniMindOProcessor(
        MiniMindOFeatureExtractor(),
        tokenizer,
        default_image_processor(),
        codec,
        audio_codebook_size=CODEBOOK_SIZE,
        image_token_len=4,
        voices={"ada": make_voice(3), "bo": make_voice(5)},
    )


def noise(seconds, seed=0, rate=16000):
    return (0.1 * np.random.default_rng(seed).standard_normal(int(seconds * rate))).astype(np.float32)


def user(*content):
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def text(value):
    return {"type": "text", "text": value}


def clip(seconds=0.5, seed=0):
    return {"type": "audio", "audio": noise(seconds, seed)}


def picture(shade=128, size=(30, 20)):
    return PIL.Image.new("RGB", size, (shade, shade, shade))


def image(shade=128):
    return {"type": "image", "image": picture(shade)}


def ready(processor, conversation, **kwargs):
    return processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, add_generation_prompt=True, **kwargs
    )


# ---------------------------------------------------------------- chat template

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "city": "Zürich <&>"}}}
CALL = {"function": {"name": "weather", "arguments": {"city": "Paris"}}}
CONVERSATIONS = [
    [user("Hi")],
    [{"role": "system", "content": "Be kind."}, user("Hi")],
    [user("Hi"), {"role": "assistant", "content": "Hello!"}, user("How are you?")],
    [user("Hi"), {"role": "system", "content": "Be brief."}, user("Again")],
    [user("2+2?"), {"role": "assistant", "content": "<think>\nadd\n</think>\n\nFour."}, user("3+3?")],
    [user("2+2?"), {"role": "assistant", "content": "half a thought</think>Four."}],
    [user("2+2?"), {"role": "assistant", "content": "\n\nFour.", "reasoning_content": "\nadd\n"}],
    [user("2+2?"), {"role": "assistant", "content": "a</think>b", "reasoning_content": "add"}],
    [user("Weather?"), {"role": "assistant", "content": "", "tool_calls": [CALL, CALL["function"]]}],
    [
        user("Weather?"),
        {"role": "assistant", "content": "Let me see.", "tool_calls": [{"name": "a", "arguments": '{"b": 1}'}]},
        {"role": "tool", "content": "sunny"},
        {"role": "tool", "content": "12 °C"},
        {"role": "assistant", "content": "Sunny."},
    ],
    [user("Weather?"), {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "rain"}, user("OK")],
    [{"role": "tool", "content": "x"}],
    [user("<tool_response>x</tool_response>"), user("\n spaces \n")],
]


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_generation_prompt": True},
        {"add_generation_prompt": True, "open_thinking": True, "tools": [TOOL, TOOL]},
    ],
)
def test_plain_strings_render_as_in_the_release(shared_dir, tokenizer, number, options):
    released = AutoTokenizer.from_pretrained(shared_dir / "tokenizer").chat_template
    messages = CONVERSATIONS[number]
    expected = tokenizer.apply_chat_template(messages, chat_template=released, tokenize=False, **options)
    assert tokenizer.apply_chat_template(messages, chat_template=CHAT_TEMPLATE, tokenize=False, **options) == expected


def test_a_chat_by_hand(processor):
    messages = [{"role": "system", "content": "Be kind."}, user("Hi"), {"role": "assistant", "content": "Hello!"}]
    history = (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        f"<|im_start|>assistant\n{EMPTY_THINK}Hello!<|im_end|>\n"
    )
    assert processor.apply_chat_template(messages) == history
    messages.append(user("Bye"))
    history += "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == history + EMPTY_THINK
    thinking = processor.apply_chat_template(messages, add_generation_prompt=True, open_thinking=True)
    assert thinking == history + "<think>\n"


def test_tools_by_hand(processor):
    messages = [
        user("Weather?"),
        {"role": "assistant", "content": "One moment.", "tool_calls": [CALL]},
        {"role": "tool", "content": "rain"},
    ]
    rendered = processor.apply_chat_template(messages, tools=[TOOL])
    assert rendered.startswith("<|im_start|>system\n# Tools\n\nYou may call")
    assert '<tools>\n{"type": "function", "function": {"name": "weather"' in rendered
    assert "Zürich <&>" in rendered
    assert rendered.endswith(
        "</tool_call><|im_end|>\n<|im_start|>user\nWeather?<|im_end|>\n"
        f"<|im_start|>assistant\n{EMPTY_THINK}One moment.\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>\n"
    )


AUDIO, IMAGE = {"type": "audio"}, {"type": "image"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([], ""),
        ([text("a")], "a"),
        ([text("a"), text("b")], "ab"),
        ([AUDIO], "<|audio_pad|>"),
        ([AUDIO, text("a")], "<|audio_pad|>\n\na"),
        ([text("a"), AUDIO], "a\n\n<|audio_pad|>"),
        ([text("a\n"), AUDIO, text("\nb")], "a\n<|audio_pad|>\nb"),
        ([text("a"), text(""), IMAGE], "a\n\n<|image_pad|>"),
        ([text(""), IMAGE, text("")], "<|image_pad|>"),
        ([IMAGE, AUDIO, AUDIO], "<|image_pad|>\n\n<|audio_pad|>\n\n<|audio_pad|>"),
        ([text("a"), IMAGE, text("b"), text("c")], "a\n\n<|image_pad|>\n\nbc"),
        ([{"type": "image_url", "image_url": {"url": "http://x/y.png"}}, text("a")], "<|image_pad|>\n\na"),
    ],
)
def test_content_lists_by_hand(processor, content, expected):
    for role in ("user", "system", "assistant", "tool"):
        before = {
            "assistant": f"<|im_start|>assistant\n{EMPTY_THINK}",
            "tool": "<|im_start|>user\n<tool_response>\n",
        }.get(role, f"<|im_start|>{role}\n")
        after = "\n</tool_response><|im_end|>\n" if role == "tool" else "<|im_end|>\n"
        messages = [{"role": role, "content": content}]
        assert processor.apply_chat_template(messages) == before + expected + after


def test_an_unknown_role_is_refused(processor):
    with pytest.raises(ValueError, match="Role usr is not known"):
        processor.apply_chat_template([{"role": "usr", "content": "Hi"}])


def test_an_unknown_content_type_is_refused(processor):
    with pytest.raises(ValueError, match="Content type video is not supported"):
        processor.apply_chat_template([user({"type": "video"})])


def test_the_last_message_can_be_continued(processor):
    messages = [user("Hi"), {"role": "assistant", "content": "Well,"}]
    rendered = processor.apply_chat_template(messages, continue_final_message=True)
    assert rendered == f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{EMPTY_THINK}Well,"


# ---------------------------------------------------------------- model inputs


def test_one_conversation(processor, tokenizer):
    inputs = ready(processor, [user(text("What is this?"), clip(0.5), image())])
    frames = processor.feature_extractor.num_frames(8000)
    expected = (
        "<|im_start|>user\nWhat is this?\n\n" + "<|audio_pad|>" * frames + "\n\n" + "<|image_pad|>" * 4
    ) + f"<|im_end|>\n<|im_start|>assistant\n{EMPTY_THINK}"
    assert inputs["input_ids"].tolist() == [tokenizer.encode(expected)]
    assert inputs["attention_mask"].tolist() == [[1] * inputs["input_ids"].shape[1]]
    assert inputs["input_features"].shape == (1, frames, 560)
    assert inputs["input_features_mask"].shape == (1, frames)
    assert inputs["pixel_values"].shape == (1, 3, 256, 256)
    assert torch.allclose(inputs["pixel_values"], torch.tensor(128 / 255 * 2 - 1), atol=1e-3)
    assert set(inputs) == {"input_ids", "attention_mask", "input_features", "input_features_mask", "pixel_values"}


def test_a_batch_in_reading_order(processor):
    conversations = [
        [user(clip(0.1, 1), image(10)), {"role": "assistant", "content": "Yes."}, user(image(20), clip(0.9, 2))],
        [user("text only")],
        [user(clip(0.4, 3), text("and"), clip(0.2, 4), image(30))],
    ]
    inputs = ready(processor, conversations)
    seconds = [0.1, 0.9, 0.4, 0.2]
    frames = [processor.feature_extractor.num_frames(int(s * 16000)) for s in seconds]
    assert inputs["input_features_mask"].sum(-1).tolist() == frames
    for index, (length, count) in enumerate(zip(seconds, frames, strict=True)):
        alone = processor.feature_extractor(noise(length, index + 1)).input_features[0]
        assert torch.equal(inputs["input_features"][index, :count], alone)
    shades = ((inputs["pixel_values"].mean((1, 2, 3)) + 1) / 2 * 255).round().tolist()
    assert shades == [10, 20, 30]
    ids = inputs["input_ids"]
    assert (ids == processor.audio_token_id).sum(-1).tolist() == [frames[0] + frames[1], 0, frames[2] + frames[3]]
    assert (ids == processor.image_token_id).sum(-1).tolist() == [8, 0, 4]
    # Left padding, and every row as alone.
    for row, mask, conversation in zip(ids, inputs["attention_mask"], conversations, strict=True):
        alone = ready(processor, conversation)["input_ids"][0]
        assert mask.tolist() == [0] * (len(row) - len(alone)) + [1] * len(alone)
        assert torch.equal(row[mask.bool()], alone)
        assert not row[~mask.bool()].any()


def test_padding_side(processor, tokenizer):
    texts = ["a longer text", "a"]
    assert processor(text=texts)["attention_mask"][1, 0] == 0
    assert processor(text=texts, padding_side="right")["attention_mask"][1, 0] == 1
    assert processor(text=texts, text_kwargs={"padding_side": "right"})["attention_mask"][1, 0] == 1
    conversations = [[user("a longer text")], [user("a")]]
    right = ready(processor, conversations, processor_kwargs={"padding_side": "right"})
    assert right["attention_mask"][1, 0] == 1
    assert right["attention_mask"][1, -1] == 0
    tokenizer.padding_side = "right"
    assert processor(text=texts)["attention_mask"][1, 0] == 0
    tokenizer.padding_side = "left"


def test_sources_of_speech_and_pictures(processor, tmp_path):
    samples = noise(0.5)
    soundfile.write(tmp_path / "a.wav", samples, 16000, "FLOAT")
    picture().save(tmp_path / "a.png")
    expected = ready(processor, [user({"type": "audio", "audio": samples}, image())])
    data = (tmp_path / "a.wav").read_bytes()
    pixels = (tmp_path / "a.png").read_bytes()
    for sound, look in [
        ({"path": str(tmp_path / "a.wav")}, {"path": str(tmp_path / "a.png")}),
        ({"audio": tmp_path / "a.wav"}, {"image": tmp_path / "a.png"}),
        ({"audio": data}, {"image": pixels}),
        ({"audio": torch.from_numpy(samples), "sampling_rate": 16000}, {"url": str(tmp_path / "a.png")}),
        ({"audio": samples.tolist()}, {"image": np.array(picture())}),
    ]:
        inputs = ready(processor, [user({"type": "audio", **sound}, {"type": "image", **look})])
        assert set(inputs) == set(expected)
        for key, value in expected.items():
            torch.testing.assert_close(inputs[key], value, rtol=0, atol=1e-6)
    prompt = processor.apply_chat_template([user(AUDIO, IMAGE)], add_generation_prompt=True)
    for sound, look in [(samples, picture()), ([data], [pixels]), ([[str(tmp_path / "a.wav")]], [[picture()]])]:
        inputs = processor(images=look, text=prompt, audio=sound)
        assert torch.equal(inputs["input_features"], expected["input_features"])
        assert torch.equal(inputs["input_ids"], expected["input_ids"])


@pytest.mark.parametrize("where", ["block", "argument", "audio_kwargs"])
def test_the_rate_of_arrays(processor, where):
    samples = noise(0.5, rate=48000)
    block = {"type": "audio", "audio": samples} | ({"sampling_rate": 48000} if where == "block" else {})
    options = {"argument": {"sampling_rate": 48000}, "audio_kwargs": {"audio_kwargs": {"sampling_rate": 48000}}}
    inputs = ready(processor, [user(block)], processor_kwargs=options.get(where))
    expected = processor.feature_extractor(samples, 48000).input_features
    assert torch.equal(inputs["input_features"], expected)
    assert expected.shape[1] == processor.feature_extractor.num_frames(8000)


def test_the_conversation_is_left_alone_and_nothing_is_warned_of(processor, caplog, monkeypatch):
    conversation = [user(clip(), image(), text("a"))]
    before = [dict(block) for block in conversation[0]["content"]]
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    options = {"sampling_rate": 16000}
    with caplog.at_level(logging.WARNING):
        ready(processor, conversation, voice="ada", open_thinking=True, processor_kwargs=options)
    assert not caplog.records
    assert options == {"sampling_rate": 16000}
    for block, old in zip(conversation[0]["content"], before, strict=True):
        assert block.keys() == old.keys()
        assert all(block[key] is old[key] for key in block)


def test_settings_for_the_text_leave_the_speech_alone(processor):
    inputs = ready(
        processor, [user(clip(0.5))], processor_kwargs={"padding": "max_length", "max_length": 64, "truncation": True}
    )
    assert inputs["input_ids"].shape == (1, 64)
    assert inputs["input_features"].shape[1] == processor.feature_extractor.num_frames(8000)


def test_what_the_tokenizer_returns_by_default(processor):
    conversation = [user(clip(0.1))]
    ids = processor.apply_chat_template(conversation, tokenize=True)
    assert torch.equal(ids, processor.apply_chat_template(conversation, tokenize=True, return_dict=True)["input_ids"])


def test_placeholders_that_a_user_writes(processor):
    conversation = [user(clip(0.1), text("what does <|audio_pad|> mean?"))]
    with pytest.raises(ValueError, match=r"\[2\] <\|audio_pad\|>, but \[1\] audio clips"):
        ready(processor, conversation)
    inputs = ready(processor, conversation, sanitize_control_tokens=True)
    assert (inputs["input_ids"] == processor.audio_token_id).sum() == processor.feature_extractor.num_frames(1600)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"text": "<|audio_pad|>"}, r"has 1 <\|audio_pad\|>, but 0 audio clips"),
        ({"text": "<|image_pad|><|image_pad|>", "images": picture()}, r"has 2 <\|image_pad\|>, but 1 pictures"),
        ({"text": "a", "audio": noise(0.1)}, r"has 0 <\|audio_pad\|>, but 1 audio clips"),
        ({"text": ["<|audio_pad|>", "b"], "audio": [[], [noise(0.1)]]}, r"\[1, 0\] <\|audio_pad\|>, but \[0, 1\]"),
        ({"text": ["<|image_pad|>", "b"], "images": [None, [picture()]]}, r"\[1, 0\] <\|image_pad\|>, but \[0, 1\]"),
        ({"text": "<|audio_pad|>", "audio": [[noise(0.1)], []]}, "for 2 rows, but the text has 1"),
        ({}, "`text` must be"),
        ({"text": []}, "`text` must be"),
        ({"text": ["a", ""]}, "`text` must be"),
        ({"text": [["a"]]}, "`text` must be"),
        ({"audio": noise(0.1)}, "`text` must be"),
        ({"text": "a", "videos": ["x.mp4"]}, "does not take videos"),
        ({"text": "<|audio_pad|>", "audio": [np.zeros(0)]}, "audio clip 0: audio without samples"),
        ({"text": "<|audio_pad|>", "audio": np.full(800, np.nan)}, "audio clip 0: 800 of 800"),
        ({"text": "<|audio_pad|>", "audio": np.zeros(800, bool)}, "audio clip 0: .* got bool"),
        ({"text": "<|audio_pad|>", "audio": np.zeros(130 * 16000)}, r"audio clip 0 lasts 130.0 s, .* \(122 s\)"),
        ({"text": "<|audio_pad|>", "audio": noise(0.1), "sampling_rate": -1}, "positive number of Hz, got -1"),
        ({"text": "<|image_pad|>", "images": np.zeros((4, 4))}, r"3 channels, got shape \(4, 4\)"),
    ],
)
def test_bad_inputs(processor, kwargs, message):
    with pytest.raises(ValueError, match=message):
        processor(**kwargs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_inside_placeholders(processor, side, monkeypatch):
    monkeypatch.setattr(processor.tokenizer, "truncation_side", side)
    prompt = "<|audio_pad|> a few words"
    length = len(processor(text=prompt, audio=noise(1.0))["input_ids"][0])
    limit = {"left": length - 1, "right": 16}[side]
    with pytest.raises(ValueError, match=r"ids=\[16\] and text=\[17\]"):
        processor(text=prompt, audio=noise(1.0), truncation=True, max_length=limit)
    if side == "right":
        assert processor(text=prompt, audio=noise(1.0), truncation=True, max_length=18)["input_ids"].shape == (1, 18)


def test_bad_conversations(processor, tmp_path):
    for conversation, error, message in [
        ([], ValueError, "no messages"),
        ([user(AUDIO)], ValueError, "type audio needs one of"),
        ([user(clip(), "words")], ValueError, "must be a mapping with a `type`, got str"),
        ([user(IMAGE)], ValueError, "type image needs one of"),
        ([user({"type": "audio", "path": str(tmp_path / "no.wav")})], OSError, "no.wav"),
        ([user({"type": "image", "path": str(tmp_path / "no.png")})], OSError, "no.png"),
        ([user({"type": "image", "image": b"broken"})], OSError, "6 bytes passed as a picture"),
        ([user({"type": "audio", "audio": b"broken"})], OSError, "6 bytes passed as audio"),
    ]:
        with pytest.raises(error, match=message):
            ready(processor, conversation)
    with pytest.raises(ValueError, match="needs `tokenize=True`"):
        processor.apply_chat_template([user("a")], voice="ada")


def test_construction_is_checked(tokenizer, codec):
    parts = MiniMindOFeatureExtractor(), tokenizer, default_image_processor()
    with pytest.raises(TypeError, match="must be a MimiModel, got Linear"):
        MiniMindOProcessor(*parts, audio_tokenizer=torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="feature_extractor"):
        MiniMindOProcessor(tokenizer, parts[0], parts[2])
    for name in ("", " ", "a.b", "a/b", "..", "a\\b", 3):
        with pytest.raises(ValueError, match="a voice's name"):
            MiniMindOProcessor(*parts, voices={name: make_voice()})
    plain = build_tokenizer()
    plain.audio_token = "<|no_such_token|>"
    del plain._special_tokens_map["audio_token"]
    processor = MiniMindOProcessor(parts[0], plain, parts[2])
    assert (processor.audio_token, processor.audio_token_id, processor.image_token_id) == ("<|audio_pad|>", 16, 12)
    assert not hasattr(processor, "video_token")


# ---------------------------------------------------------------- voices


def test_one_voice_for_all_rows(processor):
    voice = make_voice(7, seed=9)
    conversations = [[user("a")], [user("b")]]
    inputs = ready(processor, conversations, voice=voice)
    assert inputs["reference_codes"].dtype == torch.long
    assert torch.equal(inputs["reference_codes"], voice["ref_codes"].expand(2, 8, 7))
    assert inputs["speaker_embeddings"].dtype == torch.float32
    assert torch.equal(inputs["speaker_embeddings"], voice["spk_emb"].expand(2, 192))
    named = ready(processor, conversations[0], voice="bo")
    assert torch.equal(named["reference_codes"][0], processor.voices["bo"]["ref_codes"])


def test_a_voice_for_each_row(processor):
    only_embedding = {"spk_emb": make_voice(seed=3)["spk_emb"].double().numpy()}
    only_codes = {"ref_codes": make_voice(4, seed=4)["ref_codes"].int().tolist(), "spk_emb": None}
    inputs = processor(text=["a", "b", "c", "d"], voice=["ada", None, only_embedding, only_codes])
    codes, embeddings = inputs["reference_codes"], inputs["speaker_embeddings"]
    assert codes.shape == (4, 8, 4)
    assert torch.equal(codes[0, :, 1:], processor.voices["ada"]["ref_codes"])
    assert (codes[0, :, 0] == 2049).all()
    assert (codes[1:3] == 2049).all()
    assert torch.equal(codes[3], make_voice(4, seed=4)["ref_codes"])
    assert torch.equal(embeddings[0], processor.voices["ada"]["spk_emb"])
    torch.testing.assert_close(embeddings[2], make_voice(seed=3)["spk_emb"])
    assert not embeddings[[1, 3]].any()


def test_what_is_not_asked_for_is_left_out(processor):
    voice = make_voice()
    assert not {"reference_codes", "speaker_embeddings"} & set(processor(text="a"))
    assert "reference_codes" not in processor(text="a", voice={"spk_emb": voice["spk_emb"]})
    assert "speaker_embeddings" not in processor(text="a", voice={"ref_codes": voice["ref_codes"]})
    assert {"reference_codes", "speaker_embeddings"} <= set(processor.model_input_names)


@pytest.mark.parametrize(
    ("voice", "message"),
    [
        ("carl", r"no voice 'carl': this processor has \['ada', 'bo'\]"),
        (["ada", "bo"], "2 voices were passed for 1 rows"),
        (["ada", "bo", "ada"], "3 voices were passed for 1 rows"),
        ([], "0 voices were passed for 1 rows"),
        (3, "got int"),
        ({}, "neither"),
        ({"ref_codes": None}, "neither"),
        ({"codes": torch.zeros(8, 3)}, r"got \['codes'\]"),
        ({"ref_codes": torch.zeros(8, 3)}, "must be integers, got torch.float32"),
        ({"ref_codes": torch.zeros(8, 3, dtype=torch.bool)}, "must be integers, got torch.bool"),
        ({"ref_codes": "abc"}, "must hold arrays"),
        ({"ref_codes": [[1, 2], [3]]}, "must hold arrays"),
        ({"ref_codes": torch.zeros(3, 8, dtype=torch.long)}, r"\(8, frames\), got \(3, 8\)"),
        ({"ref_codes": torch.zeros(8, 0, dtype=torch.long)}, r"\(8, frames\), got \(8, 0\)"),
        ({"ref_codes": torch.full((8, 2), 64)}, r"in \[0, 64\), got 64 to 64"),
        ({"ref_codes": torch.full((8, 2), -1)}, r"in \[0, 64\), got -1 to -1"),
        ({"spk_emb": torch.ones(191)}, r"must be 192 floats, got torch.float32 of shape \(191,\)"),
        ({"spk_emb": torch.ones(1, 192)}, "must be 192 floats"),
        ({"spk_emb": torch.ones(192, dtype=torch.long)}, "must be 192 floats, got torch.int64"),
        ({"spk_emb": torch.zeros(192)}, "finite and not all zero"),
        ({"spk_emb": torch.full((192,), float("nan"))}, "finite and not all zero"),
    ],
)
def test_bad_voices(processor, voice, message):
    with pytest.raises(ValueError, match=message):
        processor(text="a", voice=voice)


def test_released_voices(shared_dir, tokenizer):
    voices = torch.load(shared_dir / "voices" / "voices.pt", weights_only=True)
    processor = MiniMindOProcessor(
        MiniMindOFeatureExtractor(), tokenizer, default_image_processor(), audio_codebook_size=2048, voices=voices
    )
    inputs = processor(text=["a"] * len(voices), voice=list(voices))
    assert inputs["reference_codes"].shape == (5, 8, 101)
    assert torch.equal(inputs["reference_codes"][1, :, -76:], voices["eric"]["ref_codes"])


# ---------------------------------------------------------------- sound


def random_codes(*shape, seed=0):
    return torch.randint(0, CODEBOOK_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def test_decode_audio(processor, codec):
    assert codec.config.num_quantizers == 32
    codes = random_codes(3, 8, 6)
    mask = torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0], [0] * 6])
    padded = codes.masked_fill(mask[:, None] == 0, 2049)
    waveforms = processor.decode_audio(padded, mask)
    assert [len(waveform) for waveform in waveforms] == [6 * 1920, 2 * 1920, 0]
    with torch.no_grad():
        for row, frames in ((0, 6), (1, 2)):
            expected = codec.decode(codes[row : row + 1, :, :frames]).audio_values[0, 0].clamp(-1, 1)
            assert expected.abs().max() > 0
            torch.testing.assert_close(waveforms[row], expected, rtol=1e-4, atol=1e-5)
    assert not waveforms[0].requires_grad
    assert torch.equal(processor.decode_audio(codes)[0], waveforms[0])
    for nothing in (processor.decode_audio(codes, torch.zeros(3, 6)), processor.decode_audio(codes[..., :0])):
        assert [waveform.shape for waveform in nothing] == [(0,)] * 3


@pytest.mark.parametrize(
    ("codes", "mask", "message"),
    [
        (random_codes(1, 7, 3), None, r"\(batch_size, 8, num_frames\), got torch.int64 of shape \(1, 7, 3\)"),
        (random_codes(8, 3), None, r"of shape \(8, 3\)"),
        (random_codes(1, 8, 3).float(), None, "got torch.float32"),
        (torch.full((1, 8, 3), CODEBOOK_SIZE), None, r"in \[0, 64\), got 64 to 64"),
        (torch.full((1, 8, 3), -1), None, r"in \[0, 64\), got -1 to -1"),
        (random_codes(1, 8, 3), torch.ones(1, 2), r"must have shape \(1, 3\), got \(1, 2\)"),
        (random_codes(1, 8, 3), torch.tensor([[0, 1, 1]]), "first frames"),
    ],
)
def test_bad_codes(processor, codes, mask, message):
    with pytest.raises(ValueError, match=message):
        processor.decode_audio(codes, mask)


def test_without_a_codec(tokenizer):
    processor = MiniMindOProcessor(MiniMindOFeatureExtractor(), tokenizer, default_image_processor())
    with pytest.raises(ValueError, match=r"no codec .* `processor.audio_tokenizer = MimiModel"):
        processor.decode_audio(random_codes(1, 8, 2))


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg"])
def test_save_audio(processor, tmp_path, suffix):
    path = tmp_path / f"reply{suffix}"
    path.write_bytes(b"old")
    processor.save_audio(torch.linspace(-2, 2, 4800), path)
    samples, rate = soundfile.read(path)
    assert (len(samples), rate) == (4800, 24000)
    if suffix != ".ogg":
        np.testing.assert_allclose(samples, np.linspace(-2, 2, 4800).clip(-1, 1), atol=1e-4)
    processor.save_audio(np.zeros(0), str(path), sampling_rate=16000)
    samples, rate = soundfile.read(path)
    assert (len(samples), rate, np.abs(samples).max()) == (1280, 16000, 0)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_save_several(processor, tmp_path):
    processor.save_audio([torch.zeros(10), np.zeros(20)], [tmp_path / "a.wav", tmp_path / "b.wav"])
    assert [soundfile.info(tmp_path / f"{name}.wav").frames for name in "ab"] == [10, 20]


@pytest.mark.parametrize(
    ("audio", "name", "error", "message"),
    [
        (torch.tensor([0.0, float("nan")]), "a.wav", ValueError, "one-dimensional and finite"),
        (torch.zeros(2, 2), "a.wav", ValueError, r"got shape \(2, 2\)"),
        (None, "a.wav", ValueError, "one-dimensional and finite"),
        (torch.zeros(2), "a.xyz", ValueError, "suffix must be"),
        (torch.zeros(2), "missing/a.wav", OSError, "missing does not exist"),
    ],
)
def test_save_audio_refuses(processor, tmp_path, audio, name, error, message):
    with pytest.raises(error, match=message):
        processor.save_audio(audio, tmp_path / name)
    with pytest.raises(ValueError, match="2 waveforms cannot be written to 1 paths"):
        processor.save_audio([torch.zeros(1)] * 2, [tmp_path / "a.wav"])
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- answers


def generated(processor, prompts, answers, codes=None, mask=None):
    """What `generate` returns for rows of text, the prompts padded on the left, the answers on the right."""
    inputs = processor(text=prompts)
    ids = [processor.tokenizer.encode(answer) for answer in answers]
    longest = max(map(len, ids))
    answer_ids = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    return ModelOutput(
        sequences=torch.cat([inputs["input_ids"], answer_ids], 1),
        prompt_length=inputs["input_ids"].shape[1],
        audio_codes=codes,
        audio_codes_mask=mask,
    )


def test_decode_ids(processor, tokenizer):
    ids = tokenizer.encode("<|im_start|>user\nHello<|im_end|>")
    assert processor.decode(ids) == "user\nHello"
    assert processor.decode(torch.tensor([ids, ids])) == ["user\nHello"] * 2
    assert processor.decode(ids, skip_special_tokens=False) == "<|im_start|>user\nHello<|im_end|>"


def test_decode_answers(processor):
    prompt = processor.apply_chat_template([user("Hi")], add_generation_prompt=True)
    opened = processor.apply_chat_template([user("Please think")], add_generation_prompt=True, open_thinking=True)
    codes = random_codes(5, 8, 2)
    mask = torch.tensor([[1, 1], [1, 0], [0, 0], [1, 1], [1, 1]])
    answers = processor.decode(
        generated(
            processor,
            [prompt, opened, opened, prompt, prompt],
            [
                "Hello!<|im_end|>\n",
                "a\nb\n</think>\n\nYes.<|im_end|>",
                "no end",
                "<think>\n\n</think>\n\nNo.",
                "x</think>y",
            ],
            codes,
            mask,
        )
    )
    assert [(answer.text, answer.thinking) for answer in answers] == [
        ("Hello!", None),
        ("Yes.", "a\nb"),
        ("", "no end"),
        ("No.", None),
        ("x</think>y", None),
    ]
    assert isinstance(answers[0], MiniMindOAnswer)
    assert [len(answer.audio) for answer in answers] == [3840, 1920, 0, 3840, 3840]
    assert torch.equal(answers[0].audio, processor.decode_audio(codes, mask)[0])
    assert answers[0].sampling_rate == 24000


def test_decode_text_only(processor):
    outputs = generated(processor, ["a", "longer prompt"], ["Hello<|im_end|>", "Bye"])
    answers = processor.decode(outputs)
    assert [(answer.text, answer.audio) for answer in answers] == [("Hello", None), ("Bye", None)]
    assert processor.decode(outputs, skip_special_tokens=False)[0].text == "Hello<|im_end|>"


def test_what_the_pipeline_asks_for(processor):
    codes = random_codes(2, 8, 3)
    outputs = generated(processor, ["Hi.", "A longer prompt."], ["Hello", "Bye"], codes, torch.ones(2, 3))
    expected = ["Hi.Hello", "A longer prompt.Bye"]
    assert processor.post_process_multimodal_output(outputs) == expected
    assert processor.post_process_multimodal_output(outputs["sequences"], generation_mode="text") == expected
    waveforms = processor.post_process_multimodal_output(outputs, generation_mode="audio")
    assert [(type(waveform), waveform.dtype, waveform.shape) for waveform in waveforms] == [
        (np.ndarray, np.float32, (5760,))
    ] * 2
    with pytest.raises(ValueError, match="no speech in the generated output"):
        processor.post_process_multimodal_output(outputs["sequences"], generation_mode="audio")
    with pytest.raises(ValueError, match="got 'image'"):
        processor.post_process_multimodal_output(outputs, generation_mode="image")


# ---------------------------------------------------------------- files


def same_inputs(one, other, voice):
    conversation = [user(clip(), text("What?"), image())]
    first, second = (ready(processor, conversation, voice=voice) for processor in (one, other))
    assert set(first) == set(second)
    for key in first:
        assert torch.equal(first[key], second[key])


def test_save_and_load_after_moving(processor, tmp_path):
    processor.feature_extractor = MiniMindOFeatureExtractor(cmvn_shift=[-8.0] * 560, cmvn_scale=[0.1] * 560)
    processor.save_pretrained(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    config = json.loads((tmp_path / "there" / "processor_config.json").read_text(encoding="utf-8"))
    assert str(tmp_path) not in json.dumps(config)
    assert config["audio_tokenizer_subfolder"] == "audio_tokenizer"
    loaded = MiniMindOProcessor.from_pretrained(tmp_path / "there")
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.image_token_len == 4
    assert loaded.chat_template == CHAT_TEMPLATE
    assert loaded.feature_extractor.cmvn_scale == processor.feature_extractor.cmvn_scale
    assert loaded.tokenizer.apply_chat_template([user("a")], tokenize=False) == loaded.apply_chat_template([user("a")])
    same_inputs(processor, loaded, "bo")
    codes = random_codes(1, 8, 3)
    assert torch.equal(loaded.decode_audio(codes)[0], processor.decode_audio(codes)[0])
    assert not loaded.audio_tokenizer.training


def test_parts_can_be_left_out_or_replaced(processor, codec, tmp_path):
    processor.save_pretrained(tmp_path)
    assert MiniMindOProcessor.from_pretrained(tmp_path, load_audio_tokenizer=False).audio_tokenizer is None
    assert MiniMindOProcessor.from_pretrained(tmp_path, audio_tokenizer=None).audio_tokenizer is None
    given = MiniMindOProcessor.from_pretrained(tmp_path, audio_tokenizer=codec, voices=None, image_token_len=9)
    assert given.audio_tokenizer is codec
    assert given.voices == {}
    assert given.image_token_len == 9
    assert "image_token_len" not in given.tokenizer.init_kwargs
    placed = MiniMindOProcessor.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert placed.audio_tokenizer.dtype == torch.bfloat16
    assert placed.decode_audio(random_codes(1, 8, 2))[0].dtype == torch.float32


def test_saving_over_another_processor_leaves_nothing_of_it(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    processor.voices, processor.audio_tokenizer = {}, None
    processor.save_pretrained(tmp_path)
    loaded = MiniMindOProcessor.from_pretrained(tmp_path)
    assert (loaded.voices, loaded.audio_tokenizer) == ({}, None)


def test_a_subfolder(processor, tmp_path):
    processor.save_pretrained(tmp_path / "inner")
    loaded = MiniMindOProcessor.from_pretrained(tmp_path, subfolder="inner")
    assert set(loaded.voices) == {"ada", "bo"}
    assert isinstance(loaded.audio_tokenizer, MimiModel)


def test_broken_files(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    (tmp_path / "voices.safetensors").write_bytes(b"broken")
    with pytest.raises(OSError, match="voices.safetensors is no readable file"):
        MiniMindOProcessor.from_pretrained(tmp_path)
    os.remove(tmp_path / "voices.safetensors")
    shutil.rmtree(tmp_path / "audio_tokenizer")
    with pytest.raises(OSError, match="cannot load the codec from audio_tokenizer in"):
        MiniMindOProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("template_in_a_file", [False, True])
def test_an_original_release_has_a_tokenizer_only(tokenizer, tmp_path, template_in_a_file):
    tokenizer.save_pretrained(tmp_path)
    if template_in_a_file:
        (tmp_path / "chat_template.jinja").write_text("the release's own", encoding="utf-8")
    loaded = MiniMindOProcessor.from_pretrained(tmp_path)
    assert loaded.chat_template == CHAT_TEMPLATE
    assert loaded.feature_extractor.to_dict() == MiniMindOFeatureExtractor().to_dict()
    assert loaded.image_processor.to_dict() == default_image_processor().to_dict()
    assert (loaded.audio_tokenizer, loaded.voices, loaded.image_token_len) == (None, {}, 64)
    inputs = ready(loaded, [user(clip(), image())])
    assert (inputs["input_ids"] == 12).sum() == 64


def test_released_tokenizer(shared_dir):
    processor = MiniMindOProcessor.from_pretrained(shared_dir / "tokenizer")
    question = shared_dir / "eval_omni" / "img-zh-02_what_is_in_the_picture.mp3"
    photo = shared_dir / "eval_omni" / "image-01-orange-cat-moon-desk.jpg"
    content = [text("?"), {"type": "audio", "path": str(question)}, {"type": "image", "path": str(photo)}]
    inputs = ready(processor, [user(*content)])
    frames = inputs["input_features"].shape[1]
    ids = inputs["input_ids"][0].tolist()
    start = ids.index(16)
    assert ids[start - 3 :] == [
        *(ids[start - 3], 234, 234, *[16] * frames, 234, 234, *[12] * 64, 2, 234),  # "?", speech, picture
        *(1, *processor.tokenizer.encode("assistant"), 234, 25, 234, 234, 26, 234, 234),
    ]


def test_pictures_without_torchvision(processor):
    from transformers import SiglipImageProcessorPil

    pillow = SiglipImageProcessorPil(**IMAGE_PROCESSOR_DEFAULTS)
    photo = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 70, 3), dtype=np.uint8))
    expected = processor(text="<|image_pad|>", images=photo)["pixel_values"]
    processor.image_processor = pillow
    pixels = processor(text="<|image_pad|>", images=photo)["pixel_values"]
    assert pixels.shape == expected.shape == (1, 3, 256, 256)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, expected, rtol=0, atol=0.02)


def test_the_saved_code_runs_without_the_package(processor, tmp_path, monkeypatch):
    monkeypatch.setattr(MiniMindOProcessor, "_auto_class", None)
    monkeypatch.setattr(MiniMindOFeatureExtractor, "_auto_class", None)
    MiniMindOProcessor.register_for_auto_class()
    processor.save_pretrained(tmp_path / "model")
    names = {path.stem for path in (tmp_path / "model").glob("*.py")}
    assert names == {
        f"{name}_minimind_o"
        for name in ("audio", "chat_template", "image", "marks", "optional", "voices", "processing")
    } | {"feature_extraction_minimind_o"}
    program = """
import sys
sys.modules["minimind_o_hf"] = None  # an import of it fails
import numpy as np
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
chat = [{"role": "user", "content": [{"type": "audio", "audio": np.zeros(8000)}]}]
inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, voice="bo")
print(type(processor).__module__.split(".")[0], inputs["input_features"].shape[1], inputs["reference_codes"].shape[2])
print(type(processor.audio_tokenizer).__name__)
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert re.split(r"\s+", result.stdout.strip()) == ["transformers_modules", "8", "5", "MimiModel"]
