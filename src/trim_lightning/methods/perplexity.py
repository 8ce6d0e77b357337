"""Perplexity: records by how surprising their response is to the scorer (mid-ppl and top-ppl of arXiv 2503.01807)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from trim_lightning.methods.base import Selector
from trim_lightning.methods.shared import score_table
from trim_lightning.selection.ranking import ScoreTable
from trim_lightning.settings.key import key
from trim_lightning.stages.passes import mean_losses, record_values, warm_up
from trim_lightning.stages.task import SelectionTask
from trim_lightning.store import Entry


@dataclass
class PerplexitySelector(Selector):
    """Ranks by the mean loss (nats) of the response tokens, the logarithm of their perplexity.

    The response is measured whatever `scope` says (our choice; the code of arXiv 2503.01807 averages over all
    tokens of the rendered record). Records without a response have no score.
    """

    needs_targets: ClassVar[bool] = False
    mode: str = key("middle", "closest to the median, highest or lowest first", choices=("middle", "top", "bottom"))
    use_warmup: bool = key(False, "score with the warmed-up model, if the warmup group is enabled")

    def score(self, task: SelectionTask) -> ScoreTable:
        """One pass over the pool."""
        warm_up(task, self.use_warmup)
        losses = mean_losses(response_losses(task), len(task.pool))
        if self.mode == "middle":
            scored = losses[~np.isnan(losses) & (task.pool_tokens.content_lengths(task.settings.scope) > 0)]
            return score_table(task, {"": -np.abs(losses - (np.median(scored) if len(scored) else 0.0))})
        return score_table(task, {"": losses if self.mode == "top" else -losses})


def response_losses(task: SelectionTask) -> Entry:
    """The stored losses of the pool's responses given their prompts; `ifd` shares them."""
    from trim_lightning.engine.record_statistics import ResponseLoss

    return record_values(task, ResponseLoss("given"), task.pool_tokens, {"tokens": task.pool_key.hex}, "score")
