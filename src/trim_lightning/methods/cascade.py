"""A cheap score for all records, the full one for the best by it; how much that loses is measured on a random sample.

Our choice throughout; the arithmetic is in `trim_lightning.selection.recall`.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trim_lightning.errors import UserError
from trim_lightning.methods.base import load_selector
from trim_lightning.models.source import find_model
from trim_lightning.selection.budget import budget_of
from trim_lightning.selection.ranking import ScoreTable, rank_by_score
from trim_lightning.selection.recall import MOST_KEPT, Guide
from trim_lightning.selection.responses import missing_responses
from trim_lightning.settings.schema import CascadeSettings, WarmupSettings
from trim_lightning.stages.scorer import Scorer
from trim_lightning.stages.scoring import ScoringWork
from trim_lightning.stages.shallow import ShallowScorer
from trim_lightning.stages.task import SelectionTask

log = logging.getLogger(__name__)

STAGE = "cascade"  # of the manifest: all that the cheap score takes
SAMPLE_SHARE, SAMPLE_LEAST = 0.02, 500  # of the pool, and records
DEPTH = 0.125  # share of the layers that give the cheap score: four of 30 found what ten did
PLANNED = 0.25  # share of the pool that a plan takes for kept where the sample is to say
_SAMPLE_STREAM = 0x6361  # keeps the draw independent of others by the same seed


@dataclass(frozen=True)
class Field:
    """The records that a cascade is about.

    Attributes:
        rows: ``[records]`` int64 ascending, those that the full scorer can score and the budget may be spent on.
        top: How many of them the budget takes.
        sample: ``[sample]`` int64 ascending, those drawn for both scores; all where there are few.
    """

    rows: NDArray[np.int64]
    top: int
    sample: NDArray[np.int64]

    @property
    def is_small(self) -> bool:
        """True if the sample leaves too little for a second stage."""
        return len(self.sample) >= MOST_KEPT * len(self.rows)


@dataclass(frozen=True)
class Cheaply:
    """The first stage of a cascade.

    Attributes:
        field: The records that it is about.
        task: That of the cheap score.
    """

    field: Field
    task: SelectionTask


def field_of(task: SelectionTask) -> Field:
    """Find the records and draw the sample, by seed and pool alone: every job of a sweep draws the same."""
    selection, tokens = task.settings.selection, task.pool_tokens
    usable = tokens.content_lengths(task.settings.scope) > 0
    if selection.require_response:
        usable[missing_responses(task.pool, tokens, task.scorer.max_length).rows] = False
    rows = np.flatnonzero(usable)
    top = budget_of(selection, len(task.pool))
    if top is None:
        costs = tokens.content_lengths(selection.token_scope)[rows]
        top = int((selection.tokens or 0) / max(1.0, costs.mean() if len(costs) else 1.0))
    number = min(len(rows), max(SAMPLE_LEAST, int(np.ceil(SAMPLE_SHARE * len(rows)))))
    drawn = np.random.default_rng([task.settings.seed, _SAMPLE_STREAM]).choice(rows, size=number, replace=False)
    return Field(rows, max(1, min(top, len(rows))), np.sort(drawn))


def cheap_task(task: SelectionTask) -> SelectionTask:
    """The same task for the cheap score: its scorer, its tokens, no cascade within it.

    Raises:
        UserError: if the model has no more layers than are asked for, or the small model cannot be found.
    """
    cascade, ledger = task.settings.scoring.cascade, task.ledger.within(STAGE)
    settings = replace(task.settings, scoring=replace(task.settings.scoring, name="plain", cascade=CascadeSettings()))
    if cascade.by is not None:
        return replace(task, settings=replace(settings, method={"name": cascade.by}), ledger=ledger)
    if cascade.model is not None:
        scorer = small_scorer(task, cascade.model)
        scorer.ledger = ledger
        pool_tokens, entry = scorer.tokenize(task.pool)
        ledger.book("tokenize", entry)
        settings = replace(settings, warmup=WarmupSettings(enabled=False))
        return replace(
            task, settings=settings, scorer=scorer, pool_tokens=pool_tokens, pool_key=entry.key, ledger=ledger
        )
    return replace(task, settings=settings, scorer=ShallowScorer(task.scorer, depth_of(task), ledger), ledger=ledger)


def check(task: SelectionTask) -> None:
    """Refuse what a larger pool would be refused for.

    Raises:
        UserError: as `cheap_task`.
    """
    if task.settings.scoring.cascade.model is not None:
        small_scorer(task, task.settings.scoring.cascade.model)
    elif task.settings.scoring.cascade.by is None:
        depth_of(task)


def depth_of(task: SelectionTask) -> int:
    """Layers that give the cheap score.

    Raises:
        UserError: if the model has no more.
    """
    total = task.scorer.source.num_layers
    layers = task.settings.scoring.cascade.layers or max(1, round(DEPTH * total))
    if layers >= total:
        raise UserError(
            f"scoring.cascade.layers={layers}: {task.scorer.source.name} has only {total} layers; ask for fewer, or "
            "use scoring=plain"
        )
    return layers


def small_scorer(task: SelectionTask, path: str) -> Scorer:
    """A scorer of a small model as it is, without warm-up, with its own tokenizer and chat template.

    Raises:
        UserError: if it cannot be found.
    """
    model, key = task.settings.model, "scoring.cascade.model"
    settings = replace(
        model,
        path=path,
        revision=None,
        base=None,
        device_map=None,
        quantize=None,
        chat_template=None,
        trust_remote_code=False,
    )
    try:
        source = find_model(settings, task.store)
    except UserError as error:
        raise UserError(str(error).replace("model.path=", f"{key}=", 1)) from None
    return Scorer(
        source,
        model.dtype,
        task.store,
        task.ledger,
        trainer=task.settings.trainer,
        seed=task.settings.seed,
        max_length=task.settings.max_length,
    )


def scores_by_method(cheap: SelectionTask) -> ScoreTable:
    """The cheap scores of a method that needs no model."""
    return load_selector(cheap.settings.method).score(cheap)


def order_of(scores: ScoreTable) -> NDArray[np.int64]:
    """Scored rows, best first."""
    return scores.order if scores.order is not None else rank_by_score(scores.score)


def cheap_order(field: Field, cheap: ScoreTable) -> NDArray[np.int64]:
    """The records best first by the cheap score; those that it could not score come first, to be scored in full."""
    order = order_of(cheap)
    order = order[np.isin(order, field.rows)]
    return np.concatenate([np.setdiff1d(field.rows, order), order])


def kept_rows(task: SelectionTask, field: Field, cheap: ScoreTable, sampled: ScoreTable) -> NDArray[np.int64]:
    """The rows beyond the sample that are to get the full score; says what the sample tells of that.

    ``sampled`` has the full scores of the sample. Returns ascending rows.
    """
    cascade, order = task.settings.scoring.cascade, cheap_order(field, cheap)
    places = np.zeros(len(task.pool), dtype=np.int64)
    places[order] = np.arange(1, len(order) + 1)
    best_first = order_of(sampled)
    guide = Guide(places[best_first[np.isin(best_first, field.sample)]], len(order), field.top)
    if cascade.keep is not None:
        kept = min(len(order), max(field.top, int(np.ceil(cascade.keep * len(order)))))
        kept = kept if guide.points else len(order)
    else:
        kept = guide.kept_for(cascade.recall)
    expected, bound = guide.expected(kept), guide.bound(kept)
    if not guide.points:
        task.ledger.warn(
            "scoring=cascade: the cheap score is no guide, for the best records of the sample do not stand higher by "
            "it than the others; every record is scored in full"
        )
    elif kept == len(order) and cascade.keep is None:
        task.ledger.warn(
            f"scoring=cascade: for an expected recall of {cascade.recall:g} more than {MOST_KEPT:.0%} of the records "
            "would have to be scored in full; all of them are"
        )
    elif not task.ledger.quiet:
        log.info(
            "cascade: %s of %s records have both scores; the best %.1f %% by the cheap score, scored in full, are "
            "expected to hold %.1f %% of the best %s, and at least %.1f %% (95 %% confidence)",
            f"{len(field.sample):,}", f"{len(order):,}", 100 * kept / len(order), 100 * expected, f"{field.top:,}",
            100 * bound,
        )  # fmt: skip
    note(task, field, len(np.union1d(order[:kept], field.sample)), expected, bound)
    return np.setdiff1d(order[:kept], field.sample)


def note(task: SelectionTask, field: Field, in_full: int, expected: float, bound: float) -> None:
    """Keep for the manifest what got which score, and what that loses."""
    task.ledger.figures["cascade"] = {
        "scored_in_full": in_full,
        "scored_for_sample": len(field.sample),
        "wanted": field.top,
        "expected_recall": round(expected, 4),
        "recall_bound": round(bound, 4),
    }


def planned_rows(task: SelectionTask, field: Field) -> tuple[NDArray[np.int64], str]:
    """Rows in place of those that will be kept, for a plan, and what is assumed with that."""
    share = task.settings.scoring.cascade.keep or PLANNED
    left = np.setdiff1d(field.rows, field.sample)
    number = min(len(left), int(np.ceil(share * len(left))))
    told = f"{share:.0%} of the records are scored in full after the sample"
    return left[np.linspace(0, len(left) - 1, number).astype(np.int64)] if number else left[:0], told


def unknown(task: SelectionTask, work: ScoringWork) -> ScoringWork:
    """A pass whose rows are not known yet, for a plan: its key is that of no result, and no other job shares it."""
    settings = task.settings
    parts = {
        "cascade": asdict(settings.scoring.cascade),
        "pooler": asdict(settings.pooler),
        "fallback": asdict(settings.fallback),
        "selection": asdict(settings.selection),
        "aggregate": settings.target.aggregate,
    }
    return replace(work, key=replace(work.key, settings={**work.key.settings, "unknown": parts}))


def with_cheap_scores(full: ScoreTable, cheap: ScoreTable) -> ScoreTable:
    """The full scores, and behind those records the others in the order of their cheap score."""
    scoped = full.num_scored > 0
    order, rest = order_of(full), order_of(cheap)
    rest = rest[scoped[rest] & np.isnan(full.score[rest])]
    cheap_score = np.where(scoped, cheap.score, np.float32(np.nan))
    return replace(full, order=np.concatenate([order, rest]), cheap_score=cheap_score)
