"""TRIM: saliency-weighted fingerprints of the targets' token classes, matched token by token (the paper)."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from trim_lightning.errors import UserError
from trim_lightning.methods import cascade
from trim_lightning.methods.base import Selector
from trim_lightning.selection.ranking import ScoreTable, rank_round_robin
from trim_lightning.stages.attention import attention_read, warn_of_layers
from trim_lightning.stages.joined_passes import JoinedPasses
from trim_lightning.stages.passes import target_tokens
from trim_lightning.stages.scoring import BANKS, SCORE_VERSION, TARGETS, TOKEN_SCORES, ScoringWork
from trim_lightning.stages.shallow import ShallowScorer
from trim_lightning.stages.task import MatchedTokens, SelectionTask
from trim_lightning.stages.token_files import name_targets, write_target_tokens, write_token_scores
from trim_lightning.stages.token_scores import (
    ScoredShard,
    bank_coverage,
    best_group,
    pool_tokens,
    read_idf,
)
from trim_lightning.store import Entry, StageKey
from trim_lightning.store.keys import digest_of
from trim_lightning.tokens.tokenized import TokenizedRecords, TokenSequence
from trim_lightning.trim.pooling import Pooled, aggregate_groups

log = logging.getLogger(__name__)


@dataclass
class TrimSelector(Selector):
    """Target pass → banks → scoring pass → pooling; the first three go through the store."""

    reads_attention: ClassVar[bool] = True
    matches_tokens: ClassVar[bool] = True

    def score(self, task: SelectionTask) -> ScoreTable:
        """Score the pool against the target set's fingerprints, or with a cascade those records that need it."""
        self._work = work = self.prepare(task)
        cheaply = self.cheaply(task)
        if cheaply is None:
            return self._pool(task, [self._scoring_pass(task, work)])
        field, cheap = cheaply.field, self._cheap_scores(cheaply.task)
        entries = [self._scoring_pass(task, work.of(field.sample))]
        sampled = self._pool(task, entries)
        rows = task.store.processes.agree("cascade", lambda: cascade.kept_rows(task, field, cheap, sampled))
        if len(rows):
            entries.append(self._scoring_pass(task, work.of(rows, entries[0].key)))
        return cascade.with_cheap_scores(self._pool(task, entries), cheap)

    def request(self, task: SelectionTask) -> None:
        """Everything but pooling, which is no work to plan; of a cascade's last pass what can be said beforehand."""
        cheaply = self.cheaply(task)
        works = self.shared_works(task, cheaply)
        known = [task.store.find(work.key) is not None for _, work in works]
        for part, work in works:
            self._scoring_pass(part, work)
        if cheaply is not None and all(known):
            self.score(task)  # up to the last pass
        elif cheaply is not None:
            rows, assumed = cascade.planned_rows(task, cheaply.field)
            self._scoring_pass(task, cascade.unknown(task, self.prepare(task).of(rows)), assumed=assumed)

    def cheaply(self, task: SelectionTask) -> cascade.Cheaply | None:
        """A cascade's first stage; None where every record is to get the full score."""
        if task.settings.scoring.name != "cascade":
            return None
        field = cascade.field_of(task)
        if field.is_small:
            cascade.check(task)
            task.ledger.warn(
                f"scoring=cascade: {len(field.rows):,} records are too few, for {len(field.sample):,} would be scored "
                "both ways to measure what a cascade loses; every record is scored in full"
            )
            cascade.note(task, field, len(field.rows), 1.0, 1.0)
            return None
        return cascade.Cheaply(field, cascade.cheap_task(task))

    def shared_works(
        self, task: SelectionTask, cheaply: cascade.Cheaply | None
    ) -> list[tuple[SelectionTask, ScoringWork]]:
        """The passes over the pool that other selections may share, each with its task."""
        work = self.prepare(task)
        if cheaply is None:
            return [(task, work)]
        sample = (task, work.of(cheaply.field.sample))
        if cheaply.task.settings.method["name"] != "trim":
            return [sample]
        return [(cheaply.task, TrimSelector().prepare(cheaply.task)), sample]

    def _cheap_scores(self, cheap_task: SelectionTask) -> ScoreTable:
        """The scores that decide who gets the full one; a small model's memory is given back."""
        if cheap_task.settings.method["name"] != "trim":
            return cascade.scores_by_method(cheap_task)
        scores = TrimSelector().score(cheap_task)
        if not isinstance(cheap_task.scorer, ShallowScorer):
            cheap_task.scorer.release()
        return scores

    def prepare(self, task: SelectionTask) -> ScoringWork:
        """Everything before the pass over the pool, and what is wanted of that pass."""
        settings = task.settings
        targets, entry = target_tokens(task)
        answered = self.response_targets(task, targets)
        if self.warms_up(settings):
            task.scorer.warm_up(settings.warmup, task.pool_tokens, task.pool_key)
        fingerprints = self._fingerprints(task, self._target_pass(task, targets, entry))
        resources = task.scorer.resources(settings.scoring.tokens_per_batch, settings.scoring.num_workers)
        choices = {
            "scope": settings.scope,
            "nearest": settings.fallback.nearest,
            "tokens_per_batch": resources.tokens_per_batch,
            "share_prefixes": settings.scoring.share_prefixes,
        }
        if settings.pooler.token_weight == "error":
            choices["errors"] = True
        if answered:
            choices["alignment"] = True
            if self.keeps_states:
                choices["states"] = True
        inputs = {
            "pool": task.pool_key.hex,
            "fingerprint": fingerprints.key.hex,
            "scorer": task.scorer.identity,
        }
        key = StageKey("score", SCORE_VERSION, choices, inputs)
        return ScoringWork(key, fingerprints, resources, targets=answered)

    @property
    def keeps_states(self) -> bool:
        """True if the pass is to keep the mean state of each response as well."""
        return False

    def response_targets(self, task: SelectionTask, targets: TokenizedRecords) -> dict[str, list[TokenSequence]]:
        """Group name to its targets, where the pass is to keep what the model would learn from responses."""
        return {}

    def _target_pass(self, task: SelectionTask, targets: TokenizedRecords, entry: Entry) -> Entry:
        """Stage `signals`: per-layer signals and hidden states of the targets, whose tokens are those of an entry."""
        resources = task.scorer.resources(None)
        choices = {"tokens_per_batch": resources.tokens_per_batch}  # finished batches are kept by their number
        key = StageKey("signals", 3, choices, {"targets": entry.key.hex, "scorer": task.scorer.identity})

        def build(directory: Path) -> dict[str, Any]:
            from trim_lightning.engine.devices import model_for
            from trim_lightning.engine.target_pass import run_target_pass

            model = model_for(resources, task.scorer)
            return run_target_pass(model, targets, directory, resources=resources)

        cost = task.scorer.cost("fingerprint", "target pass", targets, resources=resources)
        result = task.store.get(key, build, resumable=True, together=True, cost=cost)
        task.ledger.book("fingerprint", result)
        self._signals_entry = result
        return result

    def _fingerprints(self, task: SelectionTask, signals: Entry) -> Entry:
        """Stage `fingerprint`: saliency and banks, arithmetic on the target pass."""
        assert task.targets is not None
        groups = task.targets.groups
        token_class = task.settings.fingerprint.token_class
        choices = {"saliency": asdict(task.settings.saliency), "scope": task.settings.scope, "groups": groups}
        if token_class != "own":
            choices["token_class"] = token_class
        key = StageKey("fingerprint", 2, choices, {"signals": signals.key.hex})

        def build(directory: Path) -> dict[str, Any]:
            from trim_lightning.engine.target_pass import read_signals
            from trim_lightning.stages.fingerprints import banks_of, save_banks, separation, weigh

            started = time.perf_counter()
            attention = attention_read(signals, task.settings.saliency, task.scorer.source.name)
            signals_read = read_signals(signals.path)
            salient = weigh(signals_read, task.settings.saliency, task.settings.scope, token_class)
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

    def _scoring_pass(self, task: SelectionTask, work: ScoringWork, **more: Any) -> Entry:
        """Stage `score`: every pool token's similarity to its matched fingerprint, in every bank.

        ``more`` are other attributes of its cost.
        """
        records = work.records(task.pool_tokens)

        def build(directory: Path) -> dict[str, Any]:
            from trim_lightning.engine.devices import model_for
            from trim_lightning.engine.scoring_pass import run_scoring_pass

            return run_scoring_pass(
                model_for(work.resources, task.scorer),
                records,
                {directory: work.request()},
                resources=work.resources,
                share_prefixes=work.shares_prefixes,
            )

        def computed() -> float:
            from trim_lightning.engine.prefixes import computed_share

            return computed_share(records, work.resources.tokens_per_batch)

        assert task.targets is not None
        groups = task.targets.groups
        cost = task.scorer.cost(
            "score",
            work.kind,
            records,
            how_many=lambda: len(groups),
            resources=work.resources,
            shared=digest_of([work.pass_identity, str(task.store.root)]),
            **more,
        )
        if work.shares_prefixes and not cost.divided:
            cost = replace(cost, computed=computed)
        result = task.store.get(work.key, build, resumable=True, together=True, cost=cost)
        task.ledger.book("score", result)
        task.ledger.figures.update({name: result.facts[name] for name in ("padding", "spared")})
        return result

    def _pool(self, task: SelectionTask, passes: Sequence[Entry]) -> ScoreTable:
        """Pool token similarities into scores, shard by shard."""
        self._passed = passed = JoinedPasses([entry.path for entry in passes], task.pool_tokens)
        bank_idf = read_idf(self._fingerprint_entry.path)
        groups, size = passed.groups, len(task.pool)
        combined: dict[str, Any] = {column: np.full(size, np.nan, dtype=np.float32) for column in Pooled._fields}
        self._group_scores = {group: np.full(size, np.nan, dtype=np.float32) for group in groups if group}
        aggregate = task.settings.target.aggregate
        fallback = scoped_tokens = 0
        seen: set[int] = set()
        for shard in passed.shards():
            seen.update(np.unique(shard.token_ids).tolist())
            parts = {}
            for place, group in enumerate(groups):
                tokens = shard.bank(place)
                parts[group] = pool_tokens(tokens, task.settings.fallback, task.settings.pooler, bank_idf[group])
                if group:
                    self._group_scores[group][shard.rows] = parts[group].score
                fallback += int((~tokens.direct).sum())
                scoped_tokens += len(tokens.direct)
            self._keep(shard, parts)
            for column, values in aggregate_groups(parts, aggregate)._asdict().items():
                combined[column][shard.rows] = values
        task.ledger.figures["fallback_share"] = fallback / scoped_tokens if scoped_tokens else None
        task.ledger.figures["bank_coverage"] = bank_coverage(seen, [bank_idf[group] for group in groups])
        named = self._group_scores
        return ScoreTable(
            **combined,
            num_tokens=task.pool_tokens.content_lengths().astype(np.int32),
            num_scored=task.pool_tokens.content_lengths(task.settings.scope).astype(np.int32),
            groups=named,
            order=rank_round_robin(list(named.values())) if named and aggregate == "round_robin" else None,
        )

    def _keep(self, shard: ScoredShard, pooled: Mapping[str, Pooled]) -> None:
        """What one that builds on this keeps of a shard, by group, while it is pooled."""

    def profile(self, task: SelectionTask, directory: Path) -> None:
        """Trace some batches of the scoring pass, be its result from the store or not."""
        if not self._work.resources.processes.leads:
            return
        from trim_lightning.engine.profiling import profile_scoring

        number = profile_scoring(
            task.scorer.model(),
            task.pool_tokens,
            self._work.request(),
            directory,
            resources=self._work.resources,
            share_prefixes=self._work.shares_prefixes,
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
