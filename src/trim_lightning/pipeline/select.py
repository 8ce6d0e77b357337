"""The whole selection, top to bottom: read → score → select → write."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trim_lightning.methods.base import load_selector
from trim_lightning.pipeline.checks import check_settings
from trim_lightning.pipeline.opening import for_helper, open_store, open_task
from trim_lightning.pipeline.outputs import clear, writable_directory, write_coreset, write_scores
from trim_lightning.pipeline.summary import selection_metrics, selection_summary
from trim_lightning.privacy.paths import run_name
from trim_lightning.records.record_file import RecordFile
from trim_lightning.runs.manifest import write_manifest
from trim_lightning.selection.budget import select_rows
from trim_lightning.selection.ranking import ScoreTable, rank_by_score
from trim_lightning.settings.schema import SelectSettings
from trim_lightning.store import Store
from trim_lightning.store.ledger import StageRecord
from trim_lightning.tracking.open import open_tracker
from trim_lightning.tracking.tracker import Tracker

if TYPE_CHECKING:
    from trim_lightning.report.facts import SelectionFacts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """A finished selection.

    Attributes:
        directory: Where its files are.
        scores: Scores of every pool record.
        order: Scored rows, best first.
        chosen: Selected rows, best first.
        manifest: Content of ``manifest.json``.
        summary: The table that a user sees at the end.
        report: What ``report.html`` shows, None if there is none.
    """

    directory: Path
    scores: ScoreTable
    order: NDArray[np.int64]
    chosen: NDArray[np.int64]
    manifest: dict[str, Any]
    summary: str
    report: SelectionFacts | None = None

    def show(self, tracker: Tracker) -> None:
        """Let a tracker show the report."""
        if self.report is not None:
            tracker.report(self.report, self.directory / "report.html")


def select(settings: SelectSettings, command: str | None = None) -> Selection:
    """Select a coreset and write the files of the contract into ``paths.output_dir``.

    Args:
        settings: All keys.
        command: The command line that repeats this run, for the report.

    Raises:
        UserError: for anything that the user can mend.
    """
    check_settings(settings)
    settings = for_helper(settings)
    directory = writable_directory(settings.paths.output_dir, "paths.output_dir")
    store = open_store(settings)
    name = run_name(directory)
    tracker = open_tracker(settings.logger, directory, job_type="select", name=name, config=asdict(settings))
    succeeded = False
    try:
        selection = run_selection(settings, directory, store, command=command)
        selection.show(tracker)
        tracker.metrics(selection_metrics(selection.manifest))
        tracker.artifact("scores", "scores", [directory / "scores.parquet", directory / "manifest.json"])
        tracker.artifact("coreset", "coreset", [directory / "coreset.jsonl"], uses=["scores"])
        succeeded = True
        return selection
    finally:
        tracker.finish(succeeded)


def run_selection(
    settings: SelectSettings, directory: Path, store: Store, announce: bool = True, command: str | None = None
) -> Selection:
    """Select and write the files, reporting to no tracker.

    Args:
        settings: All keys.
        directory: Where the files go.
        store: Stage results.
        announce: Say what is found and done.
        command: The command line that repeats this run, for the report.

    Raises:
        UserError: for anything that the user can mend.
    """
    selector = load_selector(settings.method)
    task = open_task(settings, selector, store, announce)
    pool, targets, ledger = task.pool, task.targets, task.ledger

    scores = selector.score(task)
    store.dismiss_helpers()
    if settings.scoring.profile:
        selector.profile(task, Path(settings.paths.output_dir) / "profile")

    started = time.perf_counter()
    order = scores.order if scores.order is not None else rank_by_score(scores.score)
    responses = task.pool_tokens.content_lengths("response")
    costs = responses if settings.selection.token_scope == "response" else None
    chosen = select_rows(settings.selection, pool, scores, order, ledger, costs=costs, everything=selector.takes_all)
    clear(directory)
    write_scores(pool, scores, order, chosen, directory / "scores.parquet")
    write_coreset(pool, chosen, directory / "coreset.jsonl")
    selector.write_extras(task, directory)
    ledger.add("select", StageRecord(None, time.perf_counter() - started, 0, cached=False))

    unscored = int(np.isnan(scores.score).sum())
    names = first_ids(pool, np.flatnonzero(np.isnan(scores.score)))
    if unscored:
        ledger.warn(f"{unscored} of the pool's records could not be scored and are left out: {names}")
    for problem in task.pool_tokens.problems[:5]:
        ledger.warn(f"pool {problem}")
    manifest = write_manifest(
        directory / "manifest.json",
        config=asdict(settings),
        inputs={
            "pool": {
                "name": pool.name,
                "sha256": pool.sha256,
                "rows": len(pool),
                "source_rows": pool.source_rows,
            },
            **({} if targets is None else {"target": targets.describe()}),
            "model": {"name": task.scorer.source.name, "sha256": task.scorer.source.digest},
        },
        counts={
            "pool": len(pool),
            "scored": len(pool) - unscored,
            "unscored": unscored,
            "max_length": task.scorer.max_length,
            "truncated": task.pool_tokens.truncated,
            "selected": len(chosen),
            "selected_tokens": int(scores.num_tokens[chosen].sum()),
            "selected_response_tokens": int(responses[chosen].sum()),
            "mean_tokens_pool": mean(scores.num_tokens),
            "mean_tokens_selected": mean(scores.num_tokens[chosen]),
            "fallback_share": ledger.facts.get("fallback_share"),
            "bank_coverage": ledger.facts.get("bank_coverage"),
            "within_over_between": ledger.facts.get("within_over_between"),
            "padding_share": ledger.facts.get("padding"),
        },
        ledger=ledger,
    )
    report = None
    if settings.report.enabled and announce:
        from trim_lightning.report.selection_facts import Outcome
        from trim_lightning.report.write import write_report

        outcome = Outcome(task, selector, scores, order, chosen, manifest, directory)
        report = write_report(outcome, settings.report.examples, command)
    summary = selection_summary(manifest, pool, targets, order, chosen, directory, names)
    return Selection(directory, scores, order, chosen, manifest, summary, report)


def first_ids(pool: RecordFile, rows: NDArray[np.int64], most: int = 5) -> str:
    """Ids of the first few rows, for messages."""
    return ", ".join(pool.id(int(row)) for row in rows[:most]) + (", ..." if len(rows) > most else "")


def mean(values: NDArray[Any]) -> float | None:
    """Rounded mean, or None of nothing."""
    return round(float(values.mean()), 2) if len(values) else None
