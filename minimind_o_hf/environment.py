"""What has to be in order before the rest of the package is imported: the torch wheels, and the two mapped folders.

torchaudio and torchvision hold compiled code for one build of torch. Where one of them is installed but cannot load,
`import transformers` itself fails, with an error about a shared library that names neither the packages nor the cure.
`minimind_o_hf/__init__.py` therefore calls `check_torch_pair()` first. Nothing here may import transformers.
"""

import sys
from collections.abc import MutableSequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# The bounds of setup.py, where the reason for them stands; tests/test_package.py compares the two files.
TORCH = "torch>=2.11,<2.15"
TORCHAUDIO = "torchaudio>=2.11,<2.12"
TORCHVISION = "torchvision>=0.26,<0.30"


def check_torch_pair() -> None:
    """Imports torch, torchaudio and, where it is installed, torchvision.

    Only a real import tells whether the compiled parts fit: the versions of a CPU-only and a CUDA build differ in
    their local label at most. It costs nothing, because transformers imports all three a moment later.

    Raises:
        ImportError: one of them is missing or cannot load. The message has the installed versions, the reason and the
            pip command that installs a matching set.
    """
    installed = {name: _installed_version(name) for name in ("torch", "torchaudio", "torchvision")}
    for name, found in installed.items():
        if name == "torchvision" and found is None:  # only the "pipeline" extra needs it
            continue
        try:
            import_module(name)
        except Exception as error:  # a mismatch shows as OSError, RuntimeError, ImportError or AttributeError
            raise ImportError(_explain(name, error, installed), name=name) from error


def locate_subpackages(package_path: MutableSequence[str]) -> None:
    """Lets `minimind_o_hf.modeling` and `.processing` be found where the package is imported from its repository.

    There the two folders stand beside `minimind_o_hf/`, not in it. Python started in the repository's root takes the
    face from there whatever is installed; without this, the two folders would be missing (regular install) or come
    from another checkout (editable install of that one).

    Args:
        package_path (`list[str]`): the package's `__path__`, changed in place.
    """
    package = Path(__file__).resolve().parent
    if not (package / "modeling").is_dir() and (package.parent / "modeling").is_dir():
        package_path.append(str(package.parent))


def _installed_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _explain(name: str, error: BaseException, installed: dict[str, str | None]) -> str:
    while error.__cause__ is not None:  # torch wraps the loader's message, which names the missing library
        error = error.__cause__
    found = ", ".join(f"{package} {number or '(not installed)'}" for package, number in installed.items())
    return (
        f"`import {name}` failed: {type(error).__name__}: {error}\n"
        f"Installed: {found}.\n"
        f"minimind_o_hf needs {TORCH} and {TORCHAUDIO} built for the same CUDA version. This installs such a pair:\n"
        f"    {_repair_command(installed)}"
    )


def _repair_command(installed: dict[str, str | None]) -> str:
    """One line for a shell. What is installed has to go first: pip takes `2.13.0+cpu` for a torch within the bounds
    and leaves it, and `--force-reinstall` would also replace every dependency, past the bounds of other packages."""
    pip = f'"{sys.executable}" -m pip' if " " in sys.executable else f"{sys.executable} -m pip"
    present = [package for package, number in installed.items() if number is not None]
    wanted = [TORCH, TORCHAUDIO] + ([TORCHVISION] if installed["torchvision"] is not None else [])
    install = f"{pip} install " + " ".join(f'"{requirement}"' for requirement in wanted)
    return f"{pip} uninstall -y {' '.join(present)} && {install}" if present else install


__all__ = ["check_torch_pair", "locate_subpackages"]
