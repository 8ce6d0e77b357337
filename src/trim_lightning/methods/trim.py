"""TRIM: saliency-weighted fingerprints of the targets' token classes, matched token by token (the paper)."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trim_lightning.engine.batches import WINDOW
from trim_lightning.engine.shards import shard_path
from trim_lightning.errors import UserError
from trim_lightning.methods.base import MatchedTokens, SelectionTask, Selector
from trim_lightning.methods.shared import target_tokens
from trim_lightning.selection.ranking import ScoreTable, rank_round_robin
from trim_lightning.settings.schema import FallbackSettings, PoolerSettings
from trim_lightning.store import Entry, Measured, StageKey
from trim_lightning.store.keys import digest_of
from trim_lightning.trim.pooling import Pooled, aggregate_groups, penalise, pool

if TYPE_CHECKING:
    from trim_lightning.engine.scoring_pass import ScoringRequest
    from trim_lightning.engine.sharded_pass import Resources
    from trim_lightning.engine.target_pass import SalientTarget

log = logging.getLogger(__name__)
BANKS = "fingerprints.safetensors"


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
        return ScoringWork(StageKey("score", 1, choices, inputs), fingerprints, resources)

    def _target_pass(self, task: SelectionTask) -> Entry:
        """Stage `signals`: per-layer signals and hidden states of the targets."""
        targets, entry = target_tokens(task)
        key = StageKey("signals", 1, {}, {"targets": entry.key.hex, "scorer": task.scorer.identity})

        def build(directory: Path) -> dict[str, Any]:
            from trim_lightning.engine.target_pass import run_target_pass

            model = task.scorer.model()
            started = time.perf_counter()
            facts = run_target_pass(
                model,
                targets,
                task.scorer.source.num_layers,
                directory,
                trainer=task.scorer.trainer,
                tokens_per_batch=task.scorer.tokens_per_batch,
            )
            return {**facts, "seconds": time.perf_counter() - started}

        def measure(model: Any) -> Measured:
            from trim_lightning.engine.target_pass import sample_target_pass

            return sample_target_pass(
                model,
                targets,
                task.scorer.source.num_layers,
                trainer=task.scorer.trainer,
                tokens_per_batch=task.scorer.tokens_per_batch,
            )

        cost = task.scorer.cost("fingerprint", targets.total_tokens, "target pass", measure)
        result = task.store.get(key, build, cost=cost)
        task.ledger.book("fingerprint", result)
        return result

    def _fingerprints(self, task: SelectionTask, signals: Entry) -> Entry:
        """Stage `fingerprint`: saliency and banks, arithmetic on the target pass."""
        assert task.targets is not None
        groups = task.targets.groups
        choices = {"saliency": asdict(task.settings.saliency), "scope": task.settings.scope, "groups": groups}
        key = StageKey("fingerprint", 2, choices, {"signals": signals.key.hex})

        def build(directory: Path) -> dict[str, Any]:
            from trim_lightning.engine.target_pass import banks_of, read_signals, separation, weigh
            from trim_lightning.trim.fingerprints import save_banks

            started = time.perf_counter()
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
            write_target_tokens(salient, directory / "target_tokens.parquet")
            classes = sum(map(len, banks.values()))
            return {"seconds": time.perf_counter() - started, "classes": classes, "within_over_between": apart}

        result = task.store.get(key, build)
        task.ledger.book("fingerprint", result)
        self._fingerprint_entry = result
        task.ledger.facts["within_over_between"] = result.facts.get("within_over_between")
        return result

    def _scoring_pass(self, task: SelectionTask, work: ScoringWork) -> Entry:
        """Stage `score`: every pool token's similarity to its matched fingerprint, in every bank."""

        def build(directory: Path) -> dict[str, Any]:
            from trim_lightning.engine.scoring_pass import run_scoring_pass
            from trim_lightning.engine.sharded_pass import model_for

            return run_scoring_pass(
                model_for(work.resources, task.scorer.model, task.scorer.recipe),
                task.pool_tokens,
                {directory: work.request()},
                resources=work.resources,
            )

        assert task.targets is not None
        groups = list(task.targets.groups)

        def measure(model: Any) -> Measured:
            from trim_lightning.engine.scoring_pass import sample_scoring_pass

            return sample_scoring_pass(model, task.pool_tokens, groups, resources=work.resources)

        cost = task.scorer.cost(
            "score",
            task.pool_tokens.total_tokens,
            ("scoring pass", len(groups)),
            measure,
            resources=work.resources,
            shared=digest_of([work.pass_identity, str(task.store.root)]),
        )
        result = task.store.get(work.key, build, resumable=True, together=True, cost=cost)
        task.ledger.book("score", result)
        task.ledger.facts["padding"] = result.facts["padding"]
        return result

    def _pool(self, task: SelectionTask) -> ScoreTable:
        """Pool token similarities into scores, shard by shard."""
        shards = shard_facts(self._scoring)
        groups: list[str] = shards["groups"]
        size = len(task.pool)
        parts = {group: np.full((4, size), np.nan) for group in groups}
        self._shard_of = np.full(size, -1, dtype=np.int32)
        fallback = scoped_tokens = 0
        seen: set[int] = set()
        for index in range(shards["shards"]):
            table = pq.read_table(shard_path(self._scoring.path, index))
            rows = table["row"].to_numpy()
            self._shard_of[rows] = index
            seen.update(scoped_classes(table))
            for group in groups:
                tokens = ScopedTokens.read(table, group)
                pooled = pool_tokens(tokens, task.settings.fallback, task.settings.pooler, self._bank_idf[group])
                parts[group][:, rows] = np.stack(pooled)
                fallback += int((~tokens.direct).sum())
                scoped_tokens += len(tokens.direct)
        pooled_groups = {group: Pooled(*values) for group, values in parts.items()}
        self._group_scores = {group: pooled.score for group, pooled in pooled_groups.items()}
        combined = aggregate_groups(pooled_groups, task.settings.target.aggregate)
        task.ledger.facts["fallback_share"] = fallback / scoped_tokens if scoped_tokens else None
        task.ledger.facts["bank_coverage"] = bank_coverage(seen, [self._bank_idf[group] for group in groups])
        named = {group: pooled.score.astype(np.float32) for group, pooled in pooled_groups.items() if group}
        turns = named and task.settings.target.aggregate == "round_robin"
        return ScoreTable(
            score=combined.score.astype(np.float32),
            mean=combined.mean.astype(np.float32),
            max=combined.max.astype(np.float32),
            coverage=combined.coverage.astype(np.float32),
            num_tokens=task.pool_tokens.content_lengths().astype(np.int32),
            num_scored=task.pool_tokens.content_lengths(task.settings.scope).astype(np.int32),
            groups=named,
            order=rank_round_robin(list(named.values())) if turns else None,
        )

    def profile(self, task: SelectionTask, directory: Path) -> None:
        """Trace some batches of the scoring pass, be its result from the store or not."""
        if not self._work.resources.team.leads:
            return
        from trim_lightning.engine.profiling import profile_scoring

        number = profile_scoring(
            task.scorer.model(), task.pool_tokens, self._work.request(), directory, resources=self._work.resources
        )
        log.info("profile: %d batches of the scoring pass, see %s", number, directory)

    def write_extras(self, task: SelectionTask, directory: Path) -> None:
        """Write ``fingerprints.safetensors``, ``target_tokens.parquet`` and, when asked, ``token_scores.parquet``."""
        from trim_lightning.pipeline.outputs import copy_atomically

        for name in (BANKS, "target_tokens.parquet"):
            if name == "target_tokens.parquet":
                assert task.targets is not None
                name_targets(self._fingerprint_entry.path / name, task.targets.records, directory / name)
            else:
                copy_atomically(self._fingerprint_entry.path / name, directory / name)
        if task.settings.scoring.save_token_scores:
            write_token_scores(task, self._scoring, directory / "token_scores.parquet")

    def matched_tokens(self, task: SelectionTask, rows: Sequence[int]) -> Mapping[int, MatchedTokens]:
        """Read a few records from their shards, each as its best target group saw it."""
        by_shard: dict[int, list[int]] = {}
        for row in rows:
            by_shard.setdefault(int(self._shard_of[row]), []).append(row)
        found: dict[int, MatchedTokens] = {}
        for index, members in by_shard.items():
            if index >= 0:
                best = {row: best_group(self._group_scores, row) for row in members}
                found.update(read_matched(shard_path(self._scoring.path, index), best, task.settings.fallback))
        return found


