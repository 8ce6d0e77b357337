"""The statistics against plain Python."""

from __future__ import annotations

import statistics
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trim_lightning.compare import statistics as ours

rows = st.sets(st.integers(0, 30)).map(sorted)
words = st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), max_size=12)
outcomes = st.lists(st.tuples(st.integers(-20, 20), st.integers(-20, 20), st.integers(1, 9)), min_size=1, max_size=12)


@given(rows, rows)
def test_jaccard_of_rows_is_that_of_sets(first: list[int], second: list[int]) -> None:
    arrays = np.array(first, np.int64), np.array(second, np.int64)
    union = set(first) | set(second)
    expected = len(set(first) & set(second)) / len(union) if union else None
    assert ours.jaccard_of_rows(*arrays) == ours.jaccard_of_rows(*arrays[::-1]) == expected
    assert ours.jaccard_of_rows(arrays[0], arrays[0]) == (1 if first else None)


@given(words, words)
def test_jaccard_of_counts_pairs_equal_lines_off(first: list[bytes], second: list[bytes]) -> None:
    free, shared = list(second), 0
    for word in first:
        if word in free:
            free.remove(word)
            shared += 1
    total = len(first) + len(second) - shared
    assert ours.jaccard_of_counts(Counter(first), Counter(second)) == (shared / total if total else None)
    if len({*first}) == len(first) and len({*second}) == len(second) and total:
        assert ours.jaccard_of_counts(Counter(first), Counter(second)) == len({*first} & {*second}) / total


def plain_rank(values: list[float], value: float) -> float:
    """Mean place of a value, counted one by one."""
    return sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2


missing = st.one_of(st.none(), st.integers(0, 8))


@given(st.lists(st.tuples(missing, missing), min_size=1, max_size=20))
def test_spearman_is_the_correlation_of_ranks_where_both_scored(pairs: list[tuple[int | None, int | None]]) -> None:
    plain = [[np.nan if value is None else value for value in column] for column in zip(*pairs, strict=True)]
    columns = [np.array(column, np.float32) for column in plain]
    both = [(one, two) for one, two in pairs if one is not None and two is not None]
    found = ours.spearman(*columns)
    ones, twos = [one for one, _ in both], [two for _, two in both]
    if len(set(ones)) < 2 or len(set(twos)) < 2:
        assert found is None
        return
    ranks = [plain_rank(ones, one) for one in ones], [plain_rank(twos, two) for two in twos]
    assert found == pytest.approx(statistics.correlation(*ranks), abs=1e-9)
    assert ours.spearman(columns[0], columns[0]) == pytest.approx(1)


@given(outcomes, st.integers(0, 5))
def test_resampled_ratios_against_a_loop(records: list[tuple[int, int, int]], seed: int) -> None:
    values = np.array([[one, two] for one, two, _ in records], float).T
    weights = np.array([weight for *_, weight in records], float)
    found = ours.resampled_ratios(values, weights, 50, seed)
    drawn = np.random.default_rng(seed).integers(0, len(records), (50, len(records)))
    for sample in range(50):
        for group in range(2):
            top = sum(records[place][group] for place in drawn[sample])
            bottom = sum(records[place][2] for place in drawn[sample])
            assert found[sample, group] == pytest.approx(top / bottom)


def test_the_chunk_size_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    values, weights = draw.random((3, 41)), draw.random(41)
    whole = ours.resampled_ratios(values, weights, 100, seed=7)
    monkeypatch.setattr(ours, "CHUNK", 41 * 7)
    np.testing.assert_allclose(ours.resampled_ratios(values, weights, 100, seed=7), whole, rtol=1e-12)


def paired(first: np.ndarray, second: np.ndarray, weights: np.ndarray, samples: int = 400) -> tuple[float, float]:
    """The interval over records of two groups, as the comparison makes it."""
    resampled = ours.resampled_ratios(np.array([first, second], float), weights, samples, seed=0)
    return ours.paired_interval(resampled[:, 0], resampled[:, 1])


@given(outcomes)
def test_identical_groups_differ_by_nothing(records: list[tuple[int, int, int]]) -> None:
    first, weights = np.array([r[0] for r in records], float) / 3, np.array([r[2] for r in records], float)
    assert paired(first, first, weights) == (0, 0)


@given(outcomes)
def test_swapping_the_groups_mirrors_the_interval(records: list[tuple[int, int, int]]) -> None:
    first, second, weights = (np.array(column, float) for column in zip(*records, strict=True))
    there, back = paired(first, second, weights), paired(second, first, weights)
    assert back == pytest.approx((-there[1], -there[0]))
    assert there[0] <= there[1]


@given(outcomes)
def test_the_interval_is_that_of_the_resampled_records(records: list[tuple[int, int, int]]) -> None:
    first, second, weights = (np.array(column, float) for column in zip(*records, strict=True))
    drawn = np.random.default_rng(0).integers(0, len(records), (400, len(records)))
    differences = [sum(first[row] - second[row] for row in sample) / sum(weights[sample]) for sample in drawn]
    assert paired(first, second, weights) == pytest.approx(tuple(np.percentile(differences, [2.5, 97.5])))


def test_a_difference_in_every_record_is_the_same_on_all() -> None:
    first = np.arange(20.0)
    assert paired(first, first - 1, np.ones(20)) == pytest.approx((1, 1))


def test_spread() -> None:
    found = ours.spread([1.0, 2.0, 4.0])
    assert (found.mean, found.deviation) == pytest.approx((7 / 3, statistics.stdev([1, 2, 4])))
    assert (found.low, found.high, found.count) == (1, 4, 3)
    assert ours.spread([5.0]) == ours.Spread(5.0, None, 5.0, 5.0, 1)
