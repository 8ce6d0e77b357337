"""TAGCOS: clusters of gradients, and in each a greedy match of its mean gradient (arXiv 2407.15235)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from trim_lightning.console.progress import progress_bar
from trim_lightning.engine.shards import read_values
from trim_lightning.methods.base import Selector
from trim_lightning.methods.clusters import (
    CLUSTERS,
    cluster,
    cluster_number,
    members_of,
    ranked_by_order,
    scoped_rows,
)
from trim_lightning.selection.ranking import ScoreTable
from trim_lightning.settings.key import key
from trim_lightning.stages.checkpoints import CHECKPOINTS, gradient_features, train_checkpoints
from trim_lightning.stages.task import SelectionTask
from trim_lightning.store import Entry, StageKey
from trim_lightning.trim.density import unit

RIDGE = 1.0  # of the authors' code, likewise the next
TOLERANCE = 1e-4  # of the residual, as a share of what is to be matched


@dataclass
class TagcosSelector(Selector):
    """A small set whose gradients add up to the pool's, cluster by cluster.

    A record's feature is the mean of its unit gradients at the warm-up's checkpoints (those of ``method=less``),
    weighted by the epochs' mean learning rates. k-means divides the pool; in each cluster orthogonal matching
    pursuit orders the records by how they add up to the cluster's mean; clusters get shares of the budget by size.
    """

    needs_targets: ClassVar[bool] = False
    num_checkpoints: int = key(4, CHECKPOINTS, low=1)
    projection_dim: int = key(8192, "numbers that a gradient is projected to", low=1)
    num_clusters: int | None = key(None, f"clusters of gradients; {CLUSTERS}", low=1)
    round_share: float = key(
        0.05, "share of a cluster that one round of matching picks; the next one starts anew", above=0, high=1
    )

    def scores_responses(self) -> bool:
        """See `Selector`."""
        return True

    def takes_gradients(self) -> bool:
        """See `Selector`."""
        return True

    def score(self, task: SelectionTask) -> ScoreTable:
        """Warm-up, gradients of the pool at every checkpoint, clusters, and a greedy order in each."""
        checkpoints = train_checkpoints(task, "tagcos", self.num_checkpoints, gradients=True)
        entries, _ = gradient_features(task, checkpoints, self.projection_dim, None)
        settings, seed = task.settings, task.settings.seed
        choices = {
            "method": "tagcos",
            "clusters": self.num_clusters,
            "round_share": self.round_share,
            "weights": checkpoints.weights.tolist(),
            "seed": seed,
            "scope": settings.scope,
        }
        inputs = {"gradients": [entry.key.hex for entry in entries]}

        def order_rows() -> NDArray[np.int64]:
            features = weighted_mean(entries, checkpoints.weights, len(task.pool))
            rows = scoped_rows(task, features.any(1))
            features = features[rows]
            clusters = members_of(cluster(features, cluster_number(self.num_clusters, len(rows)), seed))
            orders = []
            with progress_bar("matching", total=len(rows), unit="records") as bar:
                for members in clusters:
                    order = matching_order(features[members].astype(np.float64), self.round_share)
                    orders.append(members[order])
                    bar.update(len(members))
            return rows[spread_by_size(orders)]

        return ranked_by_order(task, StageKey("order", 2, choices, inputs), order_rows)


def weighted_mean(entries: Sequence[Entry], weights: NDArray[np.float64], size: int) -> NDArray[np.float32]:
    """``[size, dimension]`` weighted means of the stored features' unit vectors; zeros in rows without."""
    result: NDArray[np.float32] | None = None
    for weight, entry in zip(weights, entries, strict=True):
        for rows, values in read_values(entry.path):
            if result is None:
                result = np.zeros((size, values.shape[1]), dtype=np.float32)
            result[rows] += (weight * unit(values.astype(np.float64))).astype(np.float32)
    return np.zeros((size, 1), dtype=np.float32) if result is None else result


def spread_by_size(orders: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """One order of all clusters' members, in any beginning of which each cluster has a share by its size.

    The member at place j of a cluster of n, from 0, comes at (j + ½)/n of the whole; ties by place in the pool. The
    paper fixes the budget of each cluster beforehand; this is one order for all budgets (our choice).
    """
    places = np.concatenate([np.zeros(0), *((np.arange(len(order)) + 0.5) / len(order) for order in orders)])
    members = np.concatenate([np.zeros(0, dtype=np.int64), *orders])
    return members[np.lexsort((members, places))]


def matching_order(vectors: NDArray[np.float64], share: float) -> NDArray[np.int64]:
    """All vectors in the order in which matching pursuit picks them to add up to their mean.

    A round picks at most ``share`` of the vectors; the next one starts anew on those that are left, as the authors'
    code does when a round ends before its budget is spent. Vectors that point away from the mean come last, those
    with the largest product first.

    Args:
        vectors: ``[n, width]``.
        share: Of ``n``, at least one vector.

    Returns:
        ``[n]`` places.
    """
    mean = vectors.mean(0)
    gram, products, square = vectors @ vectors.T, vectors @ mean, float(mean @ mean)
    picks = max(1, int(share * len(vectors)))
    left, order = np.arange(len(vectors)), []
    while len(left):
        picked = pursue(gram[np.ix_(left, left)], products[left], square, picks)
        if not picked:
            picked = np.argsort(-products[left], kind="stable").tolist()
        order.append(left[picked])
        left = np.delete(left, picked)
    return np.concatenate([*order, np.zeros(0, dtype=np.int64)])


def pursue(gram: NDArray[np.float64], products: NDArray[np.float64], square: float, picks: int) -> list[int]:
    """One round of orthogonal matching pursuit with weights that are not negative, from inner products alone.

    Each step picks the vector with the largest product with the residual, if it is positive, and fits all weights
    anew by ridge regression (non-negative least squares; `RIDGE`, but none for the first vector alone, as in the
    authors' code). That code drops a vector whose weight would become negative; here it keeps its place with the weight
    0 (our choice).

    Args:
        gram: ``[n, n]`` inner products of the vectors.
        products: ``[n]`` inner products with what is to be matched.
        square: Its squared length.
        picks: Most vectors to pick.

    Returns:
        Places in the order of picking; fewer than ``picks`` if the residual vanishes or nothing points its way.
    """
    from scipy.linalg import solve_triangular
    from scipy.optimize import nnls

    chosen: list[int] = []
    weights = np.zeros(0)
    for _ in range(min(picks, len(products))):
        residual = products - gram[:, chosen] @ weights
        inner = gram[np.ix_(chosen, chosen)]
        if square - 2 * weights @ products[chosen] + weights @ inner @ weights <= TOLERANCE**2 * square:
            break
        residual[chosen] = -np.inf
        best = int(np.argmax(residual))
        if residual[best] <= 0:
            break
        chosen.append(best)
        # ‖Lᵀw − L⁻¹p‖² is the ridge objective up to a constant, with LLᵀ the Gram matrix plus the ridge
        ridge = RIDGE if len(chosen) > 1 else 0.0
        lower = np.linalg.cholesky(gram[np.ix_(chosen, chosen)] + ridge * np.eye(len(chosen)))
        weights, _ = nnls(lower.T, solve_triangular(lower, products[chosen], lower=True))
    return chosen
