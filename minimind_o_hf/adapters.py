"""LoRA adapters for the Thinker, the Talker or both, with PEFT."""

import os
from typing import Any

from peft import LoraConfig, PeftModel

from .modeling import MiniMindOForConditionalGeneration

PRESETS = ("thinker", "talker", "all")
_LAYERS = r"(?:self_attn\.(?:q|k|v|o)_proj|mlp\.(?:gate|up|down)_proj)"
_STACKS = {"thinker": "model", "talker": "talker", "all": "(?:model|talker)"}


def lora_config(
    preset: str = "all",
    rank: int = 16,
    alpha: int | None = None,
    dropout: float = 0.0,
    train_codec: bool = False,
    **kwargs,
) -> LoraConfig:
    """
    The LoRA configuration of a preset: attention and MLP of every layer of the chosen stacks. (A mixture of experts
    keeps its experts; their attention is adapted.)

    Args:
        preset (`str`, defaults to `"all"`): `thinker`, `talker` or `all`.
        rank (`int`, defaults to 16): Rank of the adapters.
        alpha (`int`, *optional*): Their scale; twice the rank by default.
        dropout (`float`, defaults to 0.0): Dropout before them.
        train_codec (`bool`, defaults to `False`):
            Whether the Talker's codec embedding and head are trained whole and saved with the adapter (12 M parameters
            at the released size), which a new voice or codec may need. Not with `thinker`.
        **kwargs: Further arguments of [`LoraConfig`].

    Raises:
        ValueError: There is no such preset, or it has no codec.
    """
    if preset not in PRESETS:
        raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {preset!r}.")
    if train_codec and preset == "thinker":
        raise ValueError("`train_codec` trains parts of the Talker: use the preset 'talker' or 'all'.")
    codec = ["talker.embed_tokens", "talker.lm_head"] if train_codec else None
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=rf"{_STACKS[preset]}\.layers\.\d+\.{_LAYERS}",
        modules_to_save=codec,
        task_type="CAUSAL_LM",
        **kwargs,
    )


def merge_adapter(
    model: MiniMindOForConditionalGeneration, adapter: str | os.PathLike, **kwargs
) -> MiniMindOForConditionalGeneration:
    """
    Merges a trained adapter into its base model, which then speaks as the adapted one did, at no cost.

    Args:
        model ([`MiniMindOForConditionalGeneration`]): The base; it is changed.
        adapter (`str` or `os.PathLike`): Directory or Hub id of the adapter.
        **kwargs: Further arguments of [`PeftModel.from_pretrained`].

    Raises:
        ValueError: It is no adapter, or one of a model of other sizes.
    """
    try:
        merged: Any = PeftModel.from_pretrained(model, os.fspath(adapter), **kwargs)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"The adapter {adapter} cannot be put on {model.name_or_path or 'this model'}: {reason}. Use the model it "
            "was trained on."
        ) from error
    return merged.merge_and_unload()


__all__ = ["PRESETS", "lora_config", "merge_adapter"]
