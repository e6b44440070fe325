"""What training with sharded parameters or gradients (FSDP2, DeepSpeed) needs beside a configuration."""

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import Trainer


class ShardedTraining(Trainer):
    """A Trainer of models with parameters of no dimension, which FSDP2 and DeepSpeed refuse, and with tied weights."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        model: Any = self.model
        self._scalars: set[str] = set()
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            self._scalars = _give_dimension(model)
        if self.is_fsdp_enabled:
            plugin: Any = self.accelerator.state.fsdp_plugin
            if plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
                # accelerate has every unit's outputs cast, which would round the losses to bfloat16.
                plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if state_dict and self._scalars:
            # Gathered tensors share no memory, so that transformers cannot tell which are tied.
            tied = getattr(self.accelerator.unwrap_model(self.model), "all_tied_weights_keys", {})
            state_dict = {
                name: tensor.view(()) if name in self._scalars else tensor
                for name, tensor in state_dict.items()
                if name not in tied
            }
        super()._save(output_dir, state_dict)


def _give_dimension(model: nn.Module) -> set[str]:
    """Replaces parameters of shape `()` by ones of shape `(1,)`, which compute the same; returns their names."""
    names = {name for name, parameter in model.named_parameters() if parameter.dim() == 0}
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        parameter: torch.Tensor = getattr(module, leaf)
        setattr(module, leaf, nn.Parameter(parameter.detach().view(1), parameter.requires_grad))
    return names


__all__ = ["ShardedTraining"]
