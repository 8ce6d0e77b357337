"""The whole selection, top to bottom: read → score → select → write."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from trim_lightning.methods.base import SelectionTask, Selector, load_selector
from trim_lightning.models.source import find_model
from trim_lightning.pipeline.outputs import clear, writable_directory, write_coreset, write_scores
from trim_lightning.pipeline.summary import selection_metrics, selection_summary
from trim_lightning.privacy.paths import run_name
from trim_lightning.records.record_file import RecordFile
from trim_lightning.records.sources import open_records
from trim_lightning.records.targets import check_target, choose_targets
from trim_lightning.runs.manifest import write_manifest
from trim_lightning.selection.budget import check_budget, check_settings, select_rows
from trim_lightning.selection.ranking import ScoreTable, rank_by_score
from trim_lightning.settings.schema import LoggerSettings, SelectSettings
from trim_lightning.stages.scorer import Scorer
from trim_lightning.store import Store
from trim_lightning.store.ledger import Ledger, StageRecord
from trim_lightning.store.processes import find_team, helper_folder, launched_size
from trim_lightning.tracking.tracker import Tracker, open_tracker

if TYPE_CHECKING:
    from trim_lightning.report.facts import SelectionFacts

log = logging.getLogger(__name__)
Settings = TypeVar("Settings", bound=SelectSettings)


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


def open_task(settings: SelectSettings, selector: Selector, store: Store, announce: bool = True) -> SelectionTask:
    """Read pool and targets, find the model, tokenise the pool: all that a selector starts from.

    Args:
        settings: All keys.
        selector: Says what it needs.
        store: Stage results.
        announce: Log what was found; False for a look ahead.

    Raises:
        UserError: for anything that the user can mend.
    """
    ledger = Ledger(quiet=not announce)
    if selector.uses_model:
        check_trainer(settings.trainer)
    pool = open_records(
        settings.pool,
        what="pool",
        seed=settings.seed,
        spool=store.spool,
        limit=settings.pool.limit,
        sample=settings.pool.sample,
    )
    if not selector.takes_all:
        check_budget(settings.selection, len(pool))
    if selector.needs_targets:
        check_target(settings)
    targets = choose_targets(settings, pool, store) if selector.needs_targets else None
    source = find_model(settings.model, store)
    if selector.reads_attention:
        source.check_layers(settings.saliency.num_layers)
    if announce:
        log.info("pool %s: %s records", pool.name, f"{len(pool):,}")
        if targets is not None:
            log.info("targets %s: %s examples", targets.records.name, f"{len(targets.records):,}")
        log.info("scorer %s", source.name)
    scorer = Scorer(
        source,
        settings.model.dtype,
        store,
        ledger,
        trainer=settings.trainer,
        seed=settings.seed,
        max_length=settings.max_length,
    )
    pool_tokens, tokens_entry = scorer.tokenize(pool)
    ledger.book("tokenize", tokens_entry)
    return SelectionTask(settings, pool, pool_tokens, tokens_entry.key, targets, scorer, store, ledger)


def open_store(settings: SelectSettings) -> Store:
    """The stage store, shared with the other processes of this command if a launcher started several."""
    directory = writable_directory(settings.paths.store_dir, "paths.store_dir")
    return Store(directory, settings.paths.store_lock, find_team())


def for_helper(settings: Settings) -> Settings:
    """In a process that helps another one: the same settings, but results and reports go nowhere."""
    if find_team().leads:
        return settings
    nowhere = helper_folder()
    return replace(settings, logger=LoggerSettings(name="none"), paths=replace(settings.paths, output_dir=nowhere))


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Let Lightning itself judge unusual trainer arguments before anything is read; plain ones need no import of it.

    Raises:
        UserError: for an argument that Trainer does not have, a device that is absent, or several of them.
    """
    usual = set(trainer) <= {"accelerator", "devices", "num_nodes"} and trainer.get("accelerator") in ("auto", "cpu")
    single = all(type(trainer.get(name, 1)) is int and trainer.get(name, 1) == 1 for name in ("devices", "num_nodes"))
    if not (usual and single and launched_size() == 1):
        from trim_lightning.engine.trainer import make_trainer

        make_trainer(trainer, [])


def first_ids(pool: RecordFile, rows: NDArray[np.int64], most: int = 5) -> str:
    """Ids of the first few rows, for messages."""
    return ", ".join(pool.id(int(row)) for row in rows[:most]) + (", ..." if len(rows) > most else "")


def mean(values: NDArray[Any]) -> float | None:
    """Rounded mean, or None of nothing."""
    return round(float(values.mean()), 2) if len(values) else None
