"""Untrained checkpoints, complete and loadable: `nano` (a toy family), `dense` and `moe` (the released sizes)."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    FunAsrNanoEncoderConfig,
    MimiConfig,
    MimiModel,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)
from transformers.models.mimi.modeling_mimi import MimiEuclideanCodebook

from .files import new_directory
from .modeling import MiniMindOConfig, MiniMindOForConditionalGeneration
from .processing import MiniMindOFeatureExtractor, MiniMindOProcessor
from .processing.processing_minimind_o import IMAGE_PROCESSOR_DEFAULTS

# The released vocabulary's first 36 entries, in the order of their ids.
SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>", "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>"),
    *("<tts_pad>", "<tts_text_bos>", "<tts_text_eod>", "<tts_text_bos_single>"),
]
# Whole tokens too, but ordinary text to `skip_special_tokens`: a tool call or a thought is part of an answer.
ADDED_TOKENS = [
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
    *(f"<|buffer{number}|>" for number in range(1, 10)),
]
VOCAB_SIZE = 1024

# Where the merges come from. It holds no newline: "\n\n" must stay two tokens, as in the released tokenizer.
TOKENIZER_TEXT = (
    "Hello, and welcome. I am a small voice assistant, and I can listen, look at a picture and answer aloud. What "
    "would you like to talk about today? You can ask me a question about the weather, the stars, a book that you "
    "are reading, or how to cook rice for two people. I will do my best to give you a short and clear answer. If I "
    "do not know something, I should say so. Please tell me what you see in this image. There is an orange cat on a "
    "wooden desk, next to a cup of coffee and an open window. The sky is blue because the air scatters short waves "
    "of light more than long ones. The moon goes around the earth in about twenty seven days, and the earth goes "
    "around the sun in one year. Water boils at one hundred degrees, and it freezes at zero. A black hole is a "
    "place where gravity is so strong that nothing, not even light, can get out of it. To make a good cup of tea, "
    "first warm the pot, then pour the hot water over the leaves, and wait for three or four minutes before you "
    "drink. My favourite season is autumn, when the leaves turn red and yellow and the evenings smell of wood "
    "smoke. She walked slowly along the river, thinking of her brother, who had gone to the city many years before. "
    "They were talking and laughing in the kitchen while the children played with their toys in the garden. When he "
    "came home, he found a letter under the door. It was written in a careful hand, and it began with these words: "
    "my dear friend, I hope that this finds you well. How are you feeling this morning? Thank you, I am feeling "
    "much better now. Could you help me with my homework? Of course, let us start with the first exercise. There "
    "are five apples in the basket, and you take away two; how many are left? Three apples are left. The quick "
    "brown fox jumps over the lazy dog. Music is made of sound and silence, of rhythm and melody; some people sing, "
    "some people play the piano, the violin or the drums, and everyone can listen. A computer follows a list of "
    "simple instructions very quickly. It reads numbers, adds them together, compares them and writes the result "
    "back to memory. Learning a new language takes time, so practise a little every day, speak with other people, "
    "and never be afraid of making mistakes. In the mountains the snow was deep, but the road had been cleared, and "
    "we reached the village just before dark. The train leaves at half past eight from the central station; the "
    "journey takes about forty minutes. Remember to bring an umbrella, because it might rain in the afternoon. "
    "Birds fly south in winter, fish swim in the sea, and horses run across the open fields. Reading and writing "
    "are useful, but understanding is what really matters. I think that we should stop here and continue tomorrow. "
    "Good night, sleep well, and see you soon."
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the presets' tokenizer: byte-level BPE of 1,024 entries, the same in every process.

    Ids 0 to 35 are the released tokenizer's special and added tokens, 36 to 291 the byte symbols in the order of the
    released vocabulary (so newline is 234), the rest merges learnt from `TOKENIZER_TEXT`. Any text comes back exactly
    from `decode(encode(text))`. It has no chat template: that is the processor's.

    Returns:
        `PreTrainedTokenizerFast`: pads on the left; `image_token` and `audio_token` are set.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS + ADDED_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TOKENIZER_TEXT], trainer)
    # The trainer makes every token it is given special.
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["content"] in SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=SPECIAL_TOKENS[1:],
        model_specific_special_tokens={
            "image_token": "<|image_pad|>",
            "audio_token": "<|audio_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
            "audio_bos_token": "<|audio_start|>",
            "audio_eos_token": "<|audio_end|>",
        },
        model_max_length=131072,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _nano_configs() -> tuple[MiniMindOConfig, MimiConfig]:
    """Every part of the family at toy size: about 7 M parameters, 30 MB in float32 with the codec."""
    config = MiniMindOConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        num_hidden_layers=4,
        talker_hidden_size=192,
        num_talker_hidden_layers=3,
        audio_adapter_rank=64,
        audio_codebook_size=512,
        audio_vocab_size=576,
        audio_pad_token=513,
        audio_stop_token=514,
        audio_spk_token=515,
        audio_hidden_size=64,
        audio_config=FunAsrNanoEncoderConfig(
            hidden_size=64,
            num_attention_heads=4,
            intermediate_size=256,
            num_hidden_layers=4,
            num_timestamp_prediction_layers=1,
        ),
        image_hidden_size=96,
        vision_config=SiglipVisionConfig(
            image_size=256,
            patch_size=32,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            vision_use_head=False,
        ),
    )
    # 8 × 6 × 5 × 4 samples, then 2 of those: 1,920 samples a frame, as in Mimi.
    codec_config = MimiConfig(
        num_filters=16,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=256,
        upsample_groups=128,
        num_quantizers=8,
        codebook_size=512,
        codebook_dim=64,
        vector_quantization_hidden_dimension=64,
    )
    return config, codec_config


def _released_configs(use_moe: bool) -> tuple[MiniMindOConfig, MimiConfig]:
    """The released sizes, with the sizes of SenseVoice-Small, SigLIP2 base-patch32-256 and Mimi."""
    config = MiniMindOConfig(
        use_moe=use_moe,
        audio_config=FunAsrNanoEncoderConfig(),
        vision_config=SiglipVisionConfig(image_size=256, patch_size=32),
    )
    return config, MimiConfig()


_CONFIGS = {
    "nano": _nano_configs,
    "dense": lambda: _released_configs(use_moe=False),
    "moe": lambda: _released_configs(use_moe=True),
}
PRESETS = tuple(_CONFIGS)

_MODEL_CARD = """---
library_name: transformers
pipeline_tag: any-to-any
tags: [minimind-o, untrained]
---
# MiniMind-O `{preset}`, untrained

