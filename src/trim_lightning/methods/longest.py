"""The longest responses (Long Is More for Alignment, arXiv 2402.04833)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trim_lightning.methods.base import Selector
from trim_lightning.methods.shared import score_table
from trim_lightning.selection.ranking import ScoreTable
from trim_lightning.settings.key import key
from trim_lightning.stages.task import SelectionTask


@dataclass
class LongestSelector(Selector):
    """A record's score is the number of content tokens in its response, whatever `scope` says, as in the paper."""

    needs_targets: ClassVar[bool] = False
    uses_model: ClassVar[bool] = False
    tokens: str = key(
        "response", "tokens that are counted: the response's or the scoped ones", choices=("response", "scoped")
    )

    def score(self, task: SelectionTask) -> ScoreTable:
        """Count tokens."""
        counted = task.settings.scope if self.tokens == "scoped" else "response"
        return score_table(task, {"": task.pool_tokens.content_lengths(counted)})
