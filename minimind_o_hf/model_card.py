"""The model card of what is published: its own text, and what its files tell of licence, training and voices."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from .modeling import MiniMindOForConditionalGeneration
from .processing.voices_minimind_o import VOICES_NAME
from .training_report import SECTION as TRAINING_SECTION
from .training_report import is_hub_id
from .voices import Voice, VoiceLibrary

# In the card's metadata: what was published with this package may be replaced by it.
MARKER = "published_with"
SECTION = ("<!-- publishing: start -->", "<!-- publishing: end -->")
UNSTATED = "not stated"

USE = """## Use it

```python
from transformers import AutoModelForMultimodalLM, AutoProcessor

model = AutoModelForMultimodalLM.from_pretrained("{repo_id}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{repo_id}", trust_remote_code=True)

chat = [{{"role": "user", "content": "Hello!"}}]
inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True{voice})
answer = processor.decode(model.generate(**inputs))[0]
print(answer.text)
processor.save_audio(answer.audio, "answer.wav")
```

It needs transformers 5.23, torch and torchaudio; files of sound also `soundfile`, pictures also `pillow`. With the
package `minimind_o_hf` installed and imported, no remote code is run and `trust_remote_code` is not needed.
"""

LIMITS = """## Limits

* {parameters} M parameters: what it says can be wrong, made up or offensive, and it does not know that it is.
* It knows the languages, the voices and the subjects of its training data, and little else. Noise, accents, crosstalk
  and unclear pictures make it mishear and misread.
* A clip of speech may last 122 s. Its own speech is what a small codec gives, and words can be left out or repeated.
"""

RESPONSIBLE = """## Responsible use

* Clone and use voices only of people who agreed to it, and for what they agreed to. Do not impersonate anybody.
* Tell listeners that they hear a machine. `save_audio` marks files as AI-generated; leave the mark in.
* Do not let it decide, and do not rely on it, in matters of health, law, money or safety.
"""

ADAPTER_USE = """## Use it

```python
import minimind_o_hf  # pip install minimind_o_hf[train]
from peft import PeftModel
from transformers import AutoModelForMultimodalLM, AutoProcessor

model = AutoModelForMultimodalLM.from_pretrained("{base}"{revision})
processor = AutoProcessor.from_pretrained("{base}"{revision})
model = PeftModel.from_pretrained(model, "{repo_id}")
print(processor.load_voices("{repo_id}"))  # those that it carries
```

or `model.load_adapter("{repo_id}", "NAME")` on the model itself, which refuses an adapter of another model, holds
several adapters, and switches between them (`model.set_adapter("NAME")`). `minimind-o adapter merge {repo_id} DIR`
makes a checkpoint of the two.
"""

VOICES_USE = """```python
from huggingface_hub import hf_hub_download
from minimind_o_hf import VoiceLibrary

library = VoiceLibrary(hf_hub_download("{repo_id}", "{file}"))
print(library.names())
```

