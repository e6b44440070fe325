"""Batches of similar lengths: how long samples will be, and an order of them in which neighbours are alike."""

import json
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import soundfile
import torch

from minimind_o_hf.modeling import MiniMindOConfig
from minimind_o_hf.processing import MiniMindOProcessor

from .rows import MappedRows
from .samples import IMAGE_MARK, TOKEN_RESERVE, SampleSettings, sample_generator

# Tokens of a message that are not its content: its role and its end.
MESSAGE_TOKENS = 6
# Rows from which the number of tokens a character is learnt.
CALIBRATION_ROWS = 64
# Batches among which samples are sorted: enough for little padding, few enough for batches to differ in each epoch.
WINDOW_BATCHES = 50


class LengthEstimates:
    """
    How long the sample of every row is, where its dialogue ends after each of its answers.

    Texts are counted in characters and recordings by their headers: it takes seconds where building every sample would
    take the time of an epoch.

    Args:
        rows ([`MappedRows`]): The original's schema.
        processor ([`MiniMindOProcessor`]), config ([`MiniMindOConfig`]): As [`build_sample`].
    """

    def __init__(self, rows: MappedRows, processor: MiniMindOProcessor, config: MiniMindOConfig):
        if "conversations" not in rows.column_names:
            raise ValueError(f"The files have no column `conversations`, but {', '.join(rows.column_names)}.")
        self._processor, self._config = processor, config
        texts = rows.select_columns(["conversations"])
        dialogues = [_messages(text["conversations"]) for text in texts]
        sample = "\n".join(content for messages in dialogues[:CALIBRATION_ROWS] for _, content in messages)
        self._per_character = len(processor.tokenizer(sample, add_special_tokens=False)["input_ids"]) / (
            len(sample) or 1
        )
        # Per row: the estimates for each end, and the tokens of the text alone, by which dialogues are cut.
        self._rows = []
        for index, messages in enumerate(dialogues):
            row = rows.arrow(index)
            self._rows.append(self._estimate(messages, _items(row, "answer_audios"), _items(row, "question_audios")))

    def _estimate(self, messages: list[tuple[str, str]], answers: list, questions: list) -> list[tuple[int, int]]:
        ends, tokens, extra, turn, speech = [], 0.0, 0, 0, 0
        for role, content in messages:
            if IMAGE_MARK in content:
                extra = self._config.image_token_len
            start = tokens + MESSAGE_TOKENS / 2
            tokens += MESSAGE_TOKENS + self._per_character * len(content)
            if role == "user":
                # Only the last user turn kept is spoken.
                speech = self._frames(questions[turn]) if turn < len(questions) else 0
                turn += 1
            elif role == "assistant":
                answer = answers[len(ends)] if len(ends) < len(answers) else None
                frames = len(answer) // self._config.num_codebooks if answer is not None and answer.is_valid else 0
                spoken = start + 1 + self._config.num_codebooks + frames if frames else 0
                ends.append((round(max(tokens, spoken)) + extra + speech, round(tokens)))
        return ends

    def _frames(self, recording: Any) -> int:
        """Placeholders of a recording, by its header; 0 where there is none to be read."""
        if not recording.is_valid:
            return 0
        try:
            duration = soundfile.info(pa.BufferReader(recording.as_buffer())).duration
        except soundfile.SoundFileError:
            return 0  # named when the sample is built
        extractor = self._processor.feature_extractor
        return extractor.num_frames(max(1, round(duration * extractor.sampling_rate)))

    def of_epoch(self, settings: SampleSettings, seed: int, epoch: int) -> np.ndarray:
        """The lengths `(num_rows,)` of one epoch's samples, whose dialogues are cut as [`build_sample`] cuts them."""
        lengths = np.zeros(len(self._rows), dtype=np.int64)
        for index, ends in enumerate(self._rows):
            choice = len(ends) - 1
            if settings.cut_dialogue and choice > 0:
                # The first draw of a sample's generator.
                choice = int(sample_generator(seed, epoch, index).integers(len(ends)))
            while choice > 0 and ends[choice][1] + TOKEN_RESERVE >= settings.max_length:
                choice -= 1
            lengths[index] = min(ends[choice][0], settings.max_length) if ends else 0
        return lengths


def _messages(conversations: Any) -> list[tuple[str, str]]:
    """Roles and contents; a row that is no conversation is empty here, and named when its sample is built."""
    try:
        messages = json.loads(conversations) if isinstance(conversations, str) else conversations
        return [(message["role"], str(message.get("content") or "")) for message in messages]
    except (ValueError, TypeError, KeyError, AttributeError):
        return []


def _items(row: pa.RecordBatch, name: str) -> list:
    """The scalars of a column of lists, without copying what they hold."""
    value = row.column(name)[0] if name in row.column_names else None
    return list(value) if value is not None and value.is_valid else []


class _HasLengths(Protocol):
    def __len__(self) -> int: ...

    def lengths(self) -> np.ndarray: ...

    def set_epoch(self, epoch: int) -> None: ...


class EpochSampler(torch.utils.data.Sampler[int]):
    """
    A random order that follows from the seed and the epoch alone, so that a resumed run goes on in it.

    Args:
        dataset: With `set_epoch`, which is called with the sampler's epoch, and, to be grouped, `lengths`.
        seed (`int`): Of the order.
        group_size (`int`, *optional*):
            Samples that share a batch, over all processes: they are put together by length. Without, lengths play no
            part.
    """

    def __init__(self, dataset: _HasLengths, seed: int, group_size: int | None = None):
        if group_size is not None and group_size < 1:
            raise ValueError(f"`group_size` must be at least 1, got {group_size}.")
        self.dataset, self.seed, self.group_size, self.epoch = dataset, seed, group_size, 0

    def set_epoch(self, epoch: int) -> None:
        """Another order, the same again after a restart; passed on to the dataset."""
        self.epoch = epoch
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self.dataset))
        if self.group_size is None:
            return iter(order.tolist())
        lengths = self.dataset.lengths()
        size = self.group_size
        # What does not fill a group comes last, so that groups stay batches.
        whole, rest = order[: len(order) - len(order) % size], order[len(order) - len(order) % size :]
        groups = []
        for start in range(0, len(whole), size * WINDOW_BATCHES):
            window = whole[start : start + size * WINDOW_BATCHES]
            groups.append(window[np.argsort(lengths[window], kind="stable")].reshape(-1, size))
        groups = np.concatenate([*groups, np.zeros((0, size), dtype=order.dtype)])
        random.shuffle(groups)
        if len(groups):
            # The longest batch first: a shortage of memory shows at once.
            longest = int(lengths[groups].max(axis=1).argmax())
            groups[[0, longest]] = groups[[longest, 0]]
        return iter([*groups.flatten().tolist(), *rest.tolist()])


__all__ = ["EpochSampler", "LengthEstimates"]
