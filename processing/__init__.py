"""What goes in and comes out: speech, pictures, chats and voices to the model's inputs, its outputs to sound."""

from .audio_minimind_o import load_audio
from .chat_template_minimind_o import CHAT_TEMPLATE
from .feature_extraction_minimind_o import MiniMindOFeatureExtractor
from .processing_minimind_o import MiniMindOAnswer, MiniMindOProcessor

__all__ = ["CHAT_TEMPLATE", "MiniMindOAnswer", "MiniMindOFeatureExtractor", "MiniMindOProcessor", "load_audio"]
