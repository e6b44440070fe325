"""Makes the checkpoint that the package carries: everything in one folder, in half precision, with where it is from.

    python training_scripts/nano/finish_model.py WORK            (seconds)
    python training_scripts/nano/finish_model.py WORK --install  (and puts it into the package, in place of the old)
    minimind-o evaluate --suite nano --out WORK/report
    python training_scripts/nano/finish_model.py WORK --report WORK/report   (adds its figures to the package's)

WORK/nano/model gets the model, the processor with codec and voices, `speaker_encoder/` (CAM++), a voice that was not
trained on (`held_out_voices.safetensors`, for evaluation), `provenance.json`, and a model card. Weights are float16 on
disk; the configuration says float32, so they are float32 when loaded.
"""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from make_speech import HELD_OUT_VOICE, VOICES
from minimind_o_hf.processing.voices_minimind_o import load_voices, weights_id
from safetensors.torch import load_file, save_file
from stages import digest_of_files, plot_counts, read_json, read_lines, run_stage, stage_arguments, write_json
from train_codec import read_waveform
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForMultimodalLM, AutoProcessor, MimiModel

import minimind_o_hf
from minimind_o_hf import Voice, VoiceLibrary
from minimind_o_hf.data.building import encode_speech
from minimind_o_hf.files import new_directory, new_file
from minimind_o_hf.packaged import HELD_OUT_VOICES

RECIPE_VERSION = "2"
INSTALLED = Path(minimind_o_hf.__file__).parent / "nano"
STAGES = (
    "corpus",
    "speech",
    "phrases",
    "pictures",
    "tokenizer",
    "codec",
    "speaker_encoder",
    "speech_encoder",
    "vision_encoder",
    "text",
    "data",
    "model",
    "lm",
    "t2a",
    "a2a_projector",
    "a2a",
    "i2t_projector",
    "i2t",
    "scenes",
    "understanding",
    "talker",
    "decoder",
)
CONSENT = "A synthetic voice of flite (CMU), made of recordings that were published for this use."
LICENCE = "flite's own: free use, modification and distribution with its notices"

REPORTED = {
    "CER": ("all", "new answer", "repeat", "spoken", "picture"),
    "CER of recordings": ("all", "repeat"),
    "CER of recordings through the codec": ("all", "repeat"),
    "accuracy": ("typed", "spoken", "picture", "repeat"),
    "cut off": ("all",),
    "right voice nearest": ("seen",),
    "similarity": ("seen", "unseen"),
    "similarity to other voices": ("seen", "unseen"),
}

# flite says a sentence in one way, and the corpus has one answer to a question: there is nothing to choose from. What
# stands beside `do_sample` is transformers' own, which it takes for unset.
GENERATION = {
    "do_sample": False,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "max_new_tokens": 96,
    "audio_repetition_penalty": 1.0,  # frames of one word are alike
    "max_turns": 0,  # it learns from single questions
}

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
knows nothing else**: questions beyond its corpus get fluent nonsense, and in a conversation it takes each question by
itself. It is the default model of this package's
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
        stages[name] = {**done, "settings": started.get("settings"), "figures": figures}
    return {
        "recipe version": RECIPE_VERSION,
        "recipe digest": digest_of_files(*sorted(Path(__file__).parent.glob("*.py"))),
        "stages": stages,
        "licence": "Apache-2.0",
    }


def held_out_voice(work: Path, codec: Any) -> dict[str, torch.Tensor]:
    """The voice that nothing was trained on: codes of one of its recordings, and its embedding."""
    rows = [row for row in read_lines(work / "speech" / "answers.jsonl") if row["voice"] == HELD_OUT_VOICE]
    row = max(rows, key=lambda row: (row["seconds"], row["path"]))
    (codes,) = encode_speech(codec, [read_waveform(work / "speech" / row["path"])], codec.config.num_quantizers)
    embedding = load_file(work / "speaker_encoder" / "voices.safetensors")[HELD_OUT_VOICE]
    return {"ref_codes": torch.from_numpy(codes).long(), "spk_emb": embedding}


def save_voices(voices: Mapping[str, Mapping], codec: Any, speaker_encoder: Any, path: Path) -> None:
    """Voices of flite, with what is known of them."""
    library = VoiceLibrary(path)
    for name, parts in voices.items():
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
            ),
            overwrite=True,
        )
    path.with_name(f".{path.name}.lock").unlink(missing_ok=True)


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
    source = work / "talker" / "model"
    model: Any = AutoModelForMultimodalLM.from_pretrained(source, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(source)
    codec = MimiModel.from_pretrained(work / "decoder" / "model", dtype=torch.float32)
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
        trained = load_voices(work / "data" / "voices.safetensors")
        save_voices(trained, codec, speaker_encoder, temporary / "voices.safetensors")
        unseen = {HELD_OUT_VOICE: held_out_voice(work, codec)}
        save_voices(unseen, codec, speaker_encoder, temporary / HELD_OUT_VOICES)
        write_json(temporary / "provenance.json", origin)
        card = CARD.format(
            millions=parameters / 1e6, voices=", ".join(VOICES), recipe=RECIPE_VERSION, digest=f"`{digest}`"
        )
        (temporary / "README.md").write_text(card, encoding="utf-8")
    sizes = {path.name: size_of(path) for path in sorted(folder.iterdir()) if size_of(path) >= 0.01}
    plot_counts(sizes, "megabytes", folder.parent / "figures.png")
    return {"parameters": parameters, "megabytes": size_of(folder), "inputs": digest}


def size_of(path: Path) -> float:
    """Megabytes of a file, or of all files of a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return round(sum(file.stat().st_size for file in files if file.is_file()) / 1e6, 2)


def install(source: Path) -> None:
    """Copies a checkpoint into the package."""
    with new_directory(INSTALLED, overwrite=True) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)


def add_report(report: Path) -> None:
    """Adds the figures of an evaluation to the installed checkpoint."""
    found = read_json(report / "report.json")
    path = INSTALLED / "provenance.json"
    figures = {
        f"{name}, {what}": round(found["figures"][name][what]["value"], 4)
        for name, kinds in REPORTED.items()
        for what in kinds
        if what in found["figures"].get(name, {})
    }
    about = {name: found["about"][name] for name in ("suite", "questions", "answers", "recogniser")}
    write_json(path, {**read_json(path), "evaluation": {**about, **figures}})


def main(arguments: list[str] | None = None) -> None:
    """Makes the checkpoint, and installs it where that is asked for."""
    parser = stage_arguments(__doc__)
    parser.add_argument("--install", action="store_true", help=f"copy it to {INSTALLED.name}/ in the package")
    parser.add_argument("--report", type=Path, metavar="DIR", help="an evaluation of the installed checkpoint")
    options = parser.parse_args(arguments)
    if options.report:
        add_report(options.report)
        return
    work = options.work
    settings = {"version": RECIPE_VERSION, "script": digest_of_files(__file__), "generation": json.dumps(GENERATION)}
    inputs = [work / name for name in STAGES]
    run_stage(work / "nano", inputs, settings, lambda folder: make_checkpoint(work, folder / "model"))
    if options.install:
        install(work / "nano" / "model")


if __name__ == "__main__":
    sys.exit(main())
