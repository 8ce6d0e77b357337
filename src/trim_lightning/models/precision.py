"""Which number format a model runs in."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

GPU_DRIVERS = ("nvidia", "nvhost", "nvmap", "kfd", "dxg")  # how the devices of CUDA and ROCm begin in /dev


def resolve_dtype(name: str) -> torch.dtype:
    """Turn ``model.dtype`` into a torch dtype; see `resolved_name`."""
    import torch

    return torch.bfloat16 if resolved_name(name) == "bfloat16" else torch.float32


def resolved_name(name: str) -> str:
    """What ``model.dtype`` comes to on this machine, ``float32`` or ``bfloat16``.

    Args:
        name: ``float32``, ``bfloat16``, or ``auto``: bfloat16 where the hardware multiplies it natively (CUDA
            compute capability 8 and up, x86 with AVX-512-BF16 or AMX), else float32.
    """
    if name == "auto":
        return "bfloat16" if multiplies_bfloat16() else "float32"
    return {"float32": "float32", "bfloat16": "bfloat16"}[name]


def multiplies_bfloat16() -> bool:
    """True if this machine's accelerator, or else its CPU, has bfloat16 matrix products in hardware."""
    if not asks_torch():
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
        return not {"avx512_bf16", "amx_tile"}.isdisjoint(flags)
    import torch

    if torch.cuda.is_available():
        return bool(torch.cuda.get_device_capability()[0] >= 8)
    if torch.backends.mps.is_available():
        return False
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def has_cuda() -> bool:
    """True if this machine has a GPU that torch can use as CUDA."""
    if not asks_torch():
        return False
    import torch

    return torch.cuda.is_available()


def asks_torch() -> bool:
    """False on a Linux without a GPU's driver while torch is not loaded.

    A run from the store needs it for nothing else, and it takes longer to load than such a run.
    """
    if "torch" in sys.modules or sys.platform != "linux" or not Path("/proc/cpuinfo").exists():
        return True
    return any(device.name.startswith(GPU_DRIVERS) for device in Path("/dev").iterdir())


def is_quantized(model: Any) -> bool:
    """True for a model whose linear layers bitsandbytes keeps in 4 or 8 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))
