"""Passes over records whose results go through the store: values, words, losses."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trim_lightning.engine.devices import Weights, model_for
from trim_lightning.engine.shards import gather_values
from trim_lightning.errors import UserError
from trim_lightning.records.record_file import RecordFile
from trim_lightning.records.word_file import WordFile, write_words
from trim_lightning.stages.task import SelectionTask
from trim_lightning.store import Entry, StageKey
from trim_lightning.tokens.tokenized import TokenizedRecords

if TYPE_CHECKING:
    from trim_lightning.engine.record_statistics import RecordStatistic


class KnownWeights(Weights, Protocol):
    """A model that passes run on, and what the keys of their results say of it."""

    @property
    def identity(self) -> dict[str, Any]:
        """What determines its outputs."""


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
    weights: KnownWeights | None = None,
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
        from trim_lightning.tuning.memory import most_tokens

        refuse_divided_weights(settings.trainer)
        tokens_per_batch = tokens_per_batch or most_tokens(settings.warmup, task.scorer.device)
    resources = task.scorer.resources(tokens_per_batch, settings.scoring.num_workers)
    key = StageKey(
        statistic.stage,
        2,
        {**statistic.settings, "tokens_per_batch": resources.tokens_per_batch},
        {**inputs, "scorer": weights.identity},
    )

    def build(directory: Path) -> dict[str, Any]:
        from trim_lightning.engine.record_pass import run_record_pass

        return run_record_pass(
            model_for(resources, weights),
            records,
            statistic,
            directory,
            scope=settings.scope,
            resources=resources,
            title=title or booked,
        )

    cost = task.scorer.cost(
        booked,
        statistic.stage,
        records,
        resources=resources,
        how_many=lambda: statistic.settings.get("dimension", 1),
        training=settings.warmup if statistic.needs_gradients else None,
    )
    entry = task.store.get(key, build, resumable=True, together=True, cost=cost)
    task.ledger.book(booked, entry)
    if booked == "score":
        task.ledger.figures["padding"] = entry.facts["padding"]
    return entry


def refuse_divided_weights(trainer: Mapping[str, Any]) -> None:
    """Say that gradients of single records are not to be had of weights that are divided among processes.

    Raises:
        UserError: if ``trainer`` divides them.
    """
    if trainer.get("strategy") == "fsdp":
        raise UserError("trainer=fsdp: gradients of single records need whole weights; use trainer=ddp")


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
    """The stored words of some records' scoped text."""
    key = StageKey("words", 2, {"scope": task.settings.scope}, {"records": records.identity()})

    def build(directory: Path) -> dict[str, Any]:
        started = time.perf_counter()
        facts = write_words(records, task.settings.scope, directory, booked)
        return {**facts, "seconds": time.perf_counter() - started}

    entry = task.store.get(key, build)
    task.ledger.book(booked, entry)
    return WordFile(entry.path), entry
