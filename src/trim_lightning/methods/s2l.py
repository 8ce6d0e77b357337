"""S2L: an even sample of clusters of loss trajectories along a warm-up (SmallToLarge, arXiv 2403.07384)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from trim_lightning.methods.base import Selector
from trim_lightning.methods.clusters import (
    CLUSTERS,
    cluster,
    cluster_number,
    members_of,
    ranked_by_order,
    scoped_rows,
)
from trim_lightning.selection.filters import field_value
from trim_lightning.selection.ranking import ScoreTable, merge_in_turns
from trim_lightning.settings.key import key
from trim_lightning.stages.checkpoints import CHECKPOINTS, loss_passes, train_checkpoints, trajectories
from trim_lightning.stages.task import SelectionTask
from trim_lightning.store import StageKey

OUTLIERS = 2  # records of a cluster that is drawn from last, as in the authors' code


@dataclass
class S2lSelector(Selector):
    """Records whose losses fall alike are alike; every cluster gives the same number of records.

    The scorer plays the paper's small proxy model. The paper trains it on the whole pool; the warm-up group trains
    on its fraction of the pool (our choice, told in a warning; ``warmup.fraction=1`` is the paper's). The authors' code
    divides the budget among the sources of the data first (``source_field``), which the paper's algorithm does not.
    """

    needs_targets: ClassVar[bool] = False
    num_checkpoints: int = key(8, CHECKPOINTS, low=1)
    num_clusters: int | None = key(None, f"clusters of loss trajectories; {CLUSTERS}", low=1)
    source_field: str | None = key(
        None, "field of the pool whose values share the budget before their clusters do; null: the pool as a whole"
    )

    def scores_responses(self) -> bool:
        """See `Selector`."""
        return True

    def score(self, task: SelectionTask) -> ScoreTable:
        """Warm-up, a pass over the pool at every checkpoint, then clusters."""
        sources = self._sources(task)
        checkpoints = train_checkpoints(task, "s2l", self.num_checkpoints, whole_pool=True)
        passes = loss_passes(
            task, checkpoints, task.pool_tokens, {"tokens": task.pool_key.hex}, "score", from_start=False
        )
        losses = trajectories(passes, len(task.pool))
        settings, seed = task.settings, task.settings.seed
        choices = {
            "method": "s2l", "clusters": self.num_clusters, "source": self.source_field, "seed": seed,
            "scope": settings.scope,
        }  # fmt: skip
        inputs = {"losses": [entry.key.hex for entry in passes]}

        def order_rows() -> NDArray[np.int64]:
            rows = scoped_rows(task, ~np.isnan(losses).any(1))
            orders = []
            for members in members_of(sources[rows]):
                labels = cluster(losses[rows[members]], cluster_number(self.num_clusters, len(members)), seed)
                orders.append(take_turns([rows[members[places]] for places in members_of(labels)], seed))
            return deal(orders)

        return ranked_by_order(task, StageKey("order", 2, choices, inputs), order_rows)

    def _sources(self, task: SelectionTask) -> NDArray[np.int64]:
        """``[records]`` number of each record's source; read first, so that a wrong field costs nothing."""
        if self.source_field is None:
            return np.zeros(len(task.pool), dtype=np.int64)
        names = [field_value(task.pool, self.source_field, row, "method.source_field") for row in range(len(task.pool))]
        return np.unique(names, return_inverse=True)[1].astype(np.int64)


def deal(orders: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """One order of the rows of several: turn by turn the next row of each, that with the most rows first.

    Its first B rows are an equal share of each order, or all of it; what does not divide falls to the longest.
    """
    return merge_in_turns(sorted(orders, key=len, reverse=True))


def take_turns(clusters: Sequence[NDArray[np.int64]], seed: int) -> NDArray[np.int64]:
    """Rows in the order in which the clusters, the largest first, give one of theirs each, drawn by seed.

    The first B rows are what the authors' code draws for a budget of B: it goes through the clusters from the smallest
    and takes from each the whole part of an equal share of what is left of the budget, or all it has, so what does not
    divide falls to the largest. Clusters of one or two records wait until all others are empty, and are then drawn from
    together. The paper's algorithm says no more than equal shares; a draw for each budget is here one for all.
    """
    generator = np.random.default_rng([seed, 0x532C])
    dealt = deal([generator.permutation(rows) for rows in clusters if len(rows) > OUTLIERS])
    outliers = [rows for rows in clusters if len(rows) <= OUTLIERS]
    return np.concatenate([dealt, generator.permutation(np.concatenate([dealt[:0], *outliers]))])
