"""Fixtures shared by the tests: the reference values (where they are found) and seeds."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of reference values and release data beside the repository; not on users' machines."""
    if not SHARED.is_dir():
        pytest.skip("the reference values (../shared) are not on this machine")
    return SHARED


@pytest.fixture(scope="session")
def golden(shared_dir):
    """Reads the reference values: `golden.tensors(name)`, `golden.manifest(name)`, `golden.config(name)`, `golden.fill`."""
    folder = shared_dir / "golden"
    spec = importlib.util.spec_from_file_location("golden_fill", folder / "fill.py")
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    return SimpleNamespace(
        tensors=lambda name: load_file(folder / f"{name}.safetensors"),
        manifest=lambda name: json.loads((folder / f"{name}.manifest.json").read_text(encoding="utf-8")),
        config=lambda name: json.loads((folder / f"{name}.config.json").read_text(encoding="utf-8")),
        fill=fill,
    )
