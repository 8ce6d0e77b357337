"""The longest records: a baseline that shows how much of a method's gain is length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trim_lightning.methods.base import Selector
from trim_lightning.methods.shared import score_table
from trim_lightning.selection.ranking import ScoreTable
from trim_lightning.stages.task import SelectionTask


@dataclass
class LongestSelector(Selector):
    """A record's score is its number of scoped tokens (our choice: content only, as `scope` says)."""

    needs_targets: ClassVar[bool] = False
    uses_model: ClassVar[bool] = False

    def score(self, task: SelectionTask) -> ScoreTable:
        """Count tokens."""
        return score_table(task, {"": task.pool_tokens.content_lengths(task.settings.scope)})
