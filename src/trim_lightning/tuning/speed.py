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

from trim_lightning.engine.speed import spread_out
from trim_lightning.models.lora import add_lora
from trim_lightning.settings.schema import TuningSettings
from trim_lightning.store.cost import Measured
from trim_lightning.tokens.tokenized import TokenizedRecords
from trim_lightning.tuning.lora_module import TuningModule
from trim_lightning.tuning.micro_batches import MicroBatch, MicroBatchLoader, trained_rows
from trim_lightning.tuning.run import TrainingSite, count_steps, fit, make_plan, recompute_activations

SECONDS = 6.0  # of measuring, roughly, after the first micro-batch
FEWEST, MOST = 2, 24  # micro-batches


def tokens_of_training(records: TokenizedRecords, rows: Sequence[int], settings: TuningSettings) -> int:
    """Real tokens that a training feeds to the model in all its epochs."""
    return settings.epochs * int(records.lengths[trained_rows(records, rows)].sum())


def sample_training(
    model: PreTrainedModel,
    records: TokenizedRecords,
    rows: Sequence[int],
    settings: TuningSettings,
    *,
    trainer: Mapping[str, Any],
    seed: int,
    title: str,
    mode: str = "lora",
    length_grouped: bool = False,
) -> Measured:
    """Speed of a training and size of its result, from the largest micro-batch and some of other sizes.

    The largest comes before the clock starts: it pays for what happens once, and memory peaks in it. With ``lora`` the
    model is as before afterwards; with ``full`` its weights have changed.

    Args:
        model: The base model.
        records: Tokenised records.
        rows: Which of them are trained on.
        settings: Hyperparameters.
        trainer: Arguments of the Lightning Trainer.
        seed: Of the plan.
        title: Of the training, for messages.
        mode: ``lora`` or ``full``.
        length_grouped: As in the training itself.

    Raises:
        UserError: if no record has a response token.
    """
    plan = make_plan(records, rows, replace(settings, epochs=1), title, seed, length_grouped)
    by_size = sorted(plan, key=lambda micro: -records.lengths[list(micro.rows)].sum())
    wrapped: Any = model
    if mode == "lora":
        wrapped = add_lora(model, settings, seed)
    else:
        model.requires_grad_(True)
    if settings.gradient_checkpointing:
        recompute_activations(model)
        if mode == "lora":
            wrapped.enable_input_require_grads()

    def run(micros: Sequence[MicroBatch]) -> float:
        module = TuningModule(wrapped, settings, total_steps=max(1, count_steps(micros)))
        with tempfile.TemporaryDirectory(prefix="trim-sample-") as folder:
            around = TrainingSite(Path(folder), trainer, "measure")
            started = time.perf_counter()
            fit(module, MicroBatchLoader(records, micros), settings, around, seed)
            return time.perf_counter() - started

    first = run(by_size[:1])
    chosen = spread_out(by_size, int(np.clip(SECONDS / max(first, 1e-3), FEWEST, MOST)))
    seconds = run(chosen)
    result = sum(weight.numel() * weight.element_size() for weight in wrapped.parameters() if weight.requires_grad)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_disable()
    if mode == "lora":
        wrapped.unload()
        model.eval()
    model.requires_grad_(False)
    tokens = sum(int(records.lengths[list(micro.rows)].sum()) for micro in plan)
    whole = seconds / len(chosen) * len(plan)
    return Measured(tokens / whole, bytes_beside=result)
