"""Packages that only files of sound and pictures need. A published checkpoint carries this folder's code to machines
where transformers, torch and torchaudio are all there is: text, samples and codes are enough there."""

import importlib
from typing import Any


class _Missing:
    """Stands in for a package that is not installed; what needs it says so."""

    def __init__(self, package: str):
        self._package = package

    def __getattr__(self, name: str):
        raise ImportError(f"files of sound and pictures need another package here: pip install {self._package}")


def optional_module(name: str, package: str) -> Any:
    """The module `name`; where `package` is not installed, a stand-in, whose use is an `ImportError` that says so."""
    # By name: transformers refuses remote code whose imports it cannot find, used or not.
    try:
        return importlib.import_module(name)
    except ImportError:
        return _Missing(package)


__all__ = ["optional_module"]
