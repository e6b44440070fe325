"""Training samples: from one conversation of a dataset to the model's aligned inputs and labels.

Pure functions of a row and a random generator. Every random choice is a setting that can be switched off, and a sample
is reproducible from `(seed, epoch, index)`, which is what makes an interrupted run resumable.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from minimind_o_hf.modeling import MiniMindOConfig, apply_delay_pattern, place_voice
from minimind_o_hf.processing import MiniMindOProcessor, load_audio

from .augmentation import SpeechAugmentation
from .features import FeatureCache

IMAGE_MARK = "<image>"
EMPTY_THINK = "<think>\n\n</think>\n\n"
# The answer and its end must fit beside a prompt: dialogues are cut earlier until this many tokens are left.
TOKEN_RESERVE = 100
# A think block that ends later than this many tokens into an answer does not delay its speech.
THINK_WINDOW = 50

SYSTEM_PROMPTS = (
    "You are a friendly assistant.",
    "You are a careful and honest assistant.",
    "You answer questions clearly and briefly.",
    "You are a voice assistant; speak naturally.",
    "You listen well and give useful answers.",
    "你是一个友好的助手。",
    "你是一个认真、诚实的助手。",
    "请清楚简短地回答问题。",
    "你是一个语音助手，说话自然。",
    "你善于倾听，并给出有用的回答。",
)


@dataclass(frozen=True)
class SampleSettings:
    """
    How samples are made. The defaults are the original's training; [`SampleSettings.deterministic`] switches every
    random choice off.

    Args:
        max_length (`int`, defaults to 512):
            Longest sequence, in positions; longer ones are cut at the end.
        cut_dialogue (`bool`, defaults to `True`):
            Whether a dialogue is cut after a random assistant turn (else after the last that fits).
        system_prompt (`float`, defaults to 0.2):
            Probability of a short system prompt where there is none (and there are no tools).
        drop_empty_think (`float`, defaults to 0.8):
            Probability of leaving empty think blocks out of the text.
        speech_only, text_only, speech_then_text, text_then_speech (`float`, default to 0.4, 0.2, 0.2, 0.2):
            Weights of what a spoken user turn consists of. `speech_only` drops its text, and a picture in it.
        image_before (`tuple[float, float]`, defaults to (0.2, 0.2)), image_after (defaults to (0.2, 0.4)):
            Weights of a picture before or after the text, each with one or two newlines between.
        reference (`float`, defaults to 0.5):
            Probability of using the reference codes; the speaker token stands wherever there is an embedding.
        swap_codes, swap_text (`float`, default to 0.05):
            Scheduled sampling: probability, at each position before a label, of random input codes or a random text
            token.
        augmentation ([`SpeechAugmentation`], *optional*):
            What is done to input speech; `None` for nothing.
    """

    max_length: int = 512
    cut_dialogue: bool = True
    system_prompt: float = 0.2
    drop_empty_think: float = 0.8
    speech_only: float = 0.4
    text_only: float = 0.2
    speech_then_text: float = 0.2
    text_then_speech: float = 0.2
    image_before: tuple[float, float] = (0.2, 0.2)
    image_after: tuple[float, float] = (0.2, 0.4)
    reference: float = 0.5
    swap_codes: float = 0.05
    swap_text: float = 0.05
    augmentation: SpeechAugmentation | None = field(default_factory=SpeechAugmentation)

    def __post_init__(self):
        if self.max_length < 2:
            raise ValueError(f"`max_length` must be at least 2, got {self.max_length}.")
        for name in ("system_prompt", "drop_empty_think", "reference", "swap_codes", "swap_text"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be a probability from 0 to 1, got {getattr(self, name)}.")
        for names in (
            ("speech_only", "text_only", "speech_then_text", "text_then_speech"),
            ("image_before", "image_after"),
        ):
            weights = np.concatenate([np.atleast_1d(getattr(self, name)) for name in names])
            if (weights < 0).any() or weights.sum() <= 0:
                raise ValueError(
                    f"The weights {', '.join(names)} must be at least 0, and one above it: got {weights}."
                )

    @classmethod
    def deterministic(cls, max_length: int = 512, reference: bool = True, **changes) -> "SampleSettings":
        """Every random choice switched off: the whole dialogue, speech before text, pictures after it, no
        augmentation."""
        settings = {
            "cut_dialogue": False,
            "system_prompt": 0.0,
            "drop_empty_think": 1.0,
            "speech_only": 0.0,
            "text_only": 0.0,
            "speech_then_text": 1.0,
            "text_then_speech": 0.0,
            "image_before": (0.0, 0.0),
            "image_after": (0.0, 1.0),
            "reference": float(reference),
            "swap_codes": 0.0,
            "swap_text": 0.0,
            "augmentation": None,
        }
        return cls(max_length=max_length, **{**settings, **changes})


def sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random generator of one sample in one epoch; the same three numbers give the same sample."""
    return np.random.default_rng([seed, epoch, index])


