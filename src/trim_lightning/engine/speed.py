"""Measure how fast a model runs forward on this machine."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from trim_lightning.engine.batches import Shard, ShardBatches, plan_shards
from trim_lightning.engine.memory import in_halves
from trim_lightning.models.loss import last_hidden_states
from trim_lightning.tokens.tokenized import TokenizedRecords

SECONDS = 6.0  # of measuring, roughly, after the first batch
FEWEST, MOST = 3, 48  # batches
Item = TypeVar("Item")


def spread_out(items: Sequence[Item], number: int) -> list[Item]:
    """``number`` items, each from the middle of an equal part; all of them if there are fewer."""
    if number >= len(items):
        return list(items)
    return [items[int((place + 0.5) * len(items) / number)] for place in range(number)]


def forward_seconds(model: PreTrainedModel, records: TokenizedRecords, tokens_per_batch: int) -> float:
    """Seconds of the plain forward pass for each real token, from batches spread over its whole plan.

    The first batch, the longest records, comes before the clock starts: it pays for what happens once, and memory
    peaks in it. The others are drawn at equal distances, so that short and long records have their share.

    Raises:
        UserError: if memory does not suffice for a single record.
    """
    rows = [rows for shard in plan_shards(records.lengths, tokens_per_batch) for rows in shard.batches]
    batches = ShardBatches(records, [Shard(0, tuple(rows), 0)], "all")
    if not len(batches):
        return 0.0

    def forward(batch: Mapping[str, Any]) -> Tensor:
        return last_hidden_states(model, batch["input_ids"].to(model.device))[:, -1, 0]

    def run(places: Sequence[int]) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            for place in places:
                in_halves(forward, batches[place]).tolist()  # an accelerator is waited for
        return time.perf_counter() - started

    first = run([0])
    chosen = spread_out(range(len(batches)), int(np.clip(SECONDS / max(first, 1e-3), FEWEST, MOST)))
    # batches, not tokens, are drawn evenly: the whole pass takes this long for each of its batches
    return run(chosen) / len(chosen) * len(batches) / records.total_tokens
