"""Muon for the matrices of the layers, AdamW for everything else, as one optimiser.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) turns the momentum of a matrix into the nearest
orthogonal one, which takes a small model further in the same number of steps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from minimind_o_hf.trainer import MiniMindOTrainer


class MuonAndAdamW(torch.optim.Optimizer):
    """
    Two optimisers that look like one to the Trainer and to schedulers.

    Args:
        matrices (list of `dict`), others (list of `dict`): Parameter groups with `params`, `lr` and `weight_decay`.
            Both take the same learning rates: Muon's updates are scaled to the size of AdamW's.
        betas (`tuple[float, float]`): AdamW's.
    """

    def __init__(self, matrices: Sequence[dict], others: Sequence[dict], betas: tuple[float, float]):
        super().__init__([*matrices, *others], {})
        count = len(matrices)
        self.muon = torch.optim.Muon(self.param_groups[:count], adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(self.param_groups[count:], betas=betas)

    def step(self, closure=None):
        """One step of both; there is nothing to compute again."""
        self.muon.step()
        self.adamw.step()

    def state_dict(self) -> dict[str, Any]:
        """Of both."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of both."""
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        # They have made new groups: schedulers are to change these.
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]


class MuonTrainer(MiniMindOTrainer):
    """[`MiniMindOTrainer`] with that optimiser."""

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The trainer's own groups, each split into the layers' matrices and the rest."""
        if self.optimizer is not None:
            return self.optimizer
        plain = super().create_optimizer(model)
        trained: Any = self.model if model is None else model
        matrices = {
            parameter
            for name, module in trained.named_modules()
            if isinstance(module, nn.Linear) and ".layers." in f".{name}."
            for parameter in module.parameters(recurse=False)
            if parameter.dim() == 2
        }
        groups: tuple[list[dict], list[dict]] = ([], [])
        for group in plain.param_groups:
            kept = {name: group[name] for name in ("lr", "weight_decay", "part")}
            for place, wanted in enumerate((True, False)):
                chosen = [parameter for parameter in group["params"] if (parameter in matrices) == wanted]
                if chosen:
                    groups[place].append({"params": chosen, **kept})
        if all(groups):  # a projector alone has no layers
            self.optimizer = MuonAndAdamW(*groups, (self.args.adam_beta1, self.args.adam_beta2))
        return self.optimizer
