"""Figures about memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import materials
from materials import median, seconds
from passes import score
from trim_lightning.models.loss import last_hidden_states


def resident_mib() -> float:
    """Memory that this process, or the GPU, holds now."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**20
    (line,) = [line for line in materials.read("/proc/self/status").splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def reset_peak() -> None:
    """Forget the memory that loading the model took."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Peak resident memory of this process since `reset_peak`, or peak memory of the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    (line,) = [line for line in materials.read("/proc/self/status").splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def long_forward(length: int, saliency: bool) -> dict[str, Any]:
    """Time and peak memory of one forward pass over one long sequence, in this process."""
    from trim_lightning.engine.modules import TargetPass

    model = materials.model_of(materials.smollm2(), materials.best_dtype())
    input_ids = torch.randint(10, 40_000, (1, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    batch = {
        "input_ids": input_ids, "lengths": torch.tensor([length], device=model.device),
        "roles": torch.ones_like(input_ids, dtype=torch.uint8), "rows": torch.tensor([0]),
    }  # fmt: skip
    run = TargetPass(model)
    before = resident_mib()
    with torch.inference_mode():
        last_hidden_states(model, input_ids[:, :64])
        reset_peak()
        taken = seconds(
            (lambda: run.predict_step(batch, 0)) if saliency else (lambda: last_hidden_states(model, input_ids))
        )
    return {"seconds": taken, "peak_mib": peak_mib(), "increase_mib": peak_mib() - before}


def saliency() -> dict[str, Any]:
    """(e) Peak memory and time of a forward with saliency in every layer, over those of a plain one."""
    rows = []
    for length in (512, 1024, 2048, 4096, 8192):
        plain, with_saliency = (child(["long_forward", str(length), flag]) for flag in ("", "1"))
        rows.append(
            {
                "tokens": length,
                "memory_ratio": with_saliency["peak_mib"] / plain["peak_mib"],
                "time_ratio": with_saliency["seconds"] / plain["seconds"],
                "plain_mib": plain["peak_mib"],
                "increase_ratio": with_saliency["increase_mib"] / plain["increase_mib"],
                "seconds": with_saliency["seconds"],
            }
        )
    return {"ratio": rows[-1]["memory_ratio"], "wanted": "<= 1.25 at 8,192 tokens", "lengths": rows}


def growth() -> dict[str, Any]:
    """(f) Exponent of the growth of the pass's seconds with the pool's tokens, 1k to 100k records, tiny model."""
    source = materials.tiny()
    model = materials.model_of(source, torch.float32)
    bank = materials.bank_for(model)
    sizes, times = (1_000, 3_162, 10_000, 31_623, 100_000), []
    records = [
        materials.tokens_of(source, size, f"growth{size}", max_length=64) for size in sizes
    ]  # short: it is about size
    score(model, records[0], bank)
    for part in records:
        times.append(median([score(model, part, bank)["seconds"] for _ in range(3)]))
    exponent = float(np.polyfit(np.log([part.total_tokens for part in records]), np.log(times), 1)[0])
    return {"ratio": exponent, "wanted": "1 +- 0.05", "records": sizes, "seconds": times}


def child(arguments: list[str]) -> dict[str, Any]:
    """Run a figure's part in a process of its own, for a peak of memory that is its own."""
    command = [sys.executable, str(Path(__file__).with_name("figures.py")), *arguments]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return result
