"""Codes to sound and sound to codes with the `moshi` package, for `test_codec_against_moshi.py`.

It runs in an environment that holds `moshi` and nothing of this project: `python codec_on_moshi.py FOLDER` reads
config.json, weights.safetensors and inputs.safetensors there, and writes outputs.safetensors.
"""

import json
import sys
from pathlib import Path

import torch
from moshi.models.loaders import get_mimi
from moshi.modules.transformer import set_attention_context
from safetensors.torch import load_file, save_file


def stream(mimi, function, values, size, ring_size=None, restart=None):
    """`function` of pieces of `size`; the first row begins anew at the piece `restart`."""
    context = mimi.decoder_transformer.transformer.layers[0].self_attn.context
    set_attention_context(mimi, ring_size or context)  # streaming allocates rings as long as the context is now,
    outputs = []
    with mimi.streaming(len(values)):
        set_attention_context(mimi, context)  # and attention sees as much as the context is then
        for index, piece in enumerate(values.split(size, dim=-1)):
            if index == restart:
                mimi.reset_streaming(torch.arange(len(values)) == 0)
            outputs.append(function(piece))
    return torch.cat(outputs, dim=-1)


@torch.no_grad()
def main(folder: Path):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    mimi = get_mimi(folder / "weights.safetensors", config, num_codebooks=config["quantizer"]["n_q"])
    inputs = load_file(folder / "inputs.safetensors")
    outputs = {}
    for name, function, values, size in (
        ("sound", mimi.decode, inputs["codes"], 1),
        ("codes", mimi.encode, inputs["sound"].unsqueeze(1), mimi.frame_size),
    ):
        # A frame is two positions of the attention: it takes a ring of one more than the context for both to see all
        # of theirs. With a ring as long as the context, the second position takes the place of the first one's oldest.
        ring_size = config["transformer"]["context"] + 1
        outputs |= {
            f"{name}.whole": function(values),
            f"{name}.streamed": stream(mimi, function, values, size, ring_size),
            f"{name}.restarted": stream(mimi, function, values, size, ring_size, restart=150),
            f"{name}.short_ring": stream(mimi, function, values, size),
        }
    save_file({name: value.contiguous() for name, value in outputs.items()}, folder / "outputs.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
