"""Linear layers with an adapter beside their weights: faster than PEFT's, and LoRA can be trained on top of them."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear
from transformers import PreTrainedModel


class LowRankLinear(nn.Linear):
    """``x Wᵀ + b + (x Aᵀ) Bᵀ`` with frozen A and B in the number format of W.

    Args:
        base: Gives W ``[out, in]`` and b.
        down: A ``[rank, in]``.
        up: B ``[out, rank]``, the adapter's scale in it.
    """

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor) -> None:
        nn.Module.__init__(self)  # not Linear's own, which would make weights
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.down, self.up = (
            nn.Parameter(matrix.detach().to(base.weight), requires_grad=False) for matrix in (down, up)
        )

    def forward(self, input: Tensor) -> Tensor:
        """``[..., out]`` of ``[..., in]``."""
        states = super().forward(input)
        low = linear(input, self.down)
        return torch.addmm(states.flatten(0, -2), low.flatten(0, -2), self.up.t()).view_as(states)


class LowRankBeside(nn.Module):
    """The same around a linear layer that has to stay what it is: weights divided among processes, or quantised.

    Args:
        base: The layer.
        down: See `LowRankLinear`.
        up: See there.
        dtype: Number format of what goes in and comes out.
    """

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = (
            nn.Parameter(matrix.detach().to(base.weight.device, dtype), requires_grad=False) for matrix in (down, up)
        )

    def forward(self, input: Tensor) -> Tensor:
        """``[..., out]`` of ``[..., in]``."""
        states: Tensor = self.base(input)
        low = linear(input, self.down)
        return torch.addmm(states.flatten(0, -2), low.flatten(0, -2), self.up.t()).view_as(states)


def beside_weights(wrapped: PeftModel) -> tuple[PreTrainedModel, list[str]]:
    """Take the adapter of a PEFT model out of PEFT's hands.

    Returns:
        The model, and the names of modules whose adapter is of another kind than plain LoRA on a linear layer: those
        stay with PEFT, in the model's number format.
    """
    model: Any = wrapped.get_base_model()
    left = []
    for name, module in list(model.named_modules()):
        if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        layer: Any = module
        if not _is_plain(layer):
            left.append(name)
            for own, parameter in layer.named_parameters():
                if not own.startswith(("base_layer", "original_module")):
                    parameter.data = parameter.data.to(model.dtype)
            continue
        (adapter,), base = layer.active_adapters, layer.base_layer
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight * layer.scaling[adapter]
        if isinstance(base, LowRankLinear):  # trained on top of another adapter
            down, up = torch.cat([base.down.to(down), down]), torch.cat([base.up.to(up), up], dim=1)
        parent, _, child = name.rpartition(".")
        stays = isinstance(base.weight, DTensor) or not base.weight.is_floating_point()
        taken = LowRankBeside(base, down, up, model.dtype) if stays else LowRankLinear(base, down, up)
        setattr(model.get_submodule(parent), child, taken)
    if not left:
        del model.peft_config  # PEFT would take the model for one of its own
    assert isinstance(model, PreTrainedModel)
    return model, left


def _is_plain(module: Any) -> bool:
    if type(module) is not LoraLinear:
        return False
    base: Any = module.base_layer
    if type(base) not in (nn.Linear, LowRankLinear) and base.weight.is_floating_point():  # quantised ones are not
        return False
    (adapter, *more) = module.active_adapters
    biased = module.lora_B[adapter].bias is not None
    return not (more or biased or module.lora_variant.get(adapter) is not None)
