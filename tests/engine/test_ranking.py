"""Ranks, budgets in exact decimal arithmetic, round robin, and the walk that spends a budget."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trim_lightning.selection.ranking import (
    DEFAULT_FRACTION,
    budget_count,
    choose,
    rank_by_score,
    rank_round_robin,
    rank_single_targets,
)

score_lists = st.lists(st.sampled_from([0.0, -0.0, 0.5, 1.0, -1.0, math.nan, 0.25]), max_size=20)


def scores_of(values: list[float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)


@given(score_lists)
def test_best_first_and_ties_by_pool_order(values: list[float]) -> None:
    expected = [row for row, value in enumerate(values) if not math.isnan(value)]
    expected.sort(key=lambda row: (-values[row], row))
    order = rank_by_score(scores_of(values))
    assert order.tolist() == expected
    assert order.dtype == np.int64


def test_an_unscored_pool_has_no_order() -> None:
    assert rank_by_score(scores_of([math.nan] * 3)).tolist() == []


@given(st.lists(st.lists(st.floats(-1, 1), min_size=6, max_size=6), min_size=1, max_size=4))
def test_groups_take_turns_and_no_record_twice(groups: list[list[float]]) -> None:
    free, expected = set(range(6)), []
    while free:
        for group in groups:
            if free:
                best = min(free, key=lambda row: (-float(np.float32(group[row])), row))
                expected.append(best)
                free.remove(best)
    assert rank_round_robin([scores_of(group) for group in groups]).tolist() == expected


def test_a_group_that_runs_out_passes_its_turn() -> None:
    first = scores_of([math.nan, 0.9, math.nan, math.nan])
    second = scores_of([0.1, 0.3, 0.2, math.nan])
    assert rank_round_robin([first, second]).tolist() == [1, 2, 0]


@given(st.lists(st.lists(st.sampled_from([0.1, 0.4, 0.7, math.nan]), min_size=6, max_size=6), min_size=1, max_size=4))
def test_a_target_that_names_a_record_again_loses_its_turn(targets: list[list[float]]) -> None:
    orders = [rank_by_score(scores_of(target)).tolist() for target in targets]
    named = [order[turn] for turn in range(6) for order in orders if turn < len(order)]
    assert rank_single_targets([scores_of(target) for target in targets]).tolist() == list(dict.fromkeys(named))


# --------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    ("fraction", "size", "expected"),
    [
        (0.29, 100, 29),  # 0.29 * 100 is 28.999999999999996
        (0.57, 100, 57),
        (0.07, 300, 21),
        (0.05, 20, 1),
        (0.05, 19, 1),
        (0.05, 39, 1),
        (0.05, 270_000, 13_500),
        (1e-7, 10_000_000, 1),
        (1e-07, 29_999_999, 2),
        (0.001, 5, 1),
        (1, 7, 7),
        (1.0, 7, 7),
        (0.999, 1000, 999),
        (0.333333, 3, 1),
    ],
)
def test_budgets_by_hand(fraction: float, size: int, expected: int) -> None:
    assert budget_count(size, fraction) == expected


@given(cents=st.integers(1, 10_000), size=st.integers(1, 10**6))
def test_a_decimal_fraction_means_what_it_says(cents: int, size: int) -> None:
    fraction = float(f"{cents / 10_000:.4f}")
    assert budget_count(size, fraction) == max(1, math.floor(Fraction(cents, 10_000) * size))
    assert 1 <= budget_count(size, fraction) <= size


def test_the_default_is_five_per_cent() -> None:
    assert budget_count(1000, DEFAULT_FRACTION) == 50


# ------------------------------------------------------------------------------------------- the walk

tokens = st.lists(st.integers(0, 30), min_size=1, max_size=15)


@given(lengths=tokens, count=st.integers(1, 20), data=st.data())
def test_a_count_is_met_from_the_best_admitted_records(lengths: list[int], count: int, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(lengths))))
    barred = data.draw(st.sets(st.sampled_from(order)))
    chosen = choose(
        np.array(order), np.array(lengths, dtype=np.int32), count=count, admit=lambda row: row not in barred
    )
    assert chosen.tolist() == [row for row in order if row not in barred][:count]


@given(lengths=tokens, budget=st.integers(1, 100), data=st.data())
def test_a_token_budget_is_the_longest_admitted_prefix_that_fits(
    lengths: list[int], budget: int, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(lengths))))
    barred = data.draw(st.sets(st.sampled_from(order)))
    chosen = choose(
        np.array(order), np.array(lengths, dtype=np.int32), tokens=budget, admit=lambda row: row not in barred
    )
    admitted = [row for row in order if row not in barred]
    fitting = [n for n in range(len(admitted) + 1) if sum(lengths[row] for row in admitted[:n]) <= budget]
    assert chosen.tolist() == admitted[: max(max(fitting), min(1, len(admitted)))]


def test_a_record_that_may_not_be_taken_does_not_end_the_walk() -> None:
    lengths = np.array([10, 1000, 10], dtype=np.int32)
    chosen = choose(np.arange(3), lengths, tokens=30, admit=lambda row: lengths[row] <= 100)
    assert chosen.tolist() == [0, 2]


def test_the_best_record_is_taken_even_if_it_alone_overspends() -> None:
    lengths = np.array([50, 5], dtype=np.int32)
    assert choose(np.arange(2), lengths, tokens=10).tolist() == [0]


def test_admission_is_asked_in_rank_order_and_not_beyond_the_budget() -> None:
    asked: list[int] = []
    order = np.array([3, 1, 0, 2])
    choose(order, np.ones(4, dtype=np.int32), count=2, admit=lambda row: asked.append(row) is None and row != 1)
    assert asked == [3, 1, 0]


def test_nothing_to_choose_from() -> None:
    assert choose(np.array([], dtype=np.int64), np.ones(3, dtype=np.int32), count=2).tolist() == []
