"""MiniMind-O for Hugging Face Transformers: text, speech and pictures in; text and speech out.

Importing this package registers the model with transformers' Auto classes.
"""

from .environment import check_torch_pair, locate_subpackages

# Before transformers is imported, which fails without a reason one could act on where the pair cannot load.
check_torch_pair()
locate_subpackages(__path__)

from .conversation import Conversation  # noqa: E402
from .modeling import (  # noqa: E402
    CamPlusPlusConfig,
    CamPlusPlusModel,
    MimiStreamingDecoder,
    MimiStreamingEncoder,
    MimiStreamState,
    MiniMindOCache,
    MiniMindOConfig,
    MiniMindOForConditionalGeneration,
    MiniMindOGenerateOutput,
    MiniMindOIteratorStreamer,
    MiniMindOOutputWithPast,
    MiniMindOPreTrainedModel,
    MiniMindOStackOutput,
    MiniMindOStreamer,
    MiniMindOStreamEvent,
    MiniMindOTalkerModel,
    MiniMindOThinkerModel,
    apply_delay_pattern,
    place_voice,
    revert_delay_pattern,
)
from .packaged import default_checkpoint  # noqa: E402
from .processing import (  # noqa: E402
    CamPlusPlusFeatureExtractor,
    MiniMindOAnswer,
    MiniMindOFeatureExtractor,
    MiniMindOProcessor,
    load_audio,
    read_mark,
)
from .registration import register  # noqa: E402
from .voices import Voice, VoiceLibrary  # noqa: E402

register()

__all__ = [
    "CamPlusPlusConfig",
    "CamPlusPlusFeatureExtractor",
    "CamPlusPlusModel",
    "Conversation",
    "MimiStreamState",
    "MimiStreamingDecoder",
    "MimiStreamingEncoder",
    "MiniMindOAnswer",
    "MiniMindOCache",
    "MiniMindOConfig",
    "MiniMindOFeatureExtractor",
    "MiniMindOForConditionalGeneration",
    "MiniMindOGenerateOutput",
    "MiniMindOIteratorStreamer",
    "MiniMindOOutputWithPast",
    "MiniMindOPreTrainedModel",
    "MiniMindOProcessor",
    "MiniMindOStackOutput",
    "MiniMindOStreamEvent",
    "MiniMindOStreamer",
    "MiniMindOTalkerModel",
    "MiniMindOThinkerModel",
    "Voice",
    "VoiceLibrary",
    "apply_delay_pattern",
    "default_checkpoint",
    "load_audio",
    "place_voice",
    "read_mark",
    "revert_delay_pattern",
]
