"""Checking training data: every row as training would read it, what is wrong with it, and how long things are."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyarrow import ArrowException
from torch.utils.data import DataLoader
from tqdm import tqdm

from minimind_o_hf.files import new_file
from minimind_o_hf.modeling import MiniMindOConfig
from minimind_o_hf.processing import MiniMindOProcessor, load_audio
from minimind_o_hf.processing.image_minimind_o import load_image

from .rows import open_parquet, read_metadata
from .samples import IMAGE_MARK, Row, Sample, SampleSettings, build_sample, read_row, sample_generator

FRAME_RATE = 12.5  # Mimi's, frames a second
ROLES = ("system", "user", "assistant", "tool")
NO_LIMIT = 1 << 30
# What is measured of a row, and its unit.
QUANTITIES = {
    "positions": "positions",
    "text_tokens": "tokens",
    "answer_frames": "frames",
    "answer_seconds": "s",
    "question_seconds": "s",
}


@dataclass
class RowReport:
    """
    What was found in one row.

    Args:
        where (`str`): `file:row`.
        errors (`list[str]`): Why it cannot be trained on.
        flags (`list[str]`): What may not be meant: empty answers, answers that are cut.
        lengths (`dict[str, list[float]]`): By the names of `QUANTITIES`: positions and text tokens of the whole
            dialogue, frames (12.5/s) and seconds of each answer, seconds of each question.
        pictures (`int`): How many there are.
    """

    where: str
    errors: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    lengths: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in QUANTITIES})
    pictures: int = 0


def check_row(
    row: Mapping[str, Any],
    processor: MiniMindOProcessor,
    config: MiniMindOConfig,
    max_length: int = 512,
    where: str = "row",
) -> RowReport:
    """
    Reads a row as training would, without its random choices.

    Args:
        row (`Mapping`): Of the original's schema.
        processor ([`MiniMindOProcessor`]), config ([`MiniMindOConfig`]): See [`build_sample`].
        max_length (`int`, defaults to 512): Longest sequence in training, in positions.
        where (`str`): How messages call the row.
    """
    report = RowReport(where)

    def attempt(name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        # A TypeError is what values of other types than the schema's end in.
        except (ValueError, OSError, TypeError) as error:
            message = f"{name}: {error}" if name else str(error)
            if message not in report.errors:
                report.errors.append(message)
            return None

    read = attempt("", lambda: read_row(row, config))
    if read is None:
        return report
    for index, message in enumerate(read.messages):
        if message["role"] not in ROLES:
            report.errors.append(f"message {index} has the role {message['role']!r}, not one of {', '.join(ROLES)}")
        if not isinstance(message.get("content") or "", str):
            report.errors.append(f"message {index} has no text as `content`: {message['content']!r:.80}")
    ends = [index + 1 for index, message in enumerate(read.messages) if message["role"] == "assistant"]
    questions = sum(message["role"] == "user" for message in read.messages)
    for name, found, turns in (
        ("question_audios", len(read.question_audios), questions),
        ("answer_audios", len(read.answer_codes), len(ends)),
    ):
        if found > turns:
            report.errors.append(f"`{name}` has {found} entries for {turns} turns")
    if report.errors:
        return report

    rate, limit = processor.feature_extractor.sampling_rate, processor.feature_extractor.max_frames
    for index, recording in enumerate(read.question_audios):
        name = f"question_audios[{index}]"
        clip = (
            attempt(name, lambda recording=recording: load_audio(recording, target_rate=rate)) if recording else None
        )
        if clip is not None:
            report.lengths["question_seconds"].append(len(clip) / rate)
            frames = processor.feature_extractor.num_frames(len(clip))
            if frames > limit:
                report.errors.append(f"{name} has {frames} frames, the speech encoder takes at most {limit}")
    for index, image in enumerate(read.images):
        attempt(f"image_bytes[{index}]", lambda image=image: load_image(image))
    if report.errors:
        return report
    report.pictures = len(read.images)
    marks = sum((message.get("content") or "").count(IMAGE_MARK) for message in read.messages)
    if marks != len(read.images):
        report.flags.append(f"{marks} {IMAGE_MARK} marks for {len(read.images)} pictures")

    def build(dialogue: Row, length: int) -> Sample:
        settings = SampleSettings.deterministic(length)
        return build_sample(dialogue, processor, config, settings, sample_generator(0, 0, 0))

    sample = None
    for index, end in enumerate(ends):
        message = read.messages[end - 1]
        if not (message.get("content") or "").strip() and not message.get("tool_calls"):
            report.flags.append(f"answer {index} is empty")
        frames = read.answer_codes[index].shape[1] if index < len(read.answer_codes) else 0
        if frames:
            report.lengths["answer_frames"].append(frames)
            report.lengths["answer_seconds"].append(frames / FRAME_RATE)
        elif read.answer_codes:
            report.flags.append(f"answer {index} has no speech")
        dialogue = dataclasses.replace(read, messages=read.messages[:end])
        sample = attempt("", lambda dialogue=dialogue: build(dialogue, NO_LIMIT))
        if sample is not None and len(sample.input_ids) > max_length:
            report.flags.append(f"answer {index} ends at position {len(sample.input_ids)} of {max_length}: it is cut")
    # An error may be that of a turn before the last.
    if sample is None or report.errors:
        return report
    report.lengths["positions"].append(len(sample.input_ids))
    report.lengths["text_tokens"].append(int((sample.input_ids != (config.pad_token_id or 0)).sum()))
    if len(sample.input_ids) > max_length:
        sample = build(read, max_length)
    if not sample.labels.ne(-100).any() and not sample.audio_labels.ne(-100).any():
        report.errors.append(f"no label stands within the first {max_length} positions: the prompt fills them")
    return report


@dataclass
class DataReport:
    """The reports of many rows; `str()` is a table, and the lists of flags and errors."""

    rows: int = 0
    pictures: int = 0
    errors: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    lengths: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in QUANTITIES})

    def add(self, row: RowReport) -> None:
        """Adds a row."""
        self.rows += 1
        self.pictures += row.pictures
        self.errors += [f"{row.where}: {error}" for error in row.errors]
        self.flags += [f"{row.where}: {flag}" for flag in row.flags]
        for name, values in row.lengths.items():
            self.lengths[name] += values

    def __str__(self) -> str:
        hours = {name: sum(self.lengths[f"{name}_seconds"]) / 3600 for name in ("answer", "question")}
        lines = [
            f"{self.rows} rows, {len(self.lengths['answer_seconds'])} spoken answers ({hours['answer']:.2f} h), "
            f"{len(self.lengths['question_seconds'])} spoken questions ({hours['question']:.2f} h), "
            f"{self.pictures} pictures",
            f"{'':18}{'count':>9}{'min':>9}{'median':>9}{'max':>9}{'total':>12}",
        ]
        for name, values in self.lengths.items():
            if values:
                digits = 1 if name.endswith("seconds") else 0
                numbers = [min(values), float(np.median(values)), max(values)]
                lines.append(
                    f"{name.replace('_', ' '):18}{len(values):9}"
                    + "".join(f"{number:9.{digits}f}" for number in numbers)
                    + f"{sum(values):12.{digits}f}"
                )
        for name, found in (("flag", self.flags), ("error", self.errors)):
            lines += [f"{len(found)} {name}{'' if len(found) == 1 else 's'}"] + [f"  {line}" for line in found]
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike) -> None:
        """Draws histograms of the durations and lengths into a PNG file."""
        from .showing import new_figure, save_png

        shown = {name: values for name, values in self.lengths.items() if values and name != "answer_frames"}
        figure = new_figure(4.2 * max(len(shown), 1), 3.2)
        for place, (name, values) in enumerate(shown.items(), start=1):
            axes = figure.add_subplot(1, len(shown), place)
            axes.hist(
                values, bins=min(40, max(5, len(values) // 4)), color="#4878a8", edgecolor="white", linewidth=0.5
            )
            median = float(np.median(values))
            axes.axvline(median, color="#c44e52")
            axes.set(title=f"{name.replace('_', ' ')}, median {median:.1f}", xlabel=QUANTITIES[name])
            axes.yaxis.get_major_locator().set_params(integer=True)
        with new_file(path) as temporary:
            save_png(figure, temporary)


class _RowGroups(torch.utils.data.Dataset):
    """The row groups of parquet files, each as the reports of its rows."""

    def __init__(self, files: list[str], processor, config, max_length: int):
        self.groups = []
        for path in files:
            metadata = read_metadata(path)
            names = metadata.schema.to_arrow_schema().names
            if "conversations" not in names:
                raise ValueError(f"{path} has no column `conversations`, but {names}.")
            first = 0
            for group in range(metadata.num_row_groups):
                self.groups.append((path, group, first))
                first += metadata.row_group(group).num_rows
        self.processor, self.config, self.max_length = processor, config, max_length

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> list[RowReport]:
        path, group, first = self.groups[index]
        reports = []
        try:
            with open_parquet(path) as file:
                # Small batches: a row may hold megabytes of sound and pictures.
                for batch in file.iter_batches(batch_size=16, row_groups=[group]):
                    for row in batch.to_pylist():
                        where = f"{path}:{first + len(reports)}"
                        reports.append(check_row(row, self.processor, self.config, self.max_length, where))
        except (ArrowException, OSError) as error:
            reports.append(RowReport(f"{path}:{first + len(reports)}", [f"from here on unreadable: {error}"]))
        return reports


def in_workers(dataset: torch.utils.data.Dataset, workers: int, order: Iterable[int] | None = None) -> Iterator[Any]:
    """The items of a dataset in their order, made in `workers` processes (0: in this one)."""
    order = list(range(len(dataset)) if order is None else order)  # pyright: ignore[reportArgumentType]
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=order,
        num_workers=min(workers, len(order)),
        # Items as they are, not as tensors.
        collate_fn=lambda item: item,
    )
    yield from loader


def check_files(
    files: Sequence[str | os.PathLike],
    processor: MiniMindOProcessor,
    config: MiniMindOConfig,
    max_length: int = 512,
    workers: int = 0,
) -> DataReport:
    """
    Checks every row of parquet files.

    Args:
        files (list of `str` or `os.PathLike`): Parquet files of the original's schema.
        processor ([`MiniMindOProcessor`]), config ([`MiniMindOConfig`]), max_length (`int`): See [`check_row`].
        workers (`int`, defaults to 0): Processes beside this one.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is no parquet file, or has no conversations.
    """
    missing = [str(path) for path in files if not Path(path).is_file()]
    if missing:
        raise FileNotFoundError(f"No such parquet file: {', '.join(missing)}.")
    groups = _RowGroups([str(path) for path in files], processor, config, max_length)
    report = DataReport()
    # `disable=None`: no bar where there is no terminal.
    for reports in tqdm(in_workers(groups, workers), total=len(groups), unit="group", desc="Checking", disable=None):
        for row in reports:
            report.add(row)
    return report


__all__ = ["DataReport", "RowReport", "check_files", "check_row"]
