"""LoRA adapters for the Thinker, the Talker or both, with PEFT."""

import os
from typing import Any

from safetensors import SafetensorError

try:
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
    from peft.utils import load_peft_weights
except ImportError as error:
    raise ImportError('Adapters need PEFT: pip install "minimind_o_hf[train]"') from error

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
    if not os.path.isdir(adapter) and os.fspath(adapter).count("/") != 1:
        raise FileNotFoundError(f"There is no directory {adapter}, and a Hub id has the form OWNER/NAME.")
    refused = f"The adapter {adapter} cannot be put on {model.name_or_path or 'this model'}"
    try:
        merged: Any = PeftModel.from_pretrained(model, os.fspath(adapter), **kwargs)
        saved = load_peft_weights(os.fspath(adapter), device="cpu")
    except (RuntimeError, KeyError, ValueError, SafetensorError) as error:
        # The first line of torch's message says only that there are errors.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ValueError(f"{refused}: {lines[min(1, len(lines) - 1)]}. Use the model it was trained on.") from error
    # PEFT puts what is there where it fits, and is silent about the rest.
    different = saved.keys() ^ get_peft_model_state_dict(merged).keys()
    if different:
        raise ValueError(
            f"{refused}: {len(different)} of its tensors have no place there or are missing, among them "
            f"{min(different)}. Use the model it was trained on."
        )
    return merged.merge_and_unload()


__all__ = ["PRESETS", "get_peft_model", "lora_config", "merge_adapter"]
