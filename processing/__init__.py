"""What goes in and comes out: speech, pictures, chats and voices to the model's inputs, its outputs to sound."""

if __name__ == "processing":
    # Python started in the repository's root finds this folder under its bare name too, as a second copy of every
    # class.
    raise ImportError("Import minimind_o_hf.processing: the folder `processing` is part of that package.")

from .audio_minimind_o import load_audio
from .chat_template_minimind_o import CHAT_TEMPLATE
from .feature_extraction_campplus import CamPlusPlusFeatureExtractor
from .feature_extraction_minimind_o import MiniMindOFeatureExtractor
from .marks_minimind_o import make_mark, read_mark
from .processing_minimind_o import MiniMindOAnswer, MiniMindOProcessor

__all__ = [
    "CHAT_TEMPLATE",
    "CamPlusPlusFeatureExtractor",
    "MiniMindOAnswer",
    "MiniMindOFeatureExtractor",
    "MiniMindOProcessor",
    "load_audio",
    "make_mark",
    "read_mark",
]
