"""What the predict loops write and show: token shards, the small target pass, tokens/s and time left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback

from trim_lightning.console.progress import progress_bar
from trim_lightning.engine.batches import Shard
from trim_lightning.engine.shards import finished_shards, ragged, shard_path, write_shard
from trim_lightning.tokens.tokenized import scope_mask


class TokenShards:
    """Token similarities of a shard as one Parquet file, keyed by row.

    Columns: ``row``, ``token_ids``, ``scope`` and for each bank ``similarity/<group>``, ``match/<group>``
    (without groups plain ``similarity`` and ``match``); lists over the record's tokens.

    Args:
        directory: Where the files go.
        groups: Names of the banks.
        scope: Content tokens that count.
        first: Place of the first bank on the predictions' first axis.
    """

    def __init__(self, directory: Path, groups: Sequence[str], scope: str, first: int = 0) -> None:
        self.directory, self.groups, self.scope, self.first = directory, list(groups), scope, first

    def finished(self, plan: Sequence[Shard]) -> set[int]:
        """See `trim_lightning.engine.sharded_pass.ShardForm`."""
        return finished_shards(self.directory, {shard.index: sum(map(len, shard.batches)) for shard in plan})

    def is_there(self, index: int) -> bool:
        """See `trim_lightning.engine.sharded_pass.ShardForm`."""
        return shard_path(self.directory, index).exists()

    def write(self, index: int, parts: Sequence[tuple[torch.Tensor, Any]]) -> None:
        """See `trim_lightning.engine.sharded_pass.ShardForm`."""
        write_shard(self._table([prediction for _, prediction in parts]), self.directory, index)

    def _table(self, parts: Sequence[Mapping[str, torch.Tensor]]) -> pa.Table:
        lengths = torch.cat([part["lengths"] for part in parts]).cpu().numpy()

        def flat(name: str) -> np.ndarray:
            return torch.cat([part[name] for part in parts], dim=-1).cpu().numpy()

        columns: dict[str, Any] = {
            "row": flat("rows").astype(np.int64),
            "token_ids": ragged(flat("token_ids").astype(np.int32), lengths),
            "scope": ragged(scope_mask(flat("roles"), self.scope), lengths),
        }
        similarity, match = flat("similarity").astype(np.float32), flat("match").astype(np.int32)
        for place, group in enumerate(self.groups, start=self.first):
            columns[column_name("similarity", group)] = ragged(similarity[place], lengths)
            columns[column_name("match", group)] = ragged(match[place], lengths)
        return pa.table(columns)


class SharedShards:
    """One pass that serves several readers: each gets the files that a pass of its own would have written."""

    def __init__(self, readers: Sequence[TokenShards]) -> None:
        self.readers = list(readers)

    def finished(self, plan: Sequence[Shard]) -> set[int]:
        """See `trim_lightning.engine.sharded_pass.ShardForm`."""
        return set.intersection(*(reader.finished(plan) for reader in self.readers))

    def is_there(self, index: int) -> bool:
        """See `trim_lightning.engine.sharded_pass.ShardForm`."""
        return all(reader.is_there(index) for reader in self.readers)

    def write(self, index: int, parts: Sequence[tuple[torch.Tensor, Any]]) -> None:
        """See `trim_lightning.engine.sharded_pass.ShardForm`."""
        parts = [(rows, {name: value.cpu() for name, value in prediction.items()}) for rows, prediction in parts]
        for reader in self.readers:
            reader.write(index, parts)


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
        if self._bar is not None and not batch.get("repeated", False):
            tokens = batch["tokens"] if "tokens" in batch else int(batch["lengths"].sum())
            tokens *= trainer.world_size  # the other processes are as fast as this one
            self._bar.update(min(tokens, self.total - self._bar.n))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


def column_name(kind: str, group: str) -> str:
    """``kind`` or ``kind/<group>``."""
    return f"{kind}/{group}" if group else kind
