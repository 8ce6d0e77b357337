"""Pooling against plain loops over Python lists: every formula, penalties, weights, empty records, groups."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trim_lightning.settings.schema import POOLERS
from trim_lightning.trim.pooling import Pooled, aggregate_groups, penalise, pool

Token = tuple[float, bool, float]  # similarity, direct, weight
tokens = st.tuples(st.floats(-1, 1, width=32), st.booleans(), st.floats(0.0625, 1, width=32))
pools = st.lists(st.lists(tokens, max_size=12), min_size=1, max_size=6)


def quantile(values: list[float], q: float) -> float:
    """Linear interpolation between order statistics."""
    values = sorted(values)
    place = q * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def score_of(name: str, record: list[Token], weighted: bool, keys: dict[str, Any]) -> tuple[float, float, float, float]:
    """Score, mean, maximum and coverage of one record."""
    if not record:
        return (math.nan,) * 4
    values = [similarity * (weight if weighted else 1) for similarity, _, weight in record]
    total = sum(weight for *_, weight in record) if weighted else len(record)
    mean, highest = sum(values) / total, max(values)
    coverage = sum(direct for _, direct, _ in record) / len(record)
    top = sorted(values, reverse=True)[: keys["k"]]
    heats = [math.exp((value - highest) / keys["temperature"]) for value in values]
    score = {
        "mean_max_coverage": keys["mean_weight"] * mean
        + keys["max_weight"] * highest
        + keys["coverage_weight"] * coverage,
        "mean_max": keys["mean_weight"] * mean + keys["max_weight"] * highest,
        "mean": mean,
        "max": highest,
        "topk_mean": sum(top) / len(top),
        "softmax_mean": sum(heat * value for heat, value in zip(heats, values, strict=True)) / sum(heats),
        "quantile": quantile(values, keys["q"]),
    }[name]
    return score, mean, highest, coverage


def arrays(records: list[list[Token]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Flat similarity, direct, lengths and weights."""
    flat = [token for record in records for token in record]
    columns = [np.array([token[part] for token in flat]) for part in range(3)]
    return columns[0].astype(float), columns[1].astype(bool), np.array([len(r) for r in records]), columns[2]


@pytest.mark.parametrize("name", POOLERS)
@settings(max_examples=40)
@given(
    records=pools,
    weighted=st.booleans(),
    keys=st.fixed_dictionaries(
        {
            "mean_weight": st.floats(-1, 2, width=16),
            "max_weight": st.floats(-1, 2, width=16),
            "coverage_weight": st.floats(-1, 2, width=16),
            "k": st.integers(1, 15),
            "temperature": st.sampled_from([1e-3, 0.1, 1.0, 50.0]),
            "q": st.floats(0, 1, width=16),
        }
    ),
)
def test_every_formula_equals_a_plain_loop(
    name: str, records: list[list[Token]], weighted: bool, keys: dict[str, Any]
) -> None:
    similarity, direct, lengths, weights = arrays(records)
    pooled = pool(similarity, direct, lengths, name=name, token_weights=weights if weighted else None, **keys)
    expected = np.array([score_of(name, record, weighted, keys) for record in records])
    for place, column in enumerate(Pooled._fields):
        np.testing.assert_allclose(getattr(pooled, column), expected[:, place], rtol=0, atol=1e-9, err_msg=column)


def test_defaults_are_the_papers() -> None:
    pooled = pool(np.array([0.2, 0.8, -0.4]), np.array([True, False, False]), np.array([3]))
    assert (pooled.mean[0], pooled.max[0], pooled.coverage[0]) == pytest.approx((0.2, 0.8, 1 / 3))
    assert pooled.score[0] == pytest.approx(0.5 * 0.2 + 0.5 * 0.8 + 0.05 / 3)


def test_an_unknown_formula_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown pooler 'median'"):
        pool(np.ones(1), np.ones(1, bool), np.ones(1, int), name="median")


