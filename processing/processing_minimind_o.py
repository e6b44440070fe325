"""The processor: chats with speech, pictures and a voice become the model's inputs, its outputs text and sound."""

import contextlib
import copy
import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2.exceptions import TemplateError
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoTokenizer, MimiModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_base import ImageProcessingMixin
from transformers.processing_utils import _MARKED_RE, OmniModalProcessorMixin
from transformers.utils.hub import cached_file
from transformers.utils.import_utils import is_torchvision_available, is_vision_available

from .audio_minimind_o import AudioSource, load_audio, soundfile, split_clips
from .chat_template_minimind_o import CHAT_TEMPLATE
from .feature_extraction_minimind_o import MiniMindOFeatureExtractor
from .image_minimind_o import ImageSource, load_image, split_images
from .marks_minimind_o import make_mark, write_mark
from .voices_minimind_o import (
    VOICES_NAME,
    Voice,
    check_voice,
    check_voice_name,
    load_voices,
    save_voices,
    written_whole,
)

# SigLIP2 base-patch32-256.
IMAGE_PROCESSOR_DEFAULTS = {
    "size": {"height": 256, "width": 256},
    "resample": 2,  # bilinear
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
SUBTYPES = {"WAV": "PCM_16", "FLAC": "PCM_16", "OGG": "VORBIS", "MP3": "MPEG_LAYER_III"}
AUDIO_TOKENIZER_FOLDER = "audio_tokenizer"
AUDIO_TOKENIZER_KEY = "audio_tokenizer_subfolder"
# What a published processor_config.json names: where its classes are, for machines without this package.
AUTO_MAP = {
    "AutoProcessor": "processing_minimind_o.MiniMindOProcessor",
    "AutoFeatureExtractor": "feature_extraction_minimind_o.MiniMindOFeatureExtractor",
}
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class MiniMindOAnswer(NamedTuple):
    """One row of a generated batch.

    Attributes:
        text (`str`): The answer, without a think block.
        audio (`torch.FloatTensor` of shape `(num_samples,)` or None): The spoken answer; None where only text was
            asked for.
        sampling_rate (`int`): Rate of `audio` in Hz.
        thinking (`str` or None): What stood in the think block, if anything did.
    """

    text: str
    audio: torch.Tensor | None
    sampling_rate: int
    thinking: str | None = None


class MiniMindOProcessor(OmniModalProcessorMixin):
    r"""
    Joins a speech feature extractor, a tokenizer, an image processor and the Mimi codec into MiniMind-O's processor.

    Args:
        feature_extractor ([`MiniMindOFeatureExtractor`]):
            Speech front-end.
        tokenizer ([`PreTrainedTokenizerBase`]):
            Text tokenizer. Its `audio_token` and `image_token` are the placeholders, where it names any.
        image_processor ([`SiglipImageProcessor`] or [`SiglipImageProcessorPil`]):
            Makes pictures 256 × 256.
        audio_tokenizer ([`MimiModel`], *optional*):
            Codec that turns codes into sound. Saved to and loaded from the subfolder `audio_tokenizer`.
        chat_template (`str`, *optional*):
            Jinja template; the package's own where omitted.
        image_token_len (`int`, *optional*, defaults to 64):
            Placeholders of one picture.
        num_codebooks (`int`, *optional*, defaults to 8):
            Codebooks of a frame of speech.
        audio_pad_code (`int`, *optional*, defaults to 2049):
            Code that pads reference codes on the left.
        audio_codebook_size (`int`, *optional*, defaults to 2048):
            Codes at or above it are no sound.
        speaker_embedding_size (`int`, *optional*, defaults to 192):
            Width of a voice's embedding.
        voices (`dict[str, dict[str, torch.Tensor]]`, *optional*):
            Named voices, each with `ref_codes` of shape `(num_codebooks, num_frames)` at 12.5 frames/s, `spk_emb` of
            shape `(speaker_embedding_size,)`, or both. Saved to and loaded from `voices.safetensors`.

    Example:

    ```python
    >>> from minimind_o_hf import MiniMindOForConditionalGeneration, MiniMindOProcessor

    >>> processor = MiniMindOProcessor.from_pretrained(path)
    >>> model = MiniMindOForConditionalGeneration.from_pretrained(path)
    >>> chat = [{"role": "user", "content": [{"type": "audio", "path": "question.wav"}]}]
    >>> inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)
    >>> answer = processor.decode(model.generate(**inputs, return_dict_in_generate=True))[0]
    >>> processor.save_audio(answer.audio, "reply.wav")
    ```
    """

    text_kwargs = {"padding": True, "return_tensors": "pt", "return_token_type_ids": False}

    def __init__(
        self,
        feature_extractor,
        tokenizer,
        image_processor,
        audio_tokenizer: MimiModel | None = None,
        chat_template: str | None = None,
        image_token_len: int = 64,
        num_codebooks: int = 8,
        audio_pad_code: int = 2049,
        audio_codebook_size: int = 2048,
        speaker_embedding_size: int = 192,
        voices: Mapping[str, Voice] | None = None,
    ):
        super().__init__(feature_extractor, tokenizer, image_processor, chat_template=chat_template or CHAT_TEMPLATE)
        # Not passed to super: its list of codecs lacks Mimi.
        if audio_tokenizer is not None and not isinstance(audio_tokenizer, MimiModel):
            raise TypeError(f"`audio_tokenizer` must be a MimiModel, got {type(audio_tokenizer).__name__}")
        self.audio_tokenizer = audio_tokenizer
        self.image_token_len = image_token_len
        self.num_codebooks = num_codebooks
        self.audio_pad_code = audio_pad_code
        self.audio_codebook_size = audio_codebook_size
        self.speaker_embedding_size = speaker_embedding_size
        self.voices: dict[str, dict[str, torch.Tensor]] = {}
        for name, voice in (voices or {}).items():
            self.add_voice(name, voice)
        self.audio_token = getattr(tokenizer, "audio_token", None) or "<|audio_pad|>"
        self.image_token = getattr(tokenizer, "image_token", None) or "<|image_pad|>"
        self.audio_token_id = self._token_id(self.audio_token)
        self.image_token_id = self._token_id(self.image_token)

    def check_argument_for_proper_class(self, argument_name, argument):
        # Without pillow transformers has no image processors, and the settings of one are kept.
        if argument_name != "image_processor" or is_vision_available():
            return super().check_argument_for_proper_class(argument_name, argument)
        return ImageProcessingMixin

    def _token_id(self, token: str) -> int:
        ids = self.tokenizer.get_added_vocab()
        if token not in ids:
            raise ValueError(f"the tokenizer has no token {token}, so it is not one of a MiniMind-O model")
        return ids[token]

    def _check_voice(self, voice: Voice, name: str) -> dict[str, torch.Tensor]:
        sizes = (self.num_codebooks, self.audio_codebook_size, self.speaker_embedding_size)
        return check_voice(voice, *sizes, name=name, codec=self.audio_tokenizer)

    def add_voice(self, name: str, voice: Voice) -> None:
        """Put a voice among `voices`, in place of one of that name; `ValueError` where it does not suit the model."""
        self.voices[check_voice_name(name)] = self._check_voice(voice, f"voice {name!r}")

    def load_voices(self, source: str | os.PathLike, **kwargs) -> list[str]:
        """
        Put the voices that an adapter or another checkpoint carries among `voices`, in place of those of their names.

        Args:
            source (`str` or `os.PathLike`): Directory or Hub id, with or without a `voices.safetensors`.
            **kwargs: `revision`, `token`, `cache_dir` ... as for `from_pretrained`.

        Returns:
            `list[str]`: their names.

        Raises:
            ValueError: One of them does not suit the model; none is put then.
            OSError: There is no such source, or its file is damaged.
        """
        if not os.path.exists(source) and os.fspath(source).count("/") != 1:
            raise FileNotFoundError(f"There is no directory {source}, and a Hub id has the form OWNER/NAME.")
        file = cached_file(source, VOICES_NAME, **kwargs, _raise_exceptions_for_missing_entries=False)
        found = load_voices(file) if file else {}
        checked = {check_voice_name(name): self._check_voice(found[name], f"voice {name!r}") for name in found}
        self.voices |= checked
        return sorted(checked)

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "reference_codes", "speaker_embeddings"]

    # ---------------------------------------------------------------- inputs

    def __call__(
        self,
        images: ImageSource | Sequence[ImageSource] | Sequence[Sequence[ImageSource]] | None = None,
        text: str | Sequence[str] | None = None,
        audio: AudioSource | Sequence[AudioSource] | Sequence[Sequence[AudioSource]] | None = None,
        voice: str | Voice | Sequence[str | Voice | None] | None = None,
        sampling_rate: float | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Prepare text with placeholders, speech, pictures and a voice for the model.

        Args:
            images (picture, list of pictures, or a list of them for each row, *optional*):
                Paths, URLs, bytes, PIL images or 3-D arrays, in the order of their placeholders.
            text (`str` or `list[str]`):
                One string for each row, with one `<|audio_pad|>` for each clip and one `<|image_pad|>` for each
                picture; `apply_chat_template` makes it from a chat.
            audio (clip, list of clips, or a list of them for each row, *optional*):
                Paths, URLs, bytes or arrays, in the order of their placeholders.
            voice (`str`, `dict`, or a list with one of these or None for each row, *optional*):
                The voice to answer in: a name out of `voices`, or a mapping with `ref_codes`
                (`(num_codebooks, num_frames)`, integers) and `spk_emb` (`(speaker_embedding_size,)`, floats), one of
                which may be missing. A single voice serves every row.
            sampling_rate (`float`, *optional*):
                Rate in Hz of clips passed as arrays; the feature extractor's (16 kHz) where omitted.
            kwargs:
                As in [`ProcessorMixin`]. `padding_side` is "left" for generation; pass "right" for training.

        Returns:
            [`BatchFeature`] with
            - `input_ids`, `attention_mask` (`torch.LongTensor` of shape `(batch_size, sequence_length)`);
            - with speech, `input_features` (`torch.FloatTensor` of shape `(clips, frames, 560)`) and
              `input_features_mask` (`torch.LongTensor` of shape `(clips, frames)`), over the batch in reading order;
            - with pictures, `pixel_values` (`torch.FloatTensor` of shape `(pictures, 3, 256, 256)`), likewise;
            - where a row's voice has codes, `reference_codes` (`torch.LongTensor` of shape `(batch_size,
              num_codebooks, frames)`), right-aligned, `audio_pad_code` on the left;
            - where a row's voice has an embedding, `speaker_embeddings` (`torch.FloatTensor` of shape `(batch_size,
              speaker_embedding_size)`), zeros in the other rows.

        Raises:
            `ValueError`: no text, counts that do not match, truncation inside placeholders, bad samples or voices.
            `OSError`: a file that cannot be read.
        """
        rows = [text] if isinstance(text, str) else list(text or [])
        if not rows or not all(isinstance(row, str) and row for row in rows):
            raise ValueError(f"`text` must be a string or a list of strings, none of them empty, got {text!r}")
        clips, clips_per_row = split_clips(audio)
        pictures, pictures_per_row = split_images(images)
        _check_counts("audio clips", self.audio_token, rows, len(clips), clips_per_row)
        _check_counts("pictures", self.image_token, rows, len(pictures), pictures_per_row)
        voices = self._voices_of_rows(voice, len(rows))

        audio_kwargs: Any = dict(kwargs.pop("audio_kwargs", None) or {})
        rate = audio_kwargs.pop("sampling_rate", None) if sampling_rate is None else sampling_rate
        waveforms = [self._load_clip(clip, index, rate) for index, clip in enumerate(clips)]
        # The keyword wins over `padding_side` in the tokenizer's own settings, which is "right" unless someone set it.
        text_kwargs: Any = dict(kwargs.pop("text_kwargs", None) or {})
        if "padding_side" not in kwargs:
            text_kwargs.setdefault("padding_side", "left")
        if pictures and not is_vision_available():
            raise ImportError("pictures need another package here: pip install pillow")
        loaded: Any = [load_image(picture) for picture in pictures] or None
        outputs = super().__call__(
            images=loaded,
            text=rows,
            audio=waveforms or None,
            text_kwargs=text_kwargs,
            audio_kwargs=audio_kwargs,
            **kwargs,
        )
        outputs.update(self._voice_inputs(voices))
        return outputs

    def _load_clip(self, clip: AudioSource, index: int, sampling_rate: float | None) -> np.ndarray:
        try:
            return load_audio(clip, sampling_rate, self.feature_extractor.sampling_rate)
        except ValueError as error:
            raise ValueError(f"audio clip {index}: {error}") from error

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs) -> None:
        # `__call__` has counted; super counts the placeholders that a user wrote with `sanitize_control_tokens` too.
        if videos is not None:
            raise ValueError("MiniMind-O does not take videos: pass pictures and speech")

    def _process_audio(self, audio, **kwargs):
        # Padding and truncation settings are the text's; clips come loaded, at the extractor's rate.
        features = self.feature_extractor(audio, return_tensors="pt")
        frames = features["input_features_mask"].sum(-1).tolist()
        return features, [self.audio_token * count for count in frames]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self.image_token_len

    def _voices_of_rows(self, voice, batch_size: int) -> list[dict[str, torch.Tensor]]:
        rows = list(voice) if isinstance(voice, (list, tuple)) else [voice] * batch_size
        if len(rows) != batch_size:
            raise ValueError(f"{len(rows)} voices were passed for {batch_size} rows: pass one, or one for each row")
        return [{} if row is None else self._resolve_voice(row) for row in rows]

    def _resolve_voice(self, voice: str | Voice) -> dict[str, torch.Tensor]:
        if not isinstance(voice, str):
            return self._check_voice(voice, "the voice")
        if voice not in self.voices:
            raise ValueError(f"there is no voice {voice!r}: this processor has {sorted(self.voices) or 'none'}")
        return self._check_voice(self.voices[voice], f"voice {voice!r}")  # `voices` may have been added to

    def _voice_inputs(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        inputs = {}
        longest = max(row["ref_codes"].shape[1] if "ref_codes" in row else 0 for row in rows)
        if longest:
            codes = torch.full((len(rows), self.num_codebooks, longest), self.audio_pad_code, dtype=torch.long)
            for target, row in zip(codes, rows, strict=True):
                if "ref_codes" in row:
                    target[:, longest - row["ref_codes"].shape[1] :] = row["ref_codes"]
            inputs["reference_codes"] = codes
        if any("spk_emb" in row for row in rows):
            silent = torch.zeros(self.speaker_embedding_size)
            inputs["speaker_embeddings"] = torch.stack([row.get("spk_emb", silent) for row in rows])
        return inputs

    def apply_chat_template(
        self,
        conversation,
        chat_template: str | None = None,
        *,
        voice: str | Voice | Sequence[str | Voice | None] | None = None,
        processor_kwargs: dict | None = None,
        tokenize: bool = False,
        **kwargs,
    ):
        """
        Render one conversation, or a batch of them, and prepare it for the model with `tokenize=True`.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`):
                Messages with a `role` (system, user, assistant, tool) and a `content`: a string, or a list of
                `{"type": "text", "text": ...}`, `{"type": "audio", "audio" | "path" | "url": ...}` and
                `{"type": "image", "image" | "path" | "url": ...}`. A source is a path, a URL, a file's bytes or an
                array; an array of samples may state its rate in Hz as `"sampling_rate"`.
            chat_template (`str`, *optional*):
                Another template.
            voice (`str`, `dict` or `list`, *optional*):
                The voice to answer in, as in [`~MiniMindOProcessor.__call__`]; needs `tokenize=True`.
            processor_kwargs (`dict`, *optional*):
                Arguments of [`~MiniMindOProcessor.__call__`], such as `padding_side`.
            tokenize (`bool`, *optional*, defaults to `False`):
                Whether to prepare the model's inputs; otherwise the rendered text is returned.
            kwargs:
                As in [`ProcessorMixin.apply_chat_template`] (`add_generation_prompt`, `return_dict`, `tools`, ...),
                and the template's own `open_thinking`.

        Returns:
            `str` or `list[str]`; with `tokenize=True` the `input_ids`, and with `return_dict=True` as well what
            [`~MiniMindOProcessor.__call__`] returns.
        """
        if not conversation:
            raise ValueError("the conversation has no messages")
        processor_kwargs = dict(processor_kwargs or {})
        if voice is not None:
            if not tokenize:
                raise ValueError("`voice` prepares inputs for the model, so it needs `tokenize=True`")
            processor_kwargs["voice"] = voice
        try:
            return super().apply_chat_template(
                conversation, chat_template, processor_kwargs=processor_kwargs, tokenize=tokenize, **kwargs
            )
        except TemplateError as error:  # what the template raises, of content it does not know among other things
            raise ValueError(f"the conversation cannot be rendered: {error}") from error

    def _multimodal_inputs_from_conversations(
        self, conversations, audio_loading_params: dict, load_audio_from_video: bool = False
    ):
        """Collect the sources of each conversation's speech and pictures; `__call__` reads them."""
        rate = audio_loading_params["sampling_rate"]
        images, clips = [], []
        for conversation in conversations:
            images.append([])
            clips.append([])
            for block in _content_blocks(conversation):
                if block.get("type") == "image":
                    images[-1].append(_source(block, ("image", "path", "url", "base64")))
                elif block.get("type") == "audio":
                    clip, clip_rate = _source(block, ("audio", "path", "url")), block.get("sampling_rate")
                    clips[-1].append(clip if clip_rate is None else load_audio(clip, clip_rate, rate))
        return images, [], clips, {}

    # ---------------------------------------------------------------- outputs

    def decode(self, outputs, skip_special_tokens: bool = True, **kwargs):
        """
        Turn generated tokens into text, or a whole generated output into answers with sound.

        Args:
            outputs (token ids, or the output of `generate(..., return_dict_in_generate=True)`):
                The latter holds `sequences` (`(batch_size, sequence_length)`), `prompt_length` (`int`) and, with
                speech, `audio_codes` (`(batch_size, num_codebooks, frames)`) and `audio_codes_mask`
                (`(batch_size, frames)`, 1 at the answer's frames).
            skip_special_tokens (`bool`, *optional*, defaults to `True`):
                Whether to leave special tokens out of the text.
            kwargs:
                Passed to the tokenizer's `decode`.

        Returns:
            `str` or `list[str]` for token ids, as the tokenizer's `decode`; `list[MiniMindOAnswer]` otherwise.
        """
        if not isinstance(outputs, Mapping) or "sequences" not in outputs:
            return self.tokenizer.decode(outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        prompt_length = int(outputs["prompt_length"])
        if outputs.get("audio_codes") is None:
            waveforms = [None] * len(outputs["sequences"])
        else:
            waveforms = self.decode_audio(outputs["audio_codes"], outputs.get("audio_codes_mask"))
        answers = []
        for ids, waveform in zip(outputs["sequences"].tolist(), waveforms, strict=True):
            prompt, answer = ids[:prompt_length], ids[prompt_length:]
            if self.tokenizer.eos_token_id in answer:
                answer = answer[: answer.index(self.tokenizer.eos_token_id) + 1]
            text = self.tokenizer.decode(answer, skip_special_tokens=skip_special_tokens, **kwargs)
            thinking, text = self._split_thinking(prompt, text)
            answers.append(MiniMindOAnswer(text, waveform, self.output_sampling_rate, thinking))
        return answers

    def _split_thinking(self, prompt: list[int], text: str) -> tuple[str | None, str]:
        """Separate the think block, which the prompt may have opened and the answer may never close."""
        start, end = self.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
        opened = next((token == start for token in reversed(prompt) if token in (start, end)), False)
        if not opened and not text.lstrip("\n").startswith("<think>"):
            return None, text
        thinking, _, answer = text.partition("</think>")
        return thinking.replace("<think>", "", 1).strip("\n") or None, answer.lstrip("\n")

    @property
    def output_sampling_rate(self) -> int:
        """Rate of the answers' sound in Hz: the codec's, or Mimi's 24 kHz without one."""
        return 24000 if self.audio_tokenizer is None else self.audio_tokenizer.config.sampling_rate

    @torch.no_grad()
    def decode_audio(
        self, audio_codes: torch.Tensor, audio_codes_mask: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """
        Turn codes into sound, the whole batch in one call of the codec.

        Args:
            audio_codes (`torch.LongTensor` of shape `(batch_size, num_codebooks, num_frames)`):
                Codes without delay, each in `[0, audio_codebook_size)` wherever the mask is 1.
            audio_codes_mask (`torch.Tensor` of shape `(batch_size, num_frames)`, *optional*):
                1 at a row's frames, which come first, 0 after them. All frames count where omitted.

        Returns:
            `list[torch.FloatTensor]`: one waveform in [-1, 1] a row, 1,920 samples a frame at 24 kHz, on the CPU.

        Raises:
            `ValueError`: there is no codec, or the codes or the mask have a wrong shape or range.
        """
        codec = self.audio_tokenizer
        if codec is None:
            raise ValueError(
                "this processor has no codec to turn codes into sound: set `processor.audio_tokenizer = "
                'MimiModel.from_pretrained("kyutai/mimi")`, or generate with `generation_mode="text"`'
            )
        codes = torch.as_tensor(audio_codes)
        if codes.ndim != 3 or codes.shape[1] != self.num_codebooks or codes.is_floating_point():
            raise ValueError(
                f"`audio_codes` must be integers of shape (batch_size, {self.num_codebooks}, num_frames), got "
                f"{codes.dtype} of shape {tuple(codes.shape)}"
            )
        shape = (codes.shape[0], codes.shape[2])
        mask = torch.ones(shape) if audio_codes_mask is None else torch.as_tensor(audio_codes_mask)
        if mask.shape != shape:
            raise ValueError(f"`audio_codes_mask` must have shape {shape}, got {tuple(mask.shape)}")
        mask = mask.to(codes.device).bool()
        if (mask[:, 1:] & ~mask[:, :-1]).any():
            raise ValueError("`audio_codes_mask` must be 1 at a row's first frames and 0 after them")
        codes = codes.long().masked_fill(~mask[:, None], 0)
        size = min(self.audio_codebook_size, codec.config.codebook_size)
        if codes.numel() and (codes.min() < 0 or codes.max() >= size):
            raise ValueError(f"audio codes must lie in [0, {size}), got {codes.min()} to {codes.max()}")
        frames = mask.sum(-1).tolist()
        if not max(frames, default=0):
            return [torch.zeros(0) for _ in frames]
        decoded: Any = codec.decode(codes[..., : max(frames)].to(codec.device))
        sound = decoded.audio_values[:, 0].float().clamp(-1, 1).cpu()
        samples_per_frame = round(codec.config.sampling_rate / codec.config.frame_rate)
        return [row[: count * samples_per_frame].clone() for row, count in zip(sound, frames, strict=True)]

    def save_audio(
        self,
        audio,
        path,
        sampling_rate: int | None = None,
        model: str | None = None,
        voice: str | None = None,
        generated: bool = True,
    ) -> None:
        """
        Write one waveform, or a list of them, as audio files (16 bits), marked as AI-generated in their metadata
        (`read_mark` reads the mark).

        Args:
            audio (`torch.Tensor` or `np.ndarray` of shape `(num_samples,)`, or a list of them):
                Samples, clipped to [-1, 1]. An empty waveform becomes one silent frame (80 ms), so that a player can
                open it.
            path (`str`, `os.PathLike`, or a list of them):
                The file or files; the suffix says the format (.wav, .flac, .ogg, .mp3).
            sampling_rate (`int`, *optional*):
                Rate in Hz; the codec's (24 kHz) where omitted.
            model, voice (`str`, *optional*):
                What spoke, and in which voice, for the mark.
            generated (`bool`, *optional*, defaults to `True`):
                Whether the sound is marked; not for recordings.

        Raises:
            `ValueError`: samples that are no finite 1-D array, another number of paths, or an unknown suffix.
            `OSError`: the folder does not exist or cannot be written.
        """
        single = isinstance(path, (str, os.PathLike))
        waveforms, paths = ([audio], [path]) if single else (list(audio), list(path))
        if len(waveforms) != len(paths):
            raise ValueError(f"{len(waveforms)} waveforms cannot be written to {len(paths)} paths")
        rate = int(sampling_rate or self.output_sampling_rate)
        mark = make_mark(model, voice) if generated else None
        for waveform, target in zip(waveforms, paths, strict=True):
            _write_audio(waveform, Path(target), rate, mark)

    @contextlib.contextmanager
    def open_audio(
        self,
        path: str | os.PathLike,
        sampling_rate: int | None = None,
        model: str | None = None,
        voice: str | None = None,
    ) -> Iterator[Any]:
        """
        Open an audio file to write generated sound into as it comes, marked as `save_audio` marks it. The file appears
        when the block ends, and not where it ends with an exception.

        Args:
            path, sampling_rate, model, voice:
                As in `save_audio`.

        Yields:
            `soundfile.SoundFile`: open for writing, one channel; `file.write(event.audio.numpy())`.

        Raises:
            `ValueError`, `OSError`: as `save_audio`.
        """
        with _open_audio(Path(path), int(sampling_rate or self.output_sampling_rate), make_mark(model, voice)) as file:
            yield file

    def post_process_multimodal_output(
        self, generated_outputs, skip_special_tokens: bool = True, generation_mode: str | None = None, **kwargs
    ):
        """
        What `pipeline("any-to-any")` returns for a generated batch.

        Args:
            generated_outputs (`torch.LongTensor` of shape `(batch_size, sequence_length)`, or a generated output):
                As for `decode`.
            skip_special_tokens (`bool`, *optional*, defaults to `True`):
                Whether to leave special tokens out of the text.
            generation_mode (`str`, *optional*):
                "text" (the default) or "audio".
            kwargs:
                Passed to the tokenizer's `decode`.

        Returns:
            `list[str]`, each with its prompt, or for "audio" `list[np.ndarray]` of float32 waveforms.
        """
        whole = isinstance(generated_outputs, Mapping)
        if generation_mode in (None, "text"):
            sequences = generated_outputs["sequences"] if whole else generated_outputs
            return self.tokenizer.decode(sequences, skip_special_tokens=skip_special_tokens, **kwargs)
        if generation_mode != "audio":
            raise ValueError(f"`generation_mode` must be 'text' or 'audio', got {generation_mode!r}")
        if not whole or generated_outputs.get("audio_codes") is None:
            raise ValueError(
                "there is no speech in the generated output: generate with `return_dict_in_generate=True`"
            )
        waveforms = self.decode_audio(generated_outputs["audio_codes"], generated_outputs.get("audio_codes_mask"))
        return [waveform.numpy() for waveform in waveforms]

    # ---------------------------------------------------------------- files

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoProcessor"):
        """As [`ProcessorMixin.register_for_auto_class`], with the feature extractor."""
        super().register_for_auto_class(auto_class)
        MiniMindOFeatureExtractor.register_for_auto_class()

    def to_dict(self) -> dict:
        # The codec and the voices have files of their own. AutoProcessor would take a key `audio_tokenizer` for an
        # absolute path and load it, and super copies whatever is still here: 96 M parameters of codec.
        bare = copy.copy(self)
        bare.__dict__ = {key: value for key, value in vars(self).items() if key not in ("audio_tokenizer", "voices")}
        output = super(MiniMindOProcessor, bare).to_dict()
        if self.audio_tokenizer is not None:
            output[AUDIO_TOKENIZER_KEY] = AUDIO_TOKENIZER_FOLDER
        return output

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Save every part to one directory: as [`ProcessorMixin.save_pretrained`], with the codec and the voices."""
        folder = Path(save_directory)
        files = super().save_pretrained(str(folder))
        if self.audio_tokenizer is not None:
            self.audio_tokenizer.save_pretrained(folder / AUDIO_TOKENIZER_FOLDER)
        if self.voices:
            save_voices(self.voices, folder / VOICES_NAME)
        else:
            (folder / VOICES_NAME).unlink(missing_ok=True)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)
        return files

    def save_code(self, directory: str | os.PathLike) -> None:
        """
        Makes a saved processor load where this package is not installed, with `trust_remote_code=True`: adds the
        files of its classes, and names them in `processor_config.json`. `push_to_hub` does so too.
        """
        custom_object_save(self, directory)
        path = Path(directory) / "processor_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        for part in (config, config["feature_extractor"]):
            part["auto_map"] = AUTO_MAP
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        self.save_code(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path, **kwargs):
        r"""
        Read what `from_pretrained` builds a processor from: as [`ProcessorMixin.get_processor_dict`], with the voices
        and the codec, each unless `from_pretrained` is given another.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A directory or a Hub id: a saved processor, or an original release, which has a tokenizer only.
            load_audio_tokenizer (`bool`, *optional*, defaults to `True`):
                Whether to load the codec; `device_map` and `dtype` place it.
        """
        path = pretrained_model_name_or_path
        load_audio_tokenizer = kwargs.pop("load_audio_tokenizer", True) and "audio_tokenizer" not in kwargs
        hub_kwargs = {key: kwargs[key] for key in HUB_KWARGS if key in kwargs}
        codec_kwargs = {key: kwargs.pop(key) for key in ("device_map", "dtype") if key in kwargs}
        config, kwargs = super().get_processor_dict(path, **kwargs)
        if "processor_class" not in config:
            # An original release: its template, where it has a file, drops speech and pictures.
            config.pop("chat_template", None)
        if "voices" not in kwargs:
            quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
            voices_file = cached_file(path, VOICES_NAME, **hub_kwargs, **quiet)
            config["voices"] = load_voices(voices_file) if voices_file else None
        folder = config.pop(AUDIO_TOKENIZER_KEY, None)
        if load_audio_tokenizer and folder:
            hub_kwargs["subfolder"] = os.path.join(hub_kwargs.get("subfolder") or "", folder)
            try:
                config["audio_tokenizer"] = _load_codec(path, **hub_kwargs, **codec_kwargs)
            except OSError as error:
                raise OSError(
                    f"cannot load the codec from {folder} in {path}: {error} (`load_audio_tokenizer=False` skips it)"
                ) from error
        return config, kwargs

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # The classes are named here rather than looked up: no registration is needed, and an original release, which
        # has a tokenizer only, gets the defaults.
        path, config = pretrained_model_name_or_path, processor_dict or {}
        own = {*inspect.signature(cls.__init__).parameters, "load_audio_tokenizer", "device_map", "dtype"}
        kwargs = {key: value for key, value in kwargs.items() if key not in own}
        if "feature_extractor" in config:
            feature_extractor = MiniMindOFeatureExtractor.from_pretrained(path, **kwargs)
        else:
            feature_extractor = MiniMindOFeatureExtractor()
        tokenizer = AutoTokenizer.from_pretrained(path, **kwargs)
        if not is_vision_available():
            image_processor = ImageProcessingMixin(**config.get("image_processor", {}))  # the settings alone
        elif "image_processor" in config:
            image_processor = AutoImageProcessor.from_pretrained(path, **kwargs)
        else:
            image_processor = default_image_processor()
        return [feature_extractor, tokenizer, image_processor]


def _load_codec(path, **kwargs) -> MimiModel:
    """Loads the codec whole: transformers would fill what is missing with noise, and noise is what one would hear."""
    try:
        codec, info = MimiModel.from_pretrained(path, output_loading_info=True, **kwargs)
    except SafetensorError as error:
        raise OSError(f"The codec of {path} cannot be read, its file is damaged or incomplete ({error}).") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"The codec of {path} lacks {len(missing)} tensors, among them {missing[:3]}.")
    return codec


def default_image_processor():
    """SigLIP2's image processor, on torchvision where that is installed."""
    import transformers

    name = "SiglipImageProcessor" if is_torchvision_available() else "SiglipImageProcessorPil"
    return getattr(transformers, name)(**IMAGE_PROCESSOR_DEFAULTS)


def _check_counts(things: str, token: str, rows: list[str], total: int, per_row: list[int] | None) -> None:
    # Placeholders that a user wrote are marked with `sanitize_control_tokens`, and are no placeholders then.
    found = [_MARKED_RE.sub("", row).count(token) for row in rows]
    if per_row is not None and len(per_row) != len(rows):
        raise ValueError(f"{things} were passed for {len(per_row)} rows, but the text has {len(rows)}")
    if per_row is not None and per_row != found:
        raise ValueError(f"the rows of the text have {found} {token}, but {per_row} {things} were passed for them")
    if sum(found) != total:
        raise ValueError(f"the text has {sum(found)} {token}, but {total} {things} were passed")


def _content_blocks(conversation: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The items of every content list of a conversation, in reading order."""
    contents = [message.get("content") for message in conversation]
    blocks = [block for content in contents if isinstance(content, (list, tuple)) for block in content]
    for block in blocks:
        if not isinstance(block, Mapping):
            raise ValueError(f"an item of a content list must be a mapping with a `type`, got {type(block).__name__}")
    return blocks


def _source(block: Mapping[str, Any], keys: tuple[str, ...]):
    source = next((block[key] for key in keys if block.get(key) is not None), None)
    if source is None:
        raise ValueError(f"a content block of type {block['type']} needs one of {list(keys)}, got {sorted(block)}")
    return source


def _write_audio(waveform, path: Path, sampling_rate: int, mark: dict[str, Any] | None) -> None:
    if isinstance(waveform, torch.Tensor):
        waveform = waveform.detach().cpu()
        waveform = (waveform.float() if waveform.is_floating_point() else waveform).numpy()
    if isinstance(waveform, np.ndarray) and not np.issubdtype(waveform.dtype, np.floating):
        raise ValueError(
            f"a waveform must hold floats from -1 to 1, got {waveform.dtype}: divide integers by their range"
        )
    samples = np.asarray(waveform, dtype=np.float32)
    if samples.ndim != 1 or not np.isfinite(samples).all():
        raise ValueError(f"a waveform must be one-dimensional and finite, got shape {samples.shape}")
    with _open_audio(path, sampling_rate, mark) as file:
        file.write(samples.clip(-1, 1))


@contextlib.contextmanager
def _open_audio(path: Path, sampling_rate: int, mark: dict[str, Any] | None) -> Iterator[Any]:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist")
    file_format = path.suffix[1:].upper()
    if file_format not in SUBTYPES:
        raise ValueError(f"cannot write {path}: the suffix must be one of .{', .'.join(SUBTYPES).lower()}")
    try:
        with (
            written_whole(path) as partial,
            soundfile.SoundFile(partial, "w", sampling_rate, 1, SUBTYPES[file_format], format=file_format) as file,
        ):
            if mark is not None:
                write_mark(file, mark)
            yield file
            if not file.frames:
                # Players do not open a file without a sample.
                file.write(np.zeros(round(0.08 * sampling_rate), dtype=np.float32))
    except soundfile.SoundFileError as error:
        raise OSError(f"cannot write {path}: {error}") from error


__all__ = ["MiniMindOAnswer", "MiniMindOProcessor", "default_image_processor"]
