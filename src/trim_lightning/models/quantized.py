"""Models whose linear layers are kept in 4 or 8 bits by bitsandbytes, frozen: LoRA is trained beside them.

4 bits are QLoRA's NF4, its scales quantised once more (arXiv 2305.14314); 8 bits are int8 with a scale for each row. In
either case the weights become numbers of the model's own format for the length of a product, in trainings and passes
alike. bitsandbytes' own 8-bit product rounds activations too, with outliers found over a whole batch, and on a CPU not
in trainings: a record's score would depend on its company, and on other numbers than were trained with (our choice).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import BitsAndBytesConfig


def quantization(bits: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """How transformers is to quantise a model's linear layers while it loads them; ``4bit`` or ``8bit``."""
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def as_kept(model: nn.Module) -> None:
    """Put layers of this module in the place of bitsandbytes' own."""
    for name, module in list(model.named_modules()):
        kind = Int8Linear if isinstance(module, Linear8bitLt) else Nf4Linear if isinstance(module, Linear4bit) else None
        if kind is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, kind(module))


class KeptLinear(nn.Linear):
    """``x Wᵀ + b`` of frozen W ``[out, in]`` that is kept in few bits.

    Args:
        quantised: Gives W and b.
    """

    def __init__(self, quantised: Any) -> None:
        nn.Module.__init__(self)  # not Linear's own, which would make weights
        self.in_features, self.out_features = quantised.in_features, quantised.out_features
        self.weight, self.bias = quantised.weight, quantised.bias

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """W in a number format."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """``[..., out]`` of ``[..., in]``."""
        product: Tensor = _Product.apply(input, self.bias, self.numbers)
        return product


class Int8Linear(KeptLinear):
    """W as int8 times a float32 scale for each row, ``[out]``."""

    def __init__(self, quantised: Any) -> None:
        super().__init__(quantised)
        self.weight = nn.Parameter(quantised.weight.data, requires_grad=False)
        self.register_buffer("scale", quantised.weight.SCB / 127)

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """See `KeptLinear.numbers`."""
        scale: Any = self.scale
        return self.weight.to(dtype).mul_(scale[:, None])


class Nf4Linear(KeptLinear):
    """W as NF4, two numbers in a byte, with a scale for each 64 of them in their order."""

    weight: Any

    def __init__(self, quantised: Any) -> None:
        super().__init__(quantised)
        # one row: bitsandbytes' CPU kernel takes wrong scales where rows end amid 64 numbers (0.50.2, AVX-512)
        self.weight.quant_state.shape = torch.Size([self.out_features * self.in_features])

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """See `KeptLinear.numbers`."""
        row: Tensor = dequantize_4bit(self.weight.data, self.weight.quant_state)
        return row.view(self.out_features, self.in_features).to(dtype)


class _Product(torch.autograd.Function):
    """Makes the numbers anew for the backward pass, where autograd would keep them."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, numbers: Callable[[torch.dtype], Tensor]) -> Tensor:
        ctx.numbers = numbers
        return linear(input, numbers(input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return gradient @ ctx.numbers(gradient.dtype), None, None
