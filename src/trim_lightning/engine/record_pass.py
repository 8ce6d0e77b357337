"""One forward pass that leaves a few numbers or a vector for each record, resumable shard by shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from trim_lightning.engine.batches import ShardBatches, padding_share, plan_shards
from trim_lightning.engine.clock import WorkClock
from trim_lightning.engine.record_values import finished_values, values_path, write_facts, write_values
from trim_lightning.engine.statistics import RecordStatistic
from trim_lightning.engine.trainer import interruptible, make_trainer, one_device
from trim_lightning.engine.writer import TokenProgress
from trim_lightning.tokens.tokenized import TokenizedRecords


class RecordPass(LightningModule):
    """Runs a statistic on every batch; ``predict_step`` returns its ``[batch, width]`` values."""

    def __init__(self, model: PreTrainedModel, statistic: RecordStatistic) -> None:
        super().__init__()
        self.model = model
        self.statistic = statistic

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> torch.Tensor:
        return self.statistic(self.model, batch)


class ValuesWriter(BasePredictionWriter):
    """Collects the values of a shard's batches and writes them as one file, keyed by row."""

    def __init__(self, directory: Path, clock: WorkClock | None = None) -> None:
        super().__init__(write_interval="batch")
        self.directory = directory
        self.clock = clock
        self._open: dict[int, list[tuple[NDArray[np.int64], NDArray[Any]]]] = {}

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: torch.Tensor,
        batch_indices: Sequence[int] | None,
        batch: Mapping[str, Any],
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keep one batch's values; with the last batch of its shard, write the shard."""
        shard = int(batch["shard"])
        self._open.setdefault(shard, []).append((batch["rows"].cpu().numpy(), prediction.cpu().numpy()))
        if batch["last"]:
            rows, values = zip(*self._open.pop(shard), strict=True)
            write_values(self.directory, shard, np.concatenate(rows), np.concatenate(values))
            if self.clock is not None:
                self.clock.tick()


def run_record_pass(
    model: PreTrainedModel,
    records: TokenizedRecords,
    statistic: RecordStatistic,
    directory: Path,
    *,
    scope: str,
    trainer: Mapping[str, Any],
    tokens_per_batch: int,
    title: str,
    alone: bool = False,
) -> dict[str, Any]:
    """One forward over some records, batched as the scoring pass is; read the result with `read_values`.

    Shards that an earlier attempt left in ``directory`` are kept. Each process of a distributed run takes
    every n-th missing shard.

    Args:
        model: The scorer.
        records: The tokens; a record without tokens gets no values.
        statistic: What is computed.
        directory: Where the shards go.
        scope: Content tokens that count, for statistics that look at the scope.
        trainer: Arguments of the Lightning Trainer.
        tokens_per_batch: Padded tokens of a batch.
        title: Name on the progress bar.
        alone: Leave the other devices idle, for a handful of records.

    Returns:
        ``seconds`` over all attempts, ``tokens`` fed to the model, ``shards``, and the ``padding`` share.
    """
    clock = WorkClock(directory)
    plan = plan_shards(records.lengths, tokens_per_batch)
    done = finished_values(directory, [[row for rows in shard.batches for row in rows] for shard in plan])
    missing = [shard for shard in plan if shard.index not in done]
    if missing:
        runner = make_trainer(one_device(trainer) if alone else trainer, [])
        batches = ShardBatches(records, missing[runner.global_rank :: runner.world_size], scope)
        runner.callbacks.extend(  # type: ignore[attr-defined]
            [ValuesWriter(directory, clock), TokenProgress(title, batches.tokens)]
        )
        with interruptible(runner):
            runner.predict(RecordPass(model, statistic), DataLoader(batches, batch_size=None), return_predictions=False)
    if not all(values_path(directory, shard.index).exists() for shard in plan):
        raise RuntimeError("the pass ended without all of its shards")  # never seal a part as the whole
    facts = {"tokens": records.total_tokens, "shards": len(plan), "padding": padding_share(records.lengths, plan)}
    write_facts(directory, facts)
    return {"seconds": clock.finish(), **facts}
