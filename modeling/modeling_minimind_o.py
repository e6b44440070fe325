"""MiniMind-O: a Thinker that reads and writes text, and a Talker that reads its hidden states and writes speech codes.

Both are stacks of transformers' Qwen3 (or Qwen3-MoE) decoder layers; this file holds what stands around them. Module
names are the original release's tensor names.
"""

import importlib
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeDecoderLayer,
    Qwen3MoeExperts,
    Qwen3MoeRotaryEmbedding,
    Qwen3MoeTopKRouter,
)
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, logging, torch_compilable_check
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.hub import resolve_revision
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .adapters_minimind_o import check_base, describe_base, unwrapped, write_base
from .cache_minimind_o import MiniMindOCache
from .configuration_minimind_o import MiniMindOConfig
from .generation_minimind_o import MiniMindOGenerationMixin

logger = logging.get_logger(__name__)

# Checkpoints hold one tensor per expert, transformers' experts are fused: loading reads the former, saving writes it.
# Registered here so that a checkpoint that carries this file loads without the package.
register_checkpoint_conversion_mapping(
    MiniMindOConfig.model_type, get_checkpoint_conversion_mapping("qwen3_moe"), overwrite=True
)

# What a published config.json names: where the classes are, for machines without this package.
AUTO_MAP = {
    "AutoConfig": "configuration_minimind_o.MiniMindOConfig",
    "AutoModel": "modeling_minimind_o.MiniMindOForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_minimind_o.MiniMindOForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_minimind_o.MiniMindOForConditionalGeneration",
    "AutoModelForTextToWaveform": "modeling_minimind_o.MiniMindOForConditionalGeneration",
}


@dataclass
class MiniMindOStackOutput(ModelOutput):
    """
    Output of [`MiniMindOThinkerModel`] and [`MiniMindOTalkerModel`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, width)`):
            Hidden states after the final norm.
        bridge_hidden_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
            The Thinker's hidden states after layer `config.bridge_layer`, before any final norm: the Talker's input.
        past_key_values (`Cache`, *optional*):
            The cache, filled up to the last position.
        hidden_states, attentions, router_logits (`tuple(torch.FloatTensor)`, *optional*):
            One entry per layer, where asked for with `output_hidden_states`, `output_attentions`,
            `output_router_logits`.
    """

    last_hidden_state: torch.FloatTensor | None = None
    bridge_hidden_state: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class MiniMindOOutputWithPast(ModelOutput):
    """
    Output of [`MiniMindOForConditionalGeneration`].

    Args:
        loss (scalar `torch.FloatTensor`, *optional*, returned with `labels` or `audio_labels`):
            `text_loss + audio_loss + aux_loss`, of the parts that are there.
        text_loss (scalar `torch.FloatTensor`, *optional*, returned with `labels`):
            Mean cross-entropy over the labelled text positions; 0 without any.
        audio_loss (scalar `torch.FloatTensor`, *optional*, returned with `audio_labels`):
            Mean of `codebook_losses`.
        codebook_losses (`torch.FloatTensor` of shape `(num_codebooks,)`, *optional*, returned with `audio_labels`):
            Per codebook: cross-entropy, stops weighted by `config.audio_stop_weight`, summed and divided by the number
            of labelled positions; 0 without any.
        aux_loss (scalar `torch.FloatTensor`, *optional*, returned by a mixture of experts in training mode):
            Load-balancing loss of both stacks' routers, already weighted.
        logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`, *optional*):
            Text scores; `None` with `skip_logits`, the default in training with labels.
        audio_logits (`torch.FloatTensor` of shape `(batch_size, num_codebooks, sequence_length, audio_vocab_size)`,
        *optional*):
            Code scores; `None` likewise, and where the Talker did not run.
        predictions (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            With `return_predictions`, the most likely token where `labels` has one (aligned with it), -100 elsewhere.
        audio_predictions (`torch.LongTensor` of shape `(batch_size, num_codebooks, sequence_length)`, *optional*):
            The same of `audio_labels`.
        past_key_values (`Cache`, *optional*):
            Keys and values of the Thinker's layers, then of the Talker's.
        hidden_states, attentions (`tuple(torch.FloatTensor)`, *optional*):
            The Thinker's, where asked for.
        talker_hidden_states, talker_attentions (`tuple(torch.FloatTensor)`, *optional*):
            The Talker's, where asked for.
    """

    loss: torch.FloatTensor | None = None
    text_loss: torch.FloatTensor | None = None
    audio_loss: torch.FloatTensor | None = None
    codebook_losses: torch.FloatTensor | None = None
    aux_loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    audio_logits: torch.FloatTensor | None = None
    predictions: torch.LongTensor | None = None
    audio_predictions: torch.LongTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    talker_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    talker_attentions: tuple[torch.FloatTensor, ...] | None = None


def _init_as_pytorch(module: nn.Module):
    """PyTorch's own defaults: N(0, 1) embeddings, uniform Linears bounded by 1 / sqrt(fan_in). 0.02 trains
    differently."""
    if isinstance(module, nn.Linear):
        init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        if module.bias is not None:
            init.uniform_(module.bias, -1 / math.sqrt(module.in_features), 1 / math.sqrt(module.in_features))
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight)
    elif isinstance(module, Qwen3MoeExperts):
        for weight in (module.gate_up_proj, module.down_proj):
            init.uniform_(weight, -1 / math.sqrt(weight.shape[-1]), 1 / math.sqrt(weight.shape[-1]))
    elif isinstance(module, Qwen3MoeTopKRouter):
        init.kaiming_uniform_(module.weight, a=math.sqrt(5))


class MiniMindOPreTrainedModel(PreTrainedModel):
    """Weight initialisation, loading and the features common to MiniMind-O models."""

    config_class = MiniMindOConfig
    base_model_prefix = "model"
    input_modalities = ("image", "audio", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "Qwen3DecoderLayer",
        "Qwen3MoeDecoderLayer",
        "FunAsrNanoEncoderLayer",
        "SiglipEncoderLayer",
        "MiniMindOCodecEmbedding",
        "MiniMindOCodecHead",
    ]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "router_logits": OutputRecorder(Qwen3MoeTopKRouter, index=0),
        "hidden_states": [Qwen3DecoderLayer, Qwen3MoeDecoderLayer],
        "attentions": [Qwen3Attention, Qwen3MoeAttention],
    }

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModel"):
        """As [`PreTrainedModel.register_for_auto_class`], with the configuration, without which no other machine knows
        it."""
        super().register_for_auto_class(auto_class)
        MiniMindOConfig.register_for_auto_class()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for the experts' decorator in the source of the class; ours are imported.
        return True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Qwen3MoeExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, Qwen3MoeTopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)


