"""A warm-up's checkpoints by plain means: PEFT's own loading, float64, one record at a time."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from reference.reference import Tokens


@cache
def model_at(base: Path, folder: Path | None) -> torch.nn.Module:
    """The model with the adapter of a checkpoint beside its weights, or as it is."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    if folder is None:
        return plain.eval()
    return PeftModel.from_pretrained(plain, str(folder), is_trainable=True).eval().double()


def key_of(entry: Path) -> dict:
    """The key of a store entry."""
    return json.loads((entry / "entry.json").read_text())["key"]


def warmup_of(store: Path, epochs: int, **settings: object) -> Path:
    """The store's warm-up with so many epochs and these settings."""
    (found,) = [
        path
        for path in (store / "checkpoints").iterdir()
        if {"epochs": epochs, **settings}.items() <= key_of(path)["settings"]["warmup"].items()
    ]
    return found


def response_loss(model: torch.nn.Module, record: Tokens) -> float:
    """Mean loss (nats) of the response tokens, the first token of the text excepted; NaN without one."""
    wanted = [place for place in range(1, len(record.ids)) if record.kinds[place] == "response"]
    if not wanted:
        return float("nan")
    with torch.no_grad():
        probabilities = torch.log_softmax(model(torch.tensor([record.ids])).logits[0], dim=-1)
    return -sum(float(probabilities[place - 1, record.ids[place]]) for place in wanted) / len(wanted)


def losses_along(base: Path, warmup: Path, epochs: int, records: list[Tokens], *, from_start: bool) -> np.ndarray:
    """``[records, points]`` mean response losses."""
    folders = [warmup / f"checkpoint-{number:03d}" for number in range(1, epochs + 1)]
    models = [model_at(base, folder) for folder in ([None, *folders] if from_start else folders)]
    return np.array([[response_loss(model, record) for model in models] for record in records])
