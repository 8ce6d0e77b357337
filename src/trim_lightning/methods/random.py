"""A random coreset: the baseline that every method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from trim_lightning.methods.base import Selector
from trim_lightning.methods.shared import score_table
from trim_lightning.selection.ranking import ScoreTable
from trim_lightning.stages.task import SelectionTask


@dataclass
class RandomSelector(Selector):
    """Scores are uniform draws by ``seed``; records without scoped tokens stay unscored, as for all methods."""

    needs_targets: ClassVar[bool] = False
    uses_model: ClassVar[bool] = False

    def score(self, task: SelectionTask) -> ScoreTable:
        """Draw one number per record."""
        draws = np.random.default_rng([task.settings.seed, 0x52]).random(len(task.pool)).astype(np.float32)
        return score_table(task, {"": draws})