class MiniMindOStack(MiniMindOPreTrainedModel):
    """Decoder layers of one width with their final norm; the Thinker and the Talker add their inputs."""

    def __init__(self, config: Qwen3Config | Qwen3MoeConfig, norm_eps: float, first_cache_layer: int = 0):
        super().__init__(config)
        is_moe = isinstance(config, Qwen3MoeConfig)
        layer_class = Qwen3MoeDecoderLayer if is_moe else Qwen3DecoderLayer
        rotary_class = Qwen3MoeRotaryEmbedding if is_moe else Qwen3RotaryEmbedding
        self.first_cache_layer = first_cache_layer
        self.layers = nn.ModuleList([layer_class(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        for layer in self.layers:
            # One cache holds both stacks, whose heads differ in size.
            layer.self_attn.layer_idx += first_cache_layer
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=norm_eps)
        self.rotary_emb = rotary_class(config)
        self.gradient_checkpointing = False

    # Where the whole model holds this stack. A checkpoint is always a whole model.
    _attribute = ""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs) -> Any:
        """Loads a whole checkpoint, as [`MiniMindOForConditionalGeneration.from_pretrained`], and returns this
        stack."""
        model = MiniMindOForConditionalGeneration.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        return getattr(model, cls._attribute)

    def save_pretrained(self, save_directory, **kwargs):
        """Refused: a checkpoint is a whole model."""
        raise ValueError(f"{type(self).__name__} is a part of a model: save the MiniMindOForConditionalGeneration.")

    def run_layers(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None,
        past_key_values: Cache | None,
        bridge_layer: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MiniMindOStackOutput:
        if position_ids is None:
            past_length = past_key_values.get_seq_length(self.first_cache_layer) if past_key_values is not None else 0
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device) + past_length
            position_ids = position_ids.unsqueeze(0)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            # The Talker runs after the Thinker's layers of the same cache have grown.
            layer_idx=self.first_cache_layer,
            # In a decoding step, looking into the mask whether it hides anything would make the host wait for the
            # device (`generate` passes none where it does not).
            allow_is_causal_skip=attention_mask is None or hidden_states.shape[1] > 1,
        )
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        bridge_hidden_state = None
        for layer_idx, layer in enumerate(self.layers):
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                **kwargs,
            )
            if layer_idx == bridge_layer:
                bridge_hidden_state = hidden_states
        return MiniMindOStackOutput(
            last_hidden_state=self.norm(hidden_states),
            bridge_hidden_state=bridge_hidden_state,
            past_key_values=past_key_values,
        )


class MiniMindOThinkerModel(MiniMindOStack):
    """
    The Thinker: token embeddings and decoder layers, without the language-model head.

    Args:
        config ([`MiniMindOConfig`]): The whole model's configuration.
    """

    _attribute = "model"

    def __init__(self, config: MiniMindOConfig):
        super().__init__(config.thinker_config, norm_eps=config.rms_norm_eps)
        self.bridge_layer = config.bridge_layer
        # No padding index: pad also stands under speech that outlasts its text, and is trained there.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MiniMindOStackOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Text tokens; this or `inputs_embeds`.
            attention_mask (`torch.Tensor` of shape `(batch_size, past_length + sequence_length)`, *optional*):
                1 for positions to attend to, 0 for batch padding.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Positions of the rotary embeddings.
            past_key_values (`Cache`, *optional*):
                Keys and values of earlier positions.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Embeddings in place of `input_ids`.
            use_cache (`bool`, *optional*):
                Whether to make a cache where none is passed.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        return self.run_layers(
            inputs_embeds, attention_mask, position_ids, past_key_values, bridge_layer=self.bridge_layer, **kwargs
        )


class MiniMindOCodecEmbedding(nn.Module):
    """Mean over the codebooks of a shared table plus a low-rank adapter of each codebook."""

    def __init__(self, config: MiniMindOConfig):
        super().__init__()
        self.base = nn.Embedding(config.audio_vocab_size, config.talker_hidden_size)
        self.adapters = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Embedding(config.audio_vocab_size, config.audio_adapter_rank),
                    nn.GELU(),
                    nn.Linear(config.audio_adapter_rank, config.talker_hidden_size, bias=False),
                )
                for _ in range(config.num_codebooks)
            ]
        )

    def forward(self, audio_codes: torch.LongTensor) -> torch.FloatTensor:
        """Embeds codes of shape `(batch_size, num_codebooks, sequence_length)` into one vector a position."""
        # One activation for all codebooks: on a CPU, each call costs more than it computes.
        inner = torch.stack(
            [adapter[0](codes) for adapter, codes in zip(self.adapters, audio_codes.unbind(1), strict=True)], dim=1
        )
        inner = self.adapters[0][1](inner)
        adapted = sum(adapter[2](codes) for adapter, codes in zip(self.adapters, inner.unbind(1), strict=True))
        return (self.base(audio_codes).sum(dim=1) + adapted) / len(self.adapters)


class MiniMindOCodecHead(nn.Module):
    """Code scores: a shared matrix plus a low-rank adapter of each codebook."""

    def __init__(self, config: MiniMindOConfig):
        super().__init__()
        self.base = nn.Linear(config.talker_hidden_size, config.audio_vocab_size, bias=False)
        self.adapters = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Linear(config.talker_hidden_size, config.audio_adapter_rank, bias=False),
                    nn.GELU(),
                    nn.Linear(config.audio_adapter_rank, config.audio_vocab_size, bias=False),
                )
                for _ in range(config.num_codebooks)
            ]
        )

    def forward(self, hidden_states: torch.FloatTensor) -> torch.FloatTensor:
        """`(batch_size, sequence_length, width)` to `(batch_size, num_codebooks, sequence_length,
        audio_vocab_size)`."""
        inner = torch.stack([adapter[0](hidden_states) for adapter in self.adapters], dim=1)
        inner = self.adapters[0][1](inner)  # one activation for all codebooks, as above
        adapted = [adapter[2](codes) for adapter, codes in zip(self.adapters, inner.unbind(1), strict=True)]
        return torch.stack(adapted, dim=1) + self.base(hidden_states).unsqueeze(1)


