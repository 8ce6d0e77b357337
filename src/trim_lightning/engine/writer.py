"""Lightning callbacks of the predict loops: write each shard as it is complete, show tokens/s and time left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback

from trim_lightning.engine.clock import WorkClock
from trim_lightning.engine.shards import ragged, write_shard
from trim_lightning.progress import progress_bar


class ShardWriter(BasePredictionWriter):
    """Collects the results of a shard's batches and writes them as one Parquet file, keyed by row.

    Columns: ``row``, ``token_ids``, ``scope`` and for each bank ``similarity/<group>``, ``match/<group>``
    (without groups plain ``similarity`` and ``match``); lists over the record's tokens.
    """

    def __init__(self, directory: Path, groups: Sequence[str], clock: WorkClock | None = None) -> None:
        super().__init__(write_interval="batch")
        self.directory = directory
        self.clock = clock
        self.groups = list(groups)
        self._open: dict[int, list[Mapping[str, torch.Tensor]]] = {}

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Mapping[str, torch.Tensor],
        batch_indices: Sequence[int] | None,
        batch: Mapping[str, Any],
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keep one batch's result; with the last batch of its shard, write the shard."""
        shard = int(batch["shard"])
        parts = self._open.setdefault(shard, [])
        parts.append({name: value.cpu() for name, value in prediction.items()})
        if batch["last"]:
            write_shard(self._table(self._open.pop(shard)), self.directory, shard)
            if self.clock is not None:
                self.clock.tick()

    def _table(self, parts: Sequence[Mapping[str, torch.Tensor]]) -> pa.Table:
        lengths = torch.cat([part["lengths"] for part in parts]).numpy()

        def flat(name: str) -> np.ndarray:
            return torch.cat([part[name] for part in parts], dim=-1).numpy()

        columns: dict[str, Any] = {
            "row": flat("rows").astype(np.int64),
            "token_ids": ragged(flat("token_ids").astype(np.int32), lengths),
            "scope": ragged(flat("scope"), lengths),
        }
        similarity, match = flat("similarity").astype(np.float32), flat("match").astype(np.int32)
        for place, group in enumerate(self.groups):
            columns[column_name("similarity", group)] = ragged(similarity[place], lengths)
            columns[column_name("match", group)] = ragged(match[place], lengths)
        return pa.table(columns)


class Collector(BasePredictionWriter):
    """Keeps the results of a small pass (the target set) in memory, to be written by the caller."""

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self.records: list[dict[str, Any]] = []

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: list[dict[str, Any]],
        batch_indices: Sequence[int] | None,
        batch: Mapping[str, Any],
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keep one batch's records."""
        self.records.extend(prediction)


class TokenProgress(Callback):
    """A progress bar over real tokens: percentage, tokens/s, time left. Shown on the first process only."""

    def __init__(self, title: str, total: int) -> None:
        self.title = title
        self.total = total
        self._bar: Any = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        if trainer.is_global_zero:
            self._bar = progress_bar(self.title, self.total)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Mapping[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Advance by the batch's real tokens."""
        if self._bar is not None:
            self._bar.update(int(batch["lengths"].sum()))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


def column_name(kind: str, group: str) -> str:
    """``kind`` or ``kind/<group>``."""
    return f"{kind}/{group}" if group else kind
