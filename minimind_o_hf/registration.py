"""Registers MiniMind-O and its speaker encoder with transformers' Auto classes, so that importing this package is
enough to load their checkpoints.

A registered class wins over a repository's `auto_map`: the original's remote code is neither needed nor run.
"""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForTextToWaveform,
    AutoProcessor,
)

from .modeling import CamPlusPlusConfig, CamPlusPlusModel, MiniMindOConfig, MiniMindOForConditionalGeneration
from .processing import CamPlusPlusFeatureExtractor, MiniMindOFeatureExtractor, MiniMindOProcessor


def register():
    """Registers the classes; calling it again changes nothing."""
    AutoConfig.register(MiniMindOConfig.model_type, MiniMindOConfig, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoModelForTextToWaveform):
        auto_class.register(MiniMindOConfig, MiniMindOForConditionalGeneration, exist_ok=True)
    AutoFeatureExtractor.register(MiniMindOConfig, MiniMindOFeatureExtractor, exist_ok=True)
    AutoProcessor.register(MiniMindOConfig, MiniMindOProcessor, exist_ok=True)
    AutoConfig.register(CamPlusPlusConfig.model_type, CamPlusPlusConfig, exist_ok=True)
    AutoModel.register(CamPlusPlusConfig, CamPlusPlusModel, exist_ok=True)
    AutoFeatureExtractor.register(CamPlusPlusConfig, CamPlusPlusFeatureExtractor, exist_ok=True)


__all__ = ["register"]
