"""The whole pool: the upper end of every budget curve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from trim_lightning.methods.base import Selector
from trim_lightning.methods.shared import score_table
from trim_lightning.selection.ranking import ScoreTable
from trim_lightning.stages.task import SelectionTask


@dataclass
class FullSelector(Selector):
    """All records score 0, so they rank in pool order, and all of them are selected whatever the budget.

    Filters (caps, duplicates, length bounds) still apply; records without scoped tokens stay unscored.
    """

    needs_targets: ClassVar[bool] = False
    uses_model: ClassVar[bool] = False
    takes_all: ClassVar[bool] = True

    def score(self, task: SelectionTask) -> ScoreTable:
        """Give every record the same score."""
        return score_table(task, {"": np.zeros(len(task.pool))})
