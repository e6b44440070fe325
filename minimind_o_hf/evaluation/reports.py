"""Reports: everything as JSON, the figures as Markdown, the main ones as pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minimind_o_hf.files import new_file

from .answering import write_json
from .metrics import Estimate
from .scoring import Figures

PLOTS = {
    "errors": ("CER", "WER", "CER of recordings", "CER of recordings through the codec"),
    "answers": ("accuracy", "accuracy by topic"),
    "voices": ("similarity", "similarity, floor", "similarity, ceiling", "right voice nearest"),
    "codebooks": ("codebook accuracy",),
}


def write_report(folder: Path, about: Mapping[str, Any], figures: Figures, rows: Sequence[dict]) -> Path:
    """
    Writes `report.json` (figures and rows), `report.md` and a PNG for each group of figures.

    Args:
        folder (`Path`): Where to.
        about (mapping): What was evaluated, and how.
        figures (`dict`): Estimates by name and by what they are of.
        rows (list of `dict`): All answers with what was found of each.

    Returns:
        `Path`: `report.md`.
    """
    as_json = {name: {of: asdict(value) for of, value in found.items()} for name, found in figures.items()}
    write_json(folder / "report.json", {"about": dict(about), "figures": as_json, "rows": list(rows)})
    pictures = [name for name, wanted in PLOTS.items() if _plot(figures, wanted, folder / f"{name}.png")]
    lines = [f"# Evaluation of {about['name']}", ""]
    lines += [f"- {key}: {value}" for key, value in about.items() if key != "name" and value is not None]
    lines += ["", *figure_table(figures), ""]
    lines += [f"![{name}]({name}.png)" for name in pictures]
    lines += ["", "Intervals: 95 %, bootstrap over questions, 1,000 draws, seed 0.", ""]
    with new_file(folder / "report.md") as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")
    return folder / "report.md"


def figure_table(figures: Figures) -> list[str]:
    """The figures as lines of a Markdown table."""
    lines = ["| figure | of | value | 95 % interval | rows |", "|---|---|---|---|---|"]
    for name, found in figures.items():
        for of, value in found.items():
            lines.append(f"| {name} | {of} | {value.value:.4f} | {value.low:.4f} – {value.high:.4f} | {value.count} |")
    return lines


def read_figures(report: Mapping[str, Any]) -> Figures:
    """The figures of a `report.json`."""
    return {name: {of: Estimate(**value) for of, value in found.items()} for name, found in report["figures"].items()}


def _plot(figures: Figures, names: Sequence[str], path: Path) -> bool:
    """Bars with their intervals; whether there was anything to draw."""
    # Not pyplot: a report leaves no state behind.
    from matplotlib.figure import Figure

    shown = [name for name in names if figures.get(name)]
    if not shown:
        return False
    picture = Figure(figsize=(10, 2.6 * len(shown)), layout="constrained")
    axes = picture.subplots(len(shown), squeeze=False)[:, 0]
    for axis, name in zip(axes, shown, strict=True):
        found = figures[name]
        values = [value.value for value in found.values()]
        spread = [
            [max(0.0, value.value - value.low) for value in found.values()],
            [max(0.0, value.high - value.value) for value in found.values()],
        ]
        axis.bar(list(found), values, yerr=spread, capsize=3)
        axis.set_title(name, fontsize=10)
        axis.tick_params(axis="x", labelsize=8, rotation=20 if len(found) > 8 else 0)
        axis.grid(axis="y", alpha=0.3)
    with new_file(path) as temporary:
        picture.savefig(temporary, format="png", dpi=100)
    return True


__all__ = ["figure_table", "read_figures", "write_report"]
