"""Measure a pass by running a few of its batches."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from trim_lightning.engine.batches import SHARD_TOKENS, Shard, plan_shards
from trim_lightning.engine.devices import Resources
from trim_lightning.engine.shard_forms import ShardForm
from trim_lightning.engine.sharded_pass import run_sharded_pass
from trim_lightning.store.cost import Measured, folder_size
from trim_lightning.tokens.tokenized import TokenizedRecords

SECONDS = 6.0  # of measuring, roughly, after the first batch
FEWEST, MOST = 3, 48  # batches
Item = TypeVar("Item")


def spread_out(items: Sequence[Item], number: int) -> list[Item]:
    """``number`` items, each from the middle of an equal part; all of them if there are fewer."""
    if number >= len(items):
        return list(items)
    return [items[int((place + 0.5) * len(items) / number)] for place in range(number)]


def sample_pass(
    make_module: Callable[[], Any],
    make_form: Callable[[Path], ShardForm],
    records: TokenizedRecords,
    resources: Resources,
    scope: str = "all",
) -> Measured:
    """Speed and output of a sharded pass, from batches spread over its whole plan.

    The first batch, the longest records, comes before the clock starts: it pays for what happens once, and memory
    peaks in it. The others are drawn at equal distances, so that short and long records have their share.

    Args:
        make_module: Makes the pass.
        make_form: Makes the form of its shards for a directory.
        records: The tokens.
        resources: As in the pass itself; the sample runs on one device.
        scope: As in the pass itself.
    """
    plan = plan_shards(records.lengths, resources.tokens_per_batch)
    batches = [rows for shard in plan for rows in shard.batches]
    if not batches:
        return Measured(float("inf"))

    def run(chosen: Sequence[tuple[int, ...]]) -> tuple[float, int]:
        shards = as_shards(chosen, records)
        with tempfile.TemporaryDirectory(prefix="trim-sample-") as folder:
            directory = Path(folder)
            seconds = run_sharded_pass(
                make_module(), records, shards, make_form(directory), directory,
                scope=scope, resources=resources.alone(), title="measure",
            )  # fmt: skip
            return seconds, folder_size(directory)

    first, _ = run(batches[:1])
    chosen = spread_out(batches, int(np.clip(SECONDS / max(first, 1e-3), FEWEST, MOST)))
    seconds, written = run(chosen)
    tokens = sum(int(records.lengths[list(rows)].sum()) for rows in chosen)
    # batches, not tokens, are drawn evenly: the whole pass takes this long for each of its batches
    whole = seconds / len(chosen) * len(batches)
    return Measured(records.total_tokens / whole, written / tokens)


def as_shards(batches: Sequence[tuple[int, ...]], records: TokenizedRecords) -> list[Shard]:
    """Shards of the usual size that hold these batches."""
    shards: list[Shard] = []
    group: list[tuple[int, ...]] = []
    tokens = 0
    for place, rows in enumerate(batches):
        group.append(rows)
        tokens += int(records.lengths[list(rows)].sum())
        if tokens >= SHARD_TOKENS or place == len(batches) - 1:
            shards.append(Shard(len(shards), tuple(group), tokens))
            group, tokens = [], 0
    return shards
