"""Figures about a warmed-up scorer: its adapter beside the weights against merged into them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

import materials
from materials import WORK, in_turns, median
from passes import CPU, score

RATES = (2e-4, 2e-5)  # of `warmup=lora` and of `warmup=paper_like`


def adapter() -> dict[str, Any]:
    """Time of a pass with a warm-up's adapter merged into bfloat16 weights, over that with it beside them."""
    from trim_lightning.models.adapter import apply_adapter

    source = materials.smollm2()
    kept = {}
    for rate in RATES:
        folder = trained(source, rate)
        kept[f"kept_at_{rate:g}"] = share_kept(source, folder)
    beside = apply_adapter(materials.model_of(source, torch.bfloat16), folder, gradients=False)
    wrapped = PeftModel.from_pretrained(materials.model_of(source, torch.bfloat16), str(folder))
    merged = wrapped.merge_and_unload()
    records, bank = materials.tokens_of(source, 120, "engine"), materials.bank_for(beside)
    score(beside, records, bank)
    one, two = in_turns(5, [beside, merged], lambda: score(merged, records, bank), lambda: score(beside, records, bank))
    ratios = [first / second for first, second in zip(one, two, strict=True)]
    return {"ratio": median(ratios), "wanted": "reported", "rounds": ratios, **kept}


def trained(source: Any, rate: float) -> Path:
    """The adapter of twelve steps of rank 16."""
    from trim_lightning.settings.schema import WarmupSettings
    from trim_lightning.tuning.run import ADAPTER, TrainingSite, train_model

    directory = WORK / f"adapter-{rate:g}"
    if not (directory / ADAPTER).exists():
        directory.mkdir(parents=True, exist_ok=True)
        records = materials.tokens_of(source, 60, "adapter", max_length=256)
        settings = WarmupSettings(epochs=3, batch_size=16, learning_rate=rate)
        model = materials.model_of(source, torch.bfloat16)
        train_model(model, records, range(len(records)), settings, TrainingSite(directory, CPU, "warm-up"), seed=0)
    return directory / ADAPTER


def share_kept(source: Any, folder: Path) -> float:
    """Of the update's direction, how much is left in bfloat16 weights that it is merged into; 1 is all."""
    models = [materials.model_of(source, dtype) for dtype in (torch.float32, torch.float32, torch.bfloat16)]
    before, plain = (dict(model.named_parameters()) for model in models[1:])
    PeftModel.from_pretrained(models[0], str(folder)).merge_and_unload()
    exact = dict(models[0].named_parameters())
    rounded = materials.model_of(source, torch.bfloat16)
    PeftModel.from_pretrained(rounded, str(folder)).merge_and_unload()
    along = whole = 0.0
    for name, weight in rounded.named_parameters():
        update = (exact[name] - before[name]).double()
        along += float((update * (weight.double() - plain[name].double())).sum())
        whole += float((update * update).sum())
    return along / whole
