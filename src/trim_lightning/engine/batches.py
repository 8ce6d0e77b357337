"""Batches of similar length under a token budget, grouped into shards; fixed by the data alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from trim_lightning.tokens.tokenized import TokenizedRecords, TokenSequence, scope_mask

Records = TokenizedRecords | Sequence[TokenSequence] | Mapping[int, TokenSequence]  # by row
WINDOW = 16_384  # records sorted by length together: large enough that padding all but vanishes
SHARD_TOKENS = 12_000  # a shard is what a kill may lose: under 10 s of a 135M model on 2 cores
SAVED = 0.25  # least share of a batch's tokens that a prefix spares: below, a second call of the model costs as much
MOST_SHARDS = 4096  # about: of a large pool a kill may lose this part


@dataclass(frozen=True)
class Shard:
    """Batches whose results are written as one file.

    Attributes:
        index: Place in the plan; names the file.
        batches: Rows of each batch, longest record first.
        tokens: Real tokens in it.
    """

    index: int
    batches: tuple[tuple[int, ...], ...]
    tokens: int


def plan_shards(
    lengths: NDArray[np.int64],
    tokens_per_batch: int,
    *,
    window: int = WINDOW,
    shard_tokens: int | None = None,
    groups: NDArray[np.int64] | None = None,
) -> list[Shard]:
    """Divide records into shards of batches.

    Within each window of consecutive records, records are sorted by length (ties: row) and cut into batches
    whose padded size stays within the budget; a record longer than the budget is a batch of its own. With groups
    this happens group by group, the one with the longest record first.

    Args:
        lengths: ``[records]`` tokens of each record; empty ones are left out.
        tokens_per_batch: Padded tokens of a batch.
        window: Records sorted together.
        shard_tokens: Tokens after which a shard is closed; None: `SHARD_TOKENS`, more for more than 49 million tokens.
        groups: ``[records]`` equal where records may stand in one batch; None: all may.

    Returns:
        Shards that together hold every non-empty record once.
    """
    if shard_tokens is None:
        shard_tokens = max(SHARD_TOKENS, int(lengths.sum()) // MOST_SHARDS)
    shards: list[Shard] = []
    batches: list[tuple[int, ...]] = []
    tokens = 0

    def close() -> None:
        nonlocal batches, tokens
        if batches:
            shards.append(Shard(len(shards), tuple(batches), tokens))
        batches, tokens = [], 0

    for start in range(0, len(lengths), window):
        part = lengths[start : start + window]
        labels = np.zeros(len(part), np.int64) if groups is None else groups[start : start + window]
        _, labels = np.unique(labels, return_inverse=True)
        peaks = np.zeros(len(part), np.int64)
        np.maximum.at(peaks, labels, part)
        # longest first: memory peaks at the start
        order = np.lexsort((np.arange(len(part)), -part, labels, -peaks[labels]))
        order = order[part[order] > 0]
        ends = np.append(np.flatnonzero(np.diff(labels[order])) + 1, len(order))
        place = 0
        while place < len(order):
            longest = int(part[order[place]])
            size = max(1, tokens_per_batch // longest)
            size = min(size, int(ends[np.searchsorted(ends, place, side="right")]) - place)
            rows = order[place : place + size]
            batches.append(tuple(int(row) + start for row in rows))
            tokens += int(part[rows].sum())
            place += size
            if tokens >= shard_tokens:
                close()
        close()
    return shards


def padding_share(lengths: NDArray[np.int64], shards: Sequence[Shard]) -> float:
    """Share of the model's input that is padding."""
    padded = sum(len(rows) * int(lengths[rows[0]]) for shard in shards for rows in shard.batches)
    real = sum(shard.tokens for shard in shards)
    return 1 - real / padded if padded else 0.0


def shared_prefix(input_ids: NDArray[np.integer[Any]], lengths: NDArray[np.int64]) -> int:
    """Tokens with which all records of a batch begin, where computing them once pays; else 0.

    Args:
        input_ids: ``[batch, seq]``.
        lengths: ``[batch]`` real tokens; at least one of each record is left to itself.
    """
    if len(lengths) < 2:
        return 0
    most = int(lengths.min()) - 1
    alike = (input_ids[1:, :most] == input_ids[0, :most]).all(0)
    prefix = most if alike.all() else int(alike.argmin())
    return prefix if prefix * (len(lengths) - 1) >= SAVED * lengths.sum() else 0


class ShardBatches(Dataset[dict[str, Any]]):
    """The batches of some shards as tensors.

    Each item is a dict: ``input_ids [batch, seq]`` int64, padded on the right; ``lengths [batch]`` int64;
    ``roles [batch, seq]`` uint8, 0 at padding; ``scope [batch, seq]`` bool; ``rows [batch]`` int64;
    ``prefix``, the tokens of `shared_prefix`; ``tokens``, the number of real ones; ``shard``, ``last`` (the shard's
    last batch) and ``repeated`` (computed for company only, not to be kept).
    """

    def __init__(
        self,
        records: Records,
        shards: Sequence[Shard],
        scope: str,
        pad_token_id: int = 0,
    ) -> None:
        self.records = records
        self.scope = scope
        self.pad_token_id = pad_token_id
        self._items = [
            (shard.index, rows, place == len(shard.batches) - 1, False)
            for shard in shards
            for place, rows in enumerate(shard.batches)
        ]
        self.tokens = sum(shard.tokens for shard in shards)

    def fill(self, length: int, rows: tuple[int, ...]) -> None:
        """Have at least ``length`` batches, by adding ``rows`` again and again, marked as ``repeated``."""
        self._items += [(-1, rows, False, True)] * (length - len(self._items))

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, item: int) -> dict[str, Any]:
        shard, rows, last, repeated = self._items[item]
        sequences = [self.records[row] for row in rows]
        lengths = np.array([len(sequence.token_ids) for sequence in sequences])
        width = int(lengths.max())
        input_ids = np.full((len(rows), width), self.pad_token_id, dtype=np.int64)
        roles = np.zeros((len(rows), width), dtype=np.uint8)
        for line, sequence in enumerate(sequences):
            input_ids[line, : lengths[line]] = sequence.token_ids
            roles[line, : lengths[line]] = sequence.roles
        return {
            "input_ids": torch.from_numpy(input_ids),
            "lengths": torch.from_numpy(lengths),
            "roles": torch.from_numpy(roles),
            "scope": torch.from_numpy(scope_mask(roles, self.scope)),
            "rows": torch.tensor(rows, dtype=torch.int64),
            "prefix": shared_prefix(input_ids, lengths),
            "tokens": int(lengths.sum()),
            "shard": shard,
            "last": last,
            "repeated": repeated,
        }
