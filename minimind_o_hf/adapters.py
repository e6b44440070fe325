"""LoRA adapters for the Thinker, the Talker or both, with PEFT: made, looked at, merged and published."""

import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers.utils.hub import cached_file

try:
    from peft import (
        LoraConfig,
        PeftConfig,
        PeftModel,
        PeftModelForCausalLM,
        get_peft_model_state_dict,
        load_peft_weights,
    )
except ImportError as error:
    raise ImportError('Adapters need PEFT: pip install "minimind_o_hf[train]"') from error

from .files import new_directory, new_file
from .model_card import build_adapter_card, build_merged_card
from .modeling import MiniMindOForConditionalGeneration, check_base, describe_base, read_base
from .modeling.adapters_minimind_o import BASE_NAME, CONFIG_NAME, WEIGHTS_NAME, check_weights, write_base
from .processing import MiniMindOProcessor
from .processing.voices_minimind_o import VOICES_NAME
from .publishing import CHECKPOINT_FILES, PICKLES, check_answer, check_name, upload
from .training_report import is_hub_id
from .voices import Voice, VoiceLibrary

ADAPTER_FILES = (CONFIG_NAME, WEIGHTS_NAME, BASE_NAME, VOICES_NAME, "README.md", "training_curves.png")
# Of a checkpoint, what tells of its weights, or is them.
_OF_WEIGHTS = re.compile(r"model.*\.safetensors(\.index\.json)?|README\.md|provenance\.json|training_curves\.png")
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHECKPOINT = ["*.json", "*.safetensors", "*.jinja", "*.md", "*.txt", "LICENSE*", "NOTICE*"]

PARTS: dict[str, str] = {"model": "Thinker", "talker": "Talker"}
PRESETS = ("thinker", "talker", "all")
_LAYERS = r"(?:self_attn\.(?:q|k|v|o)_proj|mlp\.(?:gate|up|down)_proj)"
_STACKS = {"thinker": "model", "talker": "talker", "all": "(?:model|talker)"}


def lora_config(
    preset: str = "all",
    rank: int = 16,
    alpha: int | None = None,
    dropout: float = 0.0,
    train_codec: bool = False,
    **kwargs,
) -> LoraConfig:
    """
    The LoRA configuration of a preset: attention and MLP of every layer of the chosen stacks. (A mixture of experts
    keeps its experts; their attention is adapted.)

    Args:
        preset (`str`, defaults to `"all"`): `thinker`, `talker` or `all`.
        rank (`int`, defaults to 16): Rank of the adapters.
        alpha (`int`, *optional*): Their scale; twice the rank by default.
        dropout (`float`, defaults to 0.0): Dropout before them.
        train_codec (`bool`, defaults to `False`):
            Whether the Talker's codec embedding and head are trained whole and saved with the adapter (12 M parameters
            at the released size), which a new voice or codec may need. Not with `thinker`.
        **kwargs: Further arguments of [`LoraConfig`].

    Raises:
        ValueError: There is no such preset, or it has no codec.
    """
    if preset not in PRESETS:
        raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {preset!r}.")
    if train_codec and preset == "thinker":
        raise ValueError("`train_codec` trains parts of the Talker: use the preset 'talker' or 'all'.")
    codec = ["talker.embed_tokens", "talker.lm_head"] if train_codec else None
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=rf"{_STACKS[preset]}\.layers\.\d+\.{_LAYERS}",
        modules_to_save=codec,
        task_type="CAUSAL_LM",
        **kwargs,
    )


