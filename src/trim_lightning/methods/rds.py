"""RDS+: cosine between position-weighted means of hidden states (arXiv 2503.01807)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from trim_lightning.methods.base import Selector
from trim_lightning.methods.shared import (
    AGGREGATE,
    AGGREGATES,
    ROUND_ROBIN,
    check_aggregates,
    cosine_groups,
    targets_table,
    usable_groups,
)
from trim_lightning.selection.ranking import ScoreTable
from trim_lightning.settings.key import key
from trim_lightning.stages.passes import record_values, target_tokens, warm_up
from trim_lightning.stages.task import SelectionTask


@dataclass
class RdsSelector(Selector):
    """A record's score is the cosine of its vector with the nearest target's; targets take turns to pick.

    A vector is the mean of the last hidden states, weighted by position, over all tokens of the rendered
    record, as in RDS+. RDS+ takes the model as it is, so there is no warm-up by default, and lets its targets take
    turns.
    """

    use_warmup: bool = key(False, "score with the warmed-up model, if the warmup group is enabled")
    tokens: str = key("all", "tokens that are averaged: all (RDS+) or the scoped ones", choices=("all", "scoped"))
    aggregate: str = key(ROUND_ROBIN, AGGREGATE, choices=AGGREGATES)

    def score(self, task: SelectionTask) -> ScoreTable:
        """One pass over the targets, one over the pool, then cosines shard by shard."""
        check_aggregates(task, self.aggregate)
        warm_up(task, self.use_warmup)
        targets, targets_entry = target_tokens(task)
        scoped = targets.content_lengths(task.settings.scope)
        groups = usable_groups(task, lambda row: scoped[row] > 0, "no token")

        from trim_lightning.engine.record_statistics import PositionWeightedMean

        statistic = PositionWeightedMean(task.settings.scope if self.tokens == "scoped" else None)
        target_vectors = record_values(task, statistic, targets, {"tokens": targets_entry.key.hex}, "fingerprint")
        pool_vectors = record_values(task, statistic, task.pool_tokens, {"tokens": task.pool_key.hex}, "score")
        score = partial(cosine_groups, task, pool_vectors, target_vectors)
        return targets_table(task, groups, self.aggregate, score)
