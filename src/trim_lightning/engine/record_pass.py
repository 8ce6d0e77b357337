"""One forward pass that leaves a few numbers or a vector for each record, resumable shard by shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from trim_lightning.engine.batches import padding_share, plan_shards
from trim_lightning.engine.devices import Resources
from trim_lightning.engine.modules import ForwardPass
from trim_lightning.engine.record_statistics import RecordStatistic
from trim_lightning.engine.sharded_pass import run_sharded_pass
from trim_lightning.engine.shards import ValueShards, write_facts
from trim_lightning.models.load import ModelRecipe
from trim_lightning.tokens.tokenized import TokenizedRecords


class RecordPass(ForwardPass):
    """Runs a statistic on every batch; ``predict_step`` returns its ``[batch, width]`` values."""

    def __init__(self, model: PreTrainedModel | ModelRecipe, statistic: RecordStatistic) -> None:
        super().__init__(model)
        self.statistic = statistic

    def on_batch(self, batch: Mapping[str, Any]) -> torch.Tensor:
        return self.statistic(self.model, batch)


def run_record_pass(
    model: PreTrainedModel | ModelRecipe,
    records: TokenizedRecords,
    statistic: RecordStatistic,
    directory: Path,
    *,
    scope: str,
    resources: Resources,
    title: str,
    shard_tokens: int | None = None,
) -> dict[str, Any]:
    """One forward over some records, batched as the scoring pass is; read the result with `read_values`.

    A record without tokens gets no values; shards, which ``shard_tokens`` close, of an earlier attempt are kept.

    Returns:
        ``seconds`` over all attempts, ``tokens`` fed to the model, ``shards``, and the ``padding`` share.
    """
    plan = plan_shards(records.lengths, resources.tokens_per_batch, shard_tokens=shard_tokens)
    if statistic.needs_gradients:  # what is made in inference mode can have no gradient
        resources = replace(resources, trainer={**resources.trainer, "inference_mode": False})
    seconds = run_sharded_pass(
        RecordPass(model, statistic), records, plan, ValueShards(directory), directory,
        scope=scope, resources=resources, title=title,
    )  # fmt: skip
    facts = {"tokens": records.total_tokens, "shards": len(plan), "padding": padding_share(records.lengths, plan)}
    if resources.processes.leads:
        write_facts(directory, facts)
    return {"seconds": seconds, **facts}
