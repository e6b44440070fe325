"""Training data: rows of conversations, samples from rows, batches from samples."""

from .augmentation import FeatureMasking, SpeechAugmentation
from .collator import MiniMindODataCollator
from .features import FeatureCache, cache_features
from .lengths import EpochSampler
from .reading import MiniMindODataset, MiniMindOIterableDataset
from .samples import Sample, SampleSettings, build_sample, read_row, sample_generator

__all__ = [
    "EpochSampler",
    "FeatureCache",
    "FeatureMasking",
    "MiniMindODataCollator",
    "MiniMindODataset",
    "MiniMindOIterableDataset",
    "Sample",
    "SampleSettings",
    "SpeechAugmentation",
    "build_sample",
    "cache_features",
    "read_row",
    "sample_generator",
]
