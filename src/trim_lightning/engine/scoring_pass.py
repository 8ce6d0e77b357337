"""Run the scoring pass over the pool: shards of token similarities, resumable."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from trim_lightning.engine.batches import padding_share, plan_shards
from trim_lightning.engine.modules import ScoringPass
from trim_lightning.engine.sharded_pass import Resources, run_sharded_pass
from trim_lightning.engine.writer import TokenShards
from trim_lightning.models.load import ModelRecipe
from trim_lightning.store.store import write_atomically
from trim_lightning.tokens.tokenized import TokenizedRecords
from trim_lightning.trim.fingerprints import FingerprintBank


def run_scoring_pass(
    model: PreTrainedModel | ModelRecipe,
    records: TokenizedRecords,
    banks: Mapping[str, FingerprintBank],
    directory: Path,
    *,
    nearest: str,
    scope: str,
    resources: Resources,
) -> dict[str, Any]:
    """One forward over the pool; every token meets its fingerprint in every bank.

    Args:
        model: The scorer; a recipe where several processes run it.
        records: The tokenised pool.
        banks: Group name to bank.
        directory: Where the shards go; those of an earlier attempt are kept.
        nearest: ``fallback.nearest``.
        scope: Content tokens that count.
        resources: Devices, batch size, workers.

    Returns:
        ``seconds`` over all attempts, ``tokens`` of the whole pool, ``shards``, and the ``padding`` share.
    """
    plan = plan_shards(records.lengths, resources.tokens_per_batch)
    module, form = ScoringPass(model, banks, nearest), TokenShards(list(banks))
    seconds = run_sharded_pass(module, records, plan, form, directory, scope=scope, resources=resources, title="score")
    facts = {
        "tokens": records.total_tokens,
        "shards": len(plan),
        "shard_records": [sum(map(len, shard.batches)) for shard in plan],
        "groups": list(banks),
        "padding": padding_share(records.lengths, plan),
    }
    if resources.team.leads:
        write_atomically(directory / "shards.json", json.dumps(facts))
    return {"seconds": seconds, **{name: facts[name] for name in ("tokens", "shards", "padding")}}
