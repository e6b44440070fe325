"""Puts the parts of the package's nano where the recipe's stages look for them, so that one can go on from there.

    python training_scripts/nano/restore.py WORK

Tokenizer, codec and the three encoders become finished stages of WORK, with the digests and figures that the
checkpoint carries, for the stages after them; WORK/talker gets the model. WORK/codec has the finished decoder, and
the speech encoder lacks its heads, which are not in the checkpoint. A stage that is then run with other settings or
inputs than those it had empties its folder and trains anew.
"""

import copy
import shutil
import sys
from pathlib import Path
from typing import Any

from minimind_o_hf.processing.voices_minimind_o import load_voices
from safetensors.torch import save_file
from stages import read_json, stage_arguments, write_json
from transformers import AutoModelForMultimodalLM, AutoProcessor

from minimind_o_hf import default_checkpoint
from minimind_o_hf.files import new_directory, new_file
from minimind_o_hf.packaged import HELD_OUT_VOICES

PARTS = ("tokenizer", "codec", "decoder", "speaker_encoder", "speech_encoder", "vision_encoder", "talker")


def write_part(name: str, source: Path, model: Any, processor: Any, folder: Path) -> None:
    """Writes what `from_pretrained` loads of one part."""
    if name == "tokenizer":
        processor.tokenizer.save_pretrained(folder)
    elif name in ("codec", "decoder"):  # one with the other's decoder
        copy.deepcopy(processor.audio_tokenizer).half().save_pretrained(folder)
    elif name == "speaker_encoder":
        shutil.copytree(source / name, folder, dirs_exist_ok=True)
    elif name == "talker":
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    else:
        part, prepares = {
            "speech_encoder": (model.audio_tower, processor.feature_extractor),
            "vision_encoder": (model.vision_tower, processor.image_processor),
        }[name]
        copy.deepcopy(part).half().save_pretrained(folder)
        prepares.save_pretrained(folder)


def restore(source: Path, work: Path) -> None:
    """
    Restores all parts.

    Args:
        source (`Path`): A checkpoint that `finish_model.py` has made.
        work (`Path`): Of all stages; finished stages that stand there are kept.
    """
    stages = read_json(source / "provenance.json")["stages"]
    model = AutoModelForMultimodalLM.from_pretrained(source)
    processor = AutoProcessor.from_pretrained(source)
    for name in PARTS:
        folder = work / name
        if (folder / "done.json").exists():
            sys.stderr.write(f"{folder}: kept\n")
            continue
        with new_directory(folder) as temporary:
            write_part(name, source, model, processor, temporary / "model")
            if name == "speaker_encoder":
                voices = load_voices(source / "voices.safetensors") | load_voices(source / HELD_OUT_VOICES)
                embeddings = {voice: parts["spk_emb"] for voice, parts in voices.items()}
                with new_file(temporary / "voices.safetensors") as path:
                    save_file(embeddings, path)
            known = stages[name]
            write_json(temporary / "figures.json", known["figures"])
            write_json(temporary / "started.json", {"digest": known["digest"], "settings": known["settings"]})
            write_json(temporary / "done.json", {"digest": known["digest"], "output": known["output"]})


def main(arguments: list[str] | None = None) -> None:
    """Restores the parts of the package's checkpoint."""
    options = stage_arguments(__doc__).parse_args(arguments)
    restore(default_checkpoint(), options.work)


if __name__ == "__main__":
    sys.exit(main())