class MiniMindOAdapted(PeftModelForCausalLM):
    """
    A `PeftModel` of MiniMind-O, which [`get_peft_model`] makes: beside an adapter that it saves, or pushes to the Hub,
    it writes which model the adapter belongs to.
    """

    def __init__(self, model: MiniMindOForConditionalGeneration, peft_config: Any, *args, **kwargs):
        self._base = describe_base(model)  # now, while it is whole: training may spread it over processes
        super().__init__(model, peft_config, *args, **kwargs)

    def save_pretrained(self, save_directory: str, *args, **kwargs) -> None:
        """As [`PeftModel.save_pretrained`], with `base_model.json`."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            write_base(save_directory, self._base)

    def push_to_hub(self, repo_id: str, base: str | None = None, **kwargs) -> str:
        """Publishes the adapter that is named "default"; arguments, result and errors as [`publish_adapter`]."""
        with tempfile.TemporaryDirectory(prefix="minimind-o-") as scratch:
            self.save_pretrained(scratch, selected_adapters=["default"])
            return publish_adapter(scratch, repo_id, base, **kwargs)


def get_peft_model(
    model: MiniMindOForConditionalGeneration, config: LoraConfig, adapter_name: str = "default", **kwargs
) -> MiniMindOAdapted:
    """
    As [`peft.get_peft_model`]; the adapter's configuration names the base and, where that is from the Hub, its commit.

    Args:
        model ([`MiniMindOForConditionalGeneration`]): The base; it is changed.
        config ([`LoraConfig`]): Such as [`lora_config`] makes.
        adapter_name (`str`, defaults to `"default"`): The adapter's name.
        **kwargs: Further arguments of [`peft.PeftModel`].
    """
    base = describe_base(model)
    config.base_model_name_or_path, config.revision = base["name"], base["revision"]
    return MiniMindOAdapted(model, config, adapter_name, **kwargs)


def carry_voices(voices: VoiceLibrary, directory: str | os.PathLike) -> None:
    """Puts voices beside an adapter, with their licences and consents; `ValueError` where there are none."""
    if not voices.voices():
        raise ValueError(f"{voices.path} holds no voices: add one first, or leave them out.")
    with new_file(Path(directory) / VOICES_NAME) as temporary:
        shutil.copyfile(voices.path, temporary)


# ---- what an adapter is ----


@dataclass(frozen=True)
class AdapterInfo:
    """
    What an adapter says of itself.

    Args:
        adapter (`str`): Its directory or Hub id.
        folder (`Path`): Where its files are.
        base (`str`, *optional*), revision (`str`, *optional*): The model that it was trained on.
        has_probe (`bool`): Whether another base of the same sizes would be told apart.
        method (`str`), rank (`int`, *optional*), alpha (`float`, *optional*): PEFT's method and its settings.
        parts (`dict[str, int]`): Numbers of its parameters, by the part of the model that they change.
        whole (`list[str]`): Modules that were trained as a whole.
        voices (`dict[str, Voice]`): What it carries.
    """

    adapter: str
    folder: Path
    base: str | None
    revision: str | None
    has_probe: bool
    method: str
    rank: int | None
    alpha: float | None
    parts: dict[str, int]
    whole: list[str] = field(default_factory=list)
    voices: dict[str, Voice] = field(default_factory=dict)

    def __str__(self) -> str:
        size = sum(self.parts.values())
        changed = ", ".join(f"{part} {count:,}" for part, count in self.parts.items())
        rank = f", rank {self.rank}, alpha {self.alpha:g}" if self.rank and self.alpha is not None else ""
        lines = [
            f"{self.adapter}: {self.method}{rank}, {size:,} parameters ({changed})",
            f"base: {self.base or 'not stated'}" + (f", revision {self.revision}" if self.revision else ""),
        ]
        lines += [f"trained whole: {', '.join(self.whole)}"] if self.whole else []
        lines += [f"voice {name}: {voice.licence or 'no licence stated'}" for name, voice in self.voices.items()]
        if not self.has_probe:
            lines.append(f"It has no {BASE_NAME}: another base of the same sizes cannot be told from its own.")
        return "\n".join(lines)


def read_adapter(adapter: str | os.PathLike, **kwargs) -> AdapterInfo:
    """
    Looks at an adapter, without its base.

    Args:
        adapter (`str` or `os.PathLike`): Directory or Hub id.
        **kwargs: `revision`, `token`, `cache_dir` ... as for `snapshot_download`.

    Raises:
        FileNotFoundError: There is no such directory.
        OSError: The Hub cannot be reached.
        ValueError: It is no adapter, holds pickles in place of safetensors, or is damaged.
    """
    folder = _fetch(adapter, ADAPTER_FILES, **kwargs)
    base = read_base(folder)
    check_weights(folder)
    config = _read_config(folder, adapter)
    parts: dict[str, int] = {}
    try:
        with safe_open(folder / WEIGHTS_NAME, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                key = str(name).removeprefix("base_model.model.").partition(".")[0]
                part = PARTS.get(key, key)
                tensor: torch.Tensor = file.get_tensor(name)
                if not tensor.isfinite().all():
                    raise ValueError(f"{adapter} holds NaN or infinite values, in {name}: train it again.")
                parts[part] = parts.get(part, 0) + tensor.numel()
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS_NAME} is damaged ({error}): save or download it again.") from error
    return AdapterInfo(
        adapter=os.fspath(adapter),
        folder=folder,
        base=base["name"],
        revision=base["revision"],
        has_probe=base["probe"] is not None,
        method=str(getattr(config.peft_type, "value", config.peft_type)),
        rank=getattr(config, "r", None),
        alpha=getattr(config, "lora_alpha", None),
        parts=parts,
        whole=list(getattr(config, "modules_to_save", None) or []),
        voices=VoiceLibrary(folder / VOICES_NAME).voices(),
    )


def _read_config(folder: Path, adapter: str | os.PathLike) -> Any:
    """PEFT's configuration; `ValueError` where it is none."""
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{CONFIG_NAME} of {adapter} is none that PEFT reads: {error!r}.") from error
    kinds = {"r": int, "lora_alpha": (int, float), "modules_to_save": (list, set, type(None))}
    for name, kind in kinds.items():
        value = getattr(config, name, None)
        if hasattr(config, name) and not isinstance(value, kind):
            raise ValueError(f"{CONFIG_NAME} of {adapter} has {name} {value!r}, which PEFT cannot use.")
    return config


