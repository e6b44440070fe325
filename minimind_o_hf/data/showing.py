"""One training sample as a picture of its nine rows, and as sound."""

import itertools
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyarrow import ArrowException

from minimind_o_hf.files import new_file
from minimind_o_hf.modeling import MiniMindOConfig, revert_delay_pattern
from minimind_o_hf.processing import MiniMindOProcessor

from .rows import open_parquet
from .samples import Row, Sample, SampleSettings, build_sample, read_row, sample_generator

POSITIONS_A_LINE = 40
COLORS = {"pad": "#f4f4f4", "input": "#c6d9ee", "label": "#ffd480", "stop": "#e98b80", "speaker": "#c8a8e0"}
# DejaVu Sans, which comes with matplotlib, has no Chinese.
FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Microsoft YaHei", "PingFang SC", "SimHei")


def new_figure(width: float, height: float, layout: Any = "constrained") -> Any:
    """An empty matplotlib figure, in inches, that no window shows."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError('Pictures need matplotlib: pip install "minimind_o_hf[train]"') from error
    return Figure(figsize=(width, height), layout=layout)


def save_png(figure: Any, path: str | os.PathLike) -> None:
    """Writes a figure as a PNG file, whatever the path's suffix says."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # A token of a script that no installed font has is a box; its id stands below.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(path, format="png", dpi=110)


def read_parquet_row(path: str | os.PathLike, number: int) -> dict[str, Any]:
    """Reads row `number`, counted from 0, of a parquet file."""
    try:
        with open_parquet(path) as file:
            if not 0 <= number < file.metadata.num_rows:
                raise ValueError(f"{path} has rows 0 to {file.metadata.num_rows - 1}, not {number}.")
            for group in range(file.metadata.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if number < rows:
                    for batch in file.iter_batches(batch_size=16, row_groups=[group]):
                        if number < len(batch):
                            return batch.slice(number, 1).to_pylist()[0]
                        number -= len(batch)
                number -= rows
    except ArrowException as error:
        raise ValueError(f"{path} is no readable parquet file: {error}") from error
    raise ValueError(f"{path} holds fewer rows than it says.")


def _cells(sample: Sample, config: MiniMindOConfig) -> list[list[tuple[str, str]]]:
    """Each row's cells, as (written, kind), text first."""
    specials = {
        config.audio_pad_token: ("", "pad"),
        config.audio_stop_token: ("stop", "stop"),
        config.audio_spk_token: ("spk", "speaker"),
    }

    def kind(value: int, label: int, special: dict[int, tuple[str, str]]) -> tuple[str, str]:
        written, name = special.get(value, (str(value), "input"))
        return written, "label" if label != -100 and name != "stop" else name

    pad = {config.pad_token_id or 0: ("", "pad")}
    rows = [(sample.input_ids, sample.labels, pad)]
    rows += [(codes, labels, specials) for codes, labels in zip(sample.audio_codes, sample.audio_labels, strict=True)]
    return [
        [kind(value, label, special) for value, label in zip(ids.tolist(), labels.tolist(), strict=True)]
        for ids, labels, special in rows
    ]


def draw_sample(sample: Sample, processor: MiniMindOProcessor, config: MiniMindOConfig, title: str = "") -> Any:
    """
    Draws a sample: text and codes on one time axis, wrapped into lines of 40 positions.

    Returns:
        A matplotlib figure. Cells hold the inputs; those that are labels too are highlighted.
    """
    from matplotlib import font_manager
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    cells, length = _cells(sample, config), len(sample.input_ids)
    lines = -(-length // POSITIONS_A_LINE)
    height = 0.6 + 2.75 * lines
    # Placed by hand: measuring thousands of small texts would take seconds.
    figure = new_figure(15.5, height, layout=None)
    figure.subplots_adjust(left=0.035, right=0.995, bottom=0.3 / height, top=1 - 0.3 / height, hspace=0.1)
    installed = set(font_manager.get_font_names())
    fonts = ["DejaVu Sans", *(name for name in FONTS if name in installed)]
    names = ["text", *(f"code {index}" for index in range(len(cells) - 1))]
    for line in range(lines):
        axes = figure.add_subplot(lines, 1, line + 1)
        start = line * POSITIONS_A_LINE
        colors = [[to_rgb(COLORS[kind]) for _, kind in row[start : start + POSITIONS_A_LINE]] for row in cells]
        mesh = np.asarray(colors)
        corners = np.arange(start, start + mesh.shape[1] + 1), np.arange(len(cells) + 1)
        axes.pcolormesh(*corners, mesh, edgecolors="white", linewidth=0.8)
        for position in range(start, min(start + POSITIONS_A_LINE, length)):
            for row, values in enumerate(cells):
                axes.text(position + 0.5, row + 0.5, values[position][0], ha="center", va="center", fontsize=6)
            token = processor.tokenizer.decode([int(sample.input_ids[position])])
            if cells[0][position][1] != "pad":
                token = repr(token)[1:-1].replace(" ", "\N{OPEN BOX}")
                # `parse_math`: a token may be a dollar sign.
                axes.text(
                    *(position + 0.5, -0.15, token[:14]),
                    **{"rotation": 60, "ha": "left", "va": "bottom", "fontsize": 6.5, "family": fonts},
                    parse_math=False,
                )
        # Every line has the same scale, and room for the tokens above.
        axes.set(xlim=(start, start + POSITIONS_A_LINE), ylim=(len(cells), -3.2), yticks=[])
        axes.set_yticks([row + 0.5 for row in range(len(cells))], names, fontsize=7)
        ticks = range(start, min(start + POSITIONS_A_LINE, length), 5)
        axes.set_xticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks], fontsize=7)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=10, y=1 - 0.1 / height, va="top")
    figure.legend(
        handles=[Patch(facecolor=color, label=name) for name, color in COLORS.items()],
        **{"loc": "upper right", "ncols": len(COLORS), "fontsize": 8, "frameon": False},
    )
    return figure


