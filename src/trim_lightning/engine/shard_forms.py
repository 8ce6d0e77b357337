"""What the file of a shard holds: tokens with their similarities, or a few numbers of each record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from trim_lightning.engine.batches import Shard
from trim_lightning.engine.shards import (
    finished_shards,
    finished_values,
    ragged,
    shard_path,
    values_path,
    write_shard,
    write_values,
)
from trim_lightning.tokens.tokenized import scope_mask


class ShardForm(Protocol):
    """How the results of a shard's batches become a file that is whole or absent."""

    def finished(self, plan: Sequence[Shard]) -> set[int]:
        """Indexes of the plan's shards that are whole; removes damaged ones and what a kill left half written."""

    def is_there(self, index: int) -> bool:
        """True if the shard's file exists; it was written by rename, so it need not be read again."""

    def write(self, index: int, parts: Sequence[tuple[torch.Tensor, Any]]) -> None:
        """Write one shard by rename from its batches' rows and predictions."""


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
        """See `trim_lightning.engine.shard_forms.ShardForm`."""
        return finished_shards(self.directory, {shard.index: sum(map(len, shard.batches)) for shard in plan})

    def is_there(self, index: int) -> bool:
        """See `trim_lightning.engine.shard_forms.ShardForm`."""
        return shard_path(self.directory, index).exists()

    def write(self, index: int, parts: Sequence[tuple[torch.Tensor, Any]]) -> None:
        """See `trim_lightning.engine.shard_forms.ShardForm`."""
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
        """See `trim_lightning.engine.shard_forms.ShardForm`."""
        return set.intersection(*(reader.finished(plan) for reader in self.readers))

    def is_there(self, index: int) -> bool:
        """See `trim_lightning.engine.shard_forms.ShardForm`."""
        return all(reader.is_there(index) for reader in self.readers)

    def write(self, index: int, parts: Sequence[tuple[torch.Tensor, Any]]) -> None:
        """See `trim_lightning.engine.shard_forms.ShardForm`."""
        parts = [(rows, {name: value.cpu() for name, value in prediction.items()}) for rows, prediction in parts]
        for reader in self.readers:
            reader.write(index, parts)


def column_name(kind: str, group: str) -> str:
    """``kind`` or ``kind/<group>``."""
    return f"{kind}/{group}" if group else kind


class ValueShards:
    """The values of a shard's records as one file, keyed by row."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def finished(self, plan: Sequence[Shard]) -> set[int]:
        """See `trim_lightning.engine.shard_forms.ShardForm`."""
        return finished_values(
            self.directory, {shard.index: [row for rows in shard.batches for row in rows] for shard in plan}
        )

    def is_there(self, index: int) -> bool:
        """See `trim_lightning.engine.shard_forms.ShardForm`."""
        return values_path(self.directory, index).exists()

    def write(self, index: int, parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """See `trim_lightning.engine.shard_forms.ShardForm`."""
        places = torch.cat([rows for rows, _ in parts]).cpu().numpy()
        values = np.concatenate([prediction.cpu().numpy() for _, prediction in parts])
        write_values(self.directory, index, places, values)
