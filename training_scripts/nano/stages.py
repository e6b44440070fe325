"""What every stage of the nano recipe has in common: its own folder, reuse, figures and a plot.

A stage is a script with a `main()`. Its folder is `WORK/NAME`, which holds

    started.json    the digest of what the folder is being made from
    figures.json    what was measured, and figures.png, the same as a picture
    done.json       the digest again, and one of what was made, written last: the stage is finished

A stage whose `done.json` has the present digest is not run again. One that was interrupted goes on in its folder from
the files that it keeps there. Where the digest has changed, the folder is emptied first.
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minimind_o_hf.files import new_file


def read_json(path: Path) -> Any:
    """What a JSON file holds; None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSON-lines file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_lines(path: Path, rows: Sequence[Mapping]) -> None:
    """Writes JSON lines, whole or not at all."""
    with new_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def digest_of(inputs: Sequence[Path], settings: Mapping) -> str:
    """
    What a stage's output depends on.

    Args:
        inputs (list of `Path`): Folders of earlier, finished stages. The digests of their outputs stand for them.
        settings (mapping): The stage's settings. A `version` among them is raised with changes of the script that
            change its output.

    Returns:
        `str`: 64 hexadecimal digits.

    Raises:
        ValueError: One of the inputs is not finished.
    """
    found = {folder.name: read_json(folder / "done.json") for folder in inputs}
    missing = [name for name, done in found.items() if done is None]
    if missing:
        raise ValueError(f"Not finished yet: {', '.join(missing)}. Run the earlier stages first.")
    known = {"inputs": {name: done["output"] for name, done in found.items()}, "settings": dict(settings)}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def open_stage(folder: Path, inputs: Sequence[Path], settings: Mapping) -> str | None:
    """
    Prepares a stage's folder: empties it where it was made from something else.

    Args:
        folder (`Path`): Its folder.
        inputs (list of `Path`): Folders of the stages that it reads.
        settings (mapping): Of JSON values.

    Returns:
        `str`: The digest that `done.json` is to have; None where the stage is done already.

    Raises:
        ValueError: An input is not finished, or `folder` holds something that is no stage's.
    """
    digest = digest_of(inputs, settings)
    if (read_json(folder / "done.json") or {}).get("digest") == digest:
        return None
    started = read_json(folder / "started.json")
    if started is None and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds no stage of this recipe and is not emptied: give another folder.")
    if started is None or started["digest"] != digest:
        if folder.exists():
            # Out of the way at once: files without `started.json` would be taken for somebody else's.
            old = folder.with_name(f".{folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
            shutil.rmtree(old)
        write_json(folder / "started.json", {"digest": digest, "settings": dict(settings)})
    return digest


def output_digest(folder: Path, outputs: Sequence[str], digest: str) -> str:
    """Of the named files; of the stage's own digest where none is named."""
    total = hashlib.sha256() if outputs else hashlib.sha256(digest.encode())
    for name in outputs:
        total.update((folder / name).read_bytes())
    return total.hexdigest()


def run_stage(
    folder: Path,
    inputs: Sequence[Path],
    settings: Mapping,
    make: Callable[[Path], Mapping],
    outputs: Sequence[str] = (),
) -> bool:
    """
    Runs a stage, unless it is done already.

    Args:
        folder, inputs, settings: As for [`open_stage`], with the same errors.
        make (callable): Fills the folder and returns the figures. It is called again after an interruption.
        outputs (list of `str`, *optional*): Files whose content stands for what was made: where a new run gives the
            same again, later stages are reused.

    Returns:
        `bool`: Whether there was something to do.
    """
    digest = open_stage(folder, inputs, settings)
    if digest is None:
        sys.stderr.write(f"{folder.name}: unchanged, reused\n")
        return False
    sys.stderr.write(f"{folder.name}: running\n")
    write_json(folder / "figures.json", make(folder))
    write_json(folder / "done.json", {"digest": digest, "output": output_digest(folder, outputs, digest)})
    return True


def corpus_seed(work: Path) -> int:
    """The seed of WORK/corpus, on which depends what it holds out."""
    return read_json(work / "corpus" / "started.json")["settings"]["seed"]


def digest_of_files(*paths: str | Path) -> str:
    """For the settings of a stage that depends on files of the repository, such as its own script."""
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()


def stage_arguments(description: str) -> argparse.ArgumentParser:
    """The options that all stages have: the work folder, and `--quick`."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("work", type=Path, metavar="WORK", help="folder of all stages")
    parser.add_argument("--quick", action="store_true", help="a smoke run: little data, few steps, no useful result")
    return parser


def new_plot(rows: int = 1, columns: int = 1, width: float = 10, height: float = 4):
    """A figure without a display, and its axes in one flat list."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")
    return figure, list(axes.flat)


def save_plot(figure, path: Path) -> None:
    """Writes a figure as PNG and closes it."""
    from matplotlib import pyplot

    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    pyplot.close(figure)


def plot_counts(counts: Mapping[str, float], label: str, path: Path) -> None:
    """Bars with names."""
    figure, (axis,) = new_plot(height=1 + 0.4 * len(counts))
    axis.barh(list(counts), list(counts.values()))
    axis.bar_label(axis.containers[0], padding=4)
    axis.invert_yaxis()
    axis.set_xlabel(label)
    save_plot(figure, path)
