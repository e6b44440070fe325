"""Which model an adapter was trained on, and which adapters a model has on. PEFT itself compares sizes alone, and
takes an adapter of another model of the same sizes."""

import json
import os
from typing import Any

import torch
from torch import nn
from transformers.utils.hub import cached_file

BASE_NAME = "base_model.json"
# float16 and bfloat16 round by up to 2**-8; the weights of another training differ by far more.
TOLERANCE = 2**-7
HUB_KWARGS = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download")


def base_probe(model: nn.Module) -> list[float]:
    """
    Some weights by which a base model is known again, in whichever precision it is loaded: 32 of the Thinker's
    embedding and 32 of the Talker's, as they are without adapters.

    Args:
        model ([`MiniMindOForConditionalGeneration`]): With or without adapters.
    """
    own: Any = model
    weights = [_original(own.model.embed_tokens).weight, _original(own.talker.embed_tokens).base.weight]
    found = []
    for weight in weights:
        # From the first rows, which stay where they are when tokens are added.
        rows = torch.linspace(0, min(len(weight), 1024) - 1, 32).long().tolist()
        found += [float(weight.detach()[row, number % weight.shape[1]]) for number, row in enumerate(rows)]
    return found


def _original(module: Any) -> Any:
    """A module as it was before PEFT wrapped it."""
    return getattr(module, "original_module", getattr(module, "base_layer", module))


def describe_base(model: nn.Module) -> dict[str, Any]:
    """What is written beside an adapter of its base: `name`, `revision` (a commit of the Hub, or None), `probe`."""
    config: Any = model.config
    return {
        "name": config.name_or_path,
        "revision": getattr(config, "_commit_hash", None),
        "probe": base_probe(model),
    }


def read_base(adapter: str | os.PathLike, **kwargs) -> dict[str, Any]:
    """
    The base that an adapter names: `name`, `revision` and `probe`; an adapter of plain PEFT has no `probe`.

    Args:
        adapter (`str` or `os.PathLike`): Directory or Hub id.
        **kwargs: `revision`, `token`, `cache_dir`, `subfolder` ... of the adapter, as for `from_pretrained`.

    Raises:
        OSError: It is no adapter, or cannot be reached.
        ValueError: Its files are damaged.
    """
    where = {name: kwargs[name] for name in HUB_KWARGS if kwargs.get(name) is not None}
    config = _read_json(cached_file(adapter, "adapter_config.json", **where))
    quiet = {"_raise_exceptions_for_missing_entries": False}
    path = cached_file(adapter, BASE_NAME, **where, **quiet)
    own = _read_json(path) if path else {}
    if not isinstance(own.get("probe", []), list) or not all(isinstance(x, float) for x in own.get("probe", [])):
        raise ValueError(f"{BASE_NAME} of {adapter} is damaged: its `probe` is no list of numbers.")
    return {
        "name": own.get("name") or config.get("base_model_name_or_path"),
        "revision": own.get("revision") or config.get("revision"),
        "probe": own.get("probe"),
    }


def _read_json(path: Any) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object.")
    return content


def check_base(model: nn.Module, adapter: str | os.PathLike, **kwargs) -> None:
    """
    Refuses an adapter that was trained on another model.

    Args:
        model ([`MiniMindOForConditionalGeneration`]): What it is to be put on.
        adapter, **kwargs: As [`read_base`].

    Raises:
        ValueError: It was trained on another model; both are named.
    """
    base = read_base(adapter, **kwargs)
    if base["probe"] is None:
        return
    wanted, found = torch.tensor(base["probe"]), torch.tensor(base_probe(model))
    scale = float(wanted.abs().max()) if len(wanted) else 0.0
    if wanted.shape != found.shape or not torch.allclose(found, wanted, rtol=TOLERANCE, atol=TOLERANCE * scale / 16):
        revision = f" (revision {base['revision']})" if base["revision"] else ""
        raise ValueError(
            f"The adapter {adapter} was trained on {base['name'] or 'a model without a name'}{revision}, and this "
            f"model is {model.config.name_or_path or 'one without a name'}, whose weights are others: load that base."
        )


def adapters_in_use(model: nn.Module) -> tuple:
    """What of the model's adapters is on, in a form that can be compared: switching them changes it."""
    states = set()
    for module in model.modules():
        layer: Any = module
        # The layers that PEFT has put in; models have methods of that name.
        if isinstance(getattr(layer, "disable_adapters", None), bool):
            on = () if layer.disable_adapters else tuple(layer.active_adapters)
            states.add((on, tuple(getattr(layer, "merged_adapters", ()))))
    return tuple(sorted(states))


__all__ = ["BASE_NAME", "adapters_in_use", "base_probe", "check_base", "describe_base", "read_base"]
