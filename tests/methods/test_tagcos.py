"""TAGCOS against matching pursuit written out with vectors and a bounded least-squares solver."""

from __future__ import annotations

import json

import numpy as np
import pytest
from plain_checkpoints import key_of
from safetensors.numpy import load_file
from scipy.optimize import lsq_linear

from trim_lightning.errors import UserError
from trim_lightning.methods.clusters import cluster
from trim_lightning.methods.tagcos import matching_order

EPOCHS, CLUSTERS, SHARE, DIMENSION = 2, 3, 0.4, 400
METHOD = (
    "method=tagcos", f"method.num_checkpoints={EPOCHS}", f"method.num_clusters={CLUSTERS}",
    f"method.round_share={SHARE}", f"method.projection_dim={DIMENSION}", "warmup.fraction=0.4",
    "warmup.learning_rate=0.005", "warmup.lora_rank=6",
)  # fmt: skip


def pursue(vectors: list[np.ndarray], mean: np.ndarray, picks: int) -> list[int]:
    """One round: pick, fit the weights by ridge regression with bounds, look at what is left."""
    chosen: list[int] = []
    residual = mean
    while len(chosen) < min(picks, len(vectors)) and np.linalg.norm(residual) > 1e-4 * np.linalg.norm(mean):
        products = [-np.inf if place in chosen else float(v @ residual) for place, v in enumerate(vectors)]
        if max(products) <= 0:
            break
        chosen.append(products.index(max(products)))
        columns = np.stack([vectors[place] for place in chosen], axis=1)
        ridge = float(len(chosen) > 1)  # the authors' code fits its first vector without
        stacked = np.concatenate([columns, ridge * np.eye(len(chosen))])
        wanted = np.concatenate([mean, np.zeros(len(chosen))])
        weights = lsq_linear(stacked, wanted, bounds=(0, np.inf), tol=1e-14).x
        residual = mean - columns @ weights
    return chosen


def plain_order(vectors: np.ndarray, share: float) -> list[int]:
    mean, left, order = vectors.mean(0), list(range(len(vectors))), []
    while left:
        found = pursue([vectors[place] for place in left], mean, max(1, int(share * len(vectors))))
        if not found:
            found = sorted(range(len(left)), key=lambda place: -float(vectors[left[place]] @ mean))
        order += [left[place] for place in found]
        left = [place for number, place in enumerate(left) if number not in found]
    return order


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_the_order_is_that_of_matching_pursuit(share: float) -> None:
    generator = np.random.default_rng(3)
    vectors = generator.normal(size=(24, 7)) + 0.4
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    order = matching_order(vectors, share).tolist()
    assert order == plain_order(vectors, share)
    assert sorted(order) == list(range(24))
    assert (vectors @ vectors.mean(0) < 0).any(), "some point away"


def test_a_few_picks_match_the_mean_better_than_the_nearest_ones() -> None:
    """Two directions, one of them rarer: the nearest to the mean are all of one kind."""
    generator = np.random.default_rng(0)
    common, rare = np.eye(2)
    vectors = np.concatenate([common + generator.normal(0, 0.05, (14, 2)), rare + generator.normal(0, 0.05, (6, 2))])
    picks = matching_order(vectors, 0.2)[:4]
    assert {bool(place < 14) for place in picks} == {True, False}


@pytest.fixture(scope="module")
def run(method_runs):
    return method_runs.run(*METHOD)


@pytest.fixture(scope="module")
def clusters(method_runs, run) -> tuple[np.ndarray, list[np.ndarray]]:
    """Features of all records, added up from the stored gradients (which `test_less` checks), and the clusters."""
    found: dict[int, dict[int, np.ndarray]] = {}
    for path in (method_runs.root / "store" / "gradients").iterdir():
        if key_of(path)["settings"]["dimension"] == DIMENSION:
            number = key_of(path)["inputs"]["scorer"]["number"]
            for file in path.glob("values-*.safetensors"):
                tensors = load_file(file)
                rows = tensors["rows"].tolist()
                found.setdefault(number, {}).update(zip(rows, tensors["values"].astype(float), strict=True))
    assert sorted(found) == [1, 2]
    (warmup,) = [
        path
        for path in (method_runs.root / "store" / "checkpoints").iterdir()
        if key_of(path)["settings"]["warmup"]["lora_rank"] == 6
    ]
    rates = json.loads((warmup / "entry.json").read_text())["facts"]["rates"]
    features = np.zeros((len(method_runs.pool), DIMENSION))
    for number, rate in enumerate(rates, start=1):
        for row, values in found[number].items():
            if values.any():
                features[row] += rate / sum(rates) * values / np.linalg.norm(values)
    rows = np.flatnonzero(features.any(1))
    labels = cluster(features[rows].astype(np.float32), CLUSTERS, seed=0)
    return features, [rows[labels == label] for label in range(CLUSTERS)]


def test_each_cluster_is_ordered_by_matching_pursuit(run, clusters) -> None:
    features, groups = clusters
    order = run.order.tolist()
    assert sorted(order) == sorted(np.concatenate(groups).tolist())
    for rows in groups:
        expected = rows[plain_order(features[rows], SHARE)].tolist()
        assert [row for row in order if row in rows] == expected


def test_any_budget_is_divided_by_the_clusters_sizes(run, clusters) -> None:
    _, groups = clusters
    order = run.order.tolist()
    assert len({len(rows) for rows in groups}) > 1
    for budget in range(1, len(order) + 1):
        for rows in groups:
            share = budget * len(rows) / len(order)
            assert abs(len(set(order[:budget]) & set(rows.tolist())) - share) <= 1


def test_gradients_are_shared_with_less(method_runs, run) -> None:
    pool = sum(len(tokens.ids) for tokens in method_runs.tokens(method_runs.pool))
    assert run.manifest["stages"]["score"]["tokens"] == EPOCHS * pool
    assert "fingerprint" not in run.manifest["stages"]
    less = method_runs.run(
        "method=less", *(part for part in METHOD[1:] if "cluster" not in part and "share" not in part)
    )
    assert less.manifest["stages"]["warmup"]["cached"]
    before = len(list((method_runs.root / "store" / "gradients").iterdir()))
    method_runs.run(*METHOD, "selection.count=3", "method.num_clusters=2")
    assert len(list((method_runs.root / "store" / "gradients").iterdir())) == before


def test_without_a_warm_up_it_is_a_user_error(method_runs) -> None:
    with pytest.raises(UserError, match="method=tagcos: needs the checkpoints of a warm-up"):
        method_runs.run("method=tagcos", "warmup=none")