Use them only for what the speakers agreed to, tell listeners that they hear a machine, and do not impersonate anybody.
"""


def build_card(folder: Path, repo_id: str, model: MiniMindOForConditionalGeneration) -> str:
    """
    The `README.md` of a checkpoint: the one it has, with metadata completed, and a section of what is known of it,
    which takes the place of one that is there.

    Args:
        folder (`Path`): The checkpoint; its `README.md`, `provenance.json` and `voices.safetensors` are read.
        repo_id (`str`): Where it is published.
        model ([`MiniMindOForConditionalGeneration`]): The checkpoint's model.

    Raises:
        ValueError: The metadata of its `README.md` are no mapping.
    """
    readme, provenance = folder / "README.md", folder / "provenance.json"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else f"# {repo_id.partition('/')[2]}\n"
    card = _parse(text)
    origin = json.loads(provenance.read_text(encoding="utf-8")) if provenance.is_file() else {}
    voices = VoiceLibrary(folder / VOICES_NAME).voices()
    data: Any = card.data
    training = text.partition(TRAINING_SECTION[0])[2].partition(TRAINING_SECTION[1])[0]
    base = _told(training, "base model")
    data.library_name, data.pipeline_tag = "transformers", "any-to-any"
    data.license = data.license or _licence(str(origin.get("licence", "")))
    data.language = data.language or _languages(voices)
    data.base_model = data.base_model or (base if is_hub_id(base) else None)
    _mark(data)
    sections = [
        USE.format(repo_id=repo_id, voice=f', voice="{min(voices)}"' if voices else ""),
        _facts(data, model, base, _told(training, "training data") or _data_of_stages(origin)),
        _training(origin),
        _evaluation(origin),
        "## Voices\n\n" + _voice_table(voices) if voices else "",
        LIMITS.format(parameters=_millions(model)),
        RESPONSIBLE,
    ]
    card.text = _with_section(card.text, sections)
    return str(card)


def _with_section(text: str, sections: Iterable[str]) -> str:
    """A card's text with our section, in the place of one that is there."""
    body = "\n".join(section for section in sections if section)
    before, _, rest = text.partition(SECTION[0])
    after = rest.partition(SECTION[1])[2].strip()
    return f"{before.rstrip()}\n\n{SECTION[0]}\n{body}{SECTION[1]}\n" + (f"\n{after}\n" if after else "")


def build_adapter_card(
    folder: Path, repo_id: str, base: str, revision: str | None, licence: str | None, about: str
) -> str:
    """
    The `README.md` of an adapter: the one that its training left, with metadata completed, and a section of what it
    is; PEFT's form to be filled in is replaced.

    Args:
        folder (`Path`): The adapter; its `README.md` and `voices.safetensors` are read.
        repo_id (`str`): Where it is published.
        base (`str`), revision (`str`, *optional*): Hub id and commit of its base.
        licence (`str`, *optional*): The base's, which is the adapter's where it states none.
        about (`str`): What it says of itself.
    """
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if not any(mark in text for mark in (TRAINING_SECTION[0], SECTION[0])):
        text = f"# {repo_id.partition('/')[2]}\n\nAn adapter for MiniMind-O.\n"
    card = _parse(text)
    voices = VoiceLibrary(folder / VOICES_NAME).voices()
    data: Any = card.data
    data.library_name, data.pipeline_tag, data.base_model = "peft", "any-to-any", base
    data.base_model_relation = "adapter"
    data.license = data.license or licence
    data.language = data.language or _languages(voices)
    data.tags = ["lora", *(data.tags or [])]
    _mark(data)
    stated = f', revision="{revision}"' if revision else ""
    sections = [
        ADAPTER_USE.format(repo_id=repo_id, base=base, revision=stated),
        f"## What it is\n\n```\n{about}\n```\n",
        "## Voices\n\n" + _voice_table(voices) if voices else "",
        RESPONSIBLE,
    ]
    card.text = _with_section(card.text, sections)
    return str(card)


def build_merged_card(folder: Path, name: str, base: str, adapter: str) -> str:
    """The `README.md` of a checkpoint that an adapter was merged into; `folder` is its base's."""
    readme = folder / "README.md"
    card = _parse(readme.read_text(encoding="utf-8") if readme.is_file() else "")
    data: Any = card.data
    data.library_name, data.pipeline_tag = "transformers", "any-to-any"
    data.base_model = [id for id in (base, adapter) if is_hub_id(id)] or None
    data.tags = sorted({"minimind-o", *(data.tags or [])})
    if MARKER in data.to_dict():
        delattr(data, MARKER)
    # A published card should not tell of this machine's folders.
    names = [source if is_hub_id(source) else Path(source).resolve().name for source in (base, adapter)]
    card.text = (
        f"# {name}\n\nMiniMind-O: `{names[0]}` with the adapter `{names[1]}` merged into it. What is known of "
        "the base's training and figures holds for the base.\n"
    )
    return str(card)


