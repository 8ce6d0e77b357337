"""What the methods share that cluster the pool: k-means, and a stored order in which records are picked."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trim_lightning.methods.shared import score_table, stored_array
from trim_lightning.selection.ranking import ScoreTable
from trim_lightning.stages.task import SelectionTask
from trim_lightning.store import StageKey

MOST_CLUSTERS = 100  # S2L's and TAGCOS's own number, for hundreds of thousands of records
POINTS_A_CLUSTER = 39  # fewest points for a centre that faiss asks for, with which S2L's code clusters
CLUSTERS = f"null: one for {POINTS_A_CLUSTER} records, {MOST_CLUSTERS} at most"


def cluster_number(wanted: int | None, points: int) -> int:
    """Clusters for some points: as many as wanted, else the originals' number scaled down to them (our choice)."""
    return wanted or max(1, min(MOST_CLUSTERS, points // POINTS_A_CLUSTER))


def cluster(points: NDArray[Any], number: int, seed: int) -> NDArray[np.int64]:
    """``[n]`` the k-means cluster of each point (scikit-learn, k-means++, Lloyd).

    Args:
        points: ``[n, width]`` float32 or float64.
        number: Clusters; no more than there are points. Equal points can leave some of them empty.
        seed: Of the first centres.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    if not len(points):
        return np.zeros(0, dtype=np.int64)
    search = KMeans(min(number, len(points)), random_state=seed, n_init=1)
    # with several threads, centres are added up in whatever order the threads end
    with threadpool_limits(1, user_api="openmp"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different points than clusters
        return search.fit_predict(points).astype(np.int64)


def members_of(labels: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Places of the points of every cluster that has some, by label."""
    return [np.flatnonzero(labels == label) for label in np.unique(labels)]


def ranked_by_order(
    task: SelectionTask, stage_key: StageKey, order_rows: Callable[[], NDArray[np.int64]]
) -> ScoreTable:
    """The score table of a method that picks records one after the other; the order is a stage result.

    A record that is picked at place p of n, from 0, gets the score 1 − p/n: a number for its rank and no more.

    Args:
        task: For store, ledger and settings.
        stage_key: Key of the order.
        order_rows: Gives the picked rows, best first; called only if nothing is stored.
    """
    order = stored_array(task, stage_key, "order.npy", order_rows)
    scores = np.full(len(task.pool), np.nan)
    scores[order] = 1 - np.arange(len(order)) / max(1, len(order))
    return score_table(task, {"": scores}, order)


def scoped_rows(task: SelectionTask, usable: Any) -> NDArray[np.int64]:
    """Rows of the pool that are ``usable [records]`` and have scoped tokens."""
    return np.flatnonzero(usable & (task.pool_tokens.content_lengths(task.settings.scope) > 0))