@dataclass(frozen=True)
class ScoringWork:
    """A pass over the pool that a selection wants.

    Attributes:
        key: Key of its result.
        banks: The fingerprint banks.
        resources: What it runs on.
    """

    key: StageKey
    banks: Entry
    resources: Resources

    def request(self) -> ScoringRequest:
        """What the pass computes; reads the banks."""
        from trim_lightning.engine.scoring_pass import ScoringRequest
        from trim_lightning.trim.fingerprints import load_banks

        settings = self.key.settings
        return ScoringRequest(load_banks(self.banks.path / BANKS), settings["nearest"], settings["scope"])

    def shares_pass_with(self, other: ScoringWork) -> bool:
        """True if one forward pass serves both: same pool, same scorer, same batches."""
        return self.pass_identity == other.pass_identity

    @property
    def pass_identity(self) -> list[Any]:
        """What a forward pass depends on, whatever is read from it."""
        return [self.key.inputs["pool"], self.key.inputs["scorer"], self.key.settings["tokens_per_batch"]]


@dataclass(frozen=True)
class ScopedTokens:
    """The scoped tokens of one shard in one bank, record after record.

    Attributes:
        similarity: ``[tokens]`` raw cosines.
        match: ``[tokens]`` ids of the matched classes.
        direct: ``[tokens]`` True where that is the token's own class.
        lengths: ``[records]`` scoped tokens of each record.
    """

    similarity: NDArray[np.float64]
    match: NDArray[np.int32]
    direct: NDArray[np.bool_]
    lengths: NDArray[np.int64]

    @classmethod
    def read(cls, table: pa.Table, group: str) -> ScopedTokens:
        """Take one bank's columns of a shard table."""
        suffix = f"/{group}" if group else ""
        scope_column = table["scope"].combine_chunks()
        scope = scope_column.flatten().to_numpy(zero_copy_only=False)
        offsets = scope_column.offsets.to_numpy()
        running = np.concatenate([[0], np.cumsum(scope, dtype=np.int64)])
        token_ids = table["token_ids"].combine_chunks().flatten().to_numpy()[scope]
        match = table[f"match{suffix}"].combine_chunks().flatten().to_numpy()[scope]
        return cls(
            similarity=table[f"similarity{suffix}"].combine_chunks().flatten().to_numpy()[scope].astype(np.float64),
            match=match,
            direct=match == token_ids,
            lengths=np.diff(running[offsets]),
        )


