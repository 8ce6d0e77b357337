"""Which number format a model runs in."""

from __future__ import annotations

from typing import Any

import torch


def resolve_dtype(name: str) -> torch.dtype:
    """Turn ``model.dtype`` into a torch dtype.

    Args:
        name: ``float32``, ``bfloat16``, or ``auto``: bfloat16 where the hardware multiplies it natively (CUDA
            compute capability 8 and up, x86 with AVX-512-BF16 or AMX), else float32.
    """
    if name == "auto":
        return torch.bfloat16 if multiplies_bfloat16() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def multiplies_bfloat16() -> bool:
    """True if this machine's accelerator, or else its CPU, has bfloat16 matrix products in hardware."""
    if torch.cuda.is_available():
        return bool(torch.cuda.get_device_capability()[0] >= 8)
    if torch.backends.mps.is_available():
        return False
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def is_quantized(model: Any) -> bool:
    """True for a model whose linear layers bitsandbytes keeps in 4 or 8 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))