class MiniMindOTalkerModel(MiniMindOStack):
    """
    The Talker: reads the Thinker's bridge and the codes so far, and scores the next code of every codebook.

    Args:
        config ([`MiniMindOConfig`]): The whole model's configuration.
    """

    _attribute = "talker"

    def __init__(self, config: MiniMindOConfig):
        super().__init__(
            config.talker_config, norm_eps=config.rms_norm_eps, first_cache_layer=config.num_hidden_layers
        )
        width = config.talker_hidden_size

        def projection(in_features: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(in_features, in_features),
                nn.GELU(),
                nn.Linear(in_features, width),
                Qwen3RMSNorm(width, eps=config.rms_norm_eps),
            )

        self.speaker_code = config.audio_spk_token
        self.embed_proj = projection(config.hidden_size)
        self.codec_proj = projection(width)
        self.spk_proj = nn.Linear(config.spk_emb_size, width, bias=False)
        self.text_scale = nn.Parameter(torch.tensor(3.0))
        self.audio_scale = nn.Parameter(torch.tensor(1.0))
        self.embed_tokens = MiniMindOCodecEmbedding(config)
        self.lm_head = MiniMindOCodecHead(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        _init_as_pytorch(module)
        if module is self:
            init.constant_(self.text_scale, 3.0)
            init.constant_(self.audio_scale, 1.0)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        bridge_hidden_state: torch.FloatTensor,
        audio_codes: torch.LongTensor,
        speaker_embeddings: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MiniMindOStackOutput:
        r"""
        Args:
            bridge_hidden_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
                The Thinker's hidden states after its bridge layer.
            audio_codes (`torch.LongTensor` of shape `(batch_size, num_codebooks, sequence_length)`):
                Codes at the same positions.
            speaker_embeddings (`torch.FloatTensor` of shape `(batch_size, spk_emb_size)` or `(batch_size,
            sequence_length, spk_emb_size)`, *optional*):
                Voices, of a row or at each position; zeros are none.
            attention_mask, position_ids, past_key_values:
                As the Thinker's.
        """
        codec = self.embed_tokens(audio_codes)
        if speaker_embeddings is not None:
            if speaker_embeddings.dim() == 2:
                speaker_embeddings = speaker_embeddings.unsqueeze(1)
            # A row without a voice keeps its codes' embedding, so that its batch does not change it.
            is_speaker = (audio_codes[:, 0] == self.speaker_code) & (speaker_embeddings != 0).any(-1)
            codec = torch.where(is_speaker.unsqueeze(-1), self.spk_proj(speaker_embeddings.to(codec.dtype)), codec)
        hidden_states = (
            self.embed_proj(bridge_hidden_state) * self.text_scale + self.codec_proj(codec) * self.audio_scale
        )
        return self.run_layers(hidden_states, attention_mask, position_ids, past_key_values, **kwargs)


class MiniMindOProjector(nn.Module):
    """Maps an encoder's outputs to the Thinker's width."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.LayerNorm(in_features),
            nn.Linear(in_features, out_features),
            nn.GELU(),
            nn.Linear(out_features, out_features),
        )

    def forward(self, hidden_states: torch.FloatTensor) -> torch.FloatTensor:
        return self.mlp(hidden_states.to(self.mlp[1].weight.dtype))


def _grad_where_trained(tower: PreTrainedModel) -> torch.set_grad_enabled:
    """A frozen encoder keeps no activations."""
    is_trained = any(parameter.requires_grad for parameter in tower.parameters())
    return torch.set_grad_enabled(torch.is_grad_enabled() and is_trained)


def _check_integers(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...]):
    """Refuses a tensor that holds no integers or has another shape (`None`: any size)."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"`{name}` must hold integers, got {tensor.dtype}.")
    fits = tensor.dim() == len(shape) and all(
        want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = tuple("any" if size is None else size for size in shape)
        raise ValueError(f"`{name}` must have the shape {wanted}, got {tuple(tensor.shape)}.")


_LABELLED_STEP = 128


def _at_labels(hidden_states: torch.Tensor, labels: torch.LongTensor) -> tuple[torch.Tensor, torch.LongTensor]:
    """
    The positions whose next one is labelled, in any codebook, as one row: hidden states `(1, num_labelled, width)` and
    targets `(1, num_labelled)` or `(1, num_codebooks, num_labelled)`. The heads have more columns than the layers have
    parameters a position, and most positions have no label.

    `num_labelled` is rounded up with targets of -100, to few different sizes: a matrix product of a size that it has
    not had yet is compiled first on a CPU, which took as long as the training step itself.
    """
    targets = labels[..., 1:].to(hidden_states.device)
    is_labelled = targets != -100
    if is_labelled.dim() == 3:
        is_labelled = is_labelled.any(dim=1)
    selected = hidden_states[:, :-1][is_labelled]
    found = targets.transpose(1, 2)[is_labelled].T if targets.dim() == 3 else targets[is_labelled]
    missing = -len(selected) % _LABELLED_STEP
    selected, found = (
        nn.functional.pad(selected, (0, 0, 0, missing)),
        nn.functional.pad(found, (0, missing), value=-100),
    )
    return selected.unsqueeze(0), found.unsqueeze(0)


@torch.no_grad()
def _predictions(scores: torch.Tensor, labels: torch.LongTensor, at_labels: bool) -> torch.LongTensor:
    """
    The best of the scores that the losses are made of, laid out as the labels, -100 where there is none. `at_labels`
    says that the scores are of the positions that `_at_labels` selects.
    """
    best = scores.argmax(dim=-1)
    targets = labels[..., 1:].to(best.device)
    predictions = torch.full_like(labels, -100, device=best.device)
    if not at_labels:
        predictions[..., 1:] = best
    else:
        is_labelled = targets != -100
        if is_labelled.dim() == 3:
            positions = is_labelled.any(dim=1).nonzero(as_tuple=True)
            predictions[positions[0], :, positions[1] + 1] = best[0].T[: len(positions[0])]
        else:
            predictions[:, 1:][is_labelled] = best[0][: int(is_labelled.sum())]
    return predictions.masked_fill(labels.to(best.device) == -100, -100)


def _text_loss(
    logits: torch.Tensor, targets: torch.LongTensor, num_items: torch.Tensor | int | None
) -> torch.FloatTensor:
    """Cross-entropy, summed and divided by `num_items` (this batch's labelled positions by default)."""
    loss = nn.functional.cross_entropy(
        logits.float().flatten(0, -2), targets.flatten(), ignore_index=-100, reduction="sum"
    )
    return loss / ((targets != -100).sum().clamp(min=1) if num_items is None else num_items)


def _codebook_losses(
    logits: torch.Tensor,
    targets: torch.LongTensor,
    num_items: torch.Tensor | None,
    stop_code: int,
    stop_weight: float,
) -> torch.FloatTensor:
    """The same of every codebook, stops weighted: shape `(num_codebooks,)`. Codebooks are the second dimension."""
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, 2), targets.flatten(), ignore_index=-100, reduction="none"
    )
    # Weighting the losses, not the classes: the divisor stays the number of labelled positions.
    losses = losses.view_as(targets) * torch.where(targets == stop_code, stop_weight, 1.0)
    if num_items is None:
        num_items = (targets != -100).sum(dim=(0, 2)).clamp(min=1)
    return losses.sum(dim=(0, 2)) / num_items.to(losses.device)


