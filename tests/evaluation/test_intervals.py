"""Bootstrap intervals and the summary against plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trim_lightning.evaluation.evaluate import bootstrap_ratio, paired, summarise
from trim_lightning.settings.schema import EvaluationSettings


def percentile(values: list[float], share: float) -> float:
    """The value below which a share of the sorted values lies, between neighbours in proportion."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def plain_interval(tops: list[float], bottoms: list[float], samples: int, seed: int) -> tuple[float, float]:
    draw = np.random.default_rng(seed)
    ratios = []
    for _ in range(samples):
        rows = [int(row) for row in draw.integers(0, len(tops), len(tops))]
        ratios.append(sum(tops[row] for row in rows) / sum(bottoms[row] for row in rows))
    return percentile(ratios, 0.025), percentile(ratios, 0.975)


@given(
    pairs=st.lists(st.tuples(st.floats(-50, 50), st.integers(1, 40)), min_size=1, max_size=12),
    seed=st.integers(0, 9),
)
def test_the_interval_is_that_of_a_plain_loop(pairs: list[tuple[float, int]], seed: int) -> None:
    tops, bottoms = [top for top, _ in pairs], [float(bottom) for _, bottom in pairs]
    found = bootstrap_ratio(np.array(tops), np.array(bottoms), 120, seed)
    assert found == pytest.approx(plain_interval(tops, bottoms, 120, seed), rel=1e-9, abs=1e-9)


def test_the_interval_narrows_with_more_records_and_covers_the_truth() -> None:
    draw = np.random.default_rng(1)
    sample = draw.normal(2.0, 1.0, 20)
    widths, covered = [], 0
    for copies in (1, 4, 16):  # the spread stays, the mean's error halves each time
        low, high = bootstrap_ratio(np.tile(sample, copies), np.ones(20 * copies), 1000, 0)
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(2, abs=0.25)
    assert widths[1] / widths[2] == pytest.approx(2, abs=0.25)
    for trial in range(200):
        low, high = bootstrap_ratio(draw.normal(2.0, 1.0, 60), np.ones(60), 200, trial)
        covered += low <= 2.0 <= high
    assert 175 <= covered <= 199  # of 200, at 95 %


def test_one_record_has_no_spread() -> None:
    assert bootstrap_ratio(np.array([6.0]), np.array([4.0]), 100, 0) == (1.5, 1.5)


def lines() -> list[dict[str, Any]]:
    return [
        {"id": "a", "num_tokens": 10, "nll_before": 20.0, "nll": 10.0, "correct_before": False, "correct": True},
        {"id": "b", "num_tokens": 30, "nll_before": 30.0, "nll": 33.0, "correct_before": True, "correct": True},
        {"id": "c", "num_tokens": 0, "nll_before": 0.0, "nll": 0.0},
        {"id": "d", "num_tokens": 5, "nll_before": 9.0, "nll": 8.0, "correct_before": False, "correct": False},
    ]


def test_the_summary_is_that_of_all_tokens_and_of_the_judged_records() -> None:
    metrics = summarise(lines(), EvaluationSettings(bootstrap=300, seed=4))
    assert metrics["eval/nll_before"] == pytest.approx(59 / 45)
    assert metrics["eval/nll"] == pytest.approx(51 / 45)
    assert metrics["eval/nll_drop"] == pytest.approx(8 / 45)
    assert metrics["eval/exact_match_before"] == pytest.approx(1 / 3)
    assert metrics["eval/exact_match"] == pytest.approx(2 / 3)
    assert not [name for name in metrics if "option" in name]
    drops, tokens = [10.0, -3.0, 1.0], [10.0, 30.0, 5.0]  # a record without response tokens carries nothing
    found = (metrics["eval/nll_drop_low"], metrics["eval/nll_drop_high"])
    assert found == pytest.approx(plain_interval(drops, tokens, 300, 4))
    exact = plain_interval([1.0, 1.0, 0.0], [1.0] * 3, 300, 4)
    assert (metrics["eval/exact_match_low"], metrics["eval/exact_match_high"]) == pytest.approx(exact)


def test_held_out_records_without_any_response_have_no_loss() -> None:
    assert summarise([{"id": "c", "num_tokens": 0, "nll_before": 0.0, "nll": 0.0}], EvaluationSettings()) == {}


def test_before_and_after_stand_side_by_side() -> None:
    before = [{"id": "a", "num_tokens": 3, "nll": 6.0, "answer": "1", "prediction": "2", "correct": False}]
    after = [{"id": "a", "num_tokens": 3, "nll": 3.0, "answer": "1", "prediction": "1", "correct": True}]
    assert paired(before, after) == [
        {
            "id": "a", "num_tokens": 3, "nll_before": 6.0, "nll": 3.0, "answer": "1", "prediction_before": "2",
            "prediction": "1", "correct_before": False, "correct": True,
        }
    ]  # fmt: skip
    options = [{"id": "a", "num_tokens": 3, "nll": 6.0, "choice": 2, "choice_correct": True}]
    assert list(paired(options, options)[0])[4:] == [
        "choice_before", "choice", "choice_correct_before", "choice_correct",
    ]  # fmt: skip
