"""Lightning strategies of trainings that are spread over several devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.optim import Optimizer

from trim_lightning.models.divided import part_of, whole


class SummedDDP(DDPStrategy):
    """Data parallel training whose module adds up the gradients itself, once an optimiser step.

    Lightning's own wraps the module in `DistributedDataParallel`, which takes means over processes at every backward
    pass; our steps differ in their number of micro-batches, and their loss is a sum.
    """

    def configure_ddp(self) -> None:
        """Leave the module as it is."""


class DividedStrategy(ModelParallelStrategy):
    """Training with divided weights (FSDP2) whose checkpoints are those of a single process.

    The first process puts weights and optimiser states together, one tensor at a time, and writes them; every process
    takes its own parts of them back.
    """

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's weights, whole in the first process."""
        assert self.lightning_module is not None
        return {name: whole(value, self.is_global_zero) for name, value in self.lightning_module.state_dict().items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimiser's states, whole in the first process."""
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        states = inner.state_dict()
        states["state"] = {
            number: {
                name: whole(value, self.is_global_zero) if isinstance(value, Tensor) else value
                for name, value in state.items()
            }
            for number, state in states["state"].items()
        }
        return states

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Let the first process write one file."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Map the file: each process reads its parts of it when it takes them."""
        loaded: dict[str, Any] = torch.load(checkpoint_path, map_location="cpu", mmap=True, weights_only=weights_only)
        return loaded

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning calls `load_optimizer_state_dict`."""
        return True

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this process's parts of the module's weights."""
        take(self.lightning_module, checkpoint["state_dict"])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this process's parts of the optimisers' states."""
        for optimizer, states in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            parts = {
                number: {
                    name: part_of(value, weights[number]) if value.shape == weights[number].shape else value
                    for name, value in state.items()
                }
                for number, state in states["state"].items()
            }
            optimizer.load_state_dict({**states, "state": parts})


def take(module: torch.nn.Module | None, values: Mapping[str, Tensor]) -> None:
    """Set some of a module's weights, of which each process may hold a part."""
    assert module is not None
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name in values:
                weight.copy_(part_of(values[name], weight))
