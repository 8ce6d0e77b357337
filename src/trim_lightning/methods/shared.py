"""What several selectors share: stored passes, stored scores against target groups, the table of scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trim_lightning.engine.record_values import gather_values, read_values
from trim_lightning.errors import UserError
from trim_lightning.methods.base import SelectionTask
from trim_lightning.records.record_file import RecordFile
from trim_lightning.records.word_file import WordFile, write_words
from trim_lightning.selection.ranking import ScoreTable, rank_round_robin
from trim_lightning.store import Entry, Measured, StageKey
from trim_lightning.tokens.tokenized import TokenizedRecords

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trim_lightning.engine.record_statistics import RecordStatistic
    from trim_lightning.models.load import ModelRecipe

SCORES = "scores.npy"
AGGREGATES = ("max", "mean")


class Weights(Protocol):
    """A model that passes run on; the scorer is one."""

    @property
    def identity(self) -> dict[str, Any]:
        """What determines its outputs."""

    def model(self) -> PreTrainedModel:
        """The model, loaded when first asked for."""

    def recipe(self) -> ModelRecipe:
        """How another process loads it."""


def score_table(
    task: SelectionTask, groups: Mapping[str, NDArray[Any]], order: NDArray[np.int64] | None = None
) -> ScoreTable:
    """The scores of a method that has neither mean, maximum nor coverage.

    Records without scoped tokens get NaN. Scores of several target groups are combined by ``target.aggregate``:
    ``mean``, or for ``max`` and ``round_robin`` the best group's; with ``round_robin`` the groups take turns.

    Args:
        task: For token counts and settings.
        groups: Group name to ``[records]`` scores; ``{"": scores}`` without groups.
        order: Scored rows best first, where the method ranks otherwise than by score.
    """
    scoped = task.pool_tokens.content_lengths(task.settings.scope)
    aggregate = task.settings.target.aggregate
    stacked = np.stack([np.where(scoped > 0, scores, np.nan) for scores in groups.values()])
    combined = stacked.mean(0) if aggregate == "mean" else stacked.max(0)
    named = {group: values.astype(np.float32) for group, values in zip(groups, stacked, strict=True) if group}
    if named and aggregate == "round_robin":
        order = rank_round_robin(list(named.values()))
    return ScoreTable(
        score=combined.astype(np.float32),
        num_tokens=task.pool_tokens.content_lengths().astype(np.int32),
        num_scored=scoped.astype(np.int32),
        groups=named,
        order=order,
    )


def warm_up(task: SelectionTask, use_warmup: bool) -> None:
    """Warm the scorer up if both the method and the ``warmup`` group say so."""
    if use_warmup and task.settings.warmup.enabled:
        task.scorer.warm_up(task.settings.warmup, task.pool_tokens, task.pool_key)


def record_values(
    task: SelectionTask,
    statistic: RecordStatistic,
    records: TokenizedRecords,
    inputs: Mapping[str, str],
    booked: str,
    weights: Weights | None = None,
    title: str | None = None,
) -> Entry:
    """The stored values of one pass over some records; see `run_record_pass`.

    Args:
        task: For scorer, store and settings.
        statistic: What is computed of each record.
        records: The tokens; a record without tokens gets no values.
        inputs: Keys of the stages that made ``records``.
        booked: Stage of the manifest that the cost belongs to: ``fingerprint`` (targets) or ``score`` (pool).
        weights: The model that runs it; None is the scorer as it is.
        title: Name on the progress bar; None is ``booked``.

    Raises:
        UserError: if gradients are wanted of a model whose weights are divided among processes.
    """
    settings = task.settings
    weights = weights or task.scorer
    tokens_per_batch = settings.scoring.tokens_per_batch
    if statistic.needs_gradients:
        from trim_lightning.tuning.run import micro_batch_tokens

        if settings.trainer.get("strategy") == "fsdp":
            raise UserError("trainer=fsdp: gradients of single records need whole weights; use trainer=ddp")
        tokens_per_batch = tokens_per_batch or micro_batch_tokens(settings.warmup)
    resources = task.scorer.resources(tokens_per_batch, settings.scoring.num_workers)
    alone = booked == "fingerprint"  # a handful of records: other devices would only wait
    if alone:
        resources = resources.alone()
    key = StageKey(
        statistic.stage,
        1,
        {**statistic.settings, "tokens_per_batch": resources.tokens_per_batch},
        {**inputs, "scorer": weights.identity},
    )

    def build(directory: Path) -> dict[str, Any]:
        from trim_lightning.engine.record_pass import run_record_pass
        from trim_lightning.engine.sharded_pass import model_for

        return run_record_pass(
            model_for(resources, weights.model, weights.recipe),
            records,
            statistic,
            directory,
            scope=settings.scope,
            resources=resources,
            title=title or booked,
        )

    def measure(model: Any) -> Measured:
        from trim_lightning.engine.record_pass import sample_record_pass

        if not statistic.needs_gradients:
            return sample_record_pass(model, records, statistic, scope=settings.scope, resources=resources)
        from trim_lightning.engine.gradients import fresh_lora

        with fresh_lora(model, settings.warmup, statistic) as stand_in:
            return sample_record_pass(model, records, stand_in, scope=settings.scope, resources=resources)

    kind = ("record pass", statistic.stage, alone, settings.warmup.lora_rank if statistic.needs_gradients else None)
    cost = task.scorer.cost(booked, records.total_tokens, kind, measure, resources=resources)
    entry = task.store.get(key, build, resumable=True, together=not alone, cost=cost)
    task.ledger.book(booked, entry)
    if booked == "score":
        task.ledger.facts["padding"] = entry.facts["padding"]
    return entry


def target_tokens(task: SelectionTask) -> tuple[TokenizedRecords, Entry]:
    """The targets, tokenised; warns of what could not be rendered or was cut."""
    assert task.targets is not None
    targets, entry = task.scorer.tokenize(task.targets.records, "tokenize")
    for problem in targets.problems:
        task.ledger.warn(f"target {problem}")
    if targets.truncated:
        task.ledger.warn(f"{targets.truncated} targets are longer than {task.scorer.max_length} tokens: cut")
    return targets, entry


def mean_losses(entry: Entry, size: int) -> NDArray[np.float64]:
    """``[size]`` nats per response token of a `ResponseLoss`; NaN for a record without a predicted response token."""
    values = gather_values(entry.path, size)
    if not values.shape[1]:
        return np.full(size, np.nan)
    with np.errstate(invalid="ignore"):
        losses: NDArray[np.float64] = values[:, 0] / values[:, 1]
    return losses


def record_words(task: SelectionTask, records: RecordFile, booked: str) -> tuple[WordFile, Entry]:
    """The stored words of some records' scoped text.

    Args:
        task: For scope, store and ledger.
        records: Pool or targets.
        booked: As in `record_values`.
    """
    key = StageKey("words", 1, {"scope": task.settings.scope}, {"records": records.identity()})

    def build(directory: Path) -> dict[str, Any]:
        started = time.perf_counter()
        facts = write_words(records, task.settings.scope, directory, booked)
        return {**facts, "seconds": time.perf_counter() - started}

    entry = task.store.get(key, build)
    task.ledger.book(booked, entry)
    return WordFile(entry.path), entry


def group_scores(
    task: SelectionTask,
    stage_key: StageKey,
    groups: Sequence[str],
    blocks: Callable[[], Iterable[tuple[Any, NDArray[Any]]]],
) -> dict[str, NDArray[np.float32]]:
    """The stored scores of the pool against every target group.

    Args:
        task: For store and ledger.
        stage_key: Their key.
        groups: Group names.
        blocks: Yields places in the ``[groups, records]`` table and the scores that belong there; called only if
            nothing is stored.

    Returns:
        Group name to ``[records]`` float32; NaN at places that were not yielded.
    """

    def build(directory: Path) -> dict[str, Any]:
        started = time.perf_counter()
        scores = np.full((len(groups), len(task.pool)), np.nan, dtype=np.float32)
        for places, values in blocks():
            scores[places] = values
        np.save(directory / SCORES, scores)
        return {"seconds": time.perf_counter() - started}

    entry = task.store.get(stage_key, build)
    task.ledger.book("score", entry)
    return dict(zip(groups, np.load(entry.path / SCORES), strict=True))


def cosine_groups(
    task: SelectionTask, pool: Entry, targets: Entry, groups: Mapping[str, Sequence[int]], aggregate: str
) -> dict[str, NDArray[np.float32]]:
    """The stored cosines of every pool record's vector with each group's targets; one shard in memory at a time.

    Args:
        task: For store and ledger.
        pool: Vectors of the pool, as `trim_lightning.engine.record_values` keeps them.
        targets: Vectors of the targets, likewise.
        groups: Group name to rows of the targets.
        aggregate: ``max`` or ``mean`` over a group's targets.

    Returns:
        Group name to ``[records]`` float32; NaN for a record without a vector.
    """
    settings = {"method": "cosine", "aggregate": aggregate, "groups": groups}
    stage_key = StageKey("similarity", 1, settings, {"pool": pool.key.hex, "targets": targets.key.hex})

    def blocks() -> Iterator[tuple[Any, NDArray[Any]]]:
        assert task.targets is not None
        wanted = unit(gather_values(targets.path, len(task.targets.records)))
        for rows, vectors in read_values(pool.path):
            cosines = unit(vectors.astype(np.float64)) @ wanted.T
            scores = [fold_targets((cosines[:, row] for row in members), aggregate) for members in groups.values()]
            yield np.s_[:, rows], np.stack(scores)

    return group_scores(task, stage_key, list(groups), blocks)


def unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[n, width]`` vectors of length 1; a zero vector stays zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


def fold_targets(scores: Iterable[NDArray[Any]], how: str) -> NDArray[Any]:
    """One score a record from its scores against several targets, without holding them all.

    Args:
        scores: ``[records]`` scores against each target.
        how: ``max`` or ``mean``.
    """
    total, number = None, 0
    for values in scores:
        number += 1
        if total is None:
            total = values.copy()
        elif how == "max":
            np.maximum(total, values, out=total)
        else:
            total += values
    assert total is not None
    return total / number if how == "mean" else total


def usable_groups(
    task: SelectionTask, usable: Callable[[int], bool], lacks: str, *, whatever_scope: bool = False
) -> dict[str, list[int]]:
    """The target groups without the targets that a method cannot use.

    Args:
        task: For the target set.
        usable: Says of a target's row whether it can be used.
        lacks: What the others lack, for the message.
        whatever_scope: True if another scope would not help.

    Raises:
        UserError: if a group has no target left.
    """
    assert task.targets is not None
    kept = {group: [row for row in rows if usable(row)] for group, rows in task.targets.groups.items()}
    for group, rows in kept.items():
        if not rows:
            where = f"group {group!r} of the target set" if group else "the target set"
            if whatever_scope:
                raise UserError(f"target: {where} has {lacks}; give targets that have one")
            raise UserError(
                f"target: {where} has {lacks} in scope={task.settings.scope}; give targets with text there, "
                "or another scope"
            )
    return kept
