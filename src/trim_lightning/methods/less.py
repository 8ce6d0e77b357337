"""LESS: gradients of the pool against gradients of the targets, at checkpoints of a warm-up (arXiv 2402.04333)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trim_lightning.engine.shards import gather_values, read_values
from trim_lightning.errors import UserError
from trim_lightning.methods.base import Selector
from trim_lightning.methods.shared import group_scores, score_table, usable_groups
from trim_lightning.selection.ranking import ScoreTable
from trim_lightning.settings.key import key
from trim_lightning.stages.checkpoints import CHECKPOINTS, gradient_features, train_checkpoints
from trim_lightning.stages.passes import target_tokens
from trim_lightning.stages.task import SelectionTask
from trim_lightning.store import StageKey
from trim_lightning.trim.density import unit


@dataclass
class LessSelector(Selector):
    """How far training on a record would lower the targets' loss, to first order.

    The scorer is warmed up with LoRA on a part of the pool; at the end of each epoch, cosines between the record's
    projected Adam step and the targets' projected gradients are taken, weighted by the epoch's mean learning rate
    and added up. A group's score is the mean over its targets; several groups are combined by ``target.aggregate``,
    whose ``max`` is LESS's. The checkpoints' weights are divided by their sum, which changes no rank.
    """

    num_checkpoints: int = key(4, CHECKPOINTS, low=1)
    projection_dim: int = key(8192, "numbers that a gradient is projected to", low=1)
    last_layers: int | None = key(
        None, "blocks, from the last, whose LoRA gradients are taken; the backward pass ends there", low=1
    )

    def scores_responses(self) -> bool:
        """See `Selector`."""
        return True

    def takes_gradients(self) -> bool:
        """See `Selector`."""
        return self.last_layers is None

    def score(self, task: SelectionTask) -> ScoreTable:
        """Warm-up, then gradients of targets and pool at every checkpoint, then cosines shard by shard.

        Raises:
            UserError: if gradients of more blocks are asked for than the model has.
        """
        most, name = task.scorer.source.num_layers, task.scorer.source.name
        if self.last_layers is not None and self.last_layers > most:
            raise UserError(f"method.last_layers={self.last_layers}: {name} has only {most} layers; ask for fewer")
        checkpoints = train_checkpoints(task, "less", self.num_checkpoints, gradients=True)
        targets, targets_entry = target_tokens(task)
        responses = targets.content_lengths("response")
        groups = usable_groups(task, lambda row: responses[row] > 0, "no response", whatever_scope=True)
        pool_entries, target_entries = gradient_features(
            task, checkpoints, self.projection_dim, (targets, targets_entry), self.last_layers
        )
        shares = checkpoints.weights
        stage_key = StageKey(
            "similarity",
            1,
            {"method": "less", "weights": shares.tolist(), "groups": groups},
            {
                "pool": [entry.key.hex for entry in pool_entries],
                "targets": [entry.key.hex for entry in target_entries],
            },
        )

        def blocks() -> Iterator[tuple[Any, NDArray[Any]]]:
            directions = []
            for entry in target_entries:
                gradients = unit(gather_values(entry.path, len(targets)))
                # the mean of cosines is the product with the mean of the unit vectors
                directions.append(np.stack([gradients[rows].mean(0) for rows in groups.values()]))
            for shards in zip(*(read_values(entry.path) for entry in pool_entries), strict=True):
                scores = np.zeros((len(groups), len(shards[0][0])))
                for share, direction, (rows, vectors) in zip(shares, directions, shards, strict=True):
                    assert np.array_equal(rows, shards[0][0]), "shards are planned from the pool's lengths alone"
                    scores += share * (direction @ unit(vectors.astype(np.float64)).T)
                scores[:, ~shards[0][1].any(1)] = np.nan  # nothing to learn from
                yield np.s_[:, shards[0][0]], scores

        return score_table(task, group_scores(task, stage_key, list(groups), blocks))
