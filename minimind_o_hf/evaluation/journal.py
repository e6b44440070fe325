"""Rows written one by one, so that what was killed goes on where it stopped."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Journal:
    """
    A JSON-lines file of rows with an `id`. Its first line says what they were made with. A last line that a killed
    process left unfinished is dropped.

    Args:
        path (`Path`): The file, made with its folder.
        made_with (mapping): Of JSON values: rows made with anything else are not gone on with.

    Raises:
        ValueError: The file was made with something else, or is no journal.
    """

    def __init__(self, path: Path, made_with: Mapping[str, Any]):
        self.path = path
        self.rows: dict[str, dict] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(path, len(whole))
        if not whole:
            self._append(dict(made_with))
            return
        try:
            header, *rows = (json.loads(line) for line in whole.splitlines())
            self.rows = {row["id"]: row for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it.") from error
        wanted = json.loads(json.dumps(dict(made_with)))
        if header != wanted:
            differing = sorted(name for name in header.keys() | wanted.keys() if header.get(name) != wanted.get(name))
            raise ValueError(
                f"{path} was made with another {' and '.join(differing)}: give another output folder, or remove it."
            )

    def _append(self, value: Mapping) -> None:
        # One write of one line: another process never reads half of it, and a crash leaves at most a part of the last.
        with self.path.open("ab", buffering=0) as file:
            file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
            os.fsync(file.fileno())

    def __contains__(self, name: object) -> bool:
        return name in self.rows

    def add(self, row: dict) -> None:
        """Writes a row."""
        self._append(row)
        self.rows[row["id"]] = row


__all__ = ["Journal"]
