"""The tables of the paper, from a YAML file that names checkpoints, or folders of other models' recordings."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind_o_hf.files import new_file

from .reports import read_figures
from .scoring import Figures
from .suites import check_keys, find_file, read_mapping

EMBEDDED = Path(__file__).parent / "tables"

# Column, figure, of what.
LAYOUTS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "consistency": (
        ("short", "CER", "short"),
        ("mid", "CER", "mid"),
        ("long", "CER", "long"),
        ("all", "CER", "all"),
    ),
    "english speech": (
        ("short CER", "CER", "short"),
        ("short WER", "WER", "short"),
        ("mid CER", "CER", "mid"),
        ("mid WER", "WER", "mid"),
    ),
    "pictures": (
        ("accuracy", "accuracy", "picture"),
        ("CER", "CER", "picture"),
        ("WER", "WER", "picture"),
    ),
    # One column a voice, which are known when all are evaluated.
    "voices": (("seen", "similarity", "seen"), ("unseen", "similarity", "unseen")),
}


@dataclass(frozen=True)
class TableRow:
    """
    One row of a table.

    Args:
        name (`str`): Its first column.
        checkpoint (`str`, *optional*): A checkpoint to evaluate: directory or Hub id.
        wavs (`str`, *optional*): Or a folder of another model's recordings.
        published (`dict`, *optional*): Or figures by column, as they stand in a paper.
    """

    name: str
    checkpoint: str | None = None
    wavs: str | None = None
    published: Mapping[str, float] | None = None

    def __post_init__(self):
        if sum(value is not None for value in (self.checkpoint, self.wavs, self.published)) != 1:
            raise ValueError(f"Row {self.name!r} needs a `checkpoint`, `wavs` or what was `published`: one of them.")


@dataclass(frozen=True)
class Table:
    """
    A table.

    Args:
        layout (`str`): "consistency", "voices", "english speech" or "pictures".
        rows (list of [`TableRow`]): Its rows.
        suite (`str`): The questions that all checkpoints are asked.
        title (`str`): Its heading.
        asked (list of `str`): Which of the questions; all by default.
    """

    layout: str
    rows: tuple[TableRow, ...]
    suite: str = "nano"
    title: str = ""
    asked: tuple[str, ...] = ("typed", "spoken", "picture")


def load_table(source: str | Path) -> Table:
    """
    Reads a table from a YAML file, or one of the package by its name ("talker_sizes", "voices", ...). Paths in it are
    relative to the current folder.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else.
    """
    path = find_file(source, EMBEDDED, ".yaml", "There is no table {}: give a YAML file, or one of: {}.")
    values = read_mapping(path, Table)
    if values.get("layout") not in LAYOUTS:
        raise ValueError(f"{path}: `layout` must be one of {', '.join(LAYOUTS)}, got {values.get('layout')!r}.")
    rows = values.get("rows") or []
    for row in rows:
        check_keys(row, TableRow, str(path))
    names = [row.get("name") for row in rows]
    if not names or None in names or len(set(names)) < len(names):
        raise ValueError(f"{path}: `rows` must each have a `name` of their own, got {names}.")
    values["rows"] = tuple(TableRow(**row) for row in rows)
    values["asked"] = tuple(values.get("asked", Table.asked))
    return Table(**{"title": path.stem, **values})


def make_table(table: Table, folder: Path, evaluate: Callable[[TableRow, Path], Any]) -> Path:
    """
    Evaluates the rows that have no report yet, and writes `table.md` and `table.json`.

    Args:
        table ([`Table`]): The rows.
        folder (`Path`): Gets a folder for each row.
        evaluate (callable): Evaluates a row into a folder, which then has a `report.json`.

    Returns:
        `Path`: `table.md`.
    """
    found: dict[str, Figures | None] = {}
    for row in table.rows:
        if row.published is not None:
            found[row.name] = None
            continue
        target = folder / "".join(letter if letter.isalnum() else "-" for letter in row.name.lower())
        # Answers and transcripts that are there are not made again, so this is quick for what is finished.
        evaluate(row, target)
        found[row.name] = read_figures(json.loads((target / "report.json").read_text(encoding="utf-8")))
    columns = columns_of(table.layout, [figures for figures in found.values() if figures is not None])
    cells = {
        row.name: {
            column: (row.published or {}).get(column)
            if figures is None
            else vars(figures[figure][of])
            if of in figures.get(figure, {})
            else None
            for column, figure, of in columns
        }
        for row, figures in zip(table.rows, found.values(), strict=True)
    }
    with new_file(folder / "table.json") as temporary:
        temporary.write_text(json.dumps({"title": table.title, "cells": cells}, indent=1) + "\n", encoding="utf-8")
    lines = [f"# {table.title}", "", *layout(cells, [column for column, _, _ in columns]), ""]
    lines += ["Behind a figure: its 95 % interval (bootstrap over questions). Without one: as published.", ""]
    with new_file(folder / "table.md") as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")
    return folder / "table.md"


def columns_of(name: str, found: Sequence[Figures]) -> list[tuple[str, str, str]]:
    """The columns of a layout; for "voices", one for each voice of any checkpoint before the means."""
    columns = list(LAYOUTS[name])
    if name == "voices":
        voices = {voice for figures in found for voice in figures.get("similarity", {})} - {"seen", "unseen"}
        columns = [(voice, "similarity", voice) for voice in sorted(voices)] + columns
    return columns


def layout(cells: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    """Cells, each an estimate, a plain number or None, as lines of a Markdown table."""
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for name, row in cells.items():
        lines.append(f"| {name} | {' | '.join(_show(row.get(column)) for column in columns)} |")
    return lines


def _show(cell: Any) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, Mapping):
        return f"{cell['value']:.4f} ({cell['low']:.4f} – {cell['high']:.4f})"
    return f"{cell:.4f}"


__all__ = ["Table", "TableRow", "layout", "load_table", "make_table"]