@pytest.mark.parametrize("name", POOLERS)
def test_records_without_scoped_tokens_get_nan_wherever_they_stand(name: str) -> None:
    for lengths in ([0, 2, 0, 0, 1, 0], [0, 0], [0]):
        size = sum(lengths)
        pooled = pool(np.full(size, 0.5), np.ones(size, bool), np.array(lengths), name=name)
        for values in pooled:
            assert np.isnan(values).tolist() == [length == 0 for length in lengths]


@pytest.mark.parametrize("name", POOLERS)
def test_a_nan_similarity_stays_in_its_record(name: str) -> None:
    similarity = np.array([0.1, np.nan, 0.3, 0.4, 0.5])
    pooled = pool(similarity, np.ones(5, bool), np.array([1, 2, 2]), name=name)
    assert np.isnan(pooled.score).tolist() == [False, True, False]


@pytest.mark.parametrize("name", POOLERS)
def test_equal_weights_of_one_are_no_weights(name: str) -> None:
    generator = np.random.default_rng(0)
    similarity, direct, lengths = generator.random(20), generator.random(20) > 0.5, np.array([5, 15])
    plain = pool(similarity, direct, lengths, name=name)
    for one, two in zip(plain, pool(similarity, direct, lengths, name=name, token_weights=np.ones(20)), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-12)


@given(st.lists(tokens, min_size=1, max_size=9), st.floats(0, 1))
def test_penalties_touch_fallback_tokens_only(record: list[Token], penalty: float) -> None:
    similarity, direct, _, _ = arrays([record])
    for mode, factor in (("scale", penalty), ("discount", 1 - penalty), ("zero", 0.0)):
        expected = [s if d else factor * s for s, d, _ in record]
        np.testing.assert_allclose(penalise(similarity, direct, mode, penalty), expected, atol=1e-12)
    np.testing.assert_allclose(penalise(similarity, direct), [s if d else 0.9 * s for s, d, _ in record], atol=1e-12)


# ---------------------------------------------------------------------------------------------- groups

scores = st.lists(st.floats(-1, 1) | st.just(math.nan), min_size=3, max_size=3)


def pooled_of(values: list[float]) -> Pooled:
    """Different columns that can be told apart."""
    score = np.array(values)
    return Pooled(score, score + 10, score + 20, score + 30)


@given(st.lists(scores, min_size=1, max_size=4))
def test_max_takes_all_columns_of_the_best_group(groups: list[list[float]]) -> None:
    named = {f"g{place}": pooled_of(values) for place, values in enumerate(groups)}
    for how in ("max", "round_robin"):
        combined = aggregate_groups(named, how)
        for row in range(3):
            known = [values[row] for values in groups if not math.isnan(values[row])]
            for column, offset in zip(combined, (0, 10, 20, 30), strict=True):
                # arrays: of scalars numpy would tell 0.0 from -0.0
                np.testing.assert_array_equal([column[row]], [max(known) + offset if known else math.nan])


@given(st.lists(scores, min_size=1, max_size=4))
def test_mean_averages_every_column_and_a_record_unscored_in_one_group_has_none(groups: list[list[float]]) -> None:
    combined = aggregate_groups({f"g{place}": pooled_of(values) for place, values in enumerate(groups)}, "mean")
    for row in range(3):
        mean = sum(values[row] for values in groups) / len(groups)
        for column, offset in zip(combined, (0, 10, 20, 30), strict=True):
            np.testing.assert_allclose(column[row], mean + offset, atol=1e-12)


def test_of_equal_groups_the_first_one_gives_the_columns() -> None:
    first = Pooled(*(np.array([value]) for value in (0.5, 1.0, 2.0, 3.0)))
    second = Pooled(*(np.array([value]) for value in (0.5, 4.0, 5.0, 6.0)))
    assert [column[0] for column in aggregate_groups({"b": first, "a": second}, "max")] == [0.5, 1.0, 2.0, 3.0]