def _fetch(source: str | os.PathLike, patterns: Any, **kwargs) -> Path:
    """The directory of something that is here or on the Hub."""
    name = os.fspath(source)
    if os.path.isdir(name):
        return Path(name)
    if not is_hub_id(name):
        raise FileNotFoundError(f"There is no directory {name}, and a Hub id has the form OWNER/NAME.")
    return Path(snapshot_download(name, allow_patterns=patterns, **kwargs))


# ---- using ----


def put_on(
    model: MiniMindOForConditionalGeneration, processor: MiniMindOProcessor, adapters: Sequence[str | os.PathLike]
) -> list[str]:
    """
    Puts adapters on a model, and their voices into its processor: all of them, or none where one does not fit. The
    first of them is on then; [`switch_adapter`] changes that.

    Args:
        model ([`MiniMindOForConditionalGeneration`]): The base; it is changed.
        processor ([`MiniMindOProcessor`]): Its processor; it is changed. Of voices of one name the last one stays.
        adapters (list of `str` or `os.PathLike`): Directories or Hub ids.

    Returns:
        `list[str]`: the name of each: the last part of its own, with a number where that is taken.

    Raises:
        ValueError: One is no adapter, or belongs to another model.
        OSError: One is not there.
    """
    names: list[str] = []
    voices = dict(processor.voices)
    try:
        for info in [read_adapter(adapter) for adapter in adapters]:
            # PEFT makes it part of a module's name.
            stem = re.sub(r"\W+", "-", Path(info.adapter).resolve().name)
            taken = {*getattr(model, "peft_config", {}), *({stem} if stem in "lora_" else ())}
            candidates = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
            name = next(candidate for candidate in candidates if candidate not in taken)
            model.load_adapter(str(info.folder), name)
            names.append(name)
            processor.load_voices(info.folder)
        if names:
            switch_adapter(model, names[0])
    except Exception:
        processor.voices = voices
        for name in names:
            model.delete_adapter(name)
        raise
    return names


def switch_adapter(model: MiniMindOForConditionalGeneration, name: str | None) -> None:
    """
    Has the model use one of its loaded adapters; None for the model as it is without.

    Raises:
        ValueError: There is none of that name.
    """
    loaded = list(getattr(model, "peft_config", {}))
    if name is not None and name not in loaded:
        raise ValueError(f"There is no adapter {name!r}: {', '.join(loaded) or 'none'} is loaded.")
    if not loaded:
        return
    if name is None:
        model.disable_adapters()
    else:
        model.set_adapter(name)
        model.enable_adapters()


# ---- merging ----


def merge_adapter(
    model: MiniMindOForConditionalGeneration, adapter: str | os.PathLike, **kwargs
) -> MiniMindOForConditionalGeneration:
    """
    Merges a trained adapter into its base model, which then speaks as the adapted one did, at no cost.

    Args:
        model ([`MiniMindOForConditionalGeneration`]): The base; it is changed, but not where the adapter is refused.
        adapter (`str` or `os.PathLike`): Directory or Hub id of the adapter.
        **kwargs: Further arguments of [`PeftModel.from_pretrained`].

    Raises:
        ValueError: It is no adapter, one of another model (both are named), or one that cannot be merged.
        OSError: It is not there.
    """
    check_base(model, adapter, **kwargs)
    refused = f"The adapter {adapter} cannot be put on {model.name_or_path or 'this model'}"
    advice = "Use the model it was trained on, with the configuration it was saved with"
    try:
        merged: Any = PeftModel.from_pretrained(model, os.fspath(adapter), **kwargs)
        saved = load_peft_weights(os.fspath(adapter), device="cpu")
        # PEFT puts what is there where it fits, and is silent about the rest.
        if different := saved.keys() ^ get_peft_model_state_dict(merged).keys():
            raise ValueError(f"{len(different)} tensors have no place there or are missing, such as {min(different)}")
        head = re.compile(r"base_model\.model\.(model\.embed_tokens|lm_head)\.lora_")
        if model.config.tie_word_embeddings and any(head.match(name) for name in saved):
            raise ValueError("it changes embeddings or head, which are one matrix: it can be loaded, but not merged")
    except (RuntimeError, KeyError, ValueError, TypeError, SafetensorError) as error:
        if hasattr(model, "peft_config"):
            del model.peft_config
        model._unwrap()
        # The first line of torch's message says only that there are errors.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ValueError(f"{refused}: {lines[min(1, len(lines) - 1)].rstrip('.')}. {advice}.") from error
    return merged.merge_and_unload()