def _last_answer(sample: Sample, config: MiniMindOConfig) -> Any:
    """The codes `(1, num_codebooks, num_frames)` that the sample's labels hold: what training teaches to say."""
    labelled = (sample.audio_labels[0] != -100).nonzero().flatten()
    if not len(labelled):
        return torch.zeros((1, config.num_codebooks, 0), dtype=torch.long)
    delayed: Any = sample.audio_labels[None]
    start: Any = labelled[:1]
    codes, valid = revert_delay_pattern(delayed, start, config.audio_codebook_size)
    return codes[..., : int(valid.sum())]


def show_sample(
    path: str | os.PathLike,
    number: int,
    processor: MiniMindOProcessor,
    config: MiniMindOConfig,
    out: str | os.PathLike,
    max_length: int = 512,
    seed: int | None = None,
) -> str:
    """
    Renders one sample into a folder: `sample.png`, and, where it has them, `answer.wav`, `question.wav` (as the speech
    encoder hears it, 16 kHz), `reference.wav` and `image.png`.

    Args:
        path (`str` or `os.PathLike`): A parquet file.
        number (`int`): The row, counted from 0.
        processor ([`MiniMindOProcessor`]): With its codec.
        config ([`MiniMindOConfig`]): The model's.
        out (`str` or `os.PathLike`): The folder, made where it is missing; files of these names are replaced.
        max_length (`int`, defaults to 512): Longest sequence, in positions.
        seed (`int`, *optional*): Make training's random choices, as with this seed in epoch 0; none are made without.

    Returns:
        `str`: The sample's text and a line for each file.

    Raises:
        ValueError, OSError: There is no such row, or it cannot be trained on.
    """
    row = read_row(read_parquet_row(path, number), config)
    settings = SampleSettings.deterministic(max_length) if seed is None else SampleSettings(max_length)
    sample = build_sample(row, processor, config, settings, sample_generator(seed or 0, 0, number))
    folder = Path(out)
    title = f"{Path(path).name}, row {number}: {len(sample.input_ids)} positions"
    with new_file(folder / "sample.png") as temporary:
        save_png(draw_sample(sample, processor, config, title), temporary)
    made = [f"{folder / 'sample.png'}: {title}"]
    made += _write_sounds(sample, row, processor, config, folder)
    if sample.images:
        from minimind_o_hf.processing.image_minimind_o import load_image

        with new_file(folder / "image.png") as temporary:
            load_image(sample.images[0]).save(temporary, "PNG")  # pyright: ignore[reportAttributeAccessIssue]
        made.append(f"{folder / 'image.png'}: the picture")
    return "\n".join([_text(sample, processor, config), "", *made])


def _write_sounds(
    sample: Sample, row: Row, processor: MiniMindOProcessor, config: MiniMindOConfig, folder: Path
) -> list[str]:
    reference = row.reference_codes
    waves: list[tuple[str, Any, int]] = [
        ("question", clip, processor.feature_extractor.sampling_rate) for clip in sample.clips
    ]
    codec: Any = processor.audio_tokenizer
    rate = codec.config.sampling_rate if codec is not None else 0
    for name, codes in (
        ("answer", _last_answer(sample, config)),
        ("reference", torch.zeros((1, 1, 0)) if reference is None else torch.from_numpy(reference.copy())[None]),
    ):
        if codes.shape[-1]:
            waves.append((name, processor.decode_audio(codes)[0], rate))
    made = []
    for name, wave, rate in waves:
        target = folder / f"{name}.wav"
        processor.save_audio(wave, target, rate, generated=False)
        seconds = len(wave) / rate
        made.append(f"{target}: {seconds:.2f} s")
    return made


def _text(sample: Sample, processor: MiniMindOProcessor, config: MiniMindOConfig) -> str:
    """The text as it is read, runs of one placeholder written once with their length, padding left out."""
    ids = sample.input_ids[sample.input_ids != (config.pad_token_id or 0)].tolist()
    placeholders = {processor.audio_token_id: processor.audio_token, processor.image_token_id: processor.image_token}
    parts = []
    for placeholder, run in itertools.groupby(ids, key=lambda token: token if token in placeholders else None):
        run = list(run)
        parts.append(
            processor.tokenizer.decode(run) if placeholder is None else f"{placeholders[placeholder]}×{len(run)}"
        )
    return "".join(parts)


__all__ = ["draw_sample", "show_sample"]