@dataclass
class Row:
    """
    One conversation, read and checked.

    Args:
        messages (`list[dict]`): `role` and `content` (a string; `<image>` marks a picture), other keys kept.
        question_audios (`list[bytes | None]`): Encoded audio files, one for each user turn; empty without any.
        answer_codes (`list[np.ndarray]`): Codes of each assistant turn, of shape `(num_codebooks, num_frames)`.
        images (`list[bytes]`): Encoded pictures.
        reference_codes (`np.ndarray` of shape `(num_codebooks, num_frames)`, *optional*): The voice's reference codes.
        speaker_embedding (`np.ndarray` of shape `(spk_emb_size,)`, *optional*): The voice's embedding.
    """

    messages: list[dict[str, Any]]
    question_audios: list[bytes | None]
    answer_codes: list[np.ndarray]
    images: list[bytes]
    reference_codes: np.ndarray | None
    speaker_embedding: np.ndarray | None


def read_row(row: Mapping[str, Any], config: MiniMindOConfig) -> Row:
    """
    Reads a row of the original's parquet schema; columns may be missing.

    Args:
        row (`Mapping`): `conversations` (JSON), `question_audios`, `answer_audios`, `image_bytes`, `ref_audios`,
        `spk_emb`. config ([`MiniMindOConfig`]): For the number of codebooks, their size and the embedding's.

    Raises:
        ValueError: What cannot be trained on, with the column and the values.
    """
    try:
        messages = json.loads(row["conversations"]) if isinstance(row["conversations"], str) else row["conversations"]
    except KeyError:
        raise ValueError("The row has no column `conversations`.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"`conversations` is no JSON ({error}): {row['conversations']!r:.80}") from None
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
    ):
        raise ValueError(f"`conversations` must be a list of messages with a role, got {messages!r:.80}")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("`conversations` has no assistant turn to train on.")

    answers = [
        _read_codes(codes, config, f"answer_audios[{index}]")
        for index, codes in enumerate(row.get("answer_audios") or [])
    ]
    images = row.get("image_bytes")
    images = [images] if isinstance(images, bytes) else [image for image in images or [] if image]
    reference = row.get("ref_audios")
    reference = None if reference is None or len(reference) == 0 else _read_codes(reference, config, "ref_audios")
    embedding = row.get("spk_emb")
    if embedding is not None and len(embedding):
        embedding = np.asarray(embedding, dtype=np.float32)
        if embedding.shape != (config.spk_emb_size,) or not np.isfinite(embedding).all():
            raise ValueError(f"`spk_emb` must be {config.spk_emb_size} finite numbers, got shape {embedding.shape}.")
    else:
        embedding = None
    return Row(messages, list(row.get("question_audios") or []), answers, images, reference, embedding)


def _read_codes(flat: Sequence[int], config: MiniMindOConfig, name: str) -> np.ndarray:
    """Flat, frame-major codes as `(num_codebooks, num_frames)`."""
    codes = np.asarray([] if flat is None else flat, dtype=np.int64)
    if codes.ndim != 1 or len(codes) % config.num_codebooks:
        raise ValueError(
            f"`{name}` must be a flat list of {config.num_codebooks} codes a frame, got {codes.shape} values."
        )
    if len(codes) and not (codes.min() >= 0 and codes.max() < config.audio_codebook_size):
        raise ValueError(
            f"`{name}` must hold codes from 0 to {config.audio_codebook_size - 1}, got values from {codes.min()} to "
            f"{codes.max()}."
        )
    return codes.reshape(-1, config.num_codebooks).T


