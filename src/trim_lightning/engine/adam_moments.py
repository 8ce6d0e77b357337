"""Adam's moments at a checkpoint, as safetensors, and the step that they give a gradient."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FILE = "moments.safetensors"
FIRST, SECOND = "exp_avg/", "exp_avg_sq/"


@dataclass(frozen=True)
class AdamMoments:
    """The state of Adam after ``step`` steps.

    Attributes:
        first: Weight name to exponential mean of its gradient.
        second: Weight name to exponential mean of the square.
        step: Steps taken.
        beta1: Decay of the first moment.
        beta2: Decay of the second.
        eps: Added to the root.
    """

    first: Mapping[str, Tensor]
    second: Mapping[str, Tensor]
    step: int
    beta1: float
    beta2: float
    eps: float

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, weights: Mapping[str, nn.Parameter]) -> AdamMoments:
        """The state of a torch Adam or AdamW that has taken a step; zeros of a weight that never got a gradient."""
        states = {name: optimizer.state.get(weight, {}) for name, weight in weights.items()}
        group = optimizer.param_groups[0]

        def moments(of: str) -> dict[str, Tensor]:
            return {
                name: state[of] if of in state else torch.zeros_like(weights[name]) for name, state in states.items()
            }

        return cls(
            first=moments("exp_avg"),
            second=moments("exp_avg_sq"),
            step=max(int(state["step"]) for state in states.values() if "step" in state),
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            eps=float(group["eps"]),
        )

    def save(self, path: Path) -> None:
        """Write them."""
        tensors = {f"{FIRST}{name}": moment.detach().contiguous() for name, moment in self.first.items()}
        tensors |= {f"{SECOND}{name}": moment.detach().contiguous() for name, moment in self.second.items()}
        numbers = {"step": self.step, "beta1": self.beta1, "beta2": self.beta2, "eps": self.eps}
        save_file(tensors, path, {"adam": json.dumps(numbers)})  # one entry: several come in a random order

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> AdamMoments:
        """Read what `save` wrote."""
        with safe_open(path, framework="pt", device=str(device)) as file:
            names = list(file.keys())
            numbers = json.loads(file.metadata()["adam"])
            return cls(
                first={name.removeprefix(FIRST): file.get_tensor(name) for name in names if name.startswith(FIRST)},
                second={name.removeprefix(SECOND): file.get_tensor(name) for name in names if name.startswith(SECOND)},
                **numbers,
            )

    def precondition(self, name: str, gradients: Tensor) -> Tensor:
        """The next step of Adam, without learning rate, if it saw one of these gradients alone.

        Args:
            name: The weight's name.
            gradients: ``[batch, *shape of the weight]`` float32.

        Returns:
            The steps, of the same shape.
        """
        correction = math.sqrt(1 - self.beta2 ** (self.step + 1))
        # all that is the same for every gradient goes into one factor: five sweeps over the batch, no more
        factor = correction / (1 - self.beta1 ** (self.step + 1))
        second, first = self.second[name] * self.beta2, self.first[name] * (self.beta1 * factor)
        roots = torch.addcmul(second, gradients, gradients, value=1 - self.beta2)
        roots.sqrt_().add_(self.eps * correction)
        return torch.add(first, gradients, alpha=(1 - self.beta1) * factor).div_(roots)
