"""IFD: how little the prompt helps the scorer to predict the response (Cherry LLM, arXiv 2308.12032)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from trim_lightning.methods.base import Selector
from trim_lightning.methods.perplexity import response_losses
from trim_lightning.methods.shared import score_table
from trim_lightning.selection.ranking import ScoreTable
from trim_lightning.settings.key import key
from trim_lightning.stages.passes import mean_losses, record_values, warm_up
from trim_lightning.stages.task import SelectionTask
from trim_lightning.store import Entry, StageKey
from trim_lightning.tokens.tokenized import TokenizedRecords, write_without_prompts


@dataclass
class IfdSelector(Selector):
    """A record's instruction-following difficulty: loss of its response given the prompt over its loss alone.

    The paper gives its model a brief experience of the data first; the warm-up plays that part here, and to go without
    is told in a warning. It drops
    records whose ratio is above 1, where the prompt does not help (our 1 itself is among them).
    """

    needs_targets: ClassVar[bool] = False
    unhelpful: str = key(
        "exclude", "records with a ratio of 1 and more: no score, or ranked last", choices=("exclude", "last")
    )
    use_warmup: bool = key(True, "score with the warmed-up model, if the warmup group is enabled")

    def scores_responses(self) -> bool:
        """See `Selector`."""
        return True

    def score(self, task: SelectionTask) -> ScoreTable:
        """Two passes over the pool: responses with their prompts, and without."""
        if not (self.use_warmup and task.settings.warmup.enabled):
            task.ledger.warn(
                "method=ifd: the original scores with a model that a part of the data gave some experience; "
                "this run scores with the model as it is (warmup=lora and method.use_warmup=true train one)"
            )
        warm_up(task, self.use_warmup)
        size = len(task.pool)
        passes = response_losses(task), self._losses_alone(task)
        given, alone = (mean_losses(entry, size) for entry in passes)
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = np.where(alone > 0, given / alone, np.nan)
        # without a prompt both losses are the same number, but batches of other shapes round it differently
        ratio[(task.pool_tokens.content_lengths("prompt") == 0) & ~np.isnan(ratio)] = 1
        unhelpful = ratio >= 1
        if self.unhelpful == "last":
            # below every helpful record, the least unhelpful first
            return score_table(task, {"": np.where(unhelpful, -ratio, ratio)})
        if unhelpful.any():
            task.ledger.warn(f"{int(unhelpful.sum())} records have a ratio (IFD) of 1 and more and are excluded")
        return score_table(task, {"": np.where(unhelpful, np.nan, ratio)})

    def _losses_alone(self, task: SelectionTask) -> Entry:
        """The stored losses of the pool's responses without their prompts."""
        from trim_lightning.engine.record_statistics import ResponseLoss

        tokenizer = task.scorer.tokenizer
        boundary = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        alone_key = StageKey("alone", 1, {"boundary": boundary}, {"tokens": task.pool_key.hex})

        def build(directory: Path) -> dict[str, Any]:
            started = time.perf_counter()
            write_without_prompts(task.pool_tokens, directory, 0 if boundary is None else boundary)
            return {"seconds": time.perf_counter() - started}

        entry = task.store.get(alone_key, build)
        task.ledger.book("score", entry)
        records = TokenizedRecords(entry.path)
        return record_values(task, ResponseLoss("removed"), records, {"tokens": alone_key.hex}, "score")