@dataclass
class Sample:
    """
    One sequence, not padded. `labels` and `audio_labels` are aligned with the inputs, -100 where there is none.

    Args:
        input_ids (`torch.LongTensor` of shape `(length,)`), labels (the same).
        audio_codes (`torch.LongTensor` of shape `(num_codebooks, length)`), audio_labels (the same).
        speaker_embedding (`torch.FloatTensor` of shape `(spk_emb_size,)`, *optional*).
        clips (`list[np.ndarray | torch.Tensor]`):
            Input speech in reading order: waveforms `(num_samples,)`, float32 at 16 kHz, or, from a cache, the speech
            encoder's outputs `(num_frames, audio_hidden_size)`.
        images (`list[bytes | torch.Tensor]`):
            Pictures in reading order: encoded, or the vision encoder's outputs `(image_token_len,
            image_hidden_size)`.
        feature_seed (`int`): Seeds what happens to the speech features (masking).
        row_id (`int`): Index of the row it was made from, -1 where there is none.
    """

    input_ids: torch.LongTensor
    labels: torch.LongTensor
    audio_codes: torch.LongTensor
    audio_labels: torch.LongTensor
    speaker_embedding: torch.FloatTensor | None
    clips: list[np.ndarray | torch.Tensor]
    images: list[bytes | torch.Tensor]
    feature_seed: int = 0
    row_id: int = -1


def cut_dialogue(
    messages: list[dict], settings: SampleSettings, random: np.random.Generator, count_tokens
) -> list[dict]:
    """Ends the dialogue after a random assistant turn, or an earlier one where it is too long."""
    ends = [index + 1 for index, message in enumerate(messages) if message["role"] == "assistant"]
    choice = int(random.integers(len(ends))) if settings.cut_dialogue else len(ends) - 1
    while choice > 0 and count_tokens(messages[: ends[choice]]) + TOKEN_RESERVE >= settings.max_length:
        choice -= 1
    return messages[: ends[choice]]