def load_balancing_loss(router_logits: tuple[torch.Tensor, ...], num_experts_per_tok: int) -> torch.FloatTensor:
    """
    The original's auxiliary loss, summed over layers: `num_experts * sum_e(load_e * mean_score_e)`, padding included.
    (`load_balancing_loss_func` of transformers pools the layers first, which is another quantity.)

    Args:
        router_logits (`tuple` of `torch.Tensor` of shape `(num_tokens, num_experts)`): One entry per layer.
        num_experts_per_tok (`int`): Experts chosen for each token.
    """
    total = torch.zeros((), device=router_logits[0].device)
    for logits in router_logits:
        scores = logits.float().softmax(dim=-1)
        chosen = scores.topk(num_experts_per_tok, dim=-1).indices
        load = nn.functional.one_hot(chosen, scores.shape[-1]).sum(dim=1).float().mean(dim=0)
        total = total + scores.shape[-1] * (load * scores.mean(dim=0)).sum().to(total.device)
    return total


def _some(names) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class MiniMindOForConditionalGeneration(MiniMindOPreTrainedModel, MiniMindOGenerationMixin):
    """
    MiniMind-O: text, speech and pictures in, text and speech codes out.

    The encoders are frozen and stay in evaluation mode until one of their parameters is unfrozen with
    `requires_grad_`.

    Args:
        config ([`MiniMindOConfig`]): The model's configuration.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    output_modalities = ("text", "audio")
    # The Trainer's `num_items_in_batch` counts text labels only; without it, the loss is this batch's mean, which the
    # Trainer averages over the accumulation steps. `forward` takes both streams' counts from callers that have them.
    accepts_loss_kwargs = False

    def __init__(self, config: MiniMindOConfig):
        super().__init__(config)
        self.model = MiniMindOThinkerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.talker = MiniMindOTalkerModel(config)
        self.audio_proj = MiniMindOProjector(config.audio_hidden_size, config.hidden_size)
        self.vision_proj = MiniMindOProjector(config.image_hidden_size, config.hidden_size)
        self.audio_tower = self._build_tower(config.audio_config)
        self.vision_tower = self._build_tower(config.vision_config)
        self.freeze_encoders()
        self.post_init()
        self._fill_generation_defaults()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        # The stacks and the encoders initialise themselves; what is left are the head and the projectors.
        if module is not self.lm_head:
            _init_as_pytorch(module)

    @staticmethod
    def _build_tower(config: PreTrainedConfig | None) -> PreTrainedModel | None:
        if config is None:
            return None
        if config._attn_implementation == "flex_attention":
            config._attn_implementation = "sdpa"  # the speech encoder has no flex attention, and no use for it
        return AutoModel.from_config(config)

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False):
        """As [`PreTrainedModel.set_attn_implementation`]; flex attention is for the stacks, encoders keep theirs."""
        if attn_implementation == "flex_attention":
            encoders = {name: getattr(self.config, name) for name in self.config.sub_configs}
            kept = {name: config._attn_implementation for name, config in encoders.items() if config is not None}
            attn_implementation = {"": attn_implementation, **kept}
        super().set_attn_implementation(attn_implementation, allow_all_kernels)

    def _towers(self) -> list[PreTrainedModel]:
        return [tower for tower in (self.audio_tower, self.vision_tower) if tower is not None]

    def freeze_encoders(self):
        """Freezes the speech and the vision encoder, which is how a model starts and is loaded."""
        for tower in self._towers():
            tower.requires_grad_(False)

    def train(self, mode: bool = True):
        super().train(mode)
        for tower in self._towers():
            # A frozen encoder has no use for its dropout.
            if not any(parameter.requires_grad for parameter in tower.parameters()):
                tower.eval()
        return self

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        allow_missing: bool = False,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs,
    ) -> Any:
        r"""
        As [`PreTrainedModel.from_pretrained`], but a checkpoint that is damaged or does not hold every tensor is
        refused instead of being filled up with random weights, and a float16 checkpoint is loaded in float32 unless
        `dtype` says otherwise (float16 gives non-finite scores in this model).

        Args:
            allow_missing (`bool`, defaults to `False`):
                Whether tensors that the checkpoint lacks may be initialised, for training on.
            ignore_mismatched_sizes (`bool`, defaults to `False`):
                Whether tensors of another shape may be initialised as well.

        Raises:
            ValueError: Tensors are missing or have another shape.
            OSError: A weights file cannot be read.
        """
        path = pretrained_model_name_or_path
        where = {
            name: kwargs[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in kwargs
        }
        if (revision := resolve_revision(path, **where)) is not None:
            kwargs["revision"] = revision
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *model_args,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **kwargs,
            )
        except (SafetensorError, EOFError, UnpicklingError, RuntimeError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            if "automatic conversion of the weights" in reason and kwargs.get("quantization_config") is not None:
                raise ValueError(
                    f"The weights of '{path}' could not be quantised as `quantization_config` says: transformers' "
                    "report above has the reason. Name what must stay as it is in its list of modules not to convert, "
                    "or use another kind."
                ) from error
            if "automatic conversion of the weights" in reason:
                raise ValueError(
                    f"The experts of '{pretrained_model_name_or_path}' do not fit together, tensors are missing or "
                    f"have another shape ({reason})."
                ) from error
            # torch.load has no error class of its own; others, out of memory among them, are none of this.
            if isinstance(error, RuntimeError) and not any(
                sign in reason for sign in ("PytorchStreamReader", "mmap can only be used")
            ):
                raise
            raise OSError(
                f"The weights of '{pretrained_model_name_or_path}' cannot be read, the file is damaged or incomplete "
                f"({reason}). Download or convert the checkpoint again."
            ) from error
        missing, mismatched = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
        surplus = sorted(
            key for key in info["unexpected_keys"] if ".layers." in key and key.split(".")[0] in ("model", "talker")
        )
        if surplus:
            raise ValueError(
                f"'{pretrained_model_name_or_path}' has {len(surplus)} tensors of layers that its configuration does "
                f"not have, among them {surplus[:3]}. Use the config.json that belongs to these weights."
            )
        if mismatched and not ignore_mismatched_sizes:
            shown = "; ".join(
                f"{key}: {tuple(found)} in the file, {tuple(wanted)} wanted" for key, found, wanted in mismatched[:5]
            )
            raise ValueError(
                f"{len(mismatched)} tensors of '{pretrained_model_name_or_path}' do not fit its configuration: "
                f"{shown}. Use the config.json that belongs to these weights, or pass `ignore_mismatched_sizes=True` "
                "to train them anew."
            )
        if missing and not allow_missing:
            raise ValueError(
                f"'{pretrained_model_name_or_path}' lacks {len(missing)} tensors, among them {missing[:5]}. The "
                "checkpoint is incomplete; pass `allow_missing=True` to initialise them and train on."
            )
        if model.dtype == torch.float16 and kwargs.get("dtype", kwargs.get("torch_dtype", "auto")) == "auto":
            logger.warning(
                "The checkpoint is in float16, which gives non-finite scores in this model: it is loaded in float32. "
                "Pass `dtype` to choose (bfloat16 is fine)."
            )
            del model
            kwargs.pop("torch_dtype", None)
            return cls.from_pretrained(
                pretrained_model_name_or_path,
                *model_args,
                allow_missing=allow_missing,
                ignore_mismatched_sizes=ignore_mismatched_sizes,
                output_loading_info=output_loading_info,
                **{**kwargs, "dtype": torch.float32},
            )
        # transformers no longer keeps the commit; an adapter names its base's. (`path` may be an adapter's.)
        commit = str(getattr(revision, "resolved", revision))
        is_commit = re.fullmatch("[0-9a-f]{40}", commit) and model.config.name_or_path == str(path)
        model.config._commit_hash = commit if is_commit else None
        model._fill_generation_defaults()
        model.freeze_encoders()  # loading replaces the parameters
        return (model, info) if output_loading_info else model

    def save_code(self, directory: str | os.PathLike) -> None:
        """
        Makes a saved checkpoint load where this package is not installed, with `trust_remote_code=True`: adds the
        files of its classes, and names them in `config.json`. `push_to_hub` does so too.
        """
        custom_object_save(self, directory)
        path = Path(directory) / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["auto_map"] = AUTO_MAP
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def load_adapter(
        self,
        peft_model_id: str | None = None,
        adapter_name: str | None = None,
        *,
        hotswap: bool | str = "auto",
        **kwargs,
    ):
        """
        As [`~integrations.PeftAdapterMixin.load_adapter`]; of an adapter that cannot be put on, nothing is left.

        Raises:
            ValueError: The adapter was trained on another model (both are named), is pickled or damaged, has tensors
                that are missing or have no place, or a name that PEFT cannot use.
            OSError: It is not there.
        """
        name = adapter_name or "default"
        if name in "lora_" or "." in name:
            raise ValueError(f"An adapter cannot be named {name!r}, which PEFT takes for a part of its own names.")
        where = {**kwargs, **(kwargs.get("adapter_kwargs") or {})}
        if peft_model_id is not None:
            check_base(self, peft_model_id, **where)
        is_there = name in getattr(self, "peft_config", {})
        swaps = getattr(self, "_hotswap_enabled", False) and is_there if hotswap == "auto" else hotswap
        # By name: transformers refuses remote code whose imports it cannot find.
        peft = importlib.import_module("peft")
        tensors = kwargs.get("adapter_state_dict")
        if swaps and is_there:
            tensors = peft.load_peft_weights(peft_model_id, "cpu") if tensors is None else tensors
            own = peft.get_peft_model_state_dict(self, adapter_name=name)
            changed = {key.removeprefix("base_model.model.") for key in tensors} ^ set(own)
            if changed:
                raise ValueError(
                    f"The adapter {peft_model_id} is to replace one with other tensors: {_some(changed)}."
                )
        before, active = set(self.state_dict()), self.active_adapters() if self._hf_peft_config_loaded else []
        # Its report takes what other adapters and the model itself hold for missing, where a name has "lora" in it.
        report = logging.get_logger("transformers.integrations.peft")
        level = report.level
        report.setLevel("ERROR")
        self._adapter_changes = vars(self).get("_adapter_changes", 0) + 1
        conversions = getattr(self, "_weight_conversions", None)
        try:
            found = super().load_adapter(peft_model_id, adapter_name, hotswap=hotswap, **kwargs)
            missing = {
                key for key in found.missing_keys - before if not re.search(r"\.(base_layer|original_module)\.", key)
            }
            if (missing or found.unexpected_keys) and peft_model_id is not None and tensors is None:
                # transformers does not know every name that PEFT gives, such as those of DoRA.
                tensors = {
                    key.removeprefix("base_model.model."): value
                    for key, value in peft.load_peft_weights(peft_model_id, "cpu").items()
                }
                found.unexpected_keys = set(
                    peft.set_peft_model_state_dict(self, tensors, adapter_name=name).unexpected_keys
                )
                missing = set(peft.get_peft_model_state_dict(self, adapter_name=name)) - set(tensors)
            if missing or found.unexpected_keys:
                raise ValueError(
                    f"Tensors of the adapter {peft_model_id} are missing or have no place in "
                    f"{self.name_or_path or 'this model'}: {_some({*missing, *found.unexpected_keys})}. Load the "
                    "model it was trained on, with the configuration it was saved with."
                )
            found.missing_keys = missing
            return found
        except Exception as error:
            if not is_there:
                if name in getattr(self, "peft_config", {}):
                    super().delete_adapter(name)
                self._unwrap()
                if active:
                    self.set_adapter(active)
            if "ignore_mismatched_sizes" in str(error):
                raise ValueError(
                    f"The adapter {peft_model_id} has tensors of other sizes than its configuration gives "
                    f"{self.name_or_path or 'this model'}: load the model it was trained on, with the configuration "
                    "it was saved with."
                ) from error
            if isinstance(error, (KeyError, TypeError, SafetensorError)):
                raise ValueError(f"The adapter {peft_model_id} cannot be read, it is damaged: {error!r}.") from error
            raise
        finally:
            report.setLevel(level)
            # By these the model is saved, once it has no adapters: an adapter's would rename all of its tensors.
            self._weight_conversions = conversions

    def delete_adapter(self, adapter_names: list[str] | str) -> None:
        """As [`~integrations.PeftAdapterMixin.delete_adapter`]; after the last one the model is as it was."""
        super().delete_adapter(adapter_names)
        self._adapter_changes = vars(self).get("_adapter_changes", 0) + 1
        self._unwrap()

    def _unwrap(self) -> None:
        """Takes PEFT's layers out, once there are no adapters."""
        if getattr(self, "peft_config", {}):
            return
        self._hf_peft_config_loaded = False
        for parent in list(self.modules()):
            for name, module in list(parent.named_children()):
                setattr(parent, name, unwrapped(module))

    def set_adapter(self, adapter_name: list[str] | str) -> None:
        """As [`~integrations.PeftAdapterMixin.set_adapter`]; adapters may differ in the modules they train whole."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        if not self._hf_peft_config_loaded or set(names) - set(self.peft_config):
            super().set_adapter(adapter_name)  # which says what is wrong
        importlib.import_module("peft.functional").set_adapter(self, adapter_name)

    def enable_adapters(self) -> None:
        """As [`~integrations.PeftAdapterMixin.enable_adapters`], which forgets the modules that were trained whole."""
        super().enable_adapters()
        for module in self.modules():
            if hasattr(module, "modules_to_save") and hasattr(module, "enable_adapters"):
                module.enable_adapters(enabled=True)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """As [`PreTrainedModel.save_pretrained`]; adapters that are loaded are saved alone, with their base's name."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if self._hf_peft_config_loaded:
            write_base(save_directory, describe_base(self))

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        if (Path(working_dir) / "config.json").is_file():  # not where adapters alone are saved
            self.save_code(working_dir)
        if self._hf_peft_config_loaded:
            write_base(working_dir, describe_base(self))
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding):
        self.model.embed_tokens = value

    def get_audio_features(
        self, input_features: torch.FloatTensor, input_features_mask: torch.Tensor | None = None
    ) -> torch.FloatTensor:
        """
        Runs the speech encoder.

        Args:
            input_features (`torch.FloatTensor` of shape `(clips, frames, 560)`): The feature extractor's output.
            input_features_mask (`torch.Tensor` of shape `(clips, frames)`, *optional*): 1 for frames, 0 for padding.

        Returns:
            `torch.FloatTensor` of shape `(clips, frames, audio_hidden_size)`.

        Raises:
            ValueError: No encoder is attached, or a clip is longer than its table of positions.
        """
        if self.audio_tower is None:
            raise ValueError(
                "This checkpoint has no speech encoder. Attach one: `minimind-o convert CHECKPOINT DIR "
                "--audio-encoder SENSEVOICE`, or pass its outputs as `audio_hidden_states`."
            )
        config = self.config.audio_config
        if not input_features.is_floating_point():
            raise ValueError(
                f"`input_features` must be floats, as the feature extractor makes them, got {input_features.dtype}."
            )
        if input_features.dim() != 3 or input_features.shape[-1] != config.input_size:
            raise ValueError(
                f"`input_features` must have the shape (clips, frames, {config.input_size}), got "
                f"{tuple(input_features.shape)}."
            )
        limit = config.max_position_embeddings - 1
        if input_features.shape[1] > limit:
            raise ValueError(
                f"A clip of {input_features.shape[1]} frames is longer than the encoder's {limit}: cut it."
            )
        mask = self._frame_mask(input_features, input_features_mask)
        with _grad_where_trained(self.audio_tower):
            return self.audio_tower(input_features, input_features_mask=mask.long()).last_hidden_state

    @staticmethod
    def _frame_mask(clips: torch.Tensor, input_features_mask: torch.Tensor | None) -> torch.BoolTensor:
        if input_features_mask is None:
            return torch.ones(clips.shape[:2], dtype=torch.bool, device=clips.device)
        if input_features_mask.shape != clips.shape[:2]:
            raise ValueError(
                f"`input_features_mask` must have the shape {tuple(clips.shape[:2])}, got "
                f"{tuple(input_features_mask.shape)}."
            )
        return input_features_mask.to(clips.device).bool()

    def get_image_features(self, pixel_values: torch.FloatTensor) -> torch.FloatTensor:
        """
        Runs the vision encoder.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(pictures, 3, height, width)`): The image processor's output.

        Returns:
            `torch.FloatTensor` of shape `(pictures, image_token_len, image_hidden_size)`.

        Raises:
            ValueError: No encoder is attached.
        """
        if self.vision_tower is None:
            raise ValueError(
                "This checkpoint has no vision encoder. Attach one: `minimind-o convert CHECKPOINT DIR "
                "--vision-encoder SIGLIP2`, or pass its outputs as `image_hidden_states`."
            )
        config = self.config.vision_config
        shape = (config.num_channels, config.image_size, config.image_size)
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"`pixel_values` must be floats, as the image processor makes them, got {pixel_values.dtype}."
            )
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != shape:
            raise ValueError(
                f"`pixel_values` must have the shape (pictures, {', '.join(map(str, shape))}), got "
                f"{tuple(pixel_values.shape)}."
            )
        with _grad_where_trained(self.vision_tower):
            return self.vision_tower(pixel_values.to(self.vision_tower.dtype)).last_hidden_state

    def _merge_features(
        self,
        inputs_embeds: torch.FloatTensor,
        is_placeholder: torch.BoolTensor,
        features: torch.FloatTensor,
        lengths: torch.LongTensor,
        name: str,
    ) -> torch.FloatTensor:
        """
        Puts projected features in the place of their placeholders, in reading order.

        Args:
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`).
            is_placeholder (`torch.BoolTensor` of shape `(batch_size, sequence_length)`).
            features (`torch.FloatTensor` of shape `(num_features, hidden_size)`): All clips', without padding.
            lengths (`torch.LongTensor` of shape `(clips,)`): Features of each clip.
            name (`str`): What a clip is called.
        """
        per_row = is_placeholder.sum(dim=1)
        torch_compilable_check(
            per_row.sum() == features.shape[0],
            lambda: (
                f"The text has {int(per_row.sum())} {name} placeholders, but {len(lengths)} {name} inputs with "
                f"{features.shape[0]} features were passed. Each placeholder takes one feature."
            ),
        )
        ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        torch_compilable_check(
            torch.isin(per_row.cumsum(0), ends.to(per_row.device)).all(),
            lambda: (
                f"The {name} placeholders of each row, {per_row.tolist()}, do not line up with the inputs' lengths, "
                f"{lengths.tolist()}: a row must hold whole inputs. Check their order."
            ),
        )
        features = features.to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(is_placeholder.unsqueeze(-1), features)

    def _placeholders(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.FloatTensor, token_id: int
    ) -> torch.BoolTensor:
        if input_ids is not None:
            return input_ids == token_id
        placeholder = self.get_input_embeddings()(torch.tensor(token_id, device=inputs_embeds.device))
        return (inputs_embeds == placeholder).all(-1)

    def _check_codes(
        self,
        name: str,
        codes: torch.Tensor,
        shape: tuple[int | None, ...],
        ignored: int = 0,
        check_values: bool = True,
    ):
        """Refuses codes of another type or shape, or outside `[0, audio_vocab_size)` and not `ignored`."""
        _check_integers(name, codes, shape)
        if check_values and codes.numel():
            size = self.config.audio_vocab_size
            torch_compilable_check(
                ((codes >= 0) & (codes < size) | (codes == ignored)).all(),
                lambda: (
                    f"`{name}` must hold codes from 0 to {size - 1}, got values from {int(codes.min())} to "
                    f"{int(codes.max())}."
                ),
            )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        audio_codes: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        audio_hidden_states: torch.FloatTensor | None = None,
        image_hidden_states: torch.FloatTensor | None = None,
        speaker_embeddings: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        audio_labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        run_talker: bool = True,
        skip_logits: bool | None = None,
        return_predictions: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_audio_items_in_batch: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MiniMindOOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Text tokens; this or `inputs_embeds`.
            audio_codes (`torch.LongTensor` of shape `(batch_size, num_codebooks, sequence_length)`, *optional*):
                The Talker's codes at the same positions, delayed (see [`apply_delay_pattern`]); pad by default.
            attention_mask (`torch.Tensor` of shape `(batch_size, past_length + sequence_length)`, *optional*):
                1 for positions to attend to, 0 for batch padding. Never made from `input_ids != pad`: pad also stands
                under speech that outlasts its text.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Positions of the rotary embeddings. Where they start again within a row, and there is neither a mask
                nor a cache, the row is packed: its sequences do not see each other (flash attention: in a batch of one
                row only).
            past_key_values (`Cache`, *optional*):
                Keys and values of the Thinker's layers, then of the Talker's. Any transformers Cache made for this
                config. With a [`MiniMindOCache`], `audio_codes` are those of every position that the Talker has not
                read.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Embeddings in place of `input_ids`.
            input_features (`torch.FloatTensor` of shape `(clips, frames, 560)`, *optional*):
                Speech features of all clips of the batch in reading order, right padded.
            input_features_mask (`torch.Tensor` of shape `(clips, frames)`, *optional*):
                1 for frames, 0 for padding; also the mask of `audio_hidden_states`.
            pixel_values (`torch.FloatTensor` of shape `(pictures, 3, height, width)`, *optional*):
                All pictures of the batch in reading order.
            audio_hidden_states (`torch.FloatTensor` of shape `(clips, frames, audio_hidden_size)`, *optional*):
                The speech encoder's outputs, in place of `input_features`.
            image_hidden_states (`torch.FloatTensor` of shape `(pictures, image_token_len, image_hidden_size)`,
            *optional*):
                The vision encoder's outputs, in place of `pixel_values`.
            speaker_embeddings (`torch.FloatTensor` of shape `(batch_size, spk_emb_size)` or `(batch_size,
            sequence_length, spk_emb_size)`, *optional*):
                What stands where the first codebook's code is `config.audio_spk_token`: a row's voice, or one at each
                position, for packed rows. Zeros are no voice.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Text labels aligned with `input_ids` (shifted inside), -100 where there is none.
            audio_labels (`torch.LongTensor` of shape `(batch_size, num_codebooks, sequence_length)`, *optional*):
                Code labels aligned with `audio_codes`, likewise.
            use_cache (`bool`, *optional*):
                Whether to return `past_key_values`; with labels, not by default.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0):
                Scores of the last positions only (0: all), or of the positions of a 1-D tensor.
            run_talker (`bool`, defaults to `True`):
                Whether to run the Talker; without it there are no `audio_logits`.
            skip_logits (`bool`, *optional*):
                Whether the heads run at labelled positions only, which gives the same losses for far less time and
                memory, and no `logits` and `audio_logits`. The default in training mode where there are labels.
            return_predictions (`bool`, defaults to `False`):
                Whether to return `predictions` and `audio_predictions`, for accuracies.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Divisor of the text loss in place of this batch's number of labelled positions: the number over all
                batches of one optimiser step.
            num_audio_items_in_batch (`torch.Tensor` of shape `(num_codebooks,)`, *optional*):
                Divisors of the codebooks' losses, likewise.

        Raises:
            ValueError: Inputs whose shapes, types, values or placeholder counts do not fit each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        if input_ids is not None:
            _check_integers("input_ids", input_ids, (None, None))
            inputs_embeds = self.get_input_embeddings()(input_ids)
        batch_size, length = inputs_embeds.shape[:2]
        # A decoding step is one position after a filled cache: its inputs are the model's own, and checks would make
        # the host wait.
        is_decoding = length == 1 and past_key_values is not None

        inputs_embeds = self._embed_speech(
            input_ids, inputs_embeds, input_features, input_features_mask, audio_hidden_states
        )
        inputs_embeds = self._embed_pictures(input_ids, inputs_embeds, pixel_values, image_hidden_states)

        if use_cache is None:
            # Labels end a sequence: a cache of it would only take memory, and hide that a row is packed.
            use_cache = self.config.use_cache and labels is None and audio_labels is None
            use_cache = use_cache and not (self.training and self.model.gradient_checkpointing)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(length, device=inputs_embeds.device) + past_length).unsqueeze(0)

        is_moe_training = self.config.use_moe and self.training
        kwargs.setdefault("output_router_logits", is_moe_training)
        thinker = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        if skip_logits is None:
            skip_logits = self.training and (labels is not None or audio_labels is not None)
        keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if (labels is not None or audio_labels is not None) and not keeps_all:
            raise ValueError(f"Labels need every position's scores, got `logits_to_keep={logits_to_keep}`.")
        logits = None
        if not skip_logits:
            logits = self.lm_head(slice_logits_to_keep(thinker.last_hidden_state, logits_to_keep))

        talker, audio_logits = None, None
        bridge, talker_positions = thinker.bridge_hidden_state, position_ids
        if isinstance(past_key_values, MiniMindOCache):
            bridge = past_key_values.unread(bridge)
            if run_talker and bridge.shape[1] != length:
                # The Talker reads positions before these, too.
                talker_positions = position_ids[:, -1:] + torch.arange(1 - bridge.shape[1], 1, device=bridge.device)
        if run_talker:
            if audio_codes is None:
                shape = (batch_size, self.config.num_codebooks, bridge.shape[1])
                audio_codes = torch.full(shape, self.config.audio_pad_token, device=inputs_embeds.device)
            self._check_codes(
                "audio_codes",
                audio_codes,
                (batch_size, self.config.num_codebooks, bridge.shape[1]),
                check_values=not is_decoding,
            )
            shapes = [(batch_size, self.config.spk_emb_size), (batch_size, length, self.config.spk_emb_size)]
            if speaker_embeddings is not None and tuple(speaker_embeddings.shape) not in shapes:
                raise ValueError(
                    f"`speaker_embeddings` must have the shape {shapes[0]} or {shapes[1]}, got "
                    f"{tuple(speaker_embeddings.shape)}."
                )
            talker = self.talker(
                bridge_hidden_state=bridge,
                audio_codes=audio_codes,
                speaker_embeddings=speaker_embeddings,
                attention_mask=attention_mask,
                position_ids=talker_positions,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
            if isinstance(past_key_values, MiniMindOCache):
                past_key_values.add_codes(audio_codes, speaker_embeddings)
            if not skip_logits:
                audio_logits = self.talker.lm_head(slice_logits_to_keep(talker.last_hidden_state, logits_to_keep))
        elif audio_labels is not None:
            raise ValueError("`audio_labels` need the Talker: pass `run_talker=True`.")

        text_loss = audio_loss = codebook_losses = aux_loss = loss = predictions = audio_predictions = None
        if labels is not None:
            _check_integers("labels", labels, (batch_size, length))
            size = self.config.vocab_size
            torch_compilable_check(
                ((labels >= 0) & (labels < size) | (labels == -100)).all(),
                lambda: (
                    f"`labels` must hold ids from 0 to {size - 1} or -100, got values from {int(labels.min())} to "
                    f"{int(labels.max())}."
                ),
            )
            if skip_logits:
                hidden_states, targets = _at_labels(thinker.last_hidden_state, labels)
                scores = self.lm_head(hidden_states)
            else:
                scores, targets = logits[:, :-1], labels[:, 1:].to(logits.device)
            text_loss = _text_loss(scores, targets, num_items_in_batch)
            if return_predictions:
                predictions = _predictions(scores, labels, skip_logits)
        if audio_labels is not None:
            self._check_codes(
                "audio_labels", audio_labels, (batch_size, self.config.num_codebooks, length), ignored=-100
            )
            if skip_logits:
                hidden_states, targets = _at_labels(talker.last_hidden_state, audio_labels)
                scores = self.talker.lm_head(hidden_states)
            else:
                scores, targets = audio_logits[:, :, :-1], audio_labels[:, :, 1:].to(audio_logits.device)
            codebook_losses = _codebook_losses(
                scores,
                targets,
                num_audio_items_in_batch,
                self.config.audio_stop_token,
                float(self.config.audio_stop_weight),
            )
            audio_loss = codebook_losses.mean()
            if return_predictions:
                audio_predictions = _predictions(scores, audio_labels, skip_logits)
        if is_moe_training:
            aux_loss = self.config.router_aux_loss_coef * load_balancing_loss(
                thinker.router_logits, self.config.num_experts_per_tok
            )
            if talker is not None:
                aux_loss = aux_loss + self.config.talker_router_aux_loss_coef * load_balancing_loss(
                    talker.router_logits, self.config.talker_num_experts_per_tok
                ).to(aux_loss.device)
        if text_loss is not None or audio_loss is not None:
            parts = [part for part in (text_loss, audio_loss, aux_loss) if part is not None]
            loss = sum(part.to(parts[0].device) for part in parts)

        return MiniMindOOutputWithPast(
            loss=loss,
            text_loss=text_loss,
            audio_loss=audio_loss,
            codebook_losses=codebook_losses,
            aux_loss=aux_loss,
            logits=logits,
            audio_logits=audio_logits,
            predictions=predictions,
            audio_predictions=audio_predictions,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=thinker.hidden_states,
            attentions=thinker.attentions,
            talker_hidden_states=talker.hidden_states if talker is not None else None,
            talker_attentions=talker.attentions if talker is not None else None,
        )

    def _embed_speech(
        self, input_ids, inputs_embeds, input_features, input_features_mask, audio_hidden_states
    ) -> torch.FloatTensor:
        if input_features is not None and audio_hidden_states is not None:
            raise ValueError("Pass `input_features` or `audio_hidden_states`, not both.")
        if input_features is not None:
            audio_hidden_states = self.get_audio_features(input_features, input_features_mask)
        if audio_hidden_states is None:
            return inputs_embeds
        if audio_hidden_states.dim() != 3 or audio_hidden_states.shape[-1] != self.config.audio_hidden_size:
            raise ValueError(
                f"`audio_hidden_states` must have the shape (clips, frames, {self.config.audio_hidden_size}), got "
                f"{tuple(audio_hidden_states.shape)}."
            )
        mask = self._frame_mask(audio_hidden_states, input_features_mask)
        lengths = mask.sum(dim=1)
        torch_compilable_check(
            (lengths > 0).all(), lambda: f"Every speech clip needs a frame, got {lengths.tolist()} frames."
        )
        is_placeholder = self._placeholders(input_ids, inputs_embeds, self.config.audio_token_id)
        features = self.audio_proj(audio_hidden_states[mask])
        return self._merge_features(inputs_embeds, is_placeholder, features, lengths, "speech")

    def _embed_pictures(self, input_ids, inputs_embeds, pixel_values, image_hidden_states) -> torch.FloatTensor:
        if pixel_values is not None and image_hidden_states is not None:
            raise ValueError("Pass `pixel_values` or `image_hidden_states`, not both.")
        if pixel_values is not None:
            image_hidden_states = self.get_image_features(pixel_values)
        if image_hidden_states is None:
            return inputs_embeds
        shape = (self.config.image_token_len, self.config.image_hidden_size)
        if image_hidden_states.dim() != 3 or tuple(image_hidden_states.shape[1:]) != shape:
            raise ValueError(
                f"`image_hidden_states` must have the shape (pictures, {shape[0]}, {shape[1]}), got "
                f"{tuple(image_hidden_states.shape)}."
            )
        lengths = torch.full((len(image_hidden_states),), shape[0], device=image_hidden_states.device)
        is_placeholder = self._placeholders(input_ids, inputs_embeds, self.config.image_token_id)
        features = self.vision_proj(image_hidden_states.flatten(0, 1))
        return self._merge_features(inputs_embeds, is_placeholder, features, lengths, "picture")


__all__ = [
    "MiniMindOForConditionalGeneration",
    "MiniMindOOutputWithPast",
    "MiniMindOPreTrainedModel",
    "MiniMindOStackOutput",
    "MiniMindOTalkerModel",
    "MiniMindOThinkerModel",
]
