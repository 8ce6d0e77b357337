"""The baselines that only count: longest and full."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("scope", ["all", "prompt", "response"])
@pytest.mark.parametrize("tokens", ["response", "scoped"])
def test_longest_counts_the_response_or_on_request_scoped_tokens(
    method_runs, best_first, scope: str, tokens: str
) -> None:
    default = [] if tokens == "response" else ["method.tokens=scoped"]
    result = method_runs.run("method=longest", f"scope={scope}", "selection.count=7", *default)
    counts = method_runs.scoped(scope if tokens == "scoped" else "response")
    expected = np.where(method_runs.scoped(scope) > 0, counts, np.nan)
    np.testing.assert_array_equal(result.scores.score, expected.astype(np.float32))
    assert len(set(expected[~np.isnan(expected)])) < np.isfinite(expected).sum(), "there are no ties to break"
    assert result.chosen.tolist() == best_first(expected)[:7]


@pytest.mark.usefixtures("no_model")
def test_full_takes_every_scored_record_in_pool_order(method_runs) -> None:
    result = method_runs.run("method=full")
    scored = np.flatnonzero(method_runs.scoped() > 0)
    assert result.chosen.tolist() == scored.tolist()
    assert len(scored) == len(method_runs.pool) - 1
    assert len(set(result.scores.score[scored])) == 1
    lines = (method_runs.root / "pool.jsonl").read_bytes().splitlines(keepends=True)
    assert (result.directory / "coreset.jsonl").read_bytes() == b"".join(lines[row] for row in scored)
    assert not [warning for warning in result.manifest["warnings"] if "ignored" in warning]


@pytest.mark.parametrize("budget", ["selection.count=5", "selection.fraction=0.5", "selection.tokens=100"])
def test_full_says_that_it_ignores_a_budget(method_runs, budget: str) -> None:
    result = method_runs.run("method=full", budget)
    assert len(result.chosen) == len(method_runs.pool) - 1
    assert f"this method takes the whole pool: {budget} is ignored" in result.manifest["warnings"]


def test_full_still_filters(method_runs) -> None:
    result = method_runs.run("method=full", "selection.min_tokens=20", "selection.dedup=exact")
    lengths = method_runs.scoped()
    # row 8 is a copy of row 0
    assert result.chosen.tolist() == [row for row in range(len(method_runs.pool)) if lengths[row] >= 20 and row != 8]
