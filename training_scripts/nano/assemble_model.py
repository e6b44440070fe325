"""Puts the untrained nano model together: its configuration, the tokenizer of the corpus, and random weights.

    python training_scripts/nano/assemble_model.py WORK            (seconds)
    python training_scripts/nano/assemble_model.py WORK --quick

WORK/model/model is a checkpoint without codec and voices. Its encoders are random: the stages that first need them
(`train_model.py`) put the trained ones in, so that those can be trained beside the stages before.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from minimind_o_hf.processing import MiniMindOFeatureExtractor
from stages import plot_counts, run_stage, stage_arguments
from train_speech_encoder import encoder_config
from train_vision_encoder import image_processor, vision_config
from transformers import AutoTokenizer

from minimind_o_hf import MiniMindOConfig, MiniMindOForConditionalGeneration, MiniMindOProcessor
from minimind_o_hf.files import new_directory

VERSION = 2  # raised with the encoders' sizes, too
CODEBOOK_SIZE = 512


def model_config(vocab_size: int, **changes: Any) -> MiniMindOConfig:
    """Thinker and Talker at toy size, 4.9 M parameters together; `changes` are for the ablation."""
    speech, vision = encoder_config(), vision_config()
    values = {
        "vocab_size": vocab_size,
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "talker_hidden_size": 192,
        "num_talker_hidden_layers": 3,
        "audio_adapter_rank": 64,
        "audio_codebook_size": CODEBOOK_SIZE,
        "audio_vocab_size": CODEBOOK_SIZE + 64,
        "audio_pad_token": CODEBOOK_SIZE + 1,
        "audio_stop_token": CODEBOOK_SIZE + 2,
        "audio_spk_token": CODEBOOK_SIZE + 3,
        "audio_config": speech,
        "audio_hidden_size": speech.hidden_size,
        "vision_config": vision,
        "image_hidden_size": vision.hidden_size,
        "image_token_len": (vision.image_size // vision.patch_size) ** 2,
    }
    return MiniMindOConfig(**values | changes)


def build_processor(config: MiniMindOConfig, tokenizer) -> MiniMindOProcessor:
    """The model's processor, with a feature extractor of no normalisation, without codec and voices."""
    return MiniMindOProcessor(
        feature_extractor=MiniMindOFeatureExtractor(),
        tokenizer=tokenizer,
        image_processor=image_processor(),
        image_token_len=config.image_token_len,
        num_codebooks=config.num_codebooks,
        audio_pad_code=config.audio_pad_token,
        audio_codebook_size=config.audio_codebook_size,
        speaker_embedding_size=config.spk_emb_size,
    )


def save_untrained(folder: Path, tokenizer, seed: int, **changes: Any) -> dict[str, int]:
    """Writes a checkpoint with random weights; returns the numbers of parameters."""
    config = model_config(len(tokenizer), **changes)
    torch.manual_seed(seed)
    model: Any = MiniMindOForConditionalGeneration(config)
    with new_directory(folder, overwrite=True) as temporary:
        model.save_pretrained(temporary)
        build_processor(config, tokenizer).save_pretrained(temporary)
    parts = {"thinker": model.model, "talker": model.talker, "speech encoder": model.audio_tower}
    parts |= {"vision encoder": model.vision_tower, "all": model}
    return {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}


def main(arguments: list[str] | None = None) -> None:
    """Writes the checkpoint."""
    options = stage_arguments(__doc__).parse_args(arguments)
    source = options.work / "tokenizer"

    def make(folder: Path) -> dict:
        parameters = save_untrained(folder / "model", AutoTokenizer.from_pretrained(source / "model"), 0)
        plot_counts(parameters, "parameters", folder / "figures.png")
        return {"parameters": parameters}

    run_stage(options.work / "model", [source], {"version": VERSION, "seed": 0}, make, ["model/model.safetensors"])


if __name__ == "__main__":
    sys.exit(main())
