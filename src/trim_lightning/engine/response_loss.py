"""Held-out loss: nats per response token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lightning import LightningModule
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from trim_lightning.engine.batches import plan_shards
from trim_lightning.engine.devices import one_device
from trim_lightning.engine.labels import collate
from trim_lightning.engine.memory import in_halves
from trim_lightning.engine.trainer import interruptible, make_trainer
from trim_lightning.engine.writer import Collector, TokenProgress
from trim_lightning.models.loss import IGNORED, record_losses
from trim_lightning.tokens.tokenized import TokenizedRecords


class LossBatches(Dataset[dict[str, Any]]):
    """Batches of ``input_ids``, ``labels`` (response content only), ``rows`` and ``lengths``."""

    def __init__(self, records: TokenizedRecords, tokens_per_batch: int) -> None:
        self.records = records
        shards = plan_shards(records.lengths, tokens_per_batch)
        self._batches = [rows for shard in shards for rows in shard.batches]
        self.tokens = sum(shard.tokens for shard in shards)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, item: int) -> dict[str, Any]:
        rows = self._batches[item]
        input_ids, labels = collate(self.records, rows, with_end=False)
        return {
            "input_ids": input_ids,
            "labels": labels,
            "rows": torch.tensor(rows),
            "lengths": torch.from_numpy(self.records.lengths[list(rows)]),
        }


class LossPass(LightningModule):
    """One forward that yields each record's summed response loss."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """The losses of a batch, in halves where memory does not suffice for the whole."""
        losses: list[dict[str, Any]] = in_halves(self._losses, batch)
        return losses

    def _losses(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        losses = record_losses(self.model, batch["input_ids"], batch["labels"])
        return [{"row": int(row), "nll": float(loss)} for row, loss in zip(batch["rows"].tolist(), losses, strict=True)]


def response_losses(
    model: PreTrainedModel,
    records: TokenizedRecords,
    *,
    trainer: Mapping[str, Any],
    tokens_per_batch: int,
    title: str = "held-out",
) -> NDArray[np.float64]:
    """Summed loss (nats) of each record's response tokens.

    Returns:
        ``[records]`` float64, 0 for a record without a response.
    """
    batches = LossBatches(records, tokens_per_batch)
    collector = Collector()
    runner = make_trainer(one_device(trainer), [collector, TokenProgress(title, batches.tokens)])
    with interruptible(runner):
        runner.predict(LossPass(model), DataLoader(batches, batch_size=None), return_predictions=False)
    losses = np.zeros(len(records))
    for record in collector.records:
        losses[record["row"]] = record["nll"]
    return losses


def mean_response_loss(model: PreTrainedModel, records: TokenizedRecords, tokens_per_batch: int) -> float:
    """Nats per response token over all records, without a Trainer of its own (for use inside a training)."""
    batches = LossBatches(records, tokens_per_batch)
    total = 0.0
    with torch.no_grad():
        for item in range(len(batches)):
            batch = batches[item]
            losses = record_losses(model, batch["input_ids"].to(model.device), batch["labels"].to(model.device))
            total += float(losses.sum())
    return total / max(1, int(response_counts(records).sum()))


def response_counts(records: TokenizedRecords) -> NDArray[np.int64]:
    """Predicted response tokens of each record, ``[records]`` int64 (a sequence's first token is never predicted)."""
    return np.array(
        [int((collate(records, [row], with_end=False)[1][:, 1:] != IGNORED).sum()) if records.lengths[row] else 0
         for row in range(len(records))],
        dtype=np.int64,
    )  # fmt: skip
