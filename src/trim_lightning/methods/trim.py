"""TRIM: saliency-weighted fingerprints of the targets' token classes, matched token by token (the paper)."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from trim_lightning.errors import UserError
from trim_lightning.methods.base import Selector
from trim_lightning.selection.ranking import ScoreTable, rank_round_robin
from trim_lightning.stages.attention import attention_read, warn_of_layers
from trim_lightning.stages.passes import target_tokens
from trim_lightning.stages.scoring import BANKS, SCORE_VERSION, TARGETS, TOKEN_SCORES, ScoringWork
from trim_lightning.stages.task import MatchedTokens, SelectionTask
from trim_lightning.stages.token_files import name_targets, write_target_tokens, write_token_scores
from trim_lightning.stages.token_scores import (
    StoredPass,
    bank_coverage,
    best_group,
    pool_tokens,
    read_idf,
)
from trim_lightning.store import Entry, StageKey
from trim_lightning.store.keys import digest_of
from trim_lightning.trim.pooling import Pooled, aggregate_groups

log = logging.getLogger(__name__)


@dataclass
class TrimSelector(Selector):
    """Target pass → banks → scoring pass → pooling; the first three go through the store."""

    reads_attention: ClassVar[bool] = True

    def score(self, task: SelectionTask) -> ScoreTable:
        """Score the pool against the target set's fingerprints."""
        self._work = work = self.prepare(task)
        self._scoring = self._scoring_pass(task, work)
        self._bank_idf = read_idf(self._fingerprint_entry.path)
        return self._pool(task)

    def request(self, task: SelectionTask) -> None:
        """Everything but pooling, which is no work to plan."""
        self._scoring_pass(task, self.prepare(task))

    def prepare(self, task: SelectionTask) -> ScoringWork:
        """Everything before the pass over the pool, and what is wanted of that pass."""
        settings = task.settings
        if settings.warmup.enabled:
            task.scorer.warm_up(settings.warmup, task.pool_tokens, task.pool_key)
        fingerprints = self._fingerprints(task, self._target_pass(task))
        resources = task.scorer.resources(settings.scoring.tokens_per_batch, settings.scoring.num_workers)
        choices = {
            "scope": settings.scope,
            "nearest": settings.fallback.nearest,
            "tokens_per_batch": resources.tokens_per_batch,
        }
        inputs = {
            "pool": task.pool_key.hex,
            "fingerprint": fingerprints.key.hex,
            "scorer": task.scorer.identity,
        }
        return ScoringWork(StageKey("score", SCORE_VERSION, choices, inputs), fingerprints, resources)

    def _target_pass(self, task: SelectionTask) -> Entry:
        """Stage `signals`: per-layer signals and hidden states of the targets."""
        targets, entry = target_tokens(task)
        resources = task.scorer.resources(None)
        choices = {"tokens_per_batch": resources.tokens_per_batch}  # finished batches are kept by their number
        key = StageKey("signals", 3, choices, {"targets": entry.key.hex, "scorer": task.scorer.identity})

        def build(directory: Path) -> dict[str, Any]:
            from trim_lightning.engine.devices import model_for
            from trim_lightning.engine.target_pass import run_target_pass

            model = model_for(resources, task.scorer)
            return run_target_pass(model, targets, task.scorer.source.num_layers, directory, resources=resources)

        cost = task.scorer.cost("fingerprint", "target pass", targets, resources=resources)
        result = task.store.get(key, build, resumable=True, together=True, cost=cost)
        task.ledger.book("fingerprint", result)
        return result

    def _fingerprints(self, task: SelectionTask, signals: Entry) -> Entry:
        """Stage `fingerprint`: saliency and banks, arithmetic on the target pass."""
        assert task.targets is not None
        groups = task.targets.groups
        choices = {"saliency": asdict(task.settings.saliency), "scope": task.settings.scope, "groups": groups}
        key = StageKey("fingerprint", 2, choices, {"signals": signals.key.hex})

        def build(directory: Path) -> dict[str, Any]:
            from trim_lightning.engine.target_pass import read_signals
            from trim_lightning.stages.fingerprints import banks_of, save_banks, separation, weigh

            started = time.perf_counter()
            attention = attention_read(signals, task.settings.saliency, task.scorer.source.name)
            salient = weigh(read_signals(signals.path), task.settings.saliency, task.settings.scope)
            banks = banks_of(salient, groups)
            for group, bank in banks.items():
                if len(bank) == 0:
                    where = f"group {group!r} of the target set" if group else "the target set"
                    raise UserError(
                        f"target: no token of {where} is in scope={task.settings.scope}; "
                        "give targets with text there, or another scope"
                    )
            save_banks(banks, directory / BANKS, choices)
            apart = separation(salient, groups, banks)
            write_target_tokens(salient, directory / TARGETS)
            classes = sum(map(len, banks.values()))
            return {
                "seconds": time.perf_counter() - started,
                "classes": classes,
                "within_over_between": apart,
                **attention,
            }

        result = task.store.get(key, build)
        task.ledger.book("fingerprint", result)
        warn_of_layers(result.facts.get("attention"), task)
        self._fingerprint_entry = result
        task.ledger.figures["within_over_between"] = result.facts.get("within_over_between")
        return result

    def _scoring_pass(self, task: SelectionTask, work: ScoringWork) -> Entry:
        """Stage `score`: every pool token's similarity to its matched fingerprint, in every bank."""

        def build(directory: Path) -> dict[str, Any]:
            from trim_lightning.engine.devices import model_for
            from trim_lightning.engine.scoring_pass import run_scoring_pass

            return run_scoring_pass(
                model_for(work.resources, task.scorer),
                task.pool_tokens,
                {directory: work.request()},
                resources=work.resources,
            )

        assert task.targets is not None
        groups = task.targets.groups
        cost = task.scorer.cost(
            "score",
            "scoring pass",
            task.pool_tokens,
            how_many=lambda: len(groups),
            resources=work.resources,
            shared=digest_of([work.pass_identity, str(task.store.root)]),
        )
        result = task.store.get(work.key, build, resumable=True, together=True, cost=cost)
        task.ledger.book("score", result)
        task.ledger.figures["padding"] = result.facts["padding"]
        return result

    def _pool(self, task: SelectionTask) -> ScoreTable:
        """Pool token similarities into scores, shard by shard."""
        self._passed = passed = StoredPass(self._scoring.path, task.pool_tokens)
        groups, size = passed.groups, len(task.pool)
        combined = {column: np.full(size, np.nan, dtype=np.float32) for column in Pooled._fields}
        self._group_scores = {group: np.full(size, np.nan, dtype=np.float32) for group in groups if group}
        aggregate = task.settings.target.aggregate
        fallback = scoped_tokens = 0
        seen: set[int] = set()
        for index in range(len(passed)):
            shard = passed.shard(index)
            seen.update(np.unique(shard.token_ids).tolist())
            parts = {}
            for place, group in enumerate(groups):
                tokens = shard.bank(place)
                parts[group] = pool_tokens(tokens, task.settings.fallback, task.settings.pooler, self._bank_idf[group])
                if group:
                    self._group_scores[group][shard.rows] = parts[group].score
                fallback += int((~tokens.direct).sum())
                scoped_tokens += len(tokens.direct)
            for column, values in aggregate_groups(parts, aggregate)._asdict().items():
                combined[column][shard.rows] = values
        task.ledger.figures["fallback_share"] = fallback / scoped_tokens if scoped_tokens else None
        task.ledger.figures["bank_coverage"] = bank_coverage(seen, [self._bank_idf[group] for group in groups])
        named = self._group_scores
        return ScoreTable(
            **combined,
            num_tokens=task.pool_tokens.content_lengths().astype(np.int32),
            num_scored=task.pool_tokens.content_lengths(task.settings.scope).astype(np.int32),
            groups=named,
            order=rank_round_robin(list(named.values())) if named and aggregate == "round_robin" else None,
        )

    def profile(self, task: SelectionTask, directory: Path) -> None:
        """Trace some batches of the scoring pass, be its result from the store or not."""
        if not self._work.resources.processes.leads:
            return
        from trim_lightning.engine.profiling import profile_scoring

        number = profile_scoring(
            task.scorer.model(), task.pool_tokens, self._work.request(), directory, resources=self._work.resources
        )
        log.info("profile: %d batches of the scoring pass, see %s", number, directory)

    def write_extras(self, task: SelectionTask, directory: Path) -> None:
        """Write ``fingerprints.safetensors``, ``target_tokens.parquet`` and, when asked, ``token_scores.parquet``."""
        from trim_lightning.files.atomic import copy_atomically

        assert task.targets is not None
        copy_atomically(self._fingerprint_entry.path / BANKS, directory / BANKS)
        name_targets(self._fingerprint_entry.path / TARGETS, task.targets.records, directory / TARGETS)
        if task.settings.scoring.save_token_scores:
            write_token_scores(task, self._passed, directory / TOKEN_SCORES)

    def matched_tokens(self, task: SelectionTask, rows: Sequence[int]) -> Mapping[int, MatchedTokens]:
        """Read a few records from their shards, each as its best target group saw it."""
        best = {row: best_group(self._group_scores, row) if self._group_scores else "" for row in rows}
        return self._passed.matched(best, task.settings.fallback)
