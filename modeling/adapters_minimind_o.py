"""Which model an adapter was trained on, and which adapters a model has on. PEFT itself compares sizes alone, and
takes an adapter of another model of the same sizes."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils.hub import cached_file

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
BASE_NAME = "base_model.json"
# Encoders are others' networks, and need not be there.
PARTS = ("model", "talker", "audio_proj", "vision_proj", "lm_head")
# Relative difference of a probed weight. float16 and bfloat16 round by up to 0.002; training changes some by far more.
TOLERANCE = 2**-7
SMALL = 1e-3  # of smaller weights the difference counts as theirs does: float16 rounds them coarsely
HUB_KWARGS = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download")


def base_probe(model: nn.Module) -> dict[str, list[float]]:
    """
    Some weights by which a base model is known again, in whichever precision it is loaded: two of every tensor outside
    the encoders, as it is without adapters. Quantised tensors are left out.

    Args:
        model ([`MiniMindOForConditionalGeneration`]): With or without adapters.
    """
    probe = {}
    for part in PARTS:
        for name, parameter in _own_parameters(getattr(model, part), f"{part}."):
            # Subclasses of tensors are a quantizer's.
            if parameter.is_floating_point() and type(parameter.data) is torch.Tensor:
                values = parameter.detach().flatten()
                probe[name] = [float(values[len(values) * part // 3]) for part in (1, 2)]
    if model.config.tie_word_embeddings:
        probe.pop("lm_head.weight", None)
    return probe


def _own_parameters(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's parameters by the names that they have without adapters."""
    wrapped: Any = module
    if (inner := unwrapped(wrapped)) is not wrapped:
        yield from _own_parameters(inner, prefix)
        return
    yield from ((prefix + name, parameter) for name, parameter in module._parameters.items() if parameter is not None)
    for name, child in module.named_children():
        yield from _own_parameters(child, f"{prefix}{name}.")


def unwrapped(module: Any) -> Any:
    """A module as it was before PEFT wrapped it, perhaps several times."""
    while True:
        inner = getattr(module, "original_module", None) if hasattr(module, "modules_to_save") else None
        inner = getattr(module, "base_layer", None) if inner is None else inner
        if inner is None:
            return module
        module = inner


def describe_base(model: nn.Module) -> dict[str, Any]:
    """What is written beside an adapter of its base: `name`, `revision` (a commit of the Hub, or None), `probe`."""
    config: Any = model.config
    return {
        "name": config.name_or_path,
        "revision": getattr(config, "_commit_hash", None),
        "probe": base_probe(model),
    }


def write_base(directory: str | os.PathLike, base: dict[str, Any]) -> None:
    """Writes what `describe_base` gives beside each adapter of a directory: PEFT puts those with a name of their own
    into folders."""
    for folder in (Path(directory), *Path(directory).iterdir()):
        if (folder / CONFIG_NAME).is_file():
            partial = folder / f".{BASE_NAME}.tmp"
            partial.write_text(json.dumps(base, indent=2) + "\n", encoding="utf-8")
            os.replace(partial, folder / BASE_NAME)


def read_base(adapter: str | os.PathLike, **kwargs) -> dict[str, Any]:
    """
    The base that an adapter names: `name`, `revision` and `probe`; an adapter of plain PEFT has no `probe`.

    Args:
        adapter (`str` or `os.PathLike`): Directory or Hub id.
        **kwargs: `revision`, `token`, `cache_dir`, `subfolder` ... of the adapter, as for `from_pretrained`.

    Raises:
        OSError: It is not there, or cannot be reached.
        ValueError: It is no adapter, or its files are damaged.
    """
    config = _read_json(_file(adapter, CONFIG_NAME, kwargs), adapter)
    path = _file(adapter, BASE_NAME, kwargs, is_needed=False)
    own = {} if path is None else _read_json(path, adapter)
    probe = own.get("probe")
    found = {
        "name": own.get("name") or config.get("base_model_name_or_path"),
        "revision": own.get("revision") or config.get("revision"),
        "probe": probe,
    }
    for name in ("name", "revision"):
        if not isinstance(found[name], (str, type(None))):
            raise ValueError(f"The adapter {adapter} is damaged: the {name} of its base is {found[name]!r:.60}.")
    is_probe = isinstance(probe, dict) and all(
        isinstance(values, list)
        and len(values) == 2
        and all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
        for values in probe.values()
    )
    if path is not None and not (is_probe and probe):
        raise ValueError(
            f"{BASE_NAME} of the adapter {adapter} is damaged: its `probe` is not two numbers for each name."
        )
    return found


