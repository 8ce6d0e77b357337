"""The whole selection, top to bottom: read → score → select → write."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trim_lightning.methods.base import load_selector, whole_method
from trim_lightning.pipeline.checks import check_settings
from trim_lightning.pipeline.leaks import warn_of_leaks
from trim_lightning.pipeline.opening import for_helper, open_store, open_task
from trim_lightning.pipeline.outputs import (
    clear,
    writable_directory,
    write_bad_records,
    write_coreset,
    write_scores,
    write_selection_manifest,
)
from trim_lightning.pipeline.picks import Pick, first_picks
from trim_lightning.pipeline.summary import selection_metrics, selection_summary
from trim_lightning.records.record_file import RecordFile
from trim_lightning.records.shared import first_ids
from trim_lightning.runs.names import BAD_RECORDS, CORESET, MANIFEST, REPORT, SCORES
from trim_lightning.selection.budget import select_rows
from trim_lightning.selection.ranking import ScoreTable, rank_by_score
from trim_lightning.selection.responses import missing_responses
from trim_lightning.settings.schema import SelectSettings
from trim_lightning.store import Store
from trim_lightning.store.ledger import Ledger, StageRecord
from trim_lightning.store.versions import versions
from trim_lightning.tracking.open import tracked
from trim_lightning.tracking.tracker import Tracker

if TYPE_CHECKING:
    from trim_lightning.report.facts import SelectionFacts

log = logging.getLogger(__name__)
NOTHING: Mapping[str, RecordFile] = {}


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
        leaks: Warnings of records that pool, targets and held-out records share.
        picks: The first of the selected records, as a user sees them.
    """

    directory: Path
    scores: ScoreTable
    order: NDArray[np.int64]
    chosen: NDArray[np.int64]
    manifest: dict[str, Any]
    summary: str
    report: SelectionFacts | None = None
    leaks: tuple[str, ...] = ()
    picks: tuple[Pick, ...] = ()

    def show(self, tracker: Tracker) -> None:
        """Let a tracker show the report."""
        if self.report is not None:
            tracker.report(self.report, self.directory / REPORT)

    def attach(self, tracker: Tracker) -> None:
        """Attach scores and coreset, linked to each other."""
        tracker.artifact("scores", "scores", [self.directory / SCORES, self.directory / MANIFEST])
        tracker.artifact("coreset", "coreset", [self.directory / CORESET], uses=["scores"])


def select(settings: SelectSettings, command: str | None = None) -> Selection:
    """Select a coreset and write the files of the contract into ``paths.output_dir``.

    The report shows ``command`` as the one that repeats the run.

    Raises:
        UserError: for anything that the user can mend.
    """
    check_settings(settings)
    settings = for_helper(replace(settings, method=whole_method(settings.method)))
    directory = writable_directory(settings.paths.output_dir, "paths.output_dir")
    store = open_store(settings)
    with tracked(settings.logger, directory, job_type="select", config=asdict(settings)) as tracker:
        selection = run_selection(settings, directory, store, command=command)
        selection.show(tracker)
        tracker.metrics(selection_metrics(selection.manifest))
        selection.attach(tracker)
    return selection


def warn_of_equal_scores(score: NDArray[np.float32], takes_all: bool, ledger: Ledger) -> None:
    """Say that a method tells no record from another, which leaves the order of the pool."""
    known = score[~np.isnan(score)]
    if len(known) > 1 and not takes_all and (known == known[0]).all():
        ledger.warn(
            f"all {len(known):,} scores are equal: the method tells no record from another, and the first of the pool "
            "are selected; give other targets, or another method"
        )


def run_selection(
    settings: SelectSettings,
    directory: Path,
    store: Store,
    announce: bool = True,
    command: str | None = None,
    measured: Mapping[str, RecordFile] = NOTHING,
    keep_helpers: bool = False,
) -> Selection:
    """Select and write the files, reporting to no tracker.

    ``announce=False`` says nothing of what is found and done, and makes no report. ``measured`` has the records that
    will measure what is selected, by what they are. With ``keep_helpers`` a launcher's other processes go on with the
    command; of the files they write the coreset alone.

    Raises:
        UserError: for anything that the user can mend.
    """
    selector = load_selector(settings.method)
    task = open_task(settings, selector, store, announce, look=announce)
    missing = missing_responses(task.pool, task.pool_tokens, task.scorer.max_length)
    if settings.selection.require_response:
        missing.leave_some(task.pool_tokens, task.pool.name)

    scores = selector.score(task)
    if not keep_helpers:
        store.dismiss_helpers()
    if settings.scoring.profile:
        selector.profile(task, Path(settings.paths.output_dir) / "profile")

    started = time.perf_counter()
    if settings.selection.require_response:
        scores = scores.without(missing.rows)
    warn_of_equal_scores(scores.score, selector.takes_all, task.ledger)
    order = scores.order if scores.order is not None else rank_by_score(scores.score)
    responses = task.pool_tokens.content_lengths("response")
    costs = responses if settings.selection.token_scope == "response" else None

    def choose() -> NDArray[np.int64]:
        budget, everything = settings.selection, selector.takes_all
        return select_rows(budget, task.pool, scores, order, task.ledger, costs=costs, everything=everything)

    chosen = store.processes.agree("coreset", choose)
    clear(directory)
    if not store.processes.leads:
        write_coreset(task.pool, chosen, directory / CORESET)
        return Selection(directory, scores, order, chosen, {}, "")
    with store.alone():
        write_scores(task.pool, scores, order, chosen, directory / SCORES)
        write_coreset(task.pool, chosen, directory / CORESET)
        inputs = {"pool": task.pool, **({} if task.targets is None else {"target": task.targets.read})}
        write_bad_records(inputs, directory / BAD_RECORDS)
        selector.write_extras(task, directory)
        task.ledger.add("select", StageRecord(None, time.perf_counter() - started, 0, False, versions()))
        leaks = warn_of_leaks(task, chosen, measured)
        unscored = first_ids(task.pool, np.flatnonzero(scores.unranked).tolist())
        manifest = write_selection_manifest(task, scores, chosen, responses, missing, directory)
        report = None
        if settings.report.enabled and announce:
            from trim_lightning.report.selection_facts import Outcome
            from trim_lightning.report.selection_page import write_report

            outcome = Outcome(task, selector, scores, order, chosen, manifest, directory)
            report = write_report(outcome, settings.report.examples, command)
        summary = selection_summary(manifest, task.pool, task.targets, order, chosen, directory, unscored)
        picks = tuple(first_picks(task.pool, task.targets, scores.score, chosen))
        return Selection(directory, scores, order, chosen, manifest, summary, report, tuple(leaks), picks)
