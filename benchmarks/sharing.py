"""What it takes to check, merge and export: seconds and megabytes, against copying the same files.

    python benchmarks/sharing.py                 # the packaged nano and, but for ONNX, the released size; minutes
    python benchmarks/sharing.py --quick         # nano alone, a minute

Checking (`minimind-o publish --dry-run`) copies a checkpoint, loads it and has it answer; merging reads base and
adapter and writes another checkpoint. The floor is a copy of what each leaves behind, in the same process. An adapter
is one of rank 16 on Thinker and Talker; putting it on is `model.load_adapter`, switching `model.set_adapter`.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMultimodalLM

from minimind_o_hf import default_checkpoint
from minimind_o_hf.adapters import get_peft_model, lora_config, merge_checkpoint
from minimind_o_hf.export import export_thinker
from minimind_o_hf.export_onnx import export_onnx
from minimind_o_hf.presets import init_checkpoint
from minimind_o_hf.publishing import publish


def megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def row(name: str, made: Path, took: float, scratch: Path) -> None:
    floor = min(
        seconds(lambda number=number: shutil.copytree(made, scratch / f"{name} {number}")) for number in (1, 2)
    )
    print(f"| {name} | {megabytes(made):.1f} | {took:.2f} | {floor:.2f} | {took / floor:.0f} |", flush=True)
    for number in (1, 2):
        shutil.rmtree(scratch / f"{name} {number}")


def measure(checkpoint: Path, scratch: Path, with_onnx: bool) -> None:
    """The rows of one checkpoint."""
    adapter = scratch / "adapter"
    model: Any = AutoModelForMultimodalLM.from_pretrained(checkpoint)
    adapted = get_peft_model(model, lora_config("all", init_lora_weights=False))
    took = seconds(lambda: adapted.save_pretrained(str(adapter)))
    print(f"\n{checkpoint.name}\n\n| | MB | s | copying, s | ratio |\n|---|---|---|---|---|")
    row("checkpoint", checkpoint, seconds(lambda: AutoModelForMultimodalLM.from_pretrained(checkpoint)), scratch)
    row("adapter, saved", adapter, took, scratch)
    jobs = {
        "checked for publishing": lambda out: publish(checkpoint, "somebody/model", dry_run=out),
        "merged": lambda out: merge_checkpoint(adapter, out),
        "Thinker as Qwen3": lambda out: export_thinker(checkpoint, out),
    }
    if with_onnx:
        jobs["ONNX"] = lambda out: export_onnx(checkpoint, out)
    for name, job in jobs.items():
        out = scratch / name
        row(name, out, seconds(lambda job=job, out=out: job(out)), scratch)
        shutil.rmtree(out)
    model = AutoModelForMultimodalLM.from_pretrained(checkpoint)
    put = [seconds(lambda name=name: model.load_adapter(adapter, name)) for name in ("first", "second")]
    switch = min(seconds(lambda name=name: model.set_adapter(name)) for name in ("first", "second") * 3)
    print(f"\nPutting an adapter on: {put[0]:.2f} s, a second one {put[1]:.2f} s; switching: {1000 * switch:.1f} ms.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="nano alone")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        nano = Path(shutil.copytree(default_checkpoint(), Path(folder) / "nano", copy_function=shutil.copyfile))
        measure(nano, Path(folder) / "of nano", with_onnx=True)
        if not options.quick:
            init_checkpoint("dense", Path(folder) / "dense")
            measure(Path(folder) / "dense", Path(folder) / "of dense", with_onnx=False)


if __name__ == "__main__":
    main()