def _file(adapter: Any, name: str, kwargs: dict[str, Any], is_needed: bool = True) -> str | None:
    """Where a file of an adapter is."""
    if not os.path.exists(adapter) and os.fspath(adapter).count("/") != 1:
        raise FileNotFoundError(f"There is no directory {adapter}, and a Hub id has the form OWNER/NAME.")
    where = {key: kwargs[key] for key in HUB_KWARGS if kwargs.get(key) is not None}
    path = cached_file(adapter, name, **where, _raise_exceptions_for_missing_entries=False)
    if path is None and is_needed:
        raise ValueError(f"{adapter} is no adapter: it has no {name}.")
    return path


def _read_json(path: Any, adapter: Any) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except ValueError as error:
        raise ValueError(f"{os.path.basename(path)} of the adapter {adapter} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{os.path.basename(path)} of the adapter {adapter} is damaged: it holds no JSON object.")
    return content


def check_weights(adapter: str | os.PathLike, **kwargs) -> None:
    """Refuses an adapter without weights in safetensors; arguments and errors as [`read_base`]."""
    if _file(adapter, WEIGHTS_NAME, kwargs, is_needed=False) is None:
        pickled = _file(adapter, "adapter_model.bin", kwargs, is_needed=False)
        reason = ", but a pickle, which can run code" if pickled else ""
        raise ValueError(f"The adapter {adapter} has no {WEIGHTS_NAME}{reason}: save it again with PEFT.")


def check_base(model: nn.Module, adapter: str | os.PathLike, **kwargs) -> None:
    """
    Refuses an adapter that was trained on another model, and one whose weights are pickled.

    Args:
        model ([`MiniMindOForConditionalGeneration`]): What it is to be put on.
        adapter, **kwargs: As [`read_base`].

    Raises:
        ValueError: It was trained on another model (both are named), or is none to be loaded.
    """
    base = read_base(adapter, **kwargs)
    check_weights(adapter, **kwargs)
    if base["probe"] is None:
        return
    found = base_probe(model)
    # Of a quantised model only what is not quantised can be compared.
    shared = base["probe"].keys() & found.keys()
    pairs = [pair for name in shared for pair in zip(base["probe"][name], found[name], strict=True)]
    if not pairs or any(abs(a - b) > TOLERANCE * max(abs(a), abs(b), SMALL) for a, b in pairs):
        revision = f" (revision {base['revision']})" if base["revision"] else ""
        raise ValueError(
            f"The adapter {adapter} was trained on {base['name'] or 'a model without a name'}{revision}, and this "
            f"model is {model.config.name_or_path or 'one without a name'}, whose weights are others: load that base."
        )


def adapters_in_use(model: nn.Module) -> tuple:
    """The state of a model's weights and adapters, to be compared: loading, switching, scaling, merging and training
    change it."""
    states, changes = set(), 0
    for module in model.modules():
        layer: Any = module
        changes += vars(module).get("_adapter_changes", 0)
        # The layers that PEFT has put in; models have methods of that name.
        if isinstance(getattr(layer, "disable_adapters", None), bool):
            on = () if layer.disable_adapters else tuple(layer.active_adapters)
            scales = tuple(sorted(getattr(layer, "scaling", {}).items()))
            states.add((on, tuple(getattr(layer, "merged_adapters", ())), scales))
    weights = hash(tuple((weight.data_ptr(), _version(weight)) for weight in model.parameters()))
    return changes, weights, tuple(sorted(states, key=repr))


def _version(tensor: Any) -> int:
    return 0 if tensor.is_inference() else tensor._version


__all__ = [
    "BASE_NAME",
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "adapters_in_use",
    "base_probe",
    "check_base",
    "check_weights",
    "describe_base",
    "read_base",
    "unwrapped",
    "write_base",
]