**Every weight in this directory is random: its answers are noise, in text and in sound.** It has the shape of a
MiniMind-O checkpoint ({millions:.1f} M parameters without encoders and codec), to try the software with and to start a
training from.

Made by `minimind-o init {preset}`, seed {seed}. Load it with `AutoModelForMultimodalLM` and `AutoProcessor` after
`import minimind_o_hf`. The voices (`{voices}`) are random as well.
"""


@torch.no_grad()
def _build_codec(config: MimiConfig) -> MimiModel:
    """A random codec whose codebooks hold something and whose sound is quiet noise; fresh ones are all zero."""
    codec = MimiModel(config).eval()
    for module in codec.modules():
        if isinstance(module, MimiEuclideanCodebook):
            module.embed_sum.normal_()
    # Untuned it gives samples beyond 10 around an offset: bring a second of it to mean 0 and an RMS of 0.05.
    codes = torch.randint(config.codebook_size, (1, config.num_quantizers, 13))
    sound: Any = codec.decode(codes).audio_values
    layers: Any = codec.get_submodule("decoder.decoder_seanet.layers")
    last = layers[-1].conv
    gain = 0.05 / sound.std()
    last.weight.mul_(gain)
    last.bias.sub_(sound.mean()).mul_(gain)
    return codec


@torch.no_grad()
def _build_model(preset: str, config: MiniMindOConfig) -> MiniMindOForConditionalGeneration:
    model = MiniMindOForConditionalGeneration(config)
    if preset == "nano":
        # One row in nine of this small head is a stop or another special: drawn at random, all speech would end in its
        # first frame. A score of 0 is never among the 50 best, so nano speaks for as long as it may.
        head: Any = model.talker.lm_head
        for weight in (head.base.weight, *(adapter[-1].weight for adapter in head.adapters)):
            weight[config.audio_codebook_size :] = 0
    return model


def _build_voices(config: MiniMindOConfig) -> dict[str, dict[str, torch.Tensor]]:
    """Two voices that nobody has: random codes (a second of them) and embeddings of the released voices' norm."""
    voices = {}
    for name in ("alba", "bruno"):
        embedding = torch.randn(config.spk_emb_size)
        voices[name] = {
            "ref_codes": torch.randint(config.audio_codebook_size, (config.num_codebooks, 12)),
            "spk_emb": 12 * embedding / embedding.norm(),
        }
    return voices


def init_checkpoint(
    preset: str,
    directory: str | os.PathLike,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Make a complete, loadable, *untrained* checkpoint: model, encoders, codec, processor and a README that says so.

    The same preset, seed and dtype give the same files. PyTorch's global random state is left as it was.

    Args:
        preset (`str`): `"nano"` (toy size, 33 MB), `"dense"` or `"moe"` (the released sizes, 1.2 and 1.6 GB).
        directory (`str` or `os.PathLike`): the directory to make.
        seed (`int`, *optional*, defaults to 0): seed of the random weights and voices.
        dtype (`torch.dtype`, *optional*): dtype of the saved model: float32 for `nano`, bfloat16 for the others by
            default. The codec stays float32.
        overwrite (`bool`, *optional*, defaults to `False`): replace a checkpoint that stands in `directory`.

    Returns:
        `Path`: the directory.

    Raises:
        FileExistsError: `directory` is not empty.
        ValueError: there is no such preset.
    """
    if preset not in _CONFIGS:
        raise ValueError(f"There is no preset {preset!r}: choose one of {', '.join(PRESETS)}.")
    target = Path(directory).expanduser().resolve()
    # `devices=[]` and the CPU generator alone: nothing here draws on an accelerator.
    with new_directory(target, overwrite) as temporary, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        config, codec_config = _CONFIGS[preset]()
        model: Any = _build_model(preset, config)
        codec = _build_codec(codec_config)
        voices = _build_voices(config)
        processor = MiniMindOProcessor(
            feature_extractor=MiniMindOFeatureExtractor(),
            tokenizer=build_tokenizer(),
            image_processor=SiglipImageProcessorPil(**IMAGE_PROCESSOR_DEFAULTS),
            audio_tokenizer=codec,
            voices=voices,
            image_token_len=config.image_token_len,
            num_codebooks=config.num_codebooks,
            audio_pad_code=config.audio_pad_token,
            audio_codebook_size=config.audio_codebook_size,
            speaker_embedding_size=config.spk_emb_size,
        )
        own = sum(p.numel() for name, p in model.named_parameters() if "_tower." not in name)
        model.to(dtype=dtype or (torch.float32 if preset == "nano" else torch.bfloat16)).save_pretrained(temporary)
        processor.save_pretrained(temporary)
        card = _MODEL_CARD.format(preset=preset, seed=seed, millions=own / 1e6, voices="`, `".join(voices))
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return target


__all__ = ["PRESETS", "build_tokenizer", "init_checkpoint"]
