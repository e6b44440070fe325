"""Configuration, model and generation of MiniMind-O, its speaker encoder and the streaming codec. These files import
only each other and transformers."""

if __name__ == "modeling":
    # Python started in the repository's root finds this folder under its bare name too, as a second copy of every
    # class.
    raise ImportError("Import minimind_o_hf.modeling: the folder `modeling` is part of that package.")

from .adapters_minimind_o import adapters_in_use, check_base, describe_base, read_base
from .cache_minimind_o import MiniMindOCache, MiniMindOSlotCache
from .configuration_campplus import CamPlusPlusConfig
from .configuration_minimind_o import MiniMindOConfig
from .delay_pattern_minimind_o import apply_delay_pattern, place_voice, revert_delay_pattern
from .generation_minimind_o import MiniMindODecoding, MiniMindOGenerateOutput, MiniMindOStreamer
from .modeling_campplus import CamPlusPlusModel, CamPlusPlusOutput, CamPlusPlusPreTrainedModel
from .modeling_minimind_o import (
    MiniMindOForConditionalGeneration,
    MiniMindOOutputWithPast,
    MiniMindOPreTrainedModel,
    MiniMindOStackOutput,
    MiniMindOTalkerModel,
    MiniMindOThinkerModel,
)
from .streaming_codec_minimind_o import MimiStreamingDecoder, MimiStreamingEncoder, MimiStreamState
from .streaming_minimind_o import (
    MiniMindOIteratorStreamer,
    MiniMindOStreamEvent,
    stream_answers,
    stream_answers_async,
)

__all__ = [
    "CamPlusPlusConfig",
    "CamPlusPlusModel",
    "CamPlusPlusOutput",
    "CamPlusPlusPreTrainedModel",
    "MimiStreamState",
    "MimiStreamingDecoder",
    "MimiStreamingEncoder",
    "MiniMindOCache",
    "MiniMindOConfig",
    "MiniMindODecoding",
    "MiniMindOForConditionalGeneration",
    "MiniMindOGenerateOutput",
    "MiniMindOIteratorStreamer",
    "MiniMindOOutputWithPast",
    "MiniMindOPreTrainedModel",
    "MiniMindOSlotCache",
    "MiniMindOStackOutput",
    "MiniMindOStreamEvent",
    "MiniMindOStreamer",
    "MiniMindOTalkerModel",
    "MiniMindOThinkerModel",
    "adapters_in_use",
    "apply_delay_pattern",
    "check_base",
    "describe_base",
    "place_voice",
    "read_base",
    "revert_delay_pattern",
    "stream_answers",
    "stream_answers_async",
]
