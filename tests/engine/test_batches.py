"""Batches and shards: every record once, the budget kept, fixed by the lengths alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trim_lightning.engine.batches import SHARD_TOKENS, WINDOW, ShardBatches, padding_share, plan_shards
from trim_lightning.tokens.tokenized import TokenizedRecords

lengths = st.lists(st.integers(0, 40), max_size=60).map(lambda values: np.array(values, dtype=np.int64))


@given(
    lengths=lengths,
    budget=st.integers(1, 200),
    window=st.integers(1, 70),
    shard_tokens=st.integers(1, 400),
)
def test_a_plan_keeps_its_promises(lengths: np.ndarray, budget: int, window: int, shard_tokens: int) -> None:
    shards = plan_shards(lengths, budget, window=window, shard_tokens=shard_tokens)
    rows = [row for shard in shards for batch in shard.batches for row in batch]
    assert sorted(rows) == np.flatnonzero(lengths).tolist(), "every non-empty record exactly once"
    assert [shard.index for shard in shards] == list(range(len(shards)))
    for shard in shards:
        sizes = [sum(int(lengths[row]) for row in batch) for batch in shard.batches]
        assert shard.tokens == sum(sizes)
        assert sum(sizes[:-1]) < shard_tokens, "a shard closes as soon as it is full"
        assert len({row // window for batch in shard.batches for row in batch}) == 1, "a shard lies in one window"
        for batch in shard.batches:
            longest = [int(lengths[row]) for row in batch]
            assert longest == sorted(longest, reverse=True)
            assert len(batch) == 1 or len(batch) * longest[0] <= budget
    for start in range(0, len(lengths), window):  # within a window the order is by length, ties by row
        inside = [row for row in rows if start <= row < start + window]
        assert inside == sorted(inside, key=lambda row: (-lengths[row], row))
    assert rows == sorted(rows, key=lambda row: row // window), "windows in pool order"


@given(lengths=lengths, budget=st.integers(1, 200))
def test_batches_are_as_large_as_the_budget_lets_them(lengths: np.ndarray, budget: int) -> None:
    batches = [batch for shard in plan_shards(lengths, budget) for batch in shard.batches]
    for batch, following in itertools.pairwise(batches):
        assert (len(batch) + 1) * lengths[batch[0]] > budget
        assert lengths[batch[-1]] >= lengths[following[0]]


@given(lengths=lengths, budget=st.integers(1, 200))
def test_a_plan_depends_on_the_lengths_alone(lengths: np.ndarray, budget: int) -> None:
    np.random.default_rng().random(3)
    assert plan_shards(lengths, budget) == plan_shards(lengths.copy(), budget)


@given(lengths=lengths, budget=st.integers(1, 200))
def test_padding_share_is_what_the_tensors_show(lengths: np.ndarray, budget: int) -> None:
    shards = plan_shards(lengths, budget)
    real = int(lengths.sum())
    padded = sum(len(batch) * max(int(lengths[row]) for row in batch) for shard in shards for batch in shard.batches)
    assert padding_share(lengths, shards) == pytest.approx(1 - real / padded if padded else 0)


def test_sorting_within_a_window_leaves_little_padding() -> None:
    lengths = np.random.default_rng(0).integers(5, 500, 5000)
    shards = plan_shards(lengths, 2048)
    assert padding_share(lengths, shards) < 0.02
    assert max(shard.tokens for shard in shards) < SHARD_TOKENS + 2048
    assert WINDOW >= 5000


# ------------------------------------------------------------------------------------------- tensors

RECORDS = [
    ([5, 6, 7], [0, 1, 2]),
    ([], []),
    ([8, 9, 10, 11, 12], [0, 1, 1, 0, 2]),
    ([13], [2]),
    ([14, 15], [1, 0]),
]


@pytest.mark.parametrize("scope", ["all", "prompt", "response"])
@pytest.mark.parametrize("in_memory", [False, True])
def test_items_carry_rows_roles_and_scope(scope: str, in_memory: bool, tokenized: Callable[..., Any]) -> None:
    records: TokenizedRecords = tokenized(RECORDS)
    shards = plan_shards(records.lengths, 10, shard_tokens=6)
    given_records: Any = [records[row] for row in range(len(records))] if in_memory else records
    batches = ShardBatches(given_records, shards, scope, pad_token_id=3)
    assert batches.tokens == sum(len(ids) for ids, _ in RECORDS)
    counted = {"all": {1, 2}, "prompt": {1}, "response": {2}}[scope]
    seen = []
    for place in range(len(batches)):
        batch = batches[place]
        shape = batch["input_ids"].shape
        assert batch["roles"].shape == batch["scope"].shape == shape
        assert shape[1] == int(batch["lengths"].max())
        assert (batch["input_ids"].dtype, batch["roles"].dtype) == (torch.int64, torch.uint8)
        for line, row in enumerate(batch["rows"].tolist()):
            ids, roles = RECORDS[row]
            tail = shape[1] - len(ids)
            assert int(batch["lengths"][line]) == len(ids)
            assert batch["input_ids"][line].tolist() == [*ids, *[3] * tail]
            assert batch["roles"][line].tolist() == [*roles, *[0] * tail]
            assert batch["scope"][line].tolist() == [role in counted for role in roles] + [False] * tail
            seen.append((row, batch["shard"]))
    assert sorted(row for row, _ in seen) == [0, 2, 3, 4]
    assert dict(seen) == {row: shard.index for shard in shards for rows in shard.batches for row in rows}
    last = [batches[place]["last"] for place in range(len(batches))]
    assert last.count(True) == len(shards)
    assert last[-1]
