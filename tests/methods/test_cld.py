"""CLD against losses and correlations of single records."""

from __future__ import annotations

import numpy as np
import pytest
from plain_checkpoints import losses_along, warmup_of

from trim_lightning.errors import UserError
from trim_lightning.methods.cld import correlations

EPOCHS = 5
METHOD = (
    "method=cld", f"method.num_checkpoints={EPOCHS}", "warmup.fraction=0.4", "warmup.learning_rate=0.005",
    "warmup.lora_rank=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(method_runs):
    return method_runs.run(*METHOD)


@pytest.fixture(scope="module")
def expected(method_runs, run) -> np.ndarray:
    """``[choices of targets, records]``: all targets, then the two groups."""
    warmup = warmup_of(method_runs.root / "store", EPOCHS, lora_rank=3)
    pool, targets = (
        losses_along(method_runs.model(), warmup, EPOCHS, method_runs.tokens(records), from_start=True)
        for records in (method_runs.pool, method_runs.targets)
    )
    result = np.full((3, len(pool)), np.nan)
    for place, rows in enumerate(([0, 1, 2, 3], [0, 2], [1, 3])):
        means = [sum(targets[row][point] for row in rows) / len(rows) for point in range(EPOCHS + 1)]
        wanted = [means[point + 1] - means[point] for point in range(EPOCHS)]
        for row, losses in enumerate(pool):
            changes = [losses[point + 1] - losses[point] for point in range(EPOCHS)]
            result[place, row] = np.corrcoef(changes, wanted)[0, 1]
    return result


def test_scores(run, expected: np.ndarray, best_first) -> None:
    np.testing.assert_allclose(run.scores.score, expected[0], atol=1e-3)
    assert np.nanstd(expected[0]) > 0.05
    assert run.order.tolist() == best_first(run.scores.score)
    assert np.isnan(run.scores.score).sum() >= 3


def test_groups_are_the_classes(method_runs, expected: np.ndarray) -> None:
    result = method_runs.run(*METHOD, "target.group_field=subtask")
    for place, group in enumerate(("first", "second")):
        np.testing.assert_allclose(result.scores.groups[group], expected[1 + place], atol=1e-3)
    np.testing.assert_allclose(result.scores.score, expected[1:].max(0), atol=1e-3)
    turns = method_runs.run(*METHOD, "target.group_field=subtask", "target.aggregate=round_robin").order
    assert turns[0] == np.nanargmax(result.scores.groups["first"])


def test_costs(method_runs, run) -> None:
    stages = run.manifest["stages"]
    pool, targets = (
        sum(len(tokens.ids) for tokens in method_runs.tokens(part)) for part in (method_runs.pool, method_runs.targets)
    )
    assert stages["score"]["tokens"] == (EPOCHS + 1) * pool
    assert stages["fingerprint"]["tokens"] == (EPOCHS + 1) * targets


def test_losses_that_do_not_vary_correlate_with_nothing() -> None:
    changes = np.array([[1.0, 2.0, 4.0], [0.5, 0.5, 0.5], [np.nan, 1, 2], [-1.0, -2.0, -4.0]])
    np.testing.assert_allclose(correlations(changes, np.array([2.0, 4.0, 8.0])), [1, 0, np.nan, -1])
    np.testing.assert_allclose(correlations(changes[:1], np.ones(3)), [0])


def test_one_difference_is_refused(method_runs) -> None:
    with pytest.raises(UserError, match=r"method\.num_checkpoints=1: must be at least 2"):
        method_runs.run(*METHOD, "method.num_checkpoints=1")


def test_without_a_warm_up_it_is_a_user_error(method_runs) -> None:
    with pytest.raises(UserError, match="method=cld: needs the checkpoints of a warm-up"):
        method_runs.run("method=cld", "warmup=none")
