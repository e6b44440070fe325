"""Loading in 8 and 4 bits with transformers' quantizers: which modules stay as they are."""

# By name, for `TorchAoConfig(modules_to_not_convert=...)` and `BitsAndBytesConfig(llm_int8_skip_modules=...)`. A list
# of one's own replaces transformers' default, which keeps the head, so that the head is named here too.
KEPT_IN_FULL_PRECISION = [
    # The text's scores. Tied to the embeddings, which are no Linear: quantised, it would be there twice.
    "lm_head",
    # What codes enter and leave the Talker by. At 4 bits, all else quantised, the codes' loss rises by 0.110 without
    # these two; keeping the first saves 0.020 of it, keeping the second, for a seventh of the room, 0.017. Of the
    # Talker's other parts outside its layers (embed_tokens, embed_proj, spk_proj) none saves anything (nano).
    "talker.lm_head",
    "talker.codec_proj",
    # Small, and run once a prompt; groups of 32 do not divide every encoder's width.
    "audio_proj",
    "vision_proj",
    # Frozen networks of others, which run once a prompt.
    "audio_tower",
    "vision_tower",
]

__all__ = ["KEPT_IN_FULL_PRECISION"]
