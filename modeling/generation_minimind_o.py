"""Generation: one text token and `num_codebooks` delayed speech codes a step, for whole batches.

Everything that touches transformers' private generation helpers is in this file.
"""

from collections.abc import AsyncIterator, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .cache_minimind_o import MiniMindOCache
from .delay_pattern_minimind_o import place_voice, revert_delay_pattern

# The released model's settings. They stand in for transformers' own fallbacks (greedy, top-k 50, 20 tokens) wherever
# neither the call nor generation_config.json says otherwise.
_GENERATION_DEFAULTS = {
    "do_sample": True,
    "temperature": 0.75,
    "top_p": 0.9,
    "top_k": 0,
    "repetition_penalty": 1.0,
    "max_new_tokens": 512,
    "return_dict_in_generate": True,
    "audio_temperature": 0.2,
    "audio_top_k": 50,
    "audio_repetition_penalty": 1.05,
    "audio_repetition_window": 3,
    "post_text_token_id": 234,
    "generation_mode": None,
}

# Inputs stacked over the batch's clips or pictures instead of its rows.
_CLIP_INPUTS = ("input_features", "input_features_mask", "audio_hidden_states")
_PICTURE_INPUTS = ("pixel_values", "image_hidden_states")


@dataclass
class MiniMindOGenerateOutput(GenerateDecoderOnlyOutput):
    """
    Output of [`MiniMindOForConditionalGeneration.generate`].

    Args:
        sequences (`torch.LongTensor` of shape `(batch_size, prompt_length + num_text_tokens)`):
            The prompts and the answers' text, each up to its end token, then padding.
        scores, logits (`tuple(torch.FloatTensor)`, *optional*, returned with `output_scores` and `output_logits`):
            Per step, the text scores after and before the logits processors, each `(batch_size, vocab_size)`.
        attentions, hidden_states (`tuple`, *optional*):
            Per step, the Thinker's.
        past_key_values (`Cache`, *optional*):
            Keys and values of both stacks, at most to the end of `sequences`; `None` for a cache that cannot be cut
            there.
        prompt_length (`int`):
            Length of the (padded) prompts in `sequences`.
        is_complete (`torch.BoolTensor` of shape `(batch_size,)`):
            Whether a row came to its own end, in text and speech, and not to `max_new_tokens` or a stopping criterion.
        audio_codes (`torch.LongTensor` of shape `(batch_size, num_codebooks, num_frames)`, *optional*):
            The speech as codec codes, not delayed, 0 where `audio_codes_mask` is. `None` for text alone.
        audio_codes_mask (`torch.BoolTensor` of shape `(batch_size, num_frames)`, *optional*):
            True for each row's frames, which come first.
        audio_scores, audio_logits (`tuple(torch.FloatTensor)`, *optional*, with `output_scores` and `output_logits`):
            Per step, the code scores after and before the repetition penalty, each `(batch_size, num_codebooks,
            audio_vocab_size)`.
    """

    prompt_length: int | None = None
    is_complete: torch.BoolTensor | None = None
    audio_codes: torch.LongTensor | None = None
    audio_codes_mask: torch.BoolTensor | None = None
    audio_scores: tuple[torch.FloatTensor, ...] | None = None
    audio_logits: tuple[torch.FloatTensor, ...] | None = None


class MiniMindOStreamer(BaseStreamer):
    """
    Receives an answer while it is generated. Subclass it and pass it as `streamer=`; a plain text streamer of
    transformers works too, and gets the text alone.
    """

    def put(self, value: torch.LongTensor):
        """Text tokens: first the prompts `(batch_size, prompt_length)`, then `(batch_size,)` a step, pad in ended
        rows."""
        raise NotImplementedError

    def put_audio(self, codes: torch.LongTensor, mask: torch.BoolTensor):
        """One frame of codes `(batch_size, num_codebooks)`; only the rows where `mask` `(batch_size,)` is True have
        one. A row that has had some and has none now has said all."""
        raise NotImplementedError

    def put_end(self, rows: torch.BoolTensor):
        """The rows, True in `(batch_size,)`, whose answers are complete now, while others go on. Nothing need be
        done."""

    def end(self):
        """The answers are complete."""
        raise NotImplementedError


