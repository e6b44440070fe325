"""`minimind-o evaluate`: questions for checkpoints, and tables of several."""

import argparse
import sys
from pathlib import Path
from typing import Any

from minimind_o_hf.chat import load
from minimind_o_hf.packaged import held_out_voices_of, speaker_encoder_of

from .listening import load_recogniser
from .reports import figure_table
from .running import EvaluationSettings, evaluate_checkpoint, evaluate_recordings
from .suites import ASKED, load_suite
from .tables import TableRow, load_table, make_table


def run(options: argparse.Namespace) -> None:
    """Runs the command with parsed options."""
    if sum(value is not None for value in (options.model, options.wavs, options.table)) > 1:
        raise ValueError("Give a MODEL, --wavs or --table: one of them.")
    asked: list[str] = [name.strip() for name in (options.only or ",".join(ASKED)).split(",")]
    if unknown := sorted(set(asked) - set(ASKED)):
        raise ValueError(f"--only takes {', '.join(ASKED)}, got {', '.join(unknown)}.")
    recogniser = load_recogniser(options.asr, options.device)
    if options.table is not None:
        table = load_table(options.table)

        def evaluate(row: TableRow, folder: Path) -> None:
            print(f"{row.name}: {folder}", file=sys.stderr)
            if row.wavs is not None:
                _score_recordings(Path(row.wavs), folder, recogniser, options)
            else:
                wanted = [name for name in table.asked if name in asked]
                _ask(row.checkpoint, row.name, table.suite, wanted, folder, recogniser, options)

        print(make_table(table, options.out, evaluate).read_text(encoding="utf-8"))
        return
    if options.wavs is not None:
        figures = _score_recordings(options.wavs, options.out, recogniser, options)
    else:
        name = Path(options.model or "nano").name
        figures = _ask(options.model, name, options.suite, asked, options.out, recogniser, options)
    print("\n".join(figure_table(figures)))
    print(f"{options.out / 'report.md'}: written", file=sys.stderr)


def _ask(
    source: str | None, name: str, suite: str, asked: list[str], folder: Path, recogniser: Any, options: Any
) -> Any:
    model, processor = load(source, options.device, options.dtype)
    processor.audio_tokenizer = processor.audio_tokenizer and processor.audio_tokenizer.to(options.device)
    settings = EvaluationSettings(
        recogniser=recogniser,
        recogniser_name=options.asr,
        speaker_encoder=options.speaker_encoder or speaker_encoder_of(source),
        voices=options.voices or held_out_voices_of(source),
        recordings=options.recordings,
        data=options.data,
        asked=asked,
        limit=options.limit,
        batch_size=options.batch_size,
    )
    return evaluate_checkpoint(model, processor, load_suite(suite), folder, settings, name, _say)


def _score_recordings(source: Path, folder: Path, recogniser: Any, options: Any) -> Any:
    return evaluate_recordings(source, folder, recogniser, options.asr, options.language)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


__all__ = ["run"]
