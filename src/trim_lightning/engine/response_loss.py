"""Held-out loss: nats per response token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from trim_lightning.engine.batches import ShardBatches, plan_shards
from trim_lightning.engine.devices import Resources
from trim_lightning.engine.record_pass import run_record_pass
from trim_lightning.engine.record_statistics import ResponseLoss
from trim_lightning.engine.shards import gather_values
from trim_lightning.models.load import ModelRecipe
from trim_lightning.tokens.spans import RESPONSE
from trim_lightning.tokens.tokenized import TokenizedRecords


def run_loss_pass(
    model: PreTrainedModel | ModelRecipe,
    records: TokenizedRecords,
    directory: Path,
    *,
    resources: Resources,
    title: str = "held-out",
) -> float:
    """Compute the summed loss (nats) of each record's response tokens; `read_losses` reads them.

    Batches go around all devices one by one; those that an earlier attempt left in the directory are kept.

    Returns:
        Seconds over all attempts.
    """
    directory.mkdir(parents=True, exist_ok=True)
    facts = run_record_pass(
        model, records, ResponseLoss(), directory, scope="response", resources=resources, title=title, shard_tokens=1
    )
    return float(facts["seconds"])


def read_losses(directory: Path, records: TokenizedRecords) -> NDArray[np.float64]:
    """What `run_loss_pass` computed, ``[records]`` float64, 0 for a record without a response."""
    values = gather_values(directory, len(records))
    # a record without a response has no loss; that of a model that diverged stays not finite
    return np.where(response_counts(records) > 0, values[:, 0], 0.0) if values.size else np.zeros(len(records))


def mean_response_loss(model: PreTrainedModel, records: TokenizedRecords, tokens_per_batch: int) -> float:
    """Nats per response token over all records, without a Trainer of its own (for use inside a training)."""
    batches = ShardBatches(records, plan_shards(records.lengths, tokens_per_batch), "response")
    statistic, total = ResponseLoss(), torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for place in range(len(batches)):
            batch = batches[place]
            parts = {name: batch[name].to(model.device) for name in ("input_ids", "roles")}
            total += statistic(model, parts).sum(0)
    return float(total[0]) / max(1.0, float(total[1]))


def response_counts(records: TokenizedRecords) -> NDArray[np.int64]:
    """Predicted response tokens of each record, ``[records]`` int64 (a sequence's first token is never predicted)."""
    roles = (records[row].roles for row in range(len(records)))
    return np.array([int((own[1:] == RESPONSE).sum()) for own in roles], dtype=np.int64)
