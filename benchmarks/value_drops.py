"""A candidate with a pass for each task: how far a short LoRA on the task's targets lowers each record's loss.

What the targets teach about a record stands for what the record teaches about the targets: to first order both are the
inner product of the same two gradients.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import materials
from trim_lightning.engine.batches import ShardBatches, plan_shards
from trim_lightning.engine.record_statistics import ResponseLoss
from trim_lightning.models.load import load_model
from trim_lightning.models.precision import resolve_dtype
from trim_lightning.settings.schema import TuningSettings
from trim_lightning.tokens.tokenized import TokenizedRecords
from trim_lightning.tuning.run import TrainingSite, train_model
from value_groups import TARGETS, TASKS

Floats = NDArray[np.float64]
TOKENS_PER_BATCH = 4_096
# eight steps over ten targets: a few, so that the targets are not learnt by heart
SETTINGS = TuningSettings(epochs=4, learning_rate=5e-4, warmup_ratio=0.1, batch_size=5)


def losses(model: Any, records: TokenizedRecords) -> Floats:
    """``[records]`` nats per response token, NaN without one."""
    batches = ShardBatches(records, plan_shards(records.lengths, TOKENS_PER_BATCH), "response")
    statistic, found = ResponseLoss(), np.full(len(records), np.nan)
    with torch.no_grad():
        for place in range(len(batches)):
            batch = batches[place]
            total, count = statistic(model, batch).T.numpy()
            found[batch["rows"].numpy()] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return found


def loss_drops(records: TokenizedRecords, targets: TokenizedRecords) -> Iterator[tuple[str, Floats, float]]:
    """``nats`` and ``share`` (of the loss before), each ``[tasks, records]``, and the seconds of all passes."""
    started = time.perf_counter()
    dtype = resolve_dtype("auto")
    before = losses(load_model(materials.smollm2(), dtype), records)
    after = []
    for task in range(len(TASKS)):
        rows = range(task * TARGETS, (task + 1) * TARGETS)
        with tempfile.TemporaryDirectory() as directory:
            site = TrainingSite(Path(directory), {"accelerator": "cpu", "devices": 1}, f"targets of {TASKS[task]}")
            model, _ = train_model(load_model(materials.smollm2(), dtype), targets, tuple(rows), SETTINGS, site, seed=0)
            after.append(losses(model.get_base_model(), records))
            print(f"{TASKS[task]}: {time.perf_counter() - started:.0f} s", flush=True)
    drop = before - np.stack(after)
    seconds = time.perf_counter() - started
    yield "nats", drop, seconds
    yield "share", drop / np.maximum(before, 1e-6), seconds
