"""S2L against trajectories of single records and the paper's algorithm for one budget at a time."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain_checkpoints import losses_along, warmup_of

from trim_lightning.errors import UserError
from trim_lightning.methods.clusters import cluster, cluster_number, members_of
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


def shares(sizes: list[int], budget: int) -> tuple[list[int], int]:
    """What the authors' code takes of each cluster, and of the clusters of one or two records together.

    From the smallest on, a cluster gives the whole part of an equal share of what is left of the budget, or all it has;
    those of one or two records wait for what is left at the end.
    """
    taken, left = [0] * len(sizes), budget
    ranked = [place for place in sorted(range(len(sizes)), key=lambda place: sizes[place]) if sizes[place] > 2]
    for done, place in enumerate(ranked):
        taken[place] = min(sizes[place], left // (len(ranked) - done))
        left -= taken[place]
    return taken, min(left, sum(size for size in sizes if size <= 2))


def assert_authors_shares(order: list[int], clusters: list[list[int]]) -> None:
    """Every beginning of the order holds what the authors' code takes for that budget."""
    sizes = [len(rows) for rows in clusters]
    for budget in range(1, len(order) + 1):
        picked = set(order[:budget])
        wanted, tiny = shares(sizes, budget)
        found = [len(picked.intersection(rows)) for rows in clusters]
        by_size = [
            sorted(share for share, size in zip(part, sizes, strict=True) if size == each)
            for part in (wanted, found)
            for each in sorted({size for size in sizes if size > 2})
        ]  # which one of two clusters of a size comes first is no matter
        assert by_size[: len(by_size) // 2] == by_size[len(by_size) // 2 :]
        assert sum(share for share, size in zip(found, sizes, strict=True) if size <= 2) == tiny


def clusters_of(sizes: list[int]) -> list[np.ndarray]:
    ends = np.cumsum(sizes)
    return [np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def test_any_budget_gets_the_authors_share_of_every_cluster(run, clusters: list[list[int]]) -> None:
    order = run.order.tolist()
    assert sorted(order) == sorted(row for rows in clusters for row in rows)
    assert len({len(rows) for rows in clusters}) > 1
    assert_authors_shares(order, clusters)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 5))
def test_one_order_serves_all_budgets(sizes: list[int], seed: int) -> None:
    order = take_turns(clusters_of(sizes), seed).tolist()
    assert sorted(order) == list(range(sum(sizes)))
    assert_authors_shares(order, [rows.tolist() for rows in clusters_of(sizes)])


def test_a_budget_below_the_number_of_clusters_takes_no_outliers() -> None:
    """Twelve of a hundred clusters are single records; fifteen picks once held all twelve."""
    sizes = [1] * 12 + [3 + place % 12 for place in range(88)]
    picked = take_turns(clusters_of(sizes), 0)[:15]
    given = [size for size, rows in zip(sizes, clusters_of(sizes), strict=True) for _ in set(rows) & set(picked)]
    assert sorted(given) == [12] + [13] * 7 + [14] * 7


def test_scores_are_places(run) -> None:
    order = run.order
    np.testing.assert_allclose(run.scores.score[order], 1 - np.arange(len(order)) / len(order), rtol=1e-6)
    assert np.isnan(run.scores.score).sum() == len(run.scores) - len(order)


def test_sources_share_the_budget_before_their_clusters_do(method_runs, run, tmp_path) -> None:
    records = [{**record, "origin": "abbccc"[row % 6]} for row, record in enumerate(method_runs.pool)]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    order = method_runs.run(
        *METHOD, f"pool.path={tmp_path}/pool.jsonl", "method.source_field=origin", "method.num_clusters=2"
    ).order.tolist()
    assert sorted(order) == sorted(run.order.tolist())
    assert_authors_shares(order, [[row for row in order if records[row]["origin"] == name] for name in "abc"])
    with pytest.raises(UserError, match=r"method\.source_field=origin: .* has no such field"):
        method_runs.run(*METHOD, "method.source_field=origin")


def test_draws_follow_the_seed() -> None:
    groups = [np.arange(30), np.arange(30, 34), np.arange(34, 50)]
    first = take_turns(groups, 0)
    assert np.array_equal(first, take_turns(groups, 0))
    assert not np.array_equal(first, take_turns(groups, 1))
    assert [next(place for place, rows in enumerate(groups) if row in rows) for row in first[:3]] == [0, 2, 1]
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


def test_clusters_follow_the_size_of_the_pool() -> None:
    assert [cluster_number(None, points) for points in (0, 30, 77, 78, 600, 3900, 50_000)] == [1, 1, 1, 2, 15, 100, 100]
    assert cluster_number(7, 600) == 7


def test_a_proxy_trained_on_a_part_of_the_pool_is_told(method_runs, run) -> None:
    told = [warning for warning in run.manifest["warnings"] if "method=s2l: the original" in warning]
    assert told == [
        "method=s2l: the original follows a training on the whole pool, this one is on warmup.fraction=0.4 of it"
    ]
    whole = method_runs.run(*METHOD, "warmup.fraction=1", "method.num_checkpoints=1")
    assert not [warning for warning in whole.manifest["warnings"] if "the original" in warning]


def test_without_a_warm_up_it_is_a_user_error(method_runs) -> None:
    with pytest.raises(UserError, match="method=s2l: needs the checkpoints of a warm-up"):
        method_runs.run("method=s2l", "warmup=none")
