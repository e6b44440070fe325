"""Training data: rows of conversations, samples from rows, batches from samples."""

from .augmentation import FeatureMasking, SpeechAugmentation
from .collator import MiniMindODataCollator
from .reading import MiniMindODataset, MiniMindOIterableDataset
from .samples import Sample, SampleSettings, build_sample, read_row, sample_generator

__all__ = [
    "FeatureMasking",
    "MiniMindODataCollator",
    "MiniMindODataset",
    "MiniMindOIterableDataset",
    "Sample",
    "SampleSettings",
    "SpeechAugmentation",
    "build_sample",
    "read_row",
    "sample_generator",
]