def build_sample(
    row: Mapping[str, Any] | Row,
    processor: MiniMindOProcessor,
    config: MiniMindOConfig,
    settings: SampleSettings,
    random: np.random.Generator,
    features: FeatureCache | None = None,
) -> Sample:
    """
    Makes one training sample.

    Args:
        row (`Mapping` or [`Row`]): A row of the original's schema, or one read already.
        processor ([`MiniMindOProcessor`]): Its tokenizer, chat template and frame counts.
        config ([`MiniMindOConfig`]): The model's.
        settings ([`SampleSettings`]): What is random, and the longest sequence.
        random (`np.random.Generator`): See [`sample_generator`].
        features ([`FeatureCache`], *optional*): The encoders' outputs, in place of clips and pictures.

    Raises:
        ValueError, OSError: A row that cannot be trained on, an audio file that cannot be decoded.
    """
    row = row if isinstance(row, Row) else read_row(row, config)
    tokenizer = processor.tokenizer
    tools = next((message["tools"] for message in row.messages if message.get("tools")), None)

    def render(messages: list[dict]) -> str:
        return processor.apply_chat_template(messages, tools=tools)

    def tokenize(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    messages = cut_dialogue(row.messages, settings, random, lambda kept: len(tokenize(render(kept))))
    messages = [dict(message) for message in messages]
    add_system = random.random() < settings.system_prompt
    system = SYSTEM_PROMPTS[int(random.integers(len(SYSTEM_PROMPTS)))]
    if add_system and messages[0]["role"] != "system" and tools is None:
        messages.insert(0, {"role": "system", "content": system})

    clips: list[Any] = _add_speech(messages, row, processor, settings, random, features)
    images: list[Any] = _add_picture(messages, row, processor, settings, random)
    if features is not None:
        images = [features.picture(image) for image in images]
    text = render(messages)
    if random.random() < settings.drop_empty_think:
        text = text.replace(EMPTY_THINK, "")
    frames = [
        len(clip) if isinstance(clip, torch.Tensor) else processor.feature_extractor.num_frames(len(clip))
        for clip in clips
    ]
    text, _ = processor.get_text_with_replacements(
        [text],
        images_replacements=[processor.image_token * processor.image_token_len for _ in images],
        audio_replacements=[processor.audio_token * count for count in frames],
    )
    ids = tokenize(text[0])
    found = [ids.count(processor.audio_token_id), ids.count(processor.image_token_id)]
    wanted = [sum(frames), processor.image_token_len * len(images)]
    if found != wanted:
        raise ValueError(
            f"The conversation writes placeholders itself: {found} speech and picture placeholders were found where "
            f"{wanted} belong."
        )
    answer = sum(message["role"] == "assistant" for message in messages) - 1
    codes = (
        row.answer_codes[answer] if answer < len(row.answer_codes) else np.zeros((config.num_codebooks, 0), np.int64)
    )
    use_reference = random.random() < settings.reference
    sample = _lay_out(ids, codes, row, use_reference, tokenize("<|im_start|>assistant\n"), config)
    sample.clips, sample.images = clips, images
    sample = _cut(sample, settings.max_length, processor, frames)
    _swap_inputs(sample, settings, config, random)
    sample.feature_seed = int(random.integers(2**31))
    return sample


def _add_speech(
    messages, row: Row, processor, settings: SampleSettings, random, features: FeatureCache | None
) -> list[np.ndarray | torch.Tensor]:
    """Puts a speech placeholder into the last user turn, where that turn has a recording; returns the recording."""
    turns = [index for index, message in enumerate(messages) if message["role"] == "user"]
    kind = random.choice(
        4,
        p=_normalised(
            [settings.speech_only, settings.text_only, settings.speech_then_text, settings.text_then_speech]
        ),
    )
    recording = row.question_audios[len(turns) - 1] if 0 < len(turns) <= len(row.question_audios) else None
    if not recording:
        return []
    content = messages[turns[-1]]["content"] or ""
    if kind == 1 and content:
        return []
    if features is not None:
        clip = features.speech(recording)
    else:
        clip = load_audio(recording, target_rate=processor.feature_extractor.sampling_rate)
        if settings.augmentation is not None:
            clip = settings.augmentation(clip, processor.feature_extractor.sampling_rate, random)
    token = processor.audio_token
    if kind == 0 or not content:
        content = token
    else:
        content = f"{token}\n\n{content}" if kind in (1, 2) else f"{content}\n\n{token}"
    messages[turns[-1]]["content"] = content
    return [clip]


def _add_picture(messages, row: Row, processor, settings: SampleSettings, random) -> list[bytes]:
    """Replaces the dialogue's first picture mark by a placeholder before or after its text; removes the other
    marks."""
    place = random.choice(4, p=_normalised([*settings.image_before, *settings.image_after]))
    images = []
    for message in messages:
        content = message.get("content")
        if not isinstance(content, str) or IMAGE_MARK not in content:
            continue
        content = content.replace(IMAGE_MARK, "").strip("\n")
        if row.images and not images:
            images = [row.images[0]]
            newlines = "\n" * (1 + place % 2)
            parts = [processor.image_token, content] if place < 2 else [content, processor.image_token]
            content = newlines.join(part for part in parts if part)
        message["content"] = content
    return images


def _normalised(weights: list[float]) -> np.ndarray:
    return np.asarray(weights, dtype=np.float64) / np.sum(weights)


def _lay_out(ids: list[int], codes: np.ndarray, row: Row, use_reference: bool, header: list[int], config) -> Sample:
    """Aligns text, codes and labels on one time axis."""
    answer_start = max(
        (at + len(header) for at in range(len(ids) - len(header) + 1) if ids[at : at + len(header)] == header),
        default=None,
    )
    if answer_start is None:
        raise ValueError("The rendered conversation has no assistant turn: is this another model's chat template?")
    think_end = list(config.think_end_ids)
    speech_start = next(
        (
            at + len(think_end)
            for at in range(answer_start, min(answer_start + THINK_WINDOW, len(ids)))
            if ids[at : at + len(think_end)] == think_end
        ),
        answer_start,
    )
    num_frames = codes.shape[1]
    length = len(ids)
    if num_frames:
        length = max(length, speech_start + 1 + config.num_codebooks + num_frames)
    input_ids = torch.full((length,), config.pad_token_id, dtype=torch.long)
    input_ids[: len(ids)] = torch.tensor(ids)
    labels = torch.full((length,), -100, dtype=torch.long)
    labels[answer_start : len(ids)] = input_ids[answer_start : len(ids)]
    audio_codes = torch.full((config.num_codebooks, length), config.audio_pad_token, dtype=torch.long)
    audio_labels = torch.full((config.num_codebooks, length), -100, dtype=torch.long)
    embedding = None
    if num_frames:
        delayed, is_label = apply_delay_pattern(
            torch.from_numpy(codes.copy())[None],
            torch.tensor([speech_start + 1]),
            length,
            config.audio_pad_token,
            config.audio_stop_token,
        )
        if row.speaker_embedding is not None:
            embedding = torch.from_numpy(row.speaker_embedding)
        reference = None
        if use_reference and row.reference_codes is not None:
            reference = torch.from_numpy(row.reference_codes.copy())[None]
        end = torch.tensor([speech_start])
        voice = place_voice(
            end,
            end,
            length,
            config.num_codebooks,
            config.audio_pad_token,
            config.audio_spk_token,
            reference_codes=reference,
            speaker_embeddings=None if embedding is None else embedding[None],
        )
        audio_codes = torch.where(is_label, delayed, voice)[0]
        audio_labels = torch.where(is_label, delayed, -100)[0]
    return Sample(input_ids, labels, audio_codes, audio_labels, embedding, [], [])


def _cut(sample: Sample, max_length: int, processor: MiniMindOProcessor, frames: list[int]) -> Sample:
    """Cuts at the end; an input whose placeholders would be cut goes as a whole."""
    ids = sample.input_ids
    if len(ids) <= max_length:
        return sample
    end = max_length
    for token_id, inputs, sizes in (
        (processor.audio_token_id, sample.clips, frames),
        (processor.image_token_id, sample.images, [processor.image_token_len] * len(sample.images)),
    ):
        # At most one clip and one picture.
        start = int((ids == token_id).long().argmax())
        if inputs and start < end < start + sizes[0]:
            end = start
    for token_id, inputs in ((processor.audio_token_id, sample.clips), (processor.image_token_id, sample.images)):
        if inputs and not (ids[:end] == token_id).any():
            inputs.clear()
    return Sample(
        ids[:end],
        sample.labels[:end],
        sample.audio_codes[:, :end],
        sample.audio_labels[:, :end],
        sample.speaker_embedding,
        sample.clips,
        sample.images,
    )


def _swap_inputs(sample: Sample, settings: SampleSettings, config: MiniMindOConfig, random: np.random.Generator):
    """Scheduled sampling, in place: random inputs where the next position is labelled, so that errors are survived."""
    length = len(sample.input_ids)
    placeholders = torch.tensor([config.audio_token_id, config.image_token_id])
    next_text = torch.zeros(length, dtype=torch.bool)
    next_text[:-1] = sample.labels[1:] != -100
    next_codes = torch.zeros(length, dtype=torch.bool)
    next_codes[:-1] = (sample.audio_labels[:, 1:] != -100).any(dim=0)
    swap_codes = next_codes & torch.from_numpy(random.random(length) < settings.swap_codes)
    swap_text = next_text & torch.from_numpy(random.random(length) < settings.swap_text)
    swap_text &= ~torch.isin(sample.input_ids, placeholders)
    codes = torch.from_numpy(random.integers(config.audio_vocab_size, size=(config.num_codebooks, length)))
    # One draw from the vocabulary without the placeholders: indices at or above each of them move up by one.
    tokens = torch.from_numpy(random.integers(config.vocab_size - len(placeholders), size=length))
    for placeholder in sorted(placeholders.tolist()):
        tokens += tokens >= placeholder
    sample.audio_codes = torch.where(swap_codes, codes, sample.audio_codes)
    sample.input_ids = torch.where(swap_text, tokens, sample.input_ids)


__all__ = [
    "Row",
    "Sample",
    "SampleSettings",
    "build_sample",
    "cut_dialogue",
    "read_row",
    "sample_generator",
]