def merge_checkpoint(
    adapter: str | os.PathLike,
    directory: str | os.PathLike,
    base: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """
    Makes a complete checkpoint of an adapter and its base. What the adapter does not change stays byte for byte what
    it is in the base: tensors, encoders, codec, processor, generation config and voices; the adapter's voices join
    them, in place of those of their names.

    Args:
        adapter (`str` or `os.PathLike`): Directory or Hub id.
        directory (`str` or `os.PathLike`): The directory to make.
        base (`str` or `os.PathLike`, *optional*): The base; what the adapter names by default.
        dtype (`torch.dtype`, *optional*): Of the model's weights; each has its type in the base by default. Merged is
            in float32.
        overwrite (`bool`, defaults to `False`): Replace a checkpoint that stands there.

    Returns:
        `Path`: The directory.

    Raises:
        ValueError: The adapter, its voices or its base do not pass, or it was trained on another model.
        OSError: The base is not there, or the disk is full.
    """
    info = read_adapter(adapter)
    _check_voices(info)
    source, revision = _base_of(info, base)
    folder = _fetch(source, _CHECKPOINT, revision=revision)
    target = Path(directory).resolve()
    if any(target in (source, *source.parents) for source in (folder.resolve(), info.folder.resolve())):
        raise ValueError(f"{directory} is, or holds, what is to be merged: give another directory.")
    if not list(folder.glob("model*.safetensors")):
        raise ValueError(f"{source} holds no model in safetensors: make a checkpoint of it (`minimind-o convert`).")
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    with new_directory(directory, overwrite) as made:
        model: Any = MiniMindOForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        model.config.name_or_path = os.fspath(source)
        merged: Any = merge_adapter(model, info.folder)
        merged.to(dtype or torch.float32)
        merged.save_pretrained(made)
        if dtype is None:
            _as_in(folder, made)
        _check_finite(made)
        for file in files:
            # The configuration names the type.
            is_kept = CHECKPOINT_FILES.fullmatch(file) and not _OF_WEIGHTS.fullmatch(file)
            if is_kept and (dtype is None or file != "config.json"):
                (made / file).parent.mkdir(exist_ok=True)
                shutil.copyfile(folder / file, made / file)
        with _library(made) as library:
            for voice in info.voices.values():
                library.add(voice, overwrite=True)
        if "auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
            # It came with its code, and so does this.
            merged.save_code(made)
            MiniMindOProcessor.from_pretrained(made, load_audio_tokenizer=False).save_code(made)
        card = build_merged_card(folder, Path(directory).name, os.fspath(source), os.fspath(adapter))
        (made / "README.md").write_text(card, encoding="utf-8")
    return Path(directory)


def _as_in(base: Path, made: Path) -> None:
    """Gives the weights of a checkpoint the types that they have in its base."""
    types = {}
    for path in base.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            types |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    if others := set(types.values()) - _TYPES.keys():
        raise ValueError(f"{base} holds weights of the type {min(others)}: say how to store them (`--dtype`).")
    for path in made.glob("model*.safetensors"):
        tensors = {name: tensor.to(_TYPES[types[name]]) for name, tensor in load_file(path).items()}
        with new_file(path) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})


def _check_finite(made: Path) -> None:
    """Refuses a checkpoint whose merged weights are larger than their type holds."""
    for path in made.glob("model*.safetensors"):
        for name, tensor in load_file(path).items():
            if not tensor.isfinite().all():
                raise ValueError(f"Merged, {name} is too large for {tensor.dtype}: give another type (`--dtype`).")


def _check_voices(info: AdapterInfo) -> None:
    for voice in info.voices.values():
        if not voice.consent or not voice.licence:
            raise ValueError(f"The voice {voice.name!r} of {info.adapter} states no consent or no licence.")


