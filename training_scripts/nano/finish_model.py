"""Makes the checkpoint that the package carries: everything in one folder, in half precision, with where it is from.

    python training_scripts/nano/finish_model.py WORK            (seconds)
    python training_scripts/nano/finish_model.py WORK --install  (and puts it into the package, in place of the old)

WORK/nano/model gets the model, the processor with codec and voices, `speaker_encoder/` (CAM++), `provenance.json`, and
a model card. Weights are float16 on disk; the configuration says float32, so they are float32 when loaded.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from make_speech import VOICES
from minimind_o_hf.processing.voices_minimind_o import load_voices, weights_id
from safetensors.torch import load_file, save_file
from stages import digest_of_files, read_json, run_stage, stage_arguments, write_json
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForMultimodalLM, AutoProcessor, MimiModel

import minimind_o_hf
from minimind_o_hf import Voice, VoiceLibrary
from minimind_o_hf.files import new_directory, new_file

RECIPE_VERSION = "1"
INSTALLED = Path(minimind_o_hf.__file__).parent / "nano"
STAGES = ("corpus", "speech", "pictures", "tokenizer", "codec", "speaker_encoder", "speech_encoder", "vision_encoder")
STAGES += ("lm", "t2a", "a2a_projector", "a2a", "i2t_projector", "i2t")
CONSENT = "A synthetic voice of flite (CMU), made of recordings that were published for this use."
LICENCE = "flite's own: free use, modification and distribution with its notices"

# Speech is nearly the same each time a sentence is said: there is little to choose from.
GENERATION = {"do_sample": False, "max_new_tokens": 96}

CARD = """---
library_name: transformers
pipeline_tag: any-to-any
language: en
license: apache-2.0
tags: [minimind-o]
---
# MiniMind-O `nano`

A closed-domain toy of {millions:.1f} M parameters that listens, looks at drawn scenes and speaks, trained from nothing
by `training_scripts/nano` on a generated corpus, flite's voices and drawn pictures. It answers small talk, sums up to
twenty, colours, days, animals, simple facts and what the question itself has told, and repeats short sentences. **It
knows nothing else**: questions beyond its corpus get fluent nonsense. It is the default model of this package's
commands, the fixture of its tests and a worked example of "train your own"; it is not minimind-3o.

```python
from transformers import AutoModelForMultimodalLM, AutoProcessor

import minimind_o_hf

path = minimind_o_hf.default_checkpoint()
model, processor = AutoModelForMultimodalLM.from_pretrained(path), AutoProcessor.from_pretrained(path)
```

Voices: {voices} (synthetic, of flite; `VoiceLibrary(path / "voices.safetensors")` shows their notes).
`speaker_encoder/` is the CAM++ that made their embeddings. Weights are float16 on disk and float32 in memory.

Licence of the weights: Apache-2.0. What was learnt from: text and pictures by the recipe's generators, speech by flite
(Debian package `flite`, free licence). Recipe version {recipe}, inputs {digest}; all stages and their figures are in
`provenance.json`.
"""


def provenance(work: Path) -> dict[str, Any]:
    """What the weights were made from: digests that depend on data and settings alone, and every stage's figures."""
    stages = {}
    for name in STAGES:
        done, started = (read_json(work / name / f"{file}.json") or {} for file in ("done", "started"))
        figures = read_json(work / name / "figures.json")
        stages[name] = {"digest": done.get("digest"), "settings": started.get("settings"), "figures": figures}
    return {
        "recipe version": RECIPE_VERSION,
        "recipe digest": digest_of_files(*sorted(Path(__file__).parent.glob("*.py"))),
        "stages": stages,
        "licence": "Apache-2.0",
    }


def save_voices(work: Path, codec: Any, speaker_encoder: Any, path: Path) -> None:
    """The trained voices, with what is known of them."""
    library = VoiceLibrary(path)
    for name, parts in load_voices(work / "data" / "voices.safetensors").items():
        library.add(
            Voice(
                **parts,
                name=name,
                language="en",
                description=f"flite's voice {name}",
                licence=LICENCE,
                consent=CONSENT,
                codec=weights_id(codec),
                speaker_encoder=weights_id(speaker_encoder),
            )
        )


def halve(folder: Path) -> None:
    """Stores the weights of a checkpoint in float16, without changing what its configuration says."""
    path = folder / "model.safetensors"
    tensors = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in load_file(path).items()
    }
    with new_file(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def make_checkpoint(work: Path, folder: Path) -> dict[str, Any]:
    """Fills `folder`; returns its size and what the card says."""
    source = work / "i2t" / "model"
    model: Any = AutoModelForMultimodalLM.from_pretrained(source, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(source)
    codec = MimiModel.from_pretrained(work / "codec" / "model", dtype=torch.float32)
    speaker_folder = work / "speaker_encoder" / "model"
    speaker_encoder = AutoModel.from_pretrained(speaker_folder, dtype=torch.float32)
    for name, value in GENERATION.items():
        setattr(model.generation_config, name, value)
    processor.audio_tokenizer = codec
    origin = provenance(work)
    digest = digest_of_files(*(work / name / "done.json" for name in STAGES))[:16]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    with new_directory(folder, overwrite=True) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        speaker_encoder.save_pretrained(temporary / "speaker_encoder")
        AutoFeatureExtractor.from_pretrained(speaker_folder).save_pretrained(temporary / "speaker_encoder")
        for part in (temporary, temporary / "audio_tokenizer", temporary / "speaker_encoder"):
            halve(part)
        save_voices(work, codec, speaker_encoder, temporary / "voices.safetensors")
        write_json(temporary / "provenance.json", origin)
        card = CARD.format(
            millions=parameters / 1e6, voices=", ".join(VOICES), recipe=RECIPE_VERSION, digest=f"`{digest}`"
        )
        (temporary / "README.md").write_text(card, encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"parameters": parameters, "megabytes": round(size / 1e6, 1), "inputs": digest}


def install(source: Path) -> None:
    """Copies a checkpoint into the package."""
    with new_directory(INSTALLED, overwrite=True) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)


def main(arguments: list[str] | None = None) -> None:
    """Makes the checkpoint, and installs it where that is asked for."""
    parser = stage_arguments(__doc__)
    parser.add_argument("--install", action="store_true", help=f"copy it to {INSTALLED.name}/ in the package")
    options = parser.parse_args(arguments)
    work = options.work
    settings = {"version": RECIPE_VERSION, "script": digest_of_files(__file__), "generation": json.dumps(GENERATION)}
    inputs = [work / name for name in STAGES]
    run_stage(work / "nano", inputs, settings, lambda folder: make_checkpoint(work, folder / "model"))
    if options.install:
        install(work / "nano" / "model")


if __name__ == "__main__":
    sys.exit(main())
