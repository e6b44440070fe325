"""Writing that leaves nothing half-made: a file or a directory appears complete under its name, or not at all."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


def _temporary_sibling(path: Path) -> Path:
    # A sibling, because a rename is atomic only within one file system.
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def new_directory(directory: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Fill a directory in a temporary sibling, which takes its name when the block ends without an exception.

    Args:
        directory (`str` or `os.PathLike`): the directory to make; its parents are made too.
        overwrite (`bool`, *optional*, defaults to `False`): replace a checkpoint (a directory holding a `config.json`)
            that stands there. Without it only an empty directory is replaced.

    Yields:
        `Path`: the temporary directory to write into.

    Raises:
        FileExistsError: something stands there already that is not to be replaced.
        ValueError: `overwrite` asked to replace a directory that is no checkpoint.
    """
    target = Path(directory).expanduser().resolve()

    def check_free() -> None:
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            return
        if not overwrite:
            raise FileExistsError(
                f"{target} exists and is not empty: give another directory, or say so (`--overwrite`, or "
                "`overwrite=True`)."
            )
        if not (target / "config.json").is_file():
            raise ValueError(
                f"{target} holds no config.json, so it is no checkpoint and is not overwritten: remove it first."
            )

    check_free()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_sibling(target)
    temporary.mkdir()
    try:
        yield temporary
        # Once more: another process may have made it meanwhile.
        check_free()
        replaced = None
        if overwrite and target.exists():
            replaced = _temporary_sibling(target)
            target.rename(replaced)
        try:
            temporary.rename(target)
        except OSError as error:
            if replaced is not None:
                replaced.rename(target)
            if target.is_dir() and any(target.iterdir()):
                raise FileExistsError(f"{target} was made by another process meanwhile.") from error
            raise
        if replaced is not None:
            shutil.rmtree(replaced)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file under a temporary name, which becomes `path` when the block ends without an exception.

    An existing file is replaced.

    Args:
        path (`str` or `os.PathLike`): the file to make; its parents are made too.

    Yields:
        `Path`: the temporary file to write.
    """
    target = Path(path).expanduser().resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_sibling(target)
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


__all__ = ["new_directory", "new_file"]
