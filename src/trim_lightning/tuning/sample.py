"""Measure a training by running a few of its micro-batches."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from trim_lightning.engine.sample import spread_out
from trim_lightning.settings import TuningSettings
from trim_lightning.store.cost import Measured
from trim_lightning.tokens.tokenized import TokenizedRecords
from trim_lightning.tuning.lora_module import TuningModule, add_lora
from trim_lightning.tuning.plan import MicroBatch, MicroBatchLoader
from trim_lightning.tuning.run import Surroundings, count_steps, fit, make_plan

SECONDS = 6.0  # of measuring, roughly, after the first micro-batch
FEWEST, MOST = 2, 24  # micro-batches


def sample_training(
    model: PreTrainedModel,
    records: TokenizedRecords,
    rows: Sequence[int],
    settings: TuningSettings,
    *,
    trainer: Mapping[str, Any],
    seed: int,
    mode: str = "lora",
) -> Measured:
    """Speed of a training, from micro-batches of median and other sizes.

    With ``lora`` the model is as before afterwards; with ``full`` its weights have changed.

    Args:
        model: The base model.
        records: Tokenised records.
        rows: Which of them are trained on.
        settings: Hyperparameters.
        trainer: Arguments of the Lightning Trainer.
        seed: Of the plan.
        mode: ``lora`` or ``full``.
    """
    plan = make_plan(records, rows, replace(settings, epochs=1), "measure", seed, False)
    by_size = sorted(plan, key=lambda micro: records.lengths[list(micro.rows)].sum())
    wrapped: Any = model
    if mode == "lora":
        wrapped = add_lora(model, settings, seed)
    else:
        model.requires_grad_(True)

    def run(micros: Sequence[MicroBatch]) -> float:
        module = TuningModule(wrapped, settings, total_steps=max(1, count_steps(micros)))
        with tempfile.TemporaryDirectory(prefix="trim-sample-") as folder:
            around = Surroundings(Path(folder), trainer, "measure")
            started = time.perf_counter()
            fit(module, MicroBatchLoader(records, micros), settings, around, seed)
            return time.perf_counter() - started

    first = run(by_size[:1])  # pays for what happens once
    chosen = spread_out(by_size, int(np.clip(SECONDS / max(first, 1e-3), FEWEST, MOST)))
    seconds = run(chosen)
    if mode == "lora":
        wrapped.unload()
        model.eval()
    model.requires_grad_(False)
    tokens = sum(int(records.lengths[list(micro.rows)].sum()) for micro in plan)
    whole = seconds / len(chosen) * len(plan)
    return Measured(tokens / whole)