def sample_from_uniform(scores: torch.FloatTensor, uniform: torch.FloatTensor) -> torch.LongTensor:
    """
    Draws from the softmax of `scores` by inverting its cumulative distribution, so that one uniform number decides a
    draw.

    Args:
        scores (`torch.FloatTensor` of shape `(..., size)`): Scores in float32; -inf is never drawn.
        uniform (`torch.FloatTensor` of shape `(...)`): Numbers in [0, 1).

    Returns:
        `torch.LongTensor` of shape `(...)`.
    """
    cumulative = scores.softmax(dim=-1).cumsum(dim=-1)
    total = cumulative[..., -1:]
    # Strictly below the total, which rounding could otherwise reach: the entry drawn then has a probability above 0.
    threshold = torch.minimum(uniform.unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
    return (cumulative <= threshold).sum(dim=-1)


def penalize_repetition(
    scores: torch.FloatTensor, recent_codes: torch.LongTensor, penalty: float
) -> torch.FloatTensor:
    """
    Makes each codebook's recent codes less likely, once for each time they occur among them.

    Args:
        scores (`torch.FloatTensor` of shape `(batch_size, num_codebooks, audio_vocab_size)`): Code scores.
        recent_codes (`torch.LongTensor` of shape `(batch_size, num_codebooks, window)`): The codes of the last steps.
        penalty (`float`): What positive scores are divided by and negative ones multiplied by.
    """
    if penalty == 1.0 or recent_codes.shape[-1] == 0:
        return scores
    count = (recent_codes.unsqueeze(-1) == recent_codes.unsqueeze(-2)).sum(dim=-1)
    factor = penalty**count
    recent = scores.gather(-1, recent_codes)
    # Equal codes have equal counts, so it does not matter which of them is written last.
    return scores.scatter(-1, recent_codes, torch.where(recent > 0, recent / factor, recent * factor))


class MiniMindOGenerationMixin(GenerationMixin):
    """The generation loop of MiniMind-O."""

    _supported_generation_modes = [GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE]

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        reference_codes: torch.LongTensor | None = None,
        speaker_embeddings: torch.FloatTensor | None = None,
        audio_codes: torch.LongTensor | None = None,
        seeds: list[int] | torch.LongTensor | None = None,
        **kwargs,
    ) -> MiniMindOGenerateOutput | torch.LongTensor:
        r"""
        Answers a batch of prompts with text and speech. Takes what [`GenerationMixin.generate`] takes, for greedy
        decoding and sampling, and the following.

        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, prompt_length)`, *optional*):
                Prompts, left padded (also as `input_ids`).
            generation_config (`GenerationConfig`, *optional*):
                Settings of this call; each can also be passed by name.
            reference_codes (`torch.LongTensor` of shape `(batch_size, num_codebooks, num_frames)`, *optional*):
                Codec codes of a recording of the voice to speak with, right aligned, padded on the left with
                `config.audio_pad_token`. A row of pad has none. Its last part is used where the row's prompt is
                shorter.
            speaker_embeddings (`torch.FloatTensor` of shape `(batch_size, spk_emb_size)`, *optional*):
                The voices' embeddings. A row of zeros has none.
            audio_codes (`torch.LongTensor` of shape `(batch_size, num_codebooks, prompt_length)`, *optional*):
                Codes at the prompts' positions, for callers that lay them out themselves; not with `reference_codes`.
            seeds (`list[int]`, *optional*):
                One seed for each returned row: its answer then does not depend on the rest of the batch. Without,
                draws come from PyTorch's global generator.
            temperature, top_p, top_k, repetition_penalty, ... :
                Sampling of the text, by transformers' logits processors.
            audio_temperature (`float`, defaults to 0.2), audio_top_k (`int`, defaults to 50; 0 for all):
                Sampling of the codes.
            audio_repetition_penalty (`float`, defaults to 1.05), audio_repetition_window (`int`, defaults to 3):
                Each of a codebook's codes of the last steps is penalised, once for every time it occurs.
            post_text_token_id (`int`, defaults to 234, a newline):
                The token fed once after the text's end, while speech goes on; then pad.
            generation_mode (`str`, *optional*):
                `"text"` for text alone (the Talker does not run), `"audio"` or `None` for text and speech.
            suppress_tokens (`list[int]`, defaults to the placeholders):
                Tokens that are never written. A placeholder in an answer would ask for a clip that is not there.
            max_new_tokens (`int`, defaults to 512):
                Steps, with and without text; 12.5 of them are a second of speech.
            stopping_criteria (`StoppingCriteriaList`, *optional*):
                End tokens and stop strings end a row's text, and its speech goes on to its own end; any other
                criterion ends the row.
            streamer (`BaseStreamer`, *optional*):
                A [`MiniMindOStreamer`] gets text tokens and frames as they appear.

        Returns:
            [`MiniMindOGenerateOutput`], or `sequences` alone with `return_dict_in_generate=False`.

        Raises:
            ValueError: Inputs that do not fit each other, modes that this model has not (beam search, assisted
            generation),
                or scores that are not finite (the weights are damaged or in float16).
        """
        input_ids = kwargs.pop("input_ids", None)
        if inputs is not None and input_ids is not None:
            raise ValueError("Pass the prompts as `inputs` or as `input_ids`, not both.")
        inputs = input_ids if inputs is None else inputs
        inputs_embeds = kwargs.get("inputs_embeds")
        prompt = inputs if inputs_embeds is None else inputs_embeds
        if prompt is None:
            raise ValueError("Pass prompts as `input_ids` (see the processor's `apply_chat_template`).")
        if inputs_embeds is None and (prompt.dim() != 2 or prompt.is_floating_point() or prompt.numel() == 0):
            raise ValueError(
                "`input_ids` must be a non-empty integer tensor of shape (batch_size, prompt_length), got "
                f"{tuple(prompt.shape)} of {prompt.dtype}."
            )
        if inputs is not None and inputs.numel():
            lowest, highest = int(inputs.min()), int(inputs.max())
            if lowest < 0 or highest >= self.config.vocab_size:
                raise ValueError(
                    f"`input_ids` must lie in the vocabulary, from 0 to {self.config.vocab_size - 1}, got values from "
                    f"{lowest} to {highest}: is this the tokenizer of another model?"
                )
        self._check_no_bare_placeholder(inputs, kwargs)
        for name in _CLIP_INPUTS + _PICTURE_INPUTS:
            if kwargs.get(name) is not None and not torch.isfinite(kwargs[name]).all():
                raise ValueError(f"`{name}` must be finite, got NaN or infinity: check the files it was made from.")
        cache = kwargs.get("past_key_values")
        attention_mask = self._checked_attention_mask(prompt, kwargs.pop("attention_mask", None), cache)
        num_cached = self._checked_cache(cache, prompt.shape[1], attention_mask.shape[1], kwargs, generation_config)
        voice = self._checked_voice(prompt.shape[0], reference_codes, speaker_embeddings)
        if audio_codes is not None:
            if reference_codes is not None:
                raise ValueError("Pass `reference_codes`, or lay the codes out yourself in `audio_codes`, not both.")
            self._check_codes(
                "audio_codes", audio_codes, (prompt.shape[0], self.config.num_codebooks, prompt.shape[1])
            )
        elif attention_mask.shape[1] == prompt.shape[1]:
            end = torch.full((prompt.shape[0],), prompt.shape[1], device=prompt.device)
            # A voice goes where codes are still to be read: what a cache holds has been.
            audio_codes = place_voice(
                attention_mask.sum(dim=1).clamp(max=prompt.shape[1] - num_cached),
                end,
                prompt.shape[1],
                self.config.num_codebooks,
                self.config.audio_pad_token,
                self.config.audio_spk_token,
                **voice,
            )
        elif reference_codes is not None or speaker_embeddings is not None:
            raise ValueError(
                "A voice needs the whole prompt: pass every token's id along with `past_key_values`, not the new "
                "ones only."
            )
        if voice["speaker_embeddings"] is not None:
            kwargs["speaker_embeddings"] = voice["speaker_embeddings"]
        if isinstance(cache, MiniMindOCache):
            cache.keep_codes(audio_codes, voice["speaker_embeddings"])
        return super().generate(
            inputs,
            generation_config=generation_config,
            attention_mask=attention_mask,
            audio_codes=audio_codes,
            seeds=seeds,
            **kwargs,
        )

    def _check_no_bare_placeholder(self, input_ids: torch.LongTensor | None, kwargs: dict):
        """Refuses prompts that announce clips or pictures where none are passed (`forward` compares the counts)."""
        cache = kwargs.get("past_key_values")
        if input_ids is None or (cache is not None and cache.get_seq_length() > 0):
            return
        for names, token_id, kind in (
            (_CLIP_INPUTS, self.config.audio_token_id, "speech"),
            (_PICTURE_INPUTS, self.config.image_token_id, "picture"),
        ):
            count = int((input_ids == token_id).sum())
            if count and all(kwargs.get(name) is None for name in names):
                raise ValueError(
                    f"The prompts have {count} {kind} placeholders (id {token_id}), but 0 {kind} inputs were passed: "
                    f"pass `{names[0]}`."
                )

    def _checked_attention_mask(
        self, prompt: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None
    ) -> torch.LongTensor:
        """The mask of the batch padding, which must be on the left: an answer follows its prompt directly."""
        if attention_mask is None:
            pad = self.generation_config.pad_token_id
            if prompt.dim() == 3 or pad is None:
                return torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device)
            # Only leading pads are padding: inside a prompt, pad is a token like others.
            return ((prompt != pad).long().cumsum(dim=-1) > 0).long()
        # With a cache, the prompt may be its new tokens alone, and the mask covers the cached ones too.
        fits = attention_mask.dim() == 2 and attention_mask.shape[0] == prompt.shape[0]
        if not fits or (cache is None and attention_mask.shape[1] != prompt.shape[1]):
            raise ValueError(
                f"`attention_mask` must have the prompts' shape {tuple(prompt.shape[:2])}, got "
                f"{tuple(attention_mask.shape)}."
            )
        mask = attention_mask.long()
        if (mask.diff(dim=1) < 0).any() or (mask[:, -1] == 0).any():
            raise ValueError(
                "`attention_mask` must hide padding on the left only, an answer follows its prompt directly: use "
                '`padding_side="left"` for generation.'
            )
        return mask

    def _checked_cache(
        self, cache: Cache | None, prompt_length: int, mask_length: int, kwargs: dict, generation_config
    ) -> int:
        """The number of positions a cache holds, which the prompt must go on from, with both stacks' keys."""
        num_cached = 0 if cache is None else int(cache.get_seq_length())
        if num_cached == 0:
            return 0
        if mask_length == prompt_length and prompt_length <= num_cached:
            raise ValueError(
                f"The prompt has {prompt_length} positions and the cache {num_cached}: pass the whole prompt's ids, "
                "or the new ones along with an attention mask over both."
            )
        if isinstance(cache, MiniMindOCache):
            if mask_length != prompt_length:
                raise ValueError("A `MiniMindOCache` needs the whole prompt's ids, not the new ones only.")
            return 0  # the Talker reads anew what has changed
        mode = kwargs.get("generation_mode") or getattr(generation_config, "generation_mode", None)
        mode = mode or self.generation_config.generation_mode
        num_spoken = int(cache.get_seq_length(self.config.num_hidden_layers))
        if mode != "text" and num_spoken != num_cached:
            raise ValueError(
                f"The cache holds {num_cached} positions of the Thinker and {num_spoken} of the Talker, as after "
                'generation_mode="text": go on in that mode, or without the cache.'
            )
        return num_cached

    def _checked_voice(
        self,
        batch_size: int,
        reference_codes: torch.LongTensor | None,
        speaker_embeddings: torch.FloatTensor | None,
    ) -> dict[str, torch.Tensor | None]:
        config = self.config
        if reference_codes is not None:
            shape = (batch_size, config.num_codebooks, None)
            self._check_codes("reference_codes", reference_codes, shape, check_values=False)
            is_pad = reference_codes == config.audio_pad_token
            is_code = (reference_codes >= 0) & (reference_codes < config.audio_codebook_size)
            started = (~is_pad.all(dim=1)).long().cumsum(dim=-1) > 0
            if not torch.where(started.unsqueeze(1), is_code, is_pad).all():
                raise ValueError(
                    f"`reference_codes` must hold codes from 0 to {config.audio_codebook_size - 1}, padded on the "
                    f"left with {config.audio_pad_token}; got values from {int(reference_codes.min())} to "
                    f"{int(reference_codes.max())}."
                )
        if speaker_embeddings is not None:
            shape = (batch_size, config.spk_emb_size)
            if tuple(speaker_embeddings.shape) != shape or not speaker_embeddings.is_floating_point():
                raise ValueError(
                    f"`speaker_embeddings` must be a float tensor of shape {shape}, got "
                    f"{tuple(speaker_embeddings.shape)} of {speaker_embeddings.dtype}."
                )
            if not torch.isfinite(speaker_embeddings).all():
                raise ValueError("`speaker_embeddings` must be finite, got NaN or infinity.")
        return {"reference_codes": reference_codes, "speaker_embeddings": speaker_embeddings}

    def _fill_generation_defaults(self):
        """Gives the model's generation config the released settings where it has none."""
        # Marked as derived from config.json, it would lose the settings that transformers does not know when it is
        # loaded.
        self.generation_config._from_model_config = False
        defaults = {
            **_GENERATION_DEFAULTS,
            # An original config.json names no pad token, and transformers would then pad with the end token.
            "pad_token_id": self.config.pad_token_id,
            "suppress_tokens": [self.config.image_token_id, self.config.audio_token_id],
        }
        if self.generation_config.max_length is not None:
            defaults.pop("max_new_tokens")  # a length was chosen, in another way
        for name, value in defaults.items():
            if getattr(self.generation_config, name, None) is None:
                setattr(self.generation_config, name, value)

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict]:
        self._fill_generation_defaults()
        seeds = kwargs.pop("seeds", None)

        def is_set(name: str) -> bool:
            return kwargs.get(name) is not None or getattr(generation_config, name, None) is not None

        # `max_length` alone is a choice of the caller's: the default number of new tokens must not override it.
        drop_max_new_tokens = is_set("max_length") and not is_set("max_new_tokens")
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if drop_max_new_tokens:
            generation_config.max_new_tokens = None
        generation_config.seeds = seeds
        if generation_config.prefill_chunk_size is not None:
            raise ValueError(
                "`prefill_chunk_size` is not supported: speech codes and clips are laid out over a whole prompt."
            )
        if generation_config.generation_mode not in (None, "text", "audio"):
            raise ValueError(
                f"`generation_mode` must be 'text', 'audio' or None, got {generation_config.generation_mode!r}."
            )
        post_text = generation_config.post_text_token_id
        if not isinstance(post_text, int) or not 0 <= post_text < self.config.vocab_size:
            raise ValueError(
                f"`post_text_token_id` must lie in the vocabulary, from 0 to {self.config.vocab_size - 1}, got "
                f"{post_text!r}."
            )
        for name in ("audio_temperature", "audio_repetition_penalty"):
            value = getattr(generation_config, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"`{name}` must be above 0, got {value!r}.")
        for name in ("audio_top_k", "audio_repetition_window"):
            value = getattr(generation_config, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"`{name}` must be an integer of at least 0, got {value}.")
        return generation_config, model_kwargs

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        inputs_embeds: torch.FloatTensor | None = None,
        audio_codes: torch.LongTensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs,
    ):
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        embeds = model_inputs.get("inputs_embeds")
        tokens = embeds if embeds is not None else model_inputs["input_ids"]
        if audio_codes is not None:
            cache, length = kwargs.get("past_key_values"), tokens.shape[1]
            if isinstance(cache, MiniMindOCache):
                length += cache.get_seq_length() - cache.talker_length
            model_inputs["audio_codes"] = audio_codes[..., -length:].to(tokens.device)
        if not is_first_iteration and kwargs.get("use_cache", True):
            # The encoders' outputs went into the prompt; transformers drops the raw inputs itself.
            for name in ("audio_hidden_states", "image_hidden_states"):
                model_inputs.pop(name, None)
        return model_inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        """Repeats rows, and with each row its own clips and pictures."""
        stacked = {name: model_kwargs.pop(name, None) for name in _CLIP_INPUTS + _PICTURE_INPUTS}
        prompt_ids = input_ids
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if expand_size > 1:
            for names, token_id in (
                (_CLIP_INPUTS, self.config.audio_token_id),
                (_PICTURE_INPUTS, self.config.image_token_id),
            ):
                inputs = {name: stacked[name] for name in names if stacked[name] is not None}
                if not inputs:
                    continue
                if prompt_ids is None or prompt_ids.shape[1] == 0:
                    raise ValueError(
                        "`num_return_sequences` with clips or pictures needs `input_ids`, to tell rows apart."
                    )
                tensor = next(iter(inputs.values()))
                mask = inputs.get("input_features_mask")
                if mask is not None:
                    lengths = mask.long().sum(dim=1)
                else:
                    size = self.config.image_token_len if "pixel_values" in inputs else tensor.shape[1]
                    lengths = torch.full((len(tensor),), size)
                row_ends = (prompt_ids == token_id).sum(dim=1).cumsum(0).cpu()
                row_of_input = torch.searchsorted(row_ends, lengths.cumsum(0).cpu())
                index = torch.cat(
                    [(row_of_input == row).nonzero().flatten().repeat(expand_size) for row in range(len(prompt_ids))]
                )
                stacked.update({name: value[index.to(value.device)] for name, value in inputs.items()})
        model_kwargs.update({name: value for name, value in stacked.items() if value is not None})
        return input_ids, model_kwargs

    @contextmanager
    def _optimize_model_for_decode(self):
        """Runs experts one by one on a CPU: a step takes 32 ms so, and 96 ms with the default `grouped_mm`."""
        original = self.get_experts_implementation()
        if self.device.type != "cpu" or "grouped_mm" not in original.values():
            with super()._optimize_model_for_decode():
                yield
            return
        self.set_experts_implementation("eager")
        try:
            yield
        finally:
            self.set_experts_implementation(original)

    def _thinks(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
        """Whether each prompt ends inside an open `<think>` block of the answer it begins."""
        order = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)

        def last(token_id: int | None) -> torch.LongTensor:
            return (
                ((input_ids == token_id) * order).amax(dim=1)
                if token_id is not None
                else order.new_zeros(len(input_ids))
            )

        opened = last(self.config.think_start_id)
        return (opened > last(self.config.bos_token_id)) & (opened > last(self.config.think_end_ids[0]))

    def _uniforms(self, seeds, num_rows: int, num_steps: int, device: torch.device) -> torch.FloatTensor | None:
        """Each row's uniform numbers, drawn from its seed: `(num_rows, num_steps, 1 + num_codebooks)`."""
        if seeds is None:
            return None
        seeds = seeds.tolist() if isinstance(seeds, torch.Tensor) else seeds
        if not isinstance(seeds, Sequence) or len(seeds) != num_rows:
            found = len(seeds) if isinstance(seeds, Sequence) else repr(seeds)
            raise ValueError(f"`seeds` must hold one seed for each of the {num_rows} returned rows, got {found}.")
        size = (num_steps, 1 + self.config.num_codebooks)
        # On the CPU, so that a seed means the same on every device.
        rows = [torch.rand(size, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
        return torch.stack(rows).to(device)

    def start_decoding(self, streamer: BaseStreamer | None = None, **inputs) -> "MiniMindODecoding":
        """
        Prepares answers that the caller steps, who may so step several apart from each other with one call of the
        model for all. Nothing has run through the model yet.

        Args:
            streamer (`BaseStreamer`, *optional*): As in `generate`.
            **inputs: As in `generate`, whose checks are made here.

        Returns:
            [`MiniMindODecoding`].
        """

        def prepare(model, input_ids, **settings):
            return MiniMindODecoding(model, input_ids, streamer=streamer, **settings)

        return self.generate(**inputs, streamer=streamer, custom_generate=prepare)

    def _sample(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs,
    ) -> MiniMindOGenerateOutput | torch.LongTensor:
        decoding = MiniMindODecoding(
            self, input_ids, logits_processor, stopping_criteria, generation_config, streamer, **model_kwargs
        )
        model_forward = (
            self.get_compiled_call(generation_config.compile_config)
            if self._valid_auto_compile_criteria(decoding.model_kwargs, generation_config)
            else self.__call__
        )
        with self._optimize_model_for_decode():
            outputs = decoding.prefill()
            while self._has_unfinished_sequences(decoding.is_finished, synced_gpus, device=input_ids.device):
                if outputs is None:
                    outputs = model_forward(**decoding.next_inputs(), return_dict=True)
                decoding.advance(outputs)
                # Frees the scores of a long prompt before the next step.
                outputs = None
        return decoding.end()

    def stream(self, processor: Any, **kwargs) -> Generator:
        """
        Answers prompts and yields text and sound while they are generated.

        Args:
            processor ([`MiniMindOProcessor`]): Its tokenizer and its codec.
            **kwargs: The prompts and settings of [`~MiniMindOGenerationMixin.generate`], and `max_latency`, `pcm16`,
                `skip_special_tokens` and `cancel` of [`stream_answers`].

        Returns:
            An iterator of [`MiniMindOStreamEvent`]. Closing it, or reading no further, ends the answer.
        """
        from .streaming_minimind_o import stream_answers

        return stream_answers(self, processor, **kwargs)

    def astream(self, processor: Any, **kwargs) -> AsyncIterator:
        """As `stream`, for `async for`."""
        from .streaming_minimind_o import stream_answers_async

        return stream_answers_async(self, processor, **kwargs)


class MiniMindODecoding:
    """
    Answers while they are made: what has been written and said, and what each step adds to it. One step is one call of
    the model, whose scores `advance` turns into a text token and a code of each codebook.

    `generate` makes one of a whole batch and steps it to its end; [`~MiniMindOGenerationMixin.start_decoding`] gives
    one to a caller who does that.

    Example:

    ```python
    >>> decoding = model.start_decoding(**inputs)
    >>> outputs = decoding.prefill()
    >>> while not decoding.is_finished:
    ...     decoding.advance(outputs)
    ...     outputs = model(**decoding.next_inputs())
    >>> answers = decoding.end()
    ```
    """

    def __init__(
        self,
        model: Any,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None = None,
        **model_kwargs,
    ):
        config, device = model.config, input_ids.device
        batch_size, prompt_length = input_ids.shape
        self.model, self.generation_config, self.streamer = model, generation_config, streamer
        self.prompt_length, self.device = prompt_length, device
        self.speaks = generation_config.generation_mode != "text"
        model_kwargs["run_talker"] = self.speaks
        if not self.speaks:
            model_kwargs.pop("audio_codes", None)
        self.model_kwargs = model_kwargs
        self.max_steps = max(generation_config.max_length - prompt_length, 1)
        cache = model_kwargs.get("past_key_values")
        room = cache.get_max_length() if cache is not None and len(cache.layers) else -1
        if 0 < room < generation_config.max_length - 1:
            raise ValueError(
                f"The cache has room for {room} positions, but prompt and answer may take "
                f"{generation_config.max_length - 1}: make it larger, or lower `max_new_tokens`."
            )
        steps = self.max_steps if generation_config.do_sample else 0
        self._uniforms = model._uniforms(generation_config.seeds, batch_size, steps, device)
        self._pad = 0 if generation_config._pad_token_tensor is None else int(generation_config._pad_token_tensor)
        self._logits_processor = logits_processor
        ends_text = (EosTokenCriteria, StopStringCriteria)
        self._ends_text = [c for c in stopping_criteria if isinstance(c, ends_text)]
        self._ends_row = [c for c in stopping_criteria if not isinstance(c, (*ends_text, MaxLengthCriteria))]

        self.step, self.is_finished = 0, False
        # What is fed to the model, and what logits processors and criteria see: the text without the fill after it.
        self.input_ids = self._text_ids = input_ids
        self._thinks = (
            model._thinks(input_ids) if prompt_length else torch.zeros(batch_size, dtype=torch.bool, device=device)
        )
        self._think_end = torch.tensor(config.think_end_ids, device=device)
        # Step at which codebook 0 starts: one after the text's first token, two after the last of `</think>\n\n`.
        self._never = self.max_steps + config.num_codebooks
        self._start = torch.where(self._thinks, self._never, 1)
        self._delay = torch.arange(config.num_codebooks, device=device)
        shape = (batch_size, config.num_codebooks, self.max_steps)
        self._history = torch.full(shape, config.audio_pad_token, device=device)
        self._stopped = torch.zeros(shape[:2], dtype=torch.bool, device=device)
        rows = torch.zeros(batch_size, dtype=torch.bool, device=device)
        self._speech_ended = self._text_ended = self._finished = self._is_complete = self._feed_post_text = rows
        self._text_steps, self._row_steps = rows.long(), rows.long()
        self._no_frame_start = rows.long()

        keep = generation_config.return_dict_in_generate
        self._records: dict[str, tuple | None] = {
            name: () if keep and wanted else None
            for name, wanted in (
                ("scores", generation_config.output_scores),
                ("logits", generation_config.output_logits),
                ("audio_scores", generation_config.output_scores and self.speaks),
                ("audio_logits", generation_config.output_logits and self.speaks),
                ("attentions", generation_config.output_attentions),
                ("hidden_states", generation_config.output_hidden_states),
            )
        }

    def prefill(self) -> Any:
        """Runs the prompts through the model, and returns its outputs for the first `advance`."""
        return self.model._prefill(self.input_ids, self.generation_config, self.model_kwargs, is_first_iteration=True)

    def next_inputs(self) -> dict[str, Any]:
        """What the model is called with for the next step."""
        return self.model.prepare_inputs_for_generation(
            self.input_ids,
            next_sequence_length=1 if self.model_kwargs["use_cache"] else None,
            **self.model_kwargs,
        )

    def _record(self, **values: Any) -> None:
        for name, value in values.items():
            if self._records[name] is not None:
                self._records[name] += (value,)

    @torch.no_grad()
    def advance(self, outputs: Any) -> None:
        """
        Takes one step: chooses the text token and the codes from the scores of the last position.

        Raises:
            ValueError: Scores that are not finite.
        """
        self.model_kwargs = self.model._update_model_kwargs_for_generation(outputs, self.model_kwargs)
        if self.is_finished:  # while rows of other processes go on
            return
        uniform = self._uniform()
        text_token, scores, text_was_live, is_broken = self._choose_text(outputs, uniform)
        row_ends, frame, has_frame = self._text_ended, None, None
        if self.speaks:
            codes, audio_is_broken = self._choose_codes(outputs, uniform)
            is_broken = is_broken | audio_is_broken
            frame, has_frame = self._frame()
            # An answer that ends inside its thoughts never starts to speak.
            row_ends = self._text_ended & (self._stopped.all(dim=-1) | (self._start == self._never))
            next_codes = codes.unsqueeze(-1)
            if not self.model_kwargs["use_cache"]:
                next_codes = torch.cat([self.model_kwargs["audio_codes"], next_codes], dim=-1)
            self.model_kwargs["audio_codes"] = next_codes
        self._record(attentions=outputs.attentions, hidden_states=outputs.hidden_states)
        self._row_steps = self._row_steps + ~self._finished
        self._is_complete = self._is_complete | (row_ends & ~self._finished)
        for criterion in self._ends_row:
            row_ends = row_ends | criterion(self._text_ids, scores)
        ends_now = row_ends & ~self._finished
        self._finished = self._finished | row_ends
        self.step += 1
        all_finished = self._synchronize(is_broken, text_was_live, text_token, ends_now, frame, has_frame)
        self.is_finished = all_finished or self.step >= self.max_steps

    def _uniform(self) -> torch.FloatTensor | None:
        """This step's uniform numbers, `(batch_size, 1 + num_codebooks)`."""
        if not self.generation_config.do_sample:
            return None
        if self._uniforms is not None:
            return self._uniforms[:, self.step]
        return torch.rand(len(self.input_ids), 1 + self.model.config.num_codebooks, device=self.device)

    def _choose_text(self, outputs: Any, uniform: torch.FloatTensor | None) -> tuple[torch.Tensor, ...]:
        """The text token, pad where a row's text has ended; its scores; where it had not; whether they are broken."""
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=self.device)
        scores = self._logits_processor(self._text_ids, logits)
        token = scores.argmax(dim=-1) if uniform is None else sample_from_uniform(scores, uniform[:, 0])
        self._record(scores=scores, logits=logits)
        # A row that a criterion has ended says nothing more, though others go on.
        text_was_live = ~self._text_ended & ~self._finished
        text_token = torch.where(text_was_live, token, self._pad)
        self._text_ids = torch.cat([self._text_ids, text_token[:, None]], dim=-1)
        fed_token = torch.where(self._feed_post_text, self.generation_config.post_text_token_id, text_token)
        self.input_ids = torch.cat([self.input_ids, fed_token[:, None]], dim=-1)
        self._text_steps = self._text_steps + text_was_live
        for criterion in self._ends_text:
            self._text_ended = self._text_ended | criterion(self._text_ids, scores)
        self._feed_post_text = text_was_live & self._text_ended
        if self._text_ids.shape[1] >= len(self._think_end):
            just_thought = (self._text_ids[:, -len(self._think_end) :] == self._think_end).all(dim=-1)
            just_thought = just_thought & self._thinks & text_was_live & (self._start == self._never)
            self._start = torch.where(just_thought, self.step + 2, self._start)
        # A sum is finite where everything in it is, and costs a tenth of looking at each score.
        return text_token, scores, text_was_live, ~torch.isfinite(logits.sum())

    def _choose_codes(
        self, outputs: Any, uniform: torch.FloatTensor | None
    ) -> tuple[torch.LongTensor, torch.BoolTensor]:
        """The code of each codebook, pad before it starts; whether the scores are broken."""
        config, settings, step = self.model.config, self.generation_config, self.step
        audio_logits = outputs.audio_logits[:, :, -1].to(copy=True, dtype=torch.float32, device=self.device)
        window = self._history[:, :, max(step - settings.audio_repetition_window, 0) : step]
        audio_scores = penalize_repetition(audio_logits, window, settings.audio_repetition_penalty)
        if uniform is None:
            codes = audio_scores.argmax(dim=-1)
        else:
            top_k = min(settings.audio_top_k or config.audio_vocab_size, config.audio_vocab_size)
            top_scores, top_codes = audio_scores.topk(top_k, dim=-1)
            drawn = sample_from_uniform(top_scores / settings.audio_temperature, uniform[:, 1:])
            codes = top_codes.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
        self._record(audio_scores=audio_scores, audio_logits=audio_logits)
        started = step >= self._start[:, None] + self._delay
        codes = torch.where(started, codes, config.audio_pad_token)
        self._history[:, :, step] = codes
        self._stopped = self._stopped | (started & (codes >= config.audio_codebook_size))
        return codes, ~torch.isfinite(audio_logits.sum())

    def _frame(self) -> tuple[torch.LongTensor | None, torch.BoolTensor | None]:
        """The frame that its last codebook completes now, and which rows have one: the diagonal of the last steps."""
        num_codebooks, step = len(self._delay), self.step
        if step < num_codebooks - 1:
            return None, None
        diagonal = self._history[:, :, step - num_codebooks + 1 : step + 1]
        frame, is_frame = revert_delay_pattern(diagonal, self._no_frame_start, self.model.config.audio_codebook_size)
        in_speech = step >= self._start + num_codebooks - 1
        has_frame = in_speech & is_frame[:, 0] & ~self._speech_ended & ~self._finished
        self._speech_ended = self._speech_ended | (in_speech & ~is_frame[:, 0])
        return frame, has_frame

    def end(self) -> MiniMindOGenerateOutput | torch.LongTensor:
        """Tells the streamer, and returns the answers as far as they went."""
        if self.streamer is not None:
            self.streamer.end()
        prompt_length, device = self.prompt_length, self.device
        sequences = self._text_ids[:, prompt_length:][:, : int(self._text_steps.max())]
        is_text = torch.arange(sequences.shape[1], device=device) < self._text_steps[:, None]
        sequences = torch.where(is_text, sequences, self._pad)
        sequences = torch.cat([self.input_ids[:, :prompt_length], sequences], dim=-1)
        if not self.generation_config.return_dict_in_generate:
            return sequences
        audio_codes, audio_codes_mask = self._speech() if self.speaks else (None, None)
        # Speech outlasts its text; the cache goes no further than `sequences`, so that both can be continued together.
        cache = self.model_kwargs.get("past_key_values")
        # (With `inputs_embeds`, `sequences` has no prompt to compare with.)
        excess = int(cache.get_seq_length()) - sequences.shape[1] if cache is not None and prompt_length else 0
        if excess > 0:
            if cache.is_croppable:
                cache.crop(-excess)
            else:
                cache = None
        return MiniMindOGenerateOutput(
            sequences=sequences,
            past_key_values=cache,
            prompt_length=prompt_length,
            is_complete=self._is_complete,
            audio_codes=audio_codes,
            audio_codes_mask=audio_codes_mask,
            **self._records,
        )

    def _speech(self) -> tuple[torch.LongTensor, torch.BoolTensor]:
        """The frames of all rows, and which of them count."""
        codes, mask = revert_delay_pattern(
            self._history[:, :, : self.step], self._start, self.model.config.audio_codebook_size
        )
        # Frames completed after a criterion ended their row do not count.
        frames = torch.arange(codes.shape[-1], device=self.device)
        completed_at = self._start[:, None] + frames + len(self._delay) - 1
        mask = mask & (completed_at < self._row_steps[:, None])
        num_frames = int(mask.sum(dim=1).max()) if mask.numel() else 0
        mask = mask[:, :num_frames]
        return codes[..., :num_frames].masked_fill(~mask[:, None], 0), mask

    def _synchronize(
        self,
        is_broken: torch.BoolTensor,
        text_was_live: torch.BoolTensor,
        text_token: torch.LongTensor,
        ends_now: torch.BoolTensor,
        frame: torch.LongTensor | None,
        has_frame: torch.BoolTensor | None,
    ) -> bool:
        """The step's one wait for the device: brings the flags, and what a streamer gets, over in one copy."""
        streamer = self.streamer
        flags = [self._finished.all(), is_broken]
        if streamer is None:
            is_finished, broken = torch.stack(flags).tolist()
        else:
            speech = [] if frame is None else [has_frame, *frame.flatten(1).unbind(1)]
            rows = torch.stack([part.long() for part in (text_was_live, ends_now, text_token, *speech)])
            flags += [text_was_live.any(), ends_now.any(), has_frame.any() if speech else is_broken]
            values = torch.cat([torch.stack(flags).long(), rows.flatten()]).cpu()
            is_finished, broken, is_live, some_end, some_speak = values[: len(flags)].tolist()
            _, ended, tokens, *speech = values[len(flags) :].view(rows.shape)
        if broken:
            raise ValueError(
                "The model's scores are not finite: its weights are damaged, or its precision is too low (float16 "
                "is: load it in bfloat16 or float32)."
            )
        if streamer is not None:
            if is_live:
                streamer.put(tokens)
            if isinstance(streamer, MiniMindOStreamer):
                if speech and some_speak:
                    streamer.put_audio(torch.stack(speech[1:], dim=1), speech[0].bool())
                if some_end:
                    streamer.put_end(ended.bool())
        return bool(is_finished)


__all__ = [
    "MiniMindODecoding",
    "MiniMindOGenerateOutput",
    "MiniMindOGenerationMixin",
    "MiniMindOStreamer",
    "penalize_repetition",
    "sample_from_uniform",
]
