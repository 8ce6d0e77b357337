"""S2L: an even sample of clusters of loss trajectories along a warm-up (SmallToLarge, arXiv 2403.07384)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from trim_lightning.methods.base import Selector
from trim_lightning.methods.clusters import cluster, members_of, ranked_by_order, scoped_rows
from trim_lightning.selection.ranking import ScoreTable
from trim_lightning.settings.key import key
from trim_lightning.stages.checkpoints import CHECKPOINTS, loss_passes, train_checkpoints, trajectories
from trim_lightning.stages.task import SelectionTask
from trim_lightning.store import StageKey


@dataclass
class S2lSelector(Selector):
    """Records whose losses fall alike are alike; every cluster gives the same number of records.

    The scorer plays the paper's small proxy model. The paper trains it on the whole pool; the warm-up group trains
    on its fraction of the pool (our choice; ``warmup.fraction=1`` is the paper's).
    """

    needs_targets: ClassVar[bool] = False
    num_checkpoints: int = key(8, CHECKPOINTS, low=1)
    num_clusters: int = key(100, "clusters of loss trajectories", low=1)

    def score(self, task: SelectionTask) -> ScoreTable:
        """Warm-up, a pass over the pool at every checkpoint, then clusters."""
        checkpoints = train_checkpoints(task, "s2l", self.num_checkpoints)
        passes = loss_passes(
            task, checkpoints, task.pool_tokens, {"tokens": task.pool_key.hex}, "score", from_start=False
        )
        losses = trajectories(passes, len(task.pool))
        settings, seed = task.settings, task.settings.seed
        choices = {"method": "s2l", "clusters": self.num_clusters, "seed": seed, "scope": settings.scope}
        inputs = {"losses": [entry.key.hex for entry in passes]}

        def order_rows() -> NDArray[np.int64]:
            rows = scoped_rows(task, ~np.isnan(losses).any(1))
            clusters = [rows[places] for places in members_of(cluster(losses[rows], self.num_clusters, seed))]
            return take_turns(clusters, seed)

        return ranked_by_order(task, StageKey("order", 1, choices, inputs), order_rows)


def take_turns(clusters: Sequence[NDArray[np.int64]], seed: int) -> NDArray[np.int64]:
    """Rows in the order in which the clusters, the smallest first, give one of theirs each, drawn by seed.

    The first B rows are what the paper's algorithm draws for a budget of B: it goes through the clusters from the
    smallest and takes from each an equal share of what is left of the budget, or all it has. Turns make that one
    order for all budgets (our choice); where shares are not whole, the smaller clusters give one more.
    """
    generator = np.random.default_rng([seed, 0x532C])
    shuffled = [generator.permutation(rows) for rows in clusters]
    nothing = np.zeros(0, dtype=np.int64)
    turns = np.concatenate([nothing, *(np.arange(len(rows)) for rows in shuffled)])
    sizes = np.concatenate([nothing, *(np.full(len(rows), len(rows)) for rows in shuffled)])
    rows = np.concatenate([nothing, *shuffled])
    return rows[np.lexsort((sizes, turns))]
