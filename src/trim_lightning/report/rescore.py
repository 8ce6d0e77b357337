"""Score one more record as a run scored its pool: same model, same bank, same passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from trim_lightning.engine.batches import ShardBatches, plan_shards
from trim_lightning.engine.modules import ScoringPass
from trim_lightning.errors import UserError
from trim_lightning.methods.base import load_selector
from trim_lightning.models.load import ModelRecipe, load_tokenizer
from trim_lightning.models.precision import resolve_dtype
from trim_lightning.records.record import Turn
from trim_lightning.runs.names import BANKS
from trim_lightning.runs.reopened import OpenedRun
from trim_lightning.stages.fingerprints import load_banks
from trim_lightning.stages.task import MatchedTokens
from trim_lightning.stages.token_scores import ScopedTokens, pool_tokens, scaled_idf
from trim_lightning.tokens.rendering import ChatRenderer, RenderError
from trim_lightning.tokens.tokenized import TokenSequence, scope_mask
from trim_lightning.trim.pooling import Pooled, aggregate_groups, penalise
from trim_lightning.tuning.run import ADAPTER


@dataclass(frozen=True)
class Rescored:
    """A record scored now: its tokens as its best group sees them, and the pooled numbers."""

    tokens: MatchedTokens
    score: float
    mean: float
    max: float
    coverage: float


def rescore(run: OpenedRun, turns: Sequence[Turn], group: str | None = None) -> Rescored:
    """Score a conversation with the model and the bank of a TRIM run.

    Its tokens are shown as its best group sees them, or as the ``group`` that is named.

    Raises:
        UserError: if the bank, the model or the warm-up's adapter is not there any more, or the text has no token in
            scope.
    """
    settings = run.settings
    adapter = adapter_of(run)
    banks = load_banks(run.directory / BANKS)
    model = ModelRecipe(run.source, resolve_dtype(settings.model.dtype), adapter).load()
    length = min(settings.max_length, run.source.max_positions or settings.max_length)
    (encoded,) = ChatRenderer(load_tokenizer(run.source), run.source.chat_template).encode([list(turns)], length)
    if isinstance(encoded, RenderError):
        raise UserError(f"the text cannot be rendered: {encoded}")
    scope = scope_mask(encoded.roles, settings.scope)
    if not scope.any():
        remedy = "; give the assistant's turn with --response" if settings.scope == "response" else ""
        raise UserError(f"the text has no token in scope={settings.scope}: there is nothing to score{remedy}")
    error_scopes = [settings.scope] if settings.pooler.token_weight == "error" else []
    forward = ScoringPass(
        model, [(bank, settings.fallback.nearest) for bank in banks.values()], error_scopes=error_scopes
    )
    forward.on_predict_start()
    sequence = TokenSequence(encoded.token_ids, encoded.roles)
    shards = plan_shards(np.array([len(encoded.token_ids)]), max(length, 1))
    with torch.inference_mode():
        result = forward.predict_step(ShardBatches([sequence], shards, settings.scope)[0], 0)
    error = result[f"error/{settings.scope}"].double().numpy()[scope] if error_scopes else None
    found: dict[str, tuple[Pooled, MatchedTokens]] = {}
    for place, (name, bank) in enumerate(banks.items()):
        similarity = result["similarity"][place].double().numpy()
        match = forward.match_of(result, place).numpy().astype(np.int32)
        direct = match == encoded.token_ids
        scoped = ScopedTokens(similarity[scope], match[scope], direct[scope], np.array([int(scope.sum())]), error)
        idf = scaled_idf(bank.token_ids.numpy(), bank.idf.double().numpy())
        pooled = pool_tokens(scoped, settings.fallback, settings.pooler, idf)
        penalised = penalise(similarity, direct, settings.fallback.mode, settings.fallback.penalty)
        found[name] = (pooled, MatchedTokens(encoded.token_ids, scope, penalised, match, name))
    combined = aggregate_groups({name: pooled for name, (pooled, _) in found.items()}, settings.target.aggregate)
    best = max(found, key=lambda name: float(found[name][0].score[0])) if group is None else group
    return Rescored(found[best][1], *(float(values[0]) for values in combined))


def adapter_of(run: OpenedRun) -> Path | None:
    """The warm-up's adapter, None for a scorer that was not warmed up.

    Raises:
        UserError: if it is not in the store any more.
    """
    if not load_selector(run.settings.method).warms_up(run.settings):
        return None
    entry = run.stage("warmup")
    if entry is None:
        raise UserError(
            f"the store {run.store.root}: holds the warm-up of this run no more; name another "
            "store with --store, or run the selection again"
        )
    return entry / ADAPTER