def pool_tokens(
    tokens: ScopedTokens, fallback: FallbackSettings, pooler: PoolerSettings, idf: NDArray[np.float64]
) -> Pooled:
    """Penalise and pool one shard.

    Args:
        tokens: Scoped tokens.
        fallback: Mode and penalty.
        pooler: Formula and weights.
        idf: ``[vocabulary]`` idf of each fingerprint class, scaled to a largest value of 1; a token weighs as
            much as the class that it was matched with (our choice).
    """
    return pool(
        penalise(tokens.similarity, tokens.direct, fallback.mode, fallback.penalty),
        tokens.direct,
        tokens.lengths,
        name=pooler.name,
        mean_weight=pooler.mean_weight,
        max_weight=pooler.max_weight,
        coverage_weight=pooler.coverage_weight,
        token_weights=idf[tokens.match] if pooler.token_weight == "idf" else None,
        k=pooler.k,
        temperature=pooler.temperature,
        q=pooler.q,
    )


def scoped_classes(table: pa.Table) -> list[int]:
    """The token classes in the scope of one shard table."""
    scope = table["scope"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    classes: list[int] = np.unique(table["token_ids"].combine_chunks().flatten().to_numpy()[scope]).tolist()
    return classes


def bank_coverage(seen: set[int], idf: list[NDArray[np.float64]]) -> float | None:
    """Share of the pool's token classes that have a fingerprint, the mean over the banks; None of no class.

    Args:
        seen: Classes in the pool's scope.
        idf: For each bank the idf by token id, 0 where there is no fingerprint.
    """
    if not seen:
        return None
    ids = np.array(sorted(seen))
    return float(np.mean([np.count_nonzero(bank[ids[ids < len(bank)]]) / len(ids) for bank in idf]))


def read_idf(directory: Path) -> dict[str, NDArray[np.float64]]:
    """Scaled idf by token id for every bank; read with numpy alone."""
    from safetensors.numpy import load_file

    tensors = load_file(directory / BANKS)
    result = {}
    for name in tensors:
        if not name.endswith("token_ids"):
            continue
        prefix = name.removesuffix("token_ids")
        token_ids, idf = tensors[name], tensors[f"{prefix}idf"].astype(np.float64)
        result[prefix.removesuffix("/")] = scaled_idf(token_ids, idf)
    return result


def scaled_idf(token_ids: NDArray[np.int64], idf: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[highest id + 1]`` idf by token id, scaled to a largest value of 1; 0 where there is no fingerprint."""
    table = np.zeros(int(token_ids.max()) + 1)
    table[token_ids] = idf / idf.max()
    return table


def shard_facts(entry: Entry) -> dict[str, Any]:
    """Number of shards, groups and records per shard of a scoring pass."""
    facts: dict[str, Any] = json.loads((entry.path / "shards.json").read_text())
    return facts


def best_group(scores: Mapping[str, NDArray[Any]], row: int) -> str:
    """The target group with the highest score of a record; the first if it has none."""
    return max(scores, key=lambda group: -np.inf if np.isnan(scores[group][row]) else float(scores[group][row]))


def read_matched(path: Path, groups: Mapping[int, str], fallback: FallbackSettings) -> dict[int, MatchedTokens]:
    """Token similarities of some records of one shard.

    Args:
        path: The shard file.
        groups: Row of each wanted record to the target group whose match is wanted.
        fallback: Mode and penalty.
    """
    wanted = sorted(set(groups.values()))
    columns = [f"{kind}/{group}" if group else kind for group in wanted for kind in ("similarity", "match")]
    table = pq.read_table(path, columns=["row", "token_ids", "scope", *columns])
    places = {row: place for place, row in enumerate(table["row"].to_pylist())}

    def values(name: str, row: int) -> NDArray[Any]:
        return np.asarray(table[name][places[row]].values.to_numpy(zero_copy_only=False))

    found = {}
    for row, group in groups.items():
        if row not in places:
            continue
        suffix = f"/{group}" if group else ""
        token_ids, match = values("token_ids", row), values(f"match{suffix}", row)
        similarity = values(f"similarity{suffix}", row).astype(np.float64)
        found[row] = MatchedTokens(
            token_ids=token_ids,
            scope=values("scope", row),
            similarity=penalise(similarity, match == token_ids, fallback.mode, fallback.penalty),
            match=match,
            group=group,
        )
    return found


def spread(values: NDArray[Any], scope: NDArray[np.bool_]) -> list[Any]:
    """Put scoped values back at their tokens, null elsewhere."""
    full = np.full(len(scope), None, dtype=object)
    full[scope] = values.tolist()
    return full.tolist()


def write_target_tokens(targets: list[SalientTarget], path: Path) -> None:
    """Write the scaled saliency of every target; the id column holds the row until `name_targets`."""
    pq.write_table(
        pa.table(
            {
                "row": pa.array([target.row for target in targets], pa.int64()),
                "token_ids": pa.array([target.token_ids.tolist() for target in targets], pa.list_(pa.int32())),
                "scope": pa.array([target.scope.tolist() for target in targets], pa.list_(pa.bool_())),
                **{
                    name: pa.array(
                        [spread(getattr(target, name).numpy(), target.scope.numpy()) for target in targets],
                        pa.list_(pa.float32()),
                    )
                    for name in ("row_saliency", "column_saliency", "saliency")
                },
            }
        ),
        path,
    )


def name_targets(source: Path, records: Any, path: Path) -> None:
    """Copy a target token file with ids in place of rows."""
    from trim_lightning.pipeline.outputs import write_table

    table = pq.read_table(source)
    ids = pa.array([records.id(row) for row in table["row"].to_pylist()], pa.string())
    write_table(table.set_column(0, "id", ids), path)


def write_token_scores(task: SelectionTask, scoring: Entry, path: Path) -> None:
    """Write ``token_scores.parquet``: one line per pool record in pool order, unscored ones too.

    Similarities carry the fallback penalty. Shards hold records sorted by length within windows of the pool,
    so one window at a time is put back in order. With target groups the columns are ``similarity/<group>``
    and ``direct/<group>``.
    """
    from trim_lightning.pipeline.outputs import table_writer

    facts = shard_facts(scoring)
    groups: list[str] = facts["groups"]
    fields = [("row", pa.int64()), ("id", pa.string()), ("token_ids", pa.list_(pa.int32()))]
    fields.append(("scope", pa.list_(pa.bool_())))
    for group in groups:
        suffix = f"/{group}" if group else ""
        fields += [(f"similarity{suffix}", pa.list_(pa.float32())), (f"direct{suffix}", pa.list_(pa.bool_()))]
    shard_rows = iter(range(facts["shards"]))
    pending: dict[int, dict[str, Any]] = {}
    with table_writer(path, pa.schema(fields)) as writer:
        for start in range(0, len(task.pool), WINDOW):
            rows = range(start, min(len(task.pool), start + WINDOW))
            expected = int((task.pool_tokens.lengths[rows.start : rows.stop] > 0).sum())
            while len(pending) < expected:
                table = pq.read_table(shard_path(scoring.path, next(shard_rows)))
                pending.update((record["row"], record) for record in table.to_pylist())
            lines = [token_line(pending.get(row), row, task, groups) for row in rows]
            writer.write(pa.Table.from_pylist(lines, schema=pa.schema(fields)))
            pending.clear()


def token_line(record: Mapping[str, Any] | None, row: int, task: SelectionTask, groups: list[str]) -> dict[str, Any]:
    """One line of ``token_scores.parquet``."""
    line: dict[str, Any] = {"row": row, "id": task.pool.id(row), "token_ids": [], "scope": []}
    token_ids = np.array(record["token_ids"] if record else [], dtype=np.int32)
    scope = np.array(record["scope"] if record else [], dtype=bool)
    line["token_ids"], line["scope"] = token_ids.tolist(), scope.tolist()
    for group in groups:
        suffix = f"/{group}" if group else ""
        match = np.array(record[f"match{suffix}"] if record else [], dtype=np.int32)
        similarity = np.array(record[f"similarity{suffix}"] if record else [], dtype=np.float64)
        direct = (match == token_ids) & scope
        penalised = penalise(
            similarity, match == token_ids, task.settings.fallback.mode, task.settings.fallback.penalty
        )
        line[f"similarity{suffix}"] = spread(penalised[scope], scope)
        line[f"direct{suffix}"] = direct.tolist()
    return line
