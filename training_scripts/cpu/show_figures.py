"""Prints what finished runs of `train_sft.py` have learnt, from the figures they saved.

    python training_scripts/cpu/show_figures.py RUN ...

For each run: its time; the text and the audio loss when they were first and last logged; and on held-out data, before
(if it was evaluated then: `--eval_on_start true`) and after, the losses and the shares of right tokens and codes.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

COLUMNS = ("text loss", "audio loss", "held-out text", "held-out audio", "right tokens", "right codes")
KEYS = ("text_loss", "audio_loss", "eval_text_loss", "eval_audio_loss", "eval_token_accuracy", "eval_code_accuracy")


def _number(figures: Mapping[str, float], key: str) -> str:
    return f"{figures[key]:.3f}" if key in figures else "-"  # data without speech has no audio labels


def describe(run: Path) -> str:
    """One line of the table."""
    history = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    after = json.loads((run / "all_results.json").read_text(encoding="utf-8"))
    logged = [entry for entry in history if "text_loss" in entry]
    # An interrupted run is evaluated again when it goes on: the first time counts.
    before = next((entry for entry in history if "eval_text_loss" in entry and entry["step"] == 0), {})
    figures = []
    for key in KEYS:
        first, last = (before, after) if key.startswith("eval") else (logged[0], logged[-1])
        figures.append(f"{_number(first, key)} → {_number(last, key)}")
    return "".join([f"{run.name:<17}{after['train_runtime']:>5.0f} s  ", *(f"{figure:<17}" for figure in figures)])


def main(arguments: list[str] | None = None) -> None:
    runs = [Path(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    lines = [f"{'stage':<17}{'time':>7}  " + "".join(f"{column:<17}" for column in COLUMNS), *map(describe, runs)]
    sys.stdout.write("\n".join(line.rstrip() for line in lines) + "\n")


if __name__ == "__main__":
    main()
