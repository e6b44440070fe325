"""The presets: their tokenizer, and complete untrained checkpoints that load and answer."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from minimind_o_hf.modeling import MiniMindOForConditionalGeneration
from transformers import AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

import minimind_o_hf  # noqa: F401  (registers the Auto classes)
from minimind_o_hf.presets import PRESETS, _released_configs, build_tokenizer, init_checkpoint


def _files(directory):
    """Name and contents' hash of every file under `directory`."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def _run(code, **environment):
    # The codec and the threads of a test run are this machine's; the results must not be.
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


# ---- tokenizer ----


def test_the_special_ids_are_the_released_ones(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == 1024
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.unk_token_id == 0
    assert (tokenizer.image_token_id, tokenizer.audio_token_id) == (12, 16)
    assert tokenizer.convert_tokens_to_ids(["<think>", "</think>"]) == [25, 26]
    assert tokenizer.encode("</think>\n\n") == [26, 234, 234]
    assert tokenizer.encode("<|im_start|>user\n<|audio_pad|><|audio_pad|>")[-3:] == [234, 16, 16]
    assert sorted(tokenizer.all_special_ids) == list(range(21))
    assert tokenizer.padding_side == "left"


def test_the_bytes_follow_the_special_tokens_in_order(tokenizer):
    symbols = tokenizer.convert_ids_to_tokens(list(range(36, 292)))
    assert all(len(symbol) == 1 for symbol in symbols)
    assert symbols == sorted(symbols)
    assert tokenizer.convert_ids_to_tokens([36, 234, 256]) == ["!", "Ċ", "Ġ"]


def test_the_first_292_entries_equal_the_release(tokenizer, shared_dir):
    released = PreTrainedTokenizerFast.from_pretrained(shared_dir / "tokenizer")
    ids = list(range(292))
    assert tokenizer.convert_ids_to_tokens(ids) == released.convert_ids_to_tokens(ids)
    assert sorted(tokenizer.all_special_ids) == sorted(released.all_special_ids)
    for name in ("image_token", "audio_token", "video_token", "bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(tokenizer, name) == getattr(released, name)


@pytest.mark.parametrize(
    "text",
    [
        "Hello, how are you?",
        "你好，世界！",
        "🙂👩‍👩‍👧‍👦 café e\u0301 \u202e",
        " a  b\t\r\n\n c \n",
        "don't stop . ! ?",
        "<|im_start|>user\nhi<|im_end|>\n<tool_call>{}</tool_call>",
        "\x00\x7f\u2028\ufeff",
    ],
)
def test_any_text_comes_back_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_only_special_tokens_are_skipped(tokenizer):
    ids = tokenizer.encode("<|im_start|><think>so</think>yes<|im_end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>so</think>yes"


def test_merges_shorten_english(tokenizer):
    assert len(tokenizer.encode("The weather is good today, and the sky is blue.")) < 20


def test_the_tokenizer_is_the_same_in_every_process(tokenizer):
    code = (
        "import hashlib, minimind_o_hf.presets as p;"
        "print(hashlib.sha256(p.build_tokenizer().backend_tokenizer.to_str().encode()).hexdigest())"
    )
    processes = [
        _run(code, PYTHONHASHSEED="1", RAYON_NUM_THREADS="1"),
        _run(code, PYTHONHASHSEED="2", RAYON_NUM_THREADS="4"),
    ]
    found = {process.communicate()[0].strip() for process in processes}
    assert found == {hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()}


def test_the_tokenizer_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert (loaded.audio_token, loaded.image_token) == ("<|audio_pad|>", "<|image_pad|>")


# ---- checkpoints ----


def test_nano_loads_with_the_auto_classes_and_is_whole(nano):
    model, info = AutoModelForMultimodalLM.from_pretrained(nano, output_loading_info=True)
    processor = AutoProcessor.from_pretrained(nano)
    assert isinstance(model, MiniMindOForConditionalGeneration)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.audio_tower is not None
    assert model.vision_tower is not None
    assert model.generation_config.audio_temperature == 0.2
    assert sorted(processor.voices) == ["alba", "bruno"]
    for voice in processor.voices.values():
        assert voice["ref_codes"].shape == (8, 12)
        assert voice["spk_emb"].norm().item() == pytest.approx(12)
    codec = processor.audio_tokenizer.config
    assert (codec.frame_rate, codec.sampling_rate, codec.frame_size) == (12.5, 24000, 1920)
    assert codec.codebook_size == model.config.audio_codebook_size == processor.audio_codebook_size
    assert len(processor.tokenizer) == model.config.vocab_size


def test_nano_says_that_it_is_untrained(nano):
    card = (nano / "README.md").read_text(encoding="utf-8")
    assert "# MiniMind-O `nano`, untrained" in card
    assert "Every weight in this directory is random" in card


def test_nano_is_small(nano):
    assert sum(path.stat().st_size for path in nano.rglob("*") if path.is_file()) < 40e6


def test_nano_hears_sees_and_speaks(nano):
    model = AutoModelForMultimodalLM.from_pretrained(nano)
    processor = AutoProcessor.from_pretrained(nano)
    content = [
        {"type": "audio", "audio": torch.randn(16000).mul(0.1).numpy()},
        {"type": "image", "image": torch.randint(256, (300, 200, 3), dtype=torch.uint8).numpy()},
        {"type": "text", "text": "What is it?"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        voice="alba",
    )
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 64
    # Untrained, it neither ends its text nor stops a codebook: 20 steps less the delay of 8 give 12 frames.
    model.generation_config.eos_token_id = None
    output = model.generate(**inputs, max_new_tokens=20, return_dict_in_generate=True, seeds=[0])
    audio = processor.decode(output)[0].audio
    assert output.audio_codes.shape[-1] > 0
    assert len(audio) == output.audio_codes.shape[-1] * 1920
    assert audio.isfinite().all()


def test_the_toy_codec_sounds_and_encodes(nano):
    processor = AutoProcessor.from_pretrained(nano)
    sound = processor.decode_audio(torch.randint(512, (1, 8, 25)))[0]
    assert sound.shape == (48000,)
    assert sound.std().item() == pytest.approx(0.05, rel=0.3)
    assert abs(sound.mean().item()) < 0.01
    assert sound.abs().max() < 0.5
    with torch.no_grad():
        codes = processor.audio_tokenizer.encode(0.1 * torch.randn(1, 1, 24000)).audio_codes
    assert codes.shape == (1, 8, 13)
    assert all(len(set(row.tolist())) > 3 for row in codes[0])


def test_a_seed_gives_the_same_files_and_the_random_state_is_kept(nano, tmp_path):
    before = torch.get_rng_state()
    again = init_checkpoint("nano", tmp_path / "again")
    other = init_checkpoint("nano", tmp_path / "other", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert _files(again) == _files(nano)
    changed = {name for name, digest in _files(other).items() if digest != _files(nano)[name]}
    assert changed == {"README.md", "model.safetensors", "audio_tokenizer/model.safetensors", "voices.safetensors"}


def test_dtype_is_the_models_alone(tmp_path):
    directory = init_checkpoint("nano", tmp_path / "half", dtype=torch.bfloat16)
    assert AutoModelForMultimodalLM.from_pretrained(directory).dtype == torch.bfloat16
    assert AutoProcessor.from_pretrained(directory).audio_tokenizer.dtype == torch.float32


@pytest.mark.parametrize(("use_moe", "millions"), [(False, 113.13), (True, 314.89)])
def test_the_released_sizes(use_moe, millions):
    config, codec_config = _released_configs(use_moe)
    with torch.device("meta"):
        model = MiniMindOForConditionalGeneration(config)
    own = sum(p.numel() for name, p in model.named_parameters() if "_tower." not in name)
    assert own / 1e6 == pytest.approx(millions, abs=0.01)
    assert sum(p.numel() for p in model.vision_tower.parameters()) / 1e6 == pytest.approx(94.55, abs=0.01)
    assert len(model.audio_tower.layers) == 70
    assert codec_config.codebook_size == config.audio_codebook_size == 2048


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["dense", "moe"])
def test_the_released_sizes_load(preset, tmp_path):
    directory = init_checkpoint(preset, tmp_path / preset)
    model = AutoModelForMultimodalLM.from_pretrained(directory)
    assert model.dtype == torch.bfloat16
    assert AutoProcessor.from_pretrained(directory).audio_tokenizer.config.codebook_size == 2048


def test_an_unknown_preset_is_named(tmp_path):
    with pytest.raises(ValueError, match="'giant'.*nano, dense, moe"):
        init_checkpoint("giant", tmp_path / "giant")
    assert PRESETS == ("nano", "dense", "moe")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_kept_unless_told(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(FileExistsError, match="not empty"):
        init_checkpoint("nano", tmp_path / "mine")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]
    init_checkpoint("nano", tmp_path / "nano", seed=1)
    before = _files(tmp_path / "nano")
    init_checkpoint("nano", tmp_path / "nano", seed=2, overwrite=True)
    assert before != _files(tmp_path / "nano")


def test_a_failed_run_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        init_checkpoint("nano", tmp_path / "nano", dtype=torch.int8)
    assert list(tmp_path.iterdir()) == []
