"""S2L against trajectories of single records and the paper's algorithm for one budget at a time."""

from __future__ import annotations

import numpy as np
import pytest
from plain_checkpoints import losses_along, warmup_of

from trim_lightning.errors import UserError
from trim_lightning.methods.clusters import cluster, members_of
from trim_lightning.methods.s2l import take_turns

EPOCHS = 3
CLUSTERS = 5
METHOD = (
    "method=s2l", f"method.num_checkpoints={EPOCHS}", f"method.num_clusters={CLUSTERS}", "warmup.fraction=0.4",
    "warmup.learning_rate=0.005", "warmup.lora_rank=5",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(method_runs):
    return method_runs.run(*METHOD)


@pytest.fixture(scope="module")
def clusters(method_runs, run) -> list[list[int]]:
    """Rows of each cluster, from losses by the plain way."""
    warmup = warmup_of(method_runs.root / "store", EPOCHS, lora_rank=5)
    losses = losses_along(method_runs.model(), warmup, EPOCHS, method_runs.tokens(method_runs.pool), from_start=False)
    rows = np.flatnonzero(~np.isnan(losses).any(1))
    labels = cluster(losses[rows], CLUSTERS, seed=0)
    centres = [losses[rows[labels == label]].mean(0) for label in range(CLUSTERS)]
    for row, label in zip(rows, labels, strict=True):  # nothing is nearer to another centre than to its own
        distances = [float(((losses[row] - centre) ** 2).sum()) for centre in centres]
        assert distances[label] == min(distances)
    return [rows[labels == label].tolist() for label in range(CLUSTERS)]


def shares(sizes: list[int], budget: int) -> list[float]:
    """The paper's algorithm: from the smallest cluster on, an equal part of what is left, or all there is."""
    taken, left = [0.0] * len(sizes), float(budget)
    for done, place in enumerate(sorted(range(len(sizes)), key=lambda place: sizes[place])):
        taken[place] = min(sizes[place], left / (len(sizes) - done))
        left -= taken[place]
    return taken


def test_any_budget_gets_the_papers_share_of_every_cluster(run, clusters: list[list[int]]) -> None:
    order = run.order.tolist()
    assert sorted(order) == sorted(row for rows in clusters for row in rows)
    sizes = [len(rows) for rows in clusters]
    assert len(set(sizes)) > 1
    for budget in range(1, len(order) + 1):
        wanted = shares(sizes, budget)
        for rows, share in zip(clusters, wanted, strict=True):
            assert abs(len(set(order[:budget]) & set(rows)) - share) < 1


def test_scores_are_places(run) -> None:
    order = run.order
    np.testing.assert_allclose(run.scores.score[order], 1 - np.arange(len(order)) / len(order), rtol=1e-6)
    assert np.isnan(run.scores.score).sum() == len(run.scores) - len(order)


def test_draws_follow_the_seed() -> None:
    groups = [np.arange(30), np.arange(30, 34), np.arange(34, 50)]
    first = take_turns(groups, 0)
    assert np.array_equal(first, take_turns(groups, 0))
    assert not np.array_equal(first, take_turns(groups, 1))
    assert [next(place for place, rows in enumerate(groups) if row in rows) for row in first[:3]] == [1, 2, 0]
    assert len(take_turns([], 0)) == 0


def test_clear_clusters_are_found_and_equal_points_are_no_trouble() -> None:
    generator = np.random.default_rng(0)
    points = np.concatenate([generator.normal(10 * place, 0.1, (20, 3)) for place in range(4)])
    labels = cluster(points, 4, seed=0)
    assert sorted(rows.tolist() for rows in members_of(labels)) == [list(range(i, i + 20)) for i in range(0, 80, 20)]
    assert len(members_of(cluster(np.ones((6, 2)), 4, seed=0))) == 1
    assert members_of(cluster(np.ones((0, 2)), 4, seed=0)) == []


def test_costs_and_a_second_budget(method_runs, run) -> None:
    pool = sum(len(tokens.ids) for tokens in method_runs.tokens(method_runs.pool))
    assert run.manifest["stages"]["score"]["tokens"] == EPOCHS * pool
    again = method_runs.run(*METHOD, "selection.count=11")
    assert again.chosen.tolist() == run.order[:11].tolist()
    assert all(stage["cached"] for name, stage in again.manifest["stages"].items() if name != "select")


def test_without_a_warm_up_it_is_a_user_error(method_runs) -> None:
    with pytest.raises(UserError, match="method=s2l: needs the checkpoints of a warm-up"):
        method_runs.run("method=s2l", "warmup=none")
