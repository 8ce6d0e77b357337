"""Perplexity: records by how surprising their response is to the scorer (mid-ppl and top-ppl of arXiv 2503.01807)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from trim_lightning.methods.base import Selector
from trim_lightning.methods.shared import score_table
from trim_lightning.selection.ranking import ScoreTable, rank_by_score
from trim_lightning.settings.key import key
from trim_lightning.stages.passes import mean_losses, record_values, warm_up
from trim_lightning.stages.task import SelectionTask
from trim_lightning.store import Entry

MID_START = 0.33  # share of the records with the highest losses that the original's mid-ppl leaves out


@dataclass
class PerplexitySelector(Selector):
    """Ranks by the mean loss (nats) of the response tokens, the logarithm of their perplexity.

    The response is measured whatever `scope` says (our choice; ``tokens=all`` averages over all tokens of the rendered
    record, as the code of arXiv 2503.01807 does). Records without such tokens have no score. That code's mid-ppl begins
    at a third of the records, from the highest loss down: ``mode=mid_ppl``, whose score is 1 − place/records.
    """

    needs_targets: ClassVar[bool] = False
    mode: str = key(
        "middle", "closest to the median, highest or lowest first, or from the third on as the original's mid-ppl",
        choices=("middle", "top", "bottom", "mid_ppl"),
    )  # fmt: skip
    tokens: str = key(
        "response", "tokens whose loss counts: the response's or all (template words too)", choices=("response", "all")
    )
    use_warmup: bool = key(False, "score with the warmed-up model, if the warmup group is enabled")

    def scores_responses(self) -> bool:
        """See `Selector`."""
        return self.tokens == "response"

    def score(self, task: SelectionTask) -> ScoreTable:
        """One pass over the pool."""
        warm_up(task, self.use_warmup)
        losses = mean_losses(response_losses(task, whole=self.tokens == "all"), len(task.pool))
        usable = ~np.isnan(losses) & (task.pool_tokens.content_lengths(task.settings.scope) > 0)
        if self.mode == "mid_ppl":
            order = rank_by_score(np.where(usable, losses, np.nan))
            places = np.full(len(losses), np.nan)
            places[np.roll(order, -int(len(order) * MID_START))] = np.arange(len(order))
            return score_table(task, {"": 1 - places / max(1, len(order))})
        if self.mode == "middle":
            scored = losses[usable]
            return score_table(task, {"": -np.abs(losses - (np.median(scored) if len(scored) else 0.0))})
        return score_table(task, {"": losses if self.mode == "top" else -losses})


def response_losses(task: SelectionTask, *, whole: bool = False) -> Entry:
    """The stored losses of the pool's responses given their prompts, which `ifd` shares; or of whole records."""
    from trim_lightning.engine.record_statistics import ResponseLoss

    return record_values(
        task, ResponseLoss("given", whole=whole), task.pool_tokens, {"tokens": task.pool_key.hex}, "score"
    )
