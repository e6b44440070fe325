"""Batches: samples of different lengths as the model's arguments."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from minimind_o_hf.modeling import MiniMindOConfig
from minimind_o_hf.processing import MiniMindOProcessor
from minimind_o_hf.processing.image_minimind_o import load_image

from .augmentation import FeatureMasking
from .samples import Sample


@dataclass
class MiniMindODataCollator:
    """
    Pads samples on the right to the longest of the batch and prepares their speech and pictures.

    The attention mask hides the padding of the batch and nothing else: positions after a text's end carry speech.

    Args:
        processor ([`MiniMindOProcessor`]): Its feature extractor and image processor.
        config ([`MiniMindOConfig`]): The model's.
        pad_to_multiple_of (`int`, *optional*): Round the length up, for hardware that likes it.
        feature_masking ([`FeatureMasking`], *optional*): What is done to speech features; `None` for nothing.
        include_row_ids (`bool`, defaults to `False`): Adds `row_ids` `(B,)`, for a trainer that names rows in errors.
    """

    processor: MiniMindOProcessor
    config: MiniMindOConfig
    pad_to_multiple_of: int | None = None
    feature_masking: FeatureMasking | None = field(default_factory=FeatureMasking)
    include_row_ids: bool = False

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """
        Args:
            samples (`list` of [`Sample`]): At least one.

        Returns:
            `dict` with `input_ids`, `labels`, `attention_mask` `(B, T)`, `audio_codes`, `audio_labels` `(B, 8, T)`;
            with speech `input_features` `(clips, frames, 560)` and `input_features_mask` `(clips, frames)`; with
            pictures `pixel_values` `(pictures, 3, 256, 256)`; with voices `speaker_embeddings` `(B, 192)`, zeros where
            there is none.
        """
        if not samples:
            raise ValueError("A batch needs at least one sample, got none.")
        length = max(len(sample.input_ids) for sample in samples)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of

        def pad(name: str, value: int) -> torch.Tensor:
            rows = [getattr(sample, name) for sample in samples]
            return torch.stack(
                [torch.nn.functional.pad(row, (0, length - row.shape[-1]), value=value) for row in rows]
            )

        lengths = torch.tensor([len(sample.input_ids) for sample in samples])
        batch = {
            "input_ids": pad("input_ids", self.config.pad_token_id or 0),
            "labels": pad("labels", -100),
            "audio_codes": pad("audio_codes", self.config.audio_pad_token),
            "audio_labels": pad("audio_labels", -100),
            "attention_mask": (torch.arange(length) < lengths[:, None]).long(),
        }
        clips = [clip for sample in samples for clip in sample.clips]
        if clips:
            batch |= self._speech(samples, clips)
        images = [load_image(image) for sample in samples for image in sample.images]
        if images:
            batch["pixel_values"] = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        if any(sample.speaker_embedding is not None for sample in samples):
            none = torch.zeros(self.config.spk_emb_size)
            batch["speaker_embeddings"] = torch.stack(
                [none if sample.speaker_embedding is None else sample.speaker_embedding for sample in samples]
            )
        if self.include_row_ids:
            batch["row_ids"] = torch.tensor([sample.row_id for sample in samples])
        return batch

    def _speech(self, samples: Sequence[Sample], clips: list[np.ndarray]) -> dict[str, torch.Tensor]:
        outputs = self.processor.feature_extractor(clips, return_tensors="pt")
        features, mask = outputs["input_features"], outputs["input_features_mask"]
        if self.feature_masking is not None:
            seeds = [sample.feature_seed for sample in samples for _ in sample.clips]
            for row, frames, seed in zip(features, mask.sum(dim=1).tolist(), seeds, strict=True):
                row[:frames] = self.feature_masking(row[:frames], np.random.default_rng(seed))
        return {"input_features": features, "input_features_mask": mask}


__all__ = ["MiniMindODataCollator"]
