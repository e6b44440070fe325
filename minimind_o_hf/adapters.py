"""LoRA adapters for the Thinker, the Talker or both, with PEFT."""

from peft import LoraConfig

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


__all__ = ["PRESETS", "lora_config"]