def build_voices_card(voices: Mapping[str, Voice], repo_id: str) -> str:
    """The `README.md` of a published library of voices."""
    use = VOICES_USE.format(repo_id=repo_id, file=VOICES_NAME)
    card = _parse(f"# Voices for MiniMind-O\n\n{_voice_table(voices)}\n{use}")
    data: Any = card.data
    licences = {voice.licence for voice in voices.values()}
    data.license = _licence(licences.pop()) if len(licences) == 1 else "other"
    data.language = _languages(voices)
    data.tags = ["voices"]
    _mark(data)
    return str(card)


def _parse(text: str) -> ModelCard:
    return ModelCard(text if text.startswith("---") else f"---\n{{}}\n---\n{text}")


def _mark(data: Any) -> None:
    data.tags = sorted({"minimind-o", *(data.tags or [])})
    data[MARKER] = f"minimind_o_hf {version('minimind_o_hf')}"


def _licence(text: str) -> str | None:
    """The Hub's id of a licence; "other" for one that is described in words."""
    return (text.lower() if re.fullmatch(r"[\w.+-]+", text) else "other") if text else None


def _languages(voices: Mapping[str, Voice]) -> list[str] | None:
    """Those of the voices that are ISO codes, which alone the Hub takes."""
    found = {voice.language for voice in voices.values()}
    return sorted(language for language in found if re.fullmatch("[a-z]{2,3}", language)) or None


def _told(training: str, name: str) -> str | None:
    """A setting in the section that a training leaves in a card."""
    found = re.search(rf"^\| {name} \| (.+) \|$", training, flags=re.MULTILINE)
    return found[1] if found else None


def _millions(module: Any) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.1f}"


def _facts(data: Any, model: MiniMindOForConditionalGeneration, base: str | None, trained_on: Any) -> str:
    parts = {"Thinker": model.model, "Talker": model.talker, "speech encoder": model.audio_tower}
    parts["vision encoder"] = model.vision_tower
    sizes = [f"{name} {_millions(part)} M" for name, part in parts.items() if part is not None]
    rows = {
        "licence": data.license,
        "languages": data.language,
        "base model": data.base_model or base,
        "datasets": data.datasets or trained_on,
        "parameters": f"{_millions(model)} M ({', '.join(sizes)})",
        "experts": model.config.num_experts if model.config.use_moe else "none, dense",
    }
    return "## What it is\n\n" + _table(("", ""), [(name, value or UNSTATED) for name, value in rows.items()])


def _stages(origin: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The stages of a recipe that trained the model, where `provenance.json` tells of them."""
    return {name: stage for name, stage in origin.get("stages", {}).items() if "mode" in stage.get("settings", {})}


def _data_of_stages(origin: Mapping[str, Any]) -> list[str]:
    return [f"the recipe's {name}" for stage in _stages(origin).values() for name in stage["settings"].get("data", [])]


def _training(origin: Mapping[str, Any]) -> str:
    if not (stages := _stages(origin)):
        return ""
    told = ("mode", "data", "steps", "batch", "rate", "talker_rate", "optimiser")
    rows = [
        (name, *(stage["settings"].get(key) for key in told), stage.get("figures", {}).get("eval_loss"))
        for name, stage in stages.items()
    ]
    head = (
        "stage",
        "trained",
        "data",
        "steps",
        "batch",
        "learning rate",
        "of the Talker",
        "optimiser",
        "held-out loss",
    )
    return "## How it was trained\n\n" + _table(head, rows)


def _evaluation(origin: Mapping[str, Any]) -> str:
    figures = origin.get("evaluation") or {}
    return "## Evaluation\n\n" + _table(("figure", "value"), figures.items()) if figures else ""


def _voice_table(voices: Mapping[str, Voice]) -> str:
    notes = ("language", "licence", "consent", "description")
    rows = [(name, *(getattr(voice, note) or UNSTATED for note in notes)) for name, voice in voices.items()]
    return _table(("voice", *notes), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(str, dict.fromkeys(value)))
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


__all__ = ["MARKER", "build_adapter_card", "build_card", "build_merged_card", "build_voices_card"]
