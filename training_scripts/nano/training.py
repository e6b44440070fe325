"""The training of codec and encoders: a loop that goes on after an interruption, and what their commands share."""

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from stages import read_lines, stage_arguments
from torch import nn

from minimind_o_hf.files import new_file

CHECK_EVERY = 250  # steps
SAVE_SECONDS = 120


def encoder_arguments(description: str, steps: int, quick_steps: int) -> argparse.ArgumentParser:
    """The options of an encoder's stage: those of every stage, how many steps, and weights to start from."""
    parser = stage_arguments(description)
    parser.add_argument("--steps", type=int, help=f"default: {steps}, quick: {quick_steps}")
    parser.add_argument("--start", type=Path, metavar="FILE", help="a `training.pt` whose best weights it starts from")
    parser.set_defaults(default_steps=(steps, quick_steps))
    return parser


def steps_and_start(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that these options make: `steps`, and `start`, a hash of the weights, where there are any."""
    steps, quick_steps = options.default_steps
    settings: dict[str, Any] = {"steps": options.steps or (quick_steps if options.quick else steps)}
    if options.start:
        settings["start"] = hashlib.sha256(options.start.read_bytes()).hexdigest()
    return settings


def load_start(network: nn.Module, start: Path | None) -> None:
    """Loads the weights to start from, where there are any."""
    if start:
        network.load_state_dict(torch.load(start, weights_only=True)["best"]["weights"])


def adamw(network: nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW for all parameters."""
    return torch.optim.AdamW(network.parameters(), rate, betas=(0.8, 0.99), weight_decay=1e-3)


def train(
    name: str,
    folder: Path,
    network: nn.Module,
    loss_at: Callable[[int], torch.Tensor],
    check: Callable[[], float],
    steps: int,
    rate: float,
    make_optimizer: Callable[[nn.Module, float], torch.optim.Optimizer] = adamw,
) -> list[dict]:
    """
    Trains a network, and leaves it as it was when its held-out loss was least. Goes on from `folder/NAME.pt`; takes
    `folder/NAME.safetensors`, with its history beside it, as it is.

    Args:
        name (`str`): Of the checkpoint.
        folder (`Path`): Where it is.
        network ([`~torch.nn.Module`]): What is trained.
        loss_at (callable): The training loss at a step; it makes its own random choices from the step.
        check (callable): The held-out loss.
        steps (`int`): How many.
        rate (`float`): Learning rate, which warms up over 100 steps and falls to 0 as a cosine does.
        make_optimizer (callable): Makes an optimiser from the network and the rate.

    Returns:
        list of `dict`: `step`, `train` (mean since the last), `held out` and `seconds`.
    """
    finished = folder / f"{name}.safetensors"
    if finished.is_file():  # a part that was trained to its end before
        network.load_state_dict(load_file(finished))
        return read_lines(folder / f"{name}.jsonl")
    path = folder / f"{name}.pt"
    optimizer = make_optimizer(network, rate)
    step, history, best = 0, [], {"loss": math.inf, "weights": {}}
    if path.is_file():
        state = torch.load(path, weights_only=True)
        network.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        step, history, best = state["step"], state["history"], state["best"]

    def save() -> None:
        state = {"weights": network.state_dict(), "optimizer": optimizer.state_dict()}
        with new_file(path) as temporary:
            torch.save({**state, "step": step, "history": history, "best": best}, temporary)

    saved, losses = time.monotonic(), []
    began = time.monotonic() - (history[-1]["seconds"] if history else 0)
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.item())
        step += 1
        if step % CHECK_EVERY == 0 or step == steps:
            held = check()
            seconds = round(time.monotonic() - began)
            history.append({"step": step, "train": float(np.mean(losses)), "held out": held, "seconds": seconds})
            sys.stderr.write(f"{name} {history[-1]}\n")
            losses = []
            if held < best["loss"]:
                weights = {key: value.clone() for key, value in network.state_dict().items()}
                best = {"loss": held, "weights": weights}
        if time.monotonic() - saved > SAVE_SECONDS or step == steps:
            save()
            saved = time.monotonic()
    network.load_state_dict(best["weights"])
    return history