@contextmanager
def _library(folder: Path) -> Iterator[VoiceLibrary]:
    """A directory's voices, to be changed."""
    library = VoiceLibrary(folder / VOICES_NAME)
    yield library
    for lock in folder.glob(f".{VOICES_NAME}*.lock"):
        lock.unlink()


def _base_of(info: AdapterInfo, base: str | os.PathLike | None) -> tuple[str, str | None]:
    """The base to load, and its revision."""
    if base is not None:
        return os.fspath(base), None
    if info.base is None:
        raise ValueError(f"{info.adapter} does not say which model it belongs to: name it (`--model`).")
    if not os.path.isdir(info.base) and not is_hub_id(info.base):
        raise FileNotFoundError(f"{info.adapter} belongs to {info.base}, which is not there: name it (`--model`).")
    return info.base, info.revision if is_hub_id(info.base) else None


# ---- publishing ----


def publish_adapter(
    adapter: str | os.PathLike,
    repo_id: str,
    base: str | None = None,
    voices: VoiceLibrary | None = None,
    private: bool = False,
    update: bool = False,
    dry_run: str | os.PathLike | None = None,
) -> str:
    """
    Publishes an adapter: puts it on its base and has it answer, adds a card, and uploads it in one commit. The
    repository names the base and its commit, and carries the adapter's voices. What a training left beside the adapter
    stays where it is.

    Args:
        adapter (`str` or `os.PathLike`): Its directory; it is not changed.
        repo_id (`str`): OWNER/NAME on the Hub; made where it is not there.
        base (`str`, *optional*): Hub id of the base; what the adapter names by default.
        voices ([`VoiceLibrary`], *optional*): Voices to carry, in place of those that lie beside the adapter.
        private, update, dry_run: As [`publishing.publish`].

    Returns:
        `str`: The commit's URL, or the directory of a dry run.

    Raises:
        ValueError: The adapter does not pass, its base is not on the Hub, or is another. Nothing is uploaded then.
        OSError: The base cannot be had, or the Hub refuses. No commit is made then.
    """
    check_name(repo_id)
    info = read_adapter(adapter)
    source = base or info.base
    if pickles := sorted(path.name for path in info.folder.iterdir() if path.suffix in PICKLES):
        raise ValueError(f"{adapter} holds pickles, which can run code where they are read: {', '.join(pickles)}.")
    if repo_id == source:
        raise ValueError(f"{repo_id} is the base of {adapter}: give the adapter a repository of its own.")
    if source is None or not is_hub_id(source):
        raise ValueError(
            f"The base of {adapter} is {source or 'not stated'}, which nobody else has: publish it (`minimind-o "
            "publish`), and name it (`--base OWNER/NAME`)."
        )
    revision = info.revision if source == info.base else None
    pinned: dict[str, Any] = {"revision": revision} if revision else {}
    model: Any = MiniMindOForConditionalGeneration.from_pretrained(source, **pinned)
    processor = MiniMindOProcessor.from_pretrained(source, **pinned)
    described = describe_base(model)
    with tempfile.TemporaryDirectory(prefix="minimind-o-") as scratch:
        target = Path(scratch) / "staged" if dry_run is None else Path(dry_run)
        with new_directory(target) as staged:
            for name in ADAPTER_FILES:
                if (info.folder / name).is_file():
                    shutil.copyfile(info.folder / name, staged / name)
            if voices is not None:
                carry_voices(voices, staged)
            merge_adapter(model, staged)
            _check_voices(replace(read_adapter(staged), adapter=info.adapter))
            processor.load_voices(staged)
            check_answer(model, processor)
            config = json.loads((staged / CONFIG_NAME).read_text(encoding="utf-8"))
            config |= {"base_model_name_or_path": described["name"], "revision": described["revision"]}
            (staged / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            write_base(staged, described)
            about = str(replace(read_adapter(staged), adapter=repo_id))
            readme = cached_file(source, "README.md", _raise_exceptions_for_missing_entries=False, **pinned)
            card: Any = ModelCard.load(readme) if readme else None
            licence = card.data.license if card else None
            text = build_adapter_card(staged, repo_id, described["name"], described["revision"], licence, about)
            (staged / "README.md").write_text(text, encoding="utf-8")
        if dry_run is not None:
            return str(dry_run)
        return upload(target, repo_id, private, update, message="Upload MiniMind-O adapter")


__all__ = [
    "PRESETS",
    "AdapterInfo",
    "MiniMindOAdapted",
    "carry_voices",
    "get_peft_model",
    "lora_config",
    "merge_adapter",
    "merge_checkpoint",
    "publish_adapter",
    "put_on",
    "read_adapter",
    "switch_adapter",
]
