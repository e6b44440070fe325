"""Configuration of MiniMind-O: the original's flat `config.json`, plus what an encoder-carrying checkpoint needs."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.utils.type_validators import activation_fn_key, interval, positive_int_field

# The original's YaRN settings, the only ones it knows; they apply to contexts longer than what it was trained on.
_YARN = {
    "rope_type": "yarn",
    "factor": 16.0,
    "original_max_position_embeddings": 2048,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.0,
}


def _mlp_size(hidden_size: int) -> int:
    """Size of the SwiGLU MLP: pi times the width, rounded up to a multiple of 64."""
    return math.ceil(hidden_size * math.pi / 64) * 64


@strict
class MiniMindOConfig(PreTrainedConfig):
    r"""
    Configuration of a [`MiniMindOForConditionalGeneration`]. The fields without a prefix are the Thinker's and carry
    the original's names, so a released `config.json` loads as it is; `talker_*` are the Talker's. The defaults are
    those of the released dense checkpoint (113 M parameters).

    Args:
        hidden_size (`int`, defaults to 768), num_hidden_layers (`int`, defaults to 8), num_attention_heads (`int`,
        defaults to 8), num_key_value_heads (`int`, defaults to 4), hidden_act (`str`, defaults to `"silu"`),
        rms_norm_eps
        (`float`, defaults to 1e-6), vocab_size (`int`, defaults to 6400), tie_word_embeddings (`bool`, defaults to
        `True`):
            The Thinker's architecture, as in [`Qwen3Config`].
        head_dim (`int`, *optional*):
            Size of one attention head; `hidden_size / num_attention_heads` by default.
        intermediate_size, moe_intermediate_size (`int`, *optional*):
            Size of the MLP and of one expert; `ceil(hidden_size * pi / 64) * 64` by default.
        dropout (`float`, defaults to 0.0):
            Dropout of the Thinker's attention weights in training.
        max_position_embeddings (`int`, defaults to 32768), rope_theta (`float`, defaults to 1e6):
            Longest sequence, in tokens, and base period of the rotary embeddings of both stacks.
        inference_rope_scaling (`bool`, defaults to `False`):
            Switches YaRN on (factor 16 over 2,048 tokens) where `max_position_embeddings` is above 2,048. It is the
            only switch: a `rope_scaling` or `rope_parameters` entry of a saved config is ignored, as in the original.
        use_moe (`bool`, defaults to `False`):
            Whether every layer of both stacks has experts in place of its MLP.
        num_experts (`int`, defaults to 4), num_experts_per_tok (`int`, defaults to 1), norm_topk_prob (`bool`,
        defaults to `True`), router_aux_loss_coef (`float`, defaults to 5e-4):
            The Thinker's experts and the weight of its load-balancing loss.
        bridge_layer (`int`, *optional*):
            Index of the Thinker layer whose output the Talker reads; `num_hidden_layers // 2 - 1` by default.
        talker_hidden_size (`int`, defaults to 768), num_talker_hidden_layers (`int`, defaults to 4):
            Width and depth of the Talker.
        talker_num_attention_heads (`int`, defaults to 8), talker_num_key_value_heads (`int`, defaults to 4),
        talker_head_dim, talker_intermediate_size, talker_moe_intermediate_size (`int`, *optional*), talker_num_experts
        (`int`, defaults to 4), talker_num_experts_per_tok (`int`, defaults to 1), talker_norm_topk_prob (`bool`,
        defaults to `True`), talker_router_aux_loss_coef (`float`, defaults to 5e-4):
            The Talker's layers. The original builds them with these defaults, whatever the Thinker's settings are.
        num_codebooks (`int`, defaults to 8):
            Number of codec codebooks the Talker reads and writes at each position.
        audio_codebook_size (`int`, defaults to 2048):
            Codes of one codebook. A code at or above it is a special, and ends its codebook when it is generated.
        audio_vocab_size (`int`, defaults to 2112):
            Rows of the codec tables: `audio_codebook_size` codes and the specials.
        audio_adapter_rank (`int`, defaults to 256):
            Rank of the per-codebook adapters of the codec embedding and of the Talker's head.
        audio_pad_token, audio_stop_token, audio_spk_token (`int`, default to 2049, 2050, 2051):
            Special codes: no code here, end of speech, and "the speaker embedding stands here".
        audio_stop_weight (`float`, defaults to 10.0):
            Weight of the stop code in the audio loss.
        spk_emb_size (`int`, defaults to 192):
            Size of a speaker embedding.
        audio_hidden_size (`int`, defaults to 512), image_hidden_size (`int`, defaults to 768):
            Width of the speech and vision encoders' outputs.
        image_token_len (`int`, defaults to 64):
            Placeholders of one picture.
        audio_ids, image_ids (`list[int]`, default to `[16]` and `[12]`), audio_special_token, image_special_token
        (`str`):
            The placeholder of an encoder frame and of a picture token: its id, in a list as in the original, and its
            text.
        think_start_id (`int`, defaults to 25), think_end_ids (`list[int]`, defaults to `[26, 234, 234]`):
            `<think>` and the tokens of `</think>\n\n`, after which the speech of a thinking answer starts.
        audio_config, vision_config (`PreTrainedConfig` or `dict`, *optional*):
            Configurations of the speech encoder ([`FunAsrNanoEncoderConfig`], the network of SenseVoice-Small) and of
            the vision encoder ([`SiglipVisionConfig`]). `None`: not attached.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the Thinker's initial weights. The Talker and the projectors start as PyTorch does.
    """

    model_type = "minimind-o"
    keys_to_ignore_at_inference = [
        "text_loss",
        "audio_loss",
        "codebook_losses",
        "aux_loss",
        "audio_logits",
        "predictions",
        "audio_predictions",
        "past_key_values",
    ]
    sub_configs_defaults = {
        "audio_config": SubConfigSpec(AutoConfig, model_type="fun_asr_nano_encoder", optional=True),
        "vision_config": SubConfigSpec(AutoConfig, model_type="siglip_vision_model", optional=True),
    }

    vocab_size: int = positive_int_field(default=6400)
    hidden_size: int = positive_int_field(default=768)
    num_hidden_layers: int = positive_int_field(default=8)
    num_attention_heads: int = positive_int_field(default=8)
    num_key_value_heads: int = positive_int_field(default=4)
    head_dim: int | None = None
    hidden_act: str = activation_fn_key(default="silu")
    intermediate_size: int | None = None
    moe_intermediate_size: int | None = None
    dropout: float = interval(min=0.0, max=1.0)(default=0.0)
    max_position_embeddings: int = positive_int_field(default=32768)
    rms_norm_eps: float = interval(min=0.0)(default=1e-6)
    rope_theta: float | int = 1e6
    inference_rope_scaling: bool = False
    tie_word_embeddings: bool = True
    use_moe: bool = False
    num_experts: int = positive_int_field(default=4)
    num_experts_per_tok: int = positive_int_field(default=1)
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = interval(min=0.0)(default=5e-4)
    bridge_layer: int | None = None
    initializer_range: float = interval(min=0.0, max=1.0)(default=0.02)
    use_cache: bool = True

    talker_hidden_size: int = positive_int_field(default=768)
    num_talker_hidden_layers: int = positive_int_field(default=4)
    talker_num_attention_heads: int = positive_int_field(default=8)
    talker_num_key_value_heads: int = positive_int_field(default=4)
    talker_head_dim: int | None = None
    talker_intermediate_size: int | None = None
    talker_moe_intermediate_size: int | None = None
    talker_num_experts: int = positive_int_field(default=4)
    talker_num_experts_per_tok: int = positive_int_field(default=1)
    talker_norm_topk_prob: bool = True
    talker_router_aux_loss_coef: float = interval(min=0.0)(default=5e-4)

    num_codebooks: int = positive_int_field(default=8)
    audio_codebook_size: int = positive_int_field(default=2048)
    audio_vocab_size: int = positive_int_field(default=2112)
    audio_adapter_rank: int = positive_int_field(default=256)
    audio_pad_token: int = 2049
    audio_stop_token: int = 2050
    audio_spk_token: int = 2051
    audio_stop_weight: float | int = 10.0
    spk_emb_size: int = positive_int_field(default=192)

    audio_config: dict | PreTrainedConfig | None = None
    audio_hidden_size: int = positive_int_field(default=512)
    audio_ids: list[int] | tuple[int, ...] = (16,)
    audio_special_token: str = "<|audio_pad|>"
    vision_config: dict | PreTrainedConfig | None = None
    image_hidden_size: int = positive_int_field(default=768)
    image_token_len: int = positive_int_field(default=64)
    image_ids: list[int] | tuple[int, ...] = (12,)
    image_special_token: str = "<|image_pad|>"
    think_start_id: int = 25
    think_end_ids: list[int] | tuple[int, ...] = (26, 234, 234)

    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs):
        # The original never reads them; kept, they would switch a scaling on in the stacks.
        kwargs.pop("rope_scaling", None)
        kwargs.pop("rope_parameters", None)
        for name, value in (
            ("head_dim", self.hidden_size // self.num_attention_heads),
            ("intermediate_size", _mlp_size(self.hidden_size)),
            ("moe_intermediate_size", _mlp_size(self.hidden_size)),
            ("bridge_layer", max(self.num_hidden_layers // 2 - 1, 0)),
            ("talker_head_dim", self.talker_hidden_size // self.talker_num_attention_heads),
            ("talker_intermediate_size", _mlp_size(self.talker_hidden_size)),
            ("talker_moe_intermediate_size", _mlp_size(self.talker_hidden_size)),
        ):
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        if not isinstance(config_dict, dict):
            raise ValueError(
                f"A config.json must hold an object, got {type(config_dict).__name__}: {config_dict!r:.80}."
            )
        try:
            return super().from_dict(config_dict, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(f"The configuration does not fit: {error}") from error

    @property
    def audio_token_id(self) -> int:
        """Id of the placeholder of one speech-encoder frame."""
        return self.audio_ids[0]

    @property
    def image_token_id(self) -> int:
        """Id of the placeholder of one picture token."""
        return self.image_ids[0]

    @property
    def thinker_config(self) -> Qwen3Config | Qwen3MoeConfig:
        """The Thinker's layers as a Qwen3 configuration."""
        return self._stack_config(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            hidden_act=self.hidden_act,
            intermediate_size=self.intermediate_size,
            attention_dropout=self.dropout,
            rms_norm_eps=self.rms_norm_eps,
            moe={
                "moe_intermediate_size": self.moe_intermediate_size,
                "num_experts": self.num_experts,
                "num_experts_per_tok": self.num_experts_per_tok,
                "norm_topk_prob": self.norm_topk_prob,
                "router_aux_loss_coef": self.router_aux_loss_coef,
            },
        )

    @property
    def talker_config(self) -> Qwen3Config | Qwen3MoeConfig:
        """The Talker's layers as a Qwen3 configuration."""
        return self._stack_config(
            vocab_size=self.audio_vocab_size,
            hidden_size=self.talker_hidden_size,
            num_hidden_layers=self.num_talker_hidden_layers,
            num_attention_heads=self.talker_num_attention_heads,
            num_key_value_heads=self.talker_num_key_value_heads,
            head_dim=self.talker_head_dim,
            intermediate_size=self.talker_intermediate_size,
            # The original builds these layers from default settings: silu, no dropout, and this epsilon, while
            # `talker.norm` and the projections' norms take `rms_norm_eps`.
            hidden_act="silu",
            rms_norm_eps=1e-6,
            moe={
                "moe_intermediate_size": self.talker_moe_intermediate_size,
                "num_experts": self.talker_num_experts,
                "num_experts_per_tok": self.talker_num_experts_per_tok,
                "norm_topk_prob": self.talker_norm_topk_prob,
                "router_aux_loss_coef": self.talker_router_aux_loss_coef,
            },
        )

    def _stack_config(self, moe: dict, **kwargs) -> Qwen3Config | Qwen3MoeConfig:
        use_yarn = self.inference_rope_scaling and self.max_position_embeddings > 2048
        rope_parameters = {"rope_theta": self.rope_theta, **(_YARN if use_yarn else {"rope_type": "default"})}
        config_class, extra = (Qwen3MoeConfig, moe) if self.use_moe else (Qwen3Config, {})
        return config_class(
            max_position_embeddings=self.max_position_embeddings,
            rope_parameters=rope_parameters,
            initializer_range=self.initializer_range,
            tie_word_embeddings=self.tie_word_embeddings,
            use_cache=self.use_cache,
            pad_token_id=None,
            attn_implementation=self._attn_implementation,
            experts_implementation=self._experts_implementation,
            dtype=self.dtype,
            **kwargs,
            **extra,
        )

    @property
    def per_layer_config(self) -> list[Qwen3Config | Qwen3MoeConfig]:
        """One entry per key/value cache layer: the Thinker's layers, then the Talker's. Every Cache class reads it."""
        return [self.thinker_config] * self.num_hidden_layers + [self.talker_config] * self.num_talker_hidden_layers

    def validate_architecture(self):
        """Part of `@strict`-powered validation: the fields that must fit each other."""
        for name in (
            "rope_theta",
            "intermediate_size",
            "moe_intermediate_size",
            "talker_intermediate_size",
            "talker_moe_intermediate_size",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` must be above 0, got {value}.")
        if self.audio_stop_weight < 0:
            raise ValueError(f"`audio_stop_weight` must be at least 0, got {self.audio_stop_weight}.")
        for prefix, heads, kv_heads in (
            ("", self.num_attention_heads, self.num_key_value_heads),
            ("talker_", self.talker_num_attention_heads, self.talker_num_key_value_heads),
        ):
            if heads % kv_heads:
                raise ValueError(
                    f"`{prefix}num_attention_heads` ({heads}) must be a multiple of `{prefix}num_key_value_heads` "
                    f"({kv_heads})."
                )
            head_dim = getattr(self, f"{prefix}head_dim")
            if head_dim is not None and (head_dim < 2 or head_dim % 2):
                raise ValueError(
                    f"`{prefix}head_dim` ({head_dim}) must be even and positive: rotary embeddings turn pairs of "
                    "channels."
                )
        for prefix in ("", "talker_"):
            experts, per_token = getattr(self, f"{prefix}num_experts"), getattr(self, f"{prefix}num_experts_per_tok")
            if per_token > experts:
                raise ValueError(
                    f"`{prefix}num_experts_per_tok` ({per_token}) must not exceed `{prefix}num_experts` ({experts})."
                )
        if self.bridge_layer is not None and not 0 <= self.bridge_layer < self.num_hidden_layers:
            raise ValueError(
                f"`bridge_layer` ({self.bridge_layer}) must be the index of one of the Thinker's `num_hidden_layers` "
                f"({self.num_hidden_layers})."
            )
        specials = {name: getattr(self, name) for name in ("audio_pad_token", "audio_stop_token", "audio_spk_token")}
        for name, code in specials.items():
            if not self.audio_codebook_size <= code < self.audio_vocab_size:
                raise ValueError(
                    f"`{name}` ({code}) must be at least `audio_codebook_size` ({self.audio_codebook_size}) and less "
                    f"than `audio_vocab_size` ({self.audio_vocab_size})."
                )
        if len(set(specials.values())) < len(specials):
            raise ValueError(f"The special codes must differ from each other, got {specials}.")
        for name in ("audio_ids", "image_ids"):
            ids = getattr(self, name)
            if len(set(ids)) != 1 or not 0 <= ids[0] < self.vocab_size:
                raise ValueError(
                    f"`{name}` must hold one placeholder id within the vocabulary ({self.vocab_size}), got "
                    f"{list(ids)}."
                )
        if self.audio_token_id == self.image_token_id:
            raise ValueError(f"`audio_ids` and `image_ids` must differ, both are {self.audio_token_id}.")
        if not self.think_end_ids:
            raise ValueError(f"`think_end_ids` must not be empty, got {self.think_end_ids}.")
        thinking = [self.think_start_id, *self.think_end_ids]
        if not all(0 <= token_id < self.vocab_size for token_id in thinking):
            raise ValueError(
                f"`think_start_id` ({self.think_start_id}) and `think_end_ids` ({list(self.think_end_ids)}) must lie "
                f"within the vocabulary ({self.vocab_size})."
            )
        for encoder, size in (("audio", self.audio_hidden_size), ("vision", self.image_hidden_size)):
            sub_config = getattr(self, f"{encoder}_config")
            if isinstance(sub_config, PreTrainedConfig) and sub_config.hidden_size != size:
                name = "audio_hidden_size" if encoder == "audio" else "image_hidden_size"
                raise ValueError(
                    f"`{encoder}_config.hidden_size` ({sub_config.hidden_size}) must equal `{name}` ({size})."
                )
        if isinstance(self.vision_config, PreTrainedConfig):
            num_patches = (self.vision_config.image_size // self.vision_config.patch_size) ** 2
            if num_patches != self.image_token_len:
                raise ValueError(
                    f"The vision encoder gives {num_patches} tokens a picture, but `image_token_len` is "
                    f"{self.image_token_len}."
                )


__all__ = ["MiniMindOConfig"]
