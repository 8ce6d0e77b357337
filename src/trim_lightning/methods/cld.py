"""CLD: records whose loss moves as the targets' loss does along a warm-up (arXiv 2508.20230)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trim_lightning.methods.base import Selector
from trim_lightning.methods.shared import score_table, usable_groups
from trim_lightning.selection.ranking import ScoreTable
from trim_lightning.settings.key import key
from trim_lightning.stages.checkpoints import CHECKPOINTS, loss_passes, train_checkpoints, trajectories
from trim_lightning.stages.passes import target_tokens
from trim_lightning.stages.task import SelectionTask


@dataclass
class CldSelector(Selector):
    """Pearson correlation between a record's differences of loss from checkpoint to checkpoint and the targets'.

    The first checkpoint is the model before its warm-up. The paper trains on all that it selects from; the warm-up
    group trains on its fraction of the pool (our choice, told in a warning; ``warmup.fraction=1`` is the paper's). The
    targets are the paper's validation set, and a target group is its class: each group's mean loss is a trajectory of
    its own. A pool record has no class, so it is compared with every group (our choice);
    ``target.aggregate=round_robin`` then takes the best of each group in turn, which is nearest to the paper's best of
    each class.
    """

    num_checkpoints: int = key(8, CHECKPOINTS, low=2)

    def scores_responses(self) -> bool:
        """See `Selector`."""
        return True

    def score(self, task: SelectionTask) -> ScoreTable:
        """Warm-up, a pass over targets and pool at every checkpoint, then correlations."""
        checkpoints = train_checkpoints(task, "cld", self.num_checkpoints, whole_pool=True)
        targets, entry = target_tokens(task)
        responses = targets.content_lengths("response")
        groups = usable_groups(task, lambda row: responses[row] > 0, "no response", whatever_scope=True)
        target_passes = loss_passes(
            task, checkpoints, targets, {"tokens": entry.key.hex}, "fingerprint", from_start=True
        )
        passes = loss_passes(
            task, checkpoints, task.pool_tokens, {"tokens": task.pool_key.hex}, "score", from_start=True
        )
        target_losses, losses = trajectories(target_passes, len(targets)), trajectories(passes, len(task.pool))
        changes = np.diff(losses, axis=1)
        scores = {}
        for name, rows in groups.items():
            mean = np.nanmean(target_losses[rows], axis=0)  # a response of one token at the very start has no loss
            scores[name] = correlations(changes, np.diff(mean))
        return score_table(task, scores)


def correlations(changes: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[n]`` Pearson correlations of the rows of ``changes [n, steps]`` with ``wanted [steps]``.

    A row (or ``wanted``) that does not vary has the correlation 0 (our choice); a row with NaN has NaN.
    """
    centred, direction = changes - changes.mean(1, keepdims=True), wanted - wanted.mean()
    lengths = np.linalg.norm(centred, axis=1) * np.linalg.norm(direction)
    return (centred @ direction) / np.where(lengths == 0, 1, lengths)
