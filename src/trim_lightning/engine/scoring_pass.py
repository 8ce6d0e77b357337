"""Run the scoring pass over the pool: shards of token similarities, resumable."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from trim_lightning.engine.batches import ShardBatches, padding_share, plan_shards
from trim_lightning.engine.clock import WorkClock
from trim_lightning.engine.modules import ScoringPass
from trim_lightning.engine.shards import finished_shards, shard_path
from trim_lightning.engine.trainer import interruptible, make_trainer
from trim_lightning.engine.writer import ShardWriter, TokenProgress
from trim_lightning.store.store import write_atomically
from trim_lightning.tokens.tokenized import TokenizedRecords
from trim_lightning.trim.fingerprints import FingerprintBank


def run_scoring_pass(
    model: PreTrainedModel,
    records: TokenizedRecords,
    banks: Mapping[str, FingerprintBank],
    directory: Path,
    *,
    nearest: str,
    scope: str,
    trainer: Mapping[str, Any],
    tokens_per_batch: int,
) -> dict[str, Any]:
    """One forward over the pool; every token meets its fingerprint in every bank.

    Shards that an earlier attempt left in ``directory`` are kept. Each process of a distributed run takes
    every n-th missing shard.

    Args:
        model: The scorer.
        records: The tokenised pool.
        banks: Group name to bank.
        directory: Where the shards go.
        nearest: ``fallback.nearest``.
        scope: Content tokens that count.
        trainer: Arguments of the Lightning Trainer.
        tokens_per_batch: Padded tokens of a batch.

    Returns:
        ``seconds`` over all attempts, ``tokens`` of the whole pool, ``shards``, and the ``padding`` share.
    """
    clock = WorkClock(directory)
    plan = plan_shards(records.lengths, tokens_per_batch)
    done = finished_shards(directory, [sum(map(len, shard.batches)) for shard in plan])
    missing = [shard for shard in plan if shard.index not in done]
    if missing:
        runner = make_trainer(trainer, [])
        mine = missing[runner.global_rank :: runner.world_size]
        batches = ShardBatches(records, mine, scope)
        runner.callbacks.extend(  # type: ignore[attr-defined]
            [ShardWriter(directory, list(banks), clock), TokenProgress("score", batches.tokens)]
        )
        with interruptible(runner):
            runner.predict(
                ScoringPass(model, banks, nearest), DataLoader(batches, batch_size=None), return_predictions=False
            )
    if not all(shard_path(directory, shard.index).exists() for shard in plan):
        raise RuntimeError("the pass ended without all of its shards")  # never seal a part as the whole
    facts = {
        "tokens": records.total_tokens,
        "shards": len(plan),
        "shard_records": [sum(map(len, shard.batches)) for shard in plan],
        "groups": list(banks),
        "padding": padding_share(records.lengths, plan),
    }
    write_atomically(directory / "shards.json", json.dumps(facts))
    return {"seconds": clock.finish(), **{name: facts[name] for name in ("tokens", "shards", "padding")}}
