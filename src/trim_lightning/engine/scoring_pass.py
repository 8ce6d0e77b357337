"""Run the scoring pass over the pool: shards of token similarities, resumable."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from trim_lightning.engine.batches import padding_share, plan_shards
from trim_lightning.engine.devices import Resources
from trim_lightning.engine.elapsed import WorkClock
from trim_lightning.engine.modules import ScoringPass
from trim_lightning.engine.shard_forms import SharedShards, TokenShards
from trim_lightning.engine.sharded_pass import run_sharded_pass
from trim_lightning.engine.speed import sample_pass
from trim_lightning.files.atomic import write_atomically
from trim_lightning.models.hidden import hidden_width
from trim_lightning.models.load import ModelRecipe
from trim_lightning.store.cost import Measured
from trim_lightning.tokens.tokenized import TokenizedRecords
from trim_lightning.trim.fingerprints import FingerprintBank, unit

STAND_IN_RECORDS = 10


@dataclass(frozen=True)
class ScoringRequest:
    """What one reader wants of a scoring pass.

    Attributes:
        banks: Group name to bank.
        nearest: ``fallback.nearest``.
        scope: Content tokens that count.
    """

    banks: Mapping[str, FingerprintBank]
    nearest: str
    scope: str


def run_scoring_pass(
    model: PreTrainedModel | ModelRecipe,
    records: TokenizedRecords,
    requests: Mapping[Path, ScoringRequest],
    *,
    resources: Resources,
) -> dict[str, Any]:
    """One forward over the pool; every token meets its fingerprint in every bank of every request.

    Args:
        model: The scorer; a recipe where several processes run it.
        records: The tokenised pool.
        requests: By the directory where their shards go; those of an earlier attempt are kept. Each directory
            gets the same bytes, whoever shares the pass.
        resources: Devices, batch size, workers.

    Returns:
        ``seconds`` over all attempts, ``tokens`` of the whole pool, ``shards``, the ``padding`` share, and how many
        requests it ``served``.
    """
    plan = plan_shards(records.lengths, resources.tokens_per_batch)
    banks: list[tuple[FingerprintBank, str]] = []
    readers = []
    for directory, request in requests.items():
        readers.append(TokenShards(directory, list(request.banks), request.scope, len(banks)))
        banks += [(bank, request.nearest) for bank in request.banks.values()]
    seconds = run_sharded_pass(
        ScoringPass(model, banks),
        records,
        plan,
        SharedShards(readers) if len(readers) > 1 else readers[0],
        next(iter(requests)),
        resources=resources,
        title="score",
    )
    for directory in list(requests)[1:]:
        WorkClock(directory).finish()  # of an attempt that nobody shared
    facts = {"tokens": records.total_tokens, "shards": len(plan), "padding": padding_share(records.lengths, plan)}
    for directory, request in requests.items():
        noted = {
            **facts,
            "shard_records": [sum(map(len, shard.batches)) for shard in plan],
            "groups": list(request.banks),
        }
        if resources.team.leads:
            write_atomically(directory / "shards.json", json.dumps(noted))
    return {"seconds": seconds, **facts, "served": len(requests)}


def sample_scoring_pass(
    model: PreTrainedModel, records: TokenizedRecords, groups: Sequence[str], *, resources: Resources
) -> Measured:
    """Speed of a scoring pass and size of its shards, with banks of random directions in place of the real ones."""
    bank = stand_in_bank(model, records)
    return sample_pass(
        lambda: ScoringPass(model, [(bank, "embedding") for _ in groups]),
        lambda directory: TokenShards(directory, groups, "all"),
        records,
        resources,
    )


def stand_in_bank(model: PreTrainedModel, records: TokenizedRecords) -> FingerprintBank:
    """Fingerprints of random directions for the classes of some records: a target set's bank is of about that size."""
    rows = np.flatnonzero(records.lengths > 0)[:STAND_IN_RECORDS]
    classes = np.unique(np.concatenate([records[int(row)].token_ids for row in rows])).astype(np.int64)
    generator = torch.Generator().manual_seed(0)
    vectors = unit(torch.randn(len(classes), hidden_width(model), generator=generator))
    ones = torch.ones(len(classes))
    count = torch.ones(len(classes), dtype=torch.int64)
    return FingerprintBank(torch.from_numpy(classes), vectors, ones, ones, count, num_targets=len(rows))
