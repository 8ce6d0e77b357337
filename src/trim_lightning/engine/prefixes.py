"""Records of a pool that begin with the same tokens, put together so that a batch's prefix is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trim_lightning.engine.batches import SAVED, WINDOW, Shard, plan_shards, shared_prefix
from trim_lightning.records.flat import spans
from trim_lightning.tokens.tokenized import SomeRecords, TokenizedRecords

HEADS = (256, 128, 64, 32)  # tokens that records of a group have in common at least, tried in this order
FILLED = 0.5  # of a batch that a group must fill: a smaller one would make small batches, which waste a GPU
NOBODY = -1  # in place of a token that is not there; equal to none


def prefix_groups(records: TokenizedRecords, tokens_per_batch: int, *, window: int = WINDOW) -> NDArray[np.int64]:
    """Which records are to be batched together for what they begin with (our choice).

    Within each window, as `plan_shards` divides the pool, records with the same first 256 tokens make a group, if
    together they fill half a batch and a prefix spares them a quarter of their tokens; of the others those with the
    same first 128, and so on down to 32.

    Args:
        records: The pool; records without tokens are of no group.
        tokens_per_batch: Padded tokens of a batch.
        window: Records that are looked at together.

    Returns:
        ``[records]`` a number for each group, 0 for the records of none.
    """
    groups = np.zeros(len(records), np.int64)
    number = 0
    for start in range(0, len(records), window):
        rows = start + np.flatnonzero(records.lengths[start : start + window])
        heads = first_tokens(records, rows)
        texts = [head.tobytes() for head in heads]
        order = sorted(range(len(rows)), key=texts.__getitem__)  # those that begin alike stand beside each other
        rows, heads = rows[order], heads[order]
        for head in HEADS:
            if len(rows) < 2:
                break
            run = np.append(0, np.cumsum(common(heads[:-1], heads[1:]) < head))
            counts, tokens = np.bincount(run), np.bincount(run, records.lengths[rows])
            batches = np.ceil(tokens / tokens_per_batch)  # each computes the prefix once
            wanted = ((counts - batches) * head >= SAVED * tokens) & (tokens >= FILLED * tokens_per_batch)
            taken = wanted[run]
            groups[rows[taken]] = number + np.cumsum(wanted)[run[taken]]
            number += int(wanted.sum())
            rows, heads = rows[~taken], heads[~taken]
    return groups


def first_tokens(records: TokenizedRecords, rows: NDArray[np.int64]) -> NDArray[np.int32]:
    """``[rows, HEADS[0]]`` of each record's tokens but the last, which is never shared; `NOBODY` where it has none."""
    kept = np.minimum(records.lengths[rows] - 1, HEADS[0])
    heads = np.full((len(rows), HEADS[0]), NOBODY, np.int32)
    places = spans(np.zeros(len(rows), np.int64), kept)
    heads[np.repeat(np.arange(len(rows)), kept), places] = records.together(rows, kept).token_ids
    return heads


def common(one: NDArray[np.int32], other: NDArray[np.int32]) -> NDArray[np.int64]:
    """``[rows]`` tokens with which two records begin alike, of ``[rows, tokens]`` each."""
    alike = (one == other) & (one != NOBODY)
    found: NDArray[np.int64] = np.logical_and.accumulate(alike, axis=1).sum(1)
    return found


def spared_tokens(records: TokenizedRecords, plan: Sequence[Shard]) -> int:
    """Tokens of a plan's batches that need not be computed, for a record before them has the same prefix."""
    spared = 0
    for rows in (rows for shard in plan for rows in shard.batches if len(rows) > 1):
        lengths = records.lengths[list(rows)]
        most = int(lengths[-1])
        alike = records[rows[0]].token_ids[:most] == records[rows[-1]].token_ids
        if alike.cumprod().sum() * (len(rows) - 1) < SAVED * lengths.sum():
            continue  # its two ends tell already, in most batches
        ids = np.stack([records[row].token_ids[:most] for row in rows])
        spared += shared_prefix(ids, lengths) * (len(rows) - 1)
    return spared


def computed_share(records: TokenizedRecords, tokens_per_batch: int) -> float:
    """Share of the tokens that the model runs over in a scoring pass that shares prefixes; jobs alike count once."""
    rows = records.rows.tobytes() if isinstance(records, SomeRecords) else None
    return _computed_share(records.directory, rows, tokens_per_batch)


@lru_cache(maxsize=16)
def _computed_share(directory: Path, rows: bytes | None, tokens_per_batch: int) -> float:
    records = TokenizedRecords(directory)
    if rows is not None:
        records = SomeRecords(records, np.frombuffer(rows, np.int64))
    plan = plan_shards(records.lengths, tokens_per_batch, groups=prefix_groups(records, tokens_per_batch))
    return 1 - spared_tokens(records, plan) / max(records.total_tokens, 1)
