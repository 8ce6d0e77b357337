"""Held-out loss: nats per response token."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from trim_lightning.engine.batches import ShardBatches, plan_shards
from trim_lightning.engine.devices import Resources
from trim_lightning.engine.record_pass import run_record_pass
from trim_lightning.engine.record_statistics import ResponseLoss
from trim_lightning.engine.shards import gather_values
from trim_lightning.tokens.spans import RESPONSE
from trim_lightning.tokens.tokenized import TokenizedRecords


def response_losses(
    model: PreTrainedModel,
    records: TokenizedRecords,
    *,
    trainer: Mapping[str, Any],
    tokens_per_batch: int,
    title: str = "held-out",
    within: Path | None = None,
) -> NDArray[np.float64]:
    """Summed loss (nats) of each record's response tokens, on one device.

    Args:
        model: The model.
        records: The tokens.
        trainer: Arguments of the Lightning Trainer.
        tokens_per_batch: Padded tokens of a batch.
        title: Name on the progress bar.
        within: Folder for the pass's own files while it runs; None takes the system's temporary one.

    Returns:
        ``[records]`` float64, 0 for a record without a response.
    """
    resources = Resources(trainer, tokens_per_batch).alone()
    with tempfile.TemporaryDirectory(prefix="trim-losses-", dir=within) as folder:
        run_record_pass(
            model, records, ResponseLoss(), Path(folder), scope="response", resources=resources, title=title
        )
        values = gather_values(Path(folder), len(records))
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
