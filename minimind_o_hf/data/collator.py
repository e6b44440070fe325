"""Batches: samples of different lengths as the model's arguments, padded or packed."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from minimind_o_hf.modeling import MiniMindOConfig
from minimind_o_hf.processing import MiniMindOProcessor
from minimind_o_hf.processing.image_minimind_o import load_image

from .augmentation import FeatureMasking
from .reading import PendingSample
from .samples import Sample

# What stands in the padding of a sample's fields; of `audio_codes`, the configuration says.
_PADDING = {"input_ids": 0, "labels": -100, "audio_labels": -100}


@dataclass
class MiniMindODataCollator:
    """
    Pads samples on the right to the longest of the batch, or packs them one after another into rows, and prepares
    their speech and pictures.

    The attention mask hides the padding of the batch and nothing else: positions after a text's end carry speech. A
    packed batch has none: its position ids, which start at 0 with each sample, keep samples from seeing each other.

    Args:
        processor ([`MiniMindOProcessor`]): Its feature extractor and image processor.
        config ([`MiniMindOConfig`]): The model's.
        pad_to_multiple_of (`int`, *optional*): Round the length up, for hardware that likes it.
        feature_masking ([`FeatureMasking`], *optional*):
            What is done to speech features; `None` for nothing. Outputs of the encoder, from a cache, stay as they
            are.
        packing (`bool`, defaults to `False`): Whether samples are packed.
        pack_length (`int`, *optional*):
            Length of a packed row, in positions (a longer sample has a row of its own). Without, all samples are one
            row, which flash attention needs and other attention pays for with the square of its length.
        include_row_ids (`bool`, defaults to `False`): Adds `row_ids` `(B,)`, for a trainer that names rows in errors.
    """

    processor: MiniMindOProcessor
    config: MiniMindOConfig
    pad_to_multiple_of: int | None = None
    feature_masking: FeatureMasking | None = field(default_factory=FeatureMasking)
    packing: bool = False
    pack_length: int | None = None
    include_row_ids: bool = False

    def __post_init__(self):
        for name in ("pad_to_multiple_of", "pack_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.pack_length is not None and not self.packing:
            raise ValueError(f"`pack_length` is the length of packed rows: set `packing`, got {self.pack_length}.")

    def __call__(self, samples: Sequence[Sample | PendingSample]) -> dict[str, torch.Tensor]:
        """
        Args:
            samples (`list` of [`Sample`]): At least one.

        Returns:
            `dict` with `input_ids`, `labels`, `attention_mask` `(B, T)`, `audio_codes`, `audio_labels` `(B, 8, T)`;
            with speech `input_features` `(clips, frames, 560)` and `input_features_mask` `(clips, frames)`; with
            pictures `pixel_values` `(pictures, 3, 256, 256)`; with voices `speaker_embeddings` `(B, 192)`, zeros where
            there is none. From a cache: `audio_hidden_states` `(clips, frames, 512)` and `image_hidden_states`
            `(pictures, 64, 768)` in place of features and pixels. Packed: `position_ids` `(B, T)` in place of
            `attention_mask`, and `speaker_embeddings` `(B, T, 192)`. B is then the number of packed rows.
        """
        samples = [sample.build() if isinstance(sample, PendingSample) else sample for sample in samples]
        if not samples:
            raise ValueError("A batch needs at least one sample, got none.")
        rows = _pack(samples, self.pack_length) if self.packing else [[sample] for sample in samples]
        length = max(sum(len(sample.input_ids) for sample in row) for row in rows)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of

        def lay_out(name: str, value: int) -> torch.Tensor:
            joined = [torch.cat([getattr(sample, name) for sample in row], dim=-1) for row in rows]
            return torch.stack([pad(row, (0, length - row.shape[-1]), value=value) for row in joined])

        padding = {**_PADDING, "input_ids": self.config.pad_token_id or 0, "audio_codes": self.config.audio_pad_token}
        batch = {name: lay_out(name, value) for name, value in padding.items()}
        starts = [np.cumsum([0, *(len(sample.input_ids) for sample in row)]).tolist() for row in rows]
        if self.packing:
            batch["position_ids"] = torch.stack([_positions(row, length) for row in starts])
            for row, ends in enumerate(starts):
                # No sample's first position is predicted from the one before it.
                first = [start for start in ends if start < length]
                batch["labels"][row, first] = -100
                batch["audio_labels"][row, :, first] = -100
            samples = [sample for row in rows for sample in row]
        else:
            ends = torch.tensor([row[-1] for row in starts])
            batch["attention_mask"] = (torch.arange(length) < ends[:, None]).long()
        if any(sample.clips for sample in samples):
            batch |= self._speech(samples)
        images: list[Any] = [image for sample in samples for image in sample.images]
        if images and isinstance(images[0], torch.Tensor):
            batch["image_hidden_states"] = torch.stack(images)
        elif images:
            pictures = []
            for sample in samples:
                with _naming(sample):
                    pictures += [load_image(image) for image in sample.images]
            batch["pixel_values"] = self.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        if any(sample.speaker_embedding is not None for sample in samples):
            voices = torch.zeros(len(rows), length if self.packing else 1, self.config.spk_emb_size)
            for row, (packed, ends) in enumerate(zip(rows, starts, strict=True)):
                for sample, start, end in zip(packed, ends, ends[1:], strict=False):
                    if sample.speaker_embedding is not None:
                        voices[row, start:end] = sample.speaker_embedding
            batch["speaker_embeddings"] = voices if self.packing else voices[:, 0]
        if self.include_row_ids:
            batch["row_ids"] = torch.tensor([sample.row_id for sample in samples])
        return batch

    def _speech(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        clips: list[Any] = [clip for sample in samples for clip in sample.clips]
        if isinstance(clips[0], torch.Tensor):
            lengths = torch.tensor([len(clip) for clip in clips])
            mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
            return {"audio_hidden_states": pad_sequence(clips, batch_first=True), "input_features_mask": mask}
        extractor = self.processor.feature_extractor
        limit = None if self.config.audio_config is None else self.config.audio_config.max_position_embeddings - 1
        for sample in samples:
            frames = max((extractor.num_frames(len(clip)) for clip in sample.clips), default=0)
            if limit is not None and frames > limit:
                with _naming(sample):
                    raise ValueError(f"a clip of {frames} frames is longer than the speech encoder's {limit}: cut it.")
        outputs = extractor(clips, return_tensors="pt")
        features, mask = outputs["input_features"], outputs["input_features_mask"]
        if self.feature_masking is not None:
            seeds = [sample.feature_seed for sample in samples for _ in sample.clips]
            for row, frames, seed in zip(features, mask.sum(dim=1).tolist(), seeds, strict=True):
                row[:frames] = self.feature_masking(row[:frames], np.random.default_rng(seed))
        return {"input_features": features, "input_features_mask": mask}


@contextlib.contextmanager
def _naming(sample: Sample) -> Iterator[None]:
    """Names the row of a sample whose inputs cannot be used."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"Row {sample.row_id} cannot be trained on: {error}") from error


def _pack(samples: Sequence[Sample], pack_length: int | None) -> list[list[Sample]]:
    """Shares samples out to rows: the longest first, each to the first row that has room (first-fit decreasing)."""
    if pack_length is None:
        return [list(samples)]
    rows: list[list[Sample]] = []
    room: list[int] = []
    for sample in sorted(samples, key=lambda sample: -len(sample.input_ids)):
        length = len(sample.input_ids)
        row = next((row for row, left in enumerate(room) if left >= length), None)
        if row is None:
            rows.append([])
            room.append(pack_length)
            row = len(rows) - 1
        rows[row].append(sample)
        room[row] -= length
    return rows


def _positions(ends: list[int], length: int) -> torch.LongTensor:
    """0, 1, 2 … from the start of each sample, and of the padding."""
    ends = ends if ends[-1] == length else [*ends, length]
    return torch.cat([torch.arange(end - start) for start, end in zip(ends, ends[1:], strict=False)])


__all__ = ["MiniMindODataCollator"]
