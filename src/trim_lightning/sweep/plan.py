"""What one or many jobs would do: which results they need, which are there, which work is left."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from trim_lightning.errors import UserError
from trim_lightning.methods.base import load_selector
from trim_lightning.pipeline.checks import check_settings
from trim_lightning.pipeline.opening import open_task
from trim_lightning.pipeline.outputs import writable_directory
from trim_lightning.pipeline.select import run_selection
from trim_lightning.runs.names import CORESET
from trim_lightning.selection.budget import budget_of
from trim_lightning.settings.schema import SelectSettings, TrainSettings
from trim_lightning.stages.task import SelectionTask
from trim_lightning.stages.trainee import Trainee
from trim_lightning.store import Cost, Entry, StageKey
from trim_lightning.store.ledger import Ledger
from trim_lightning.sweep.planning_store import NotBuilt, PlanningStore, Wanted
from trim_lightning.tokens.tokenized import TokenizedRecords


@dataclass(frozen=True)
class Plan:
    """The work of some jobs.

    Attributes:
        jobs: How many, those that cannot run among them.
        problems: Number and error line of each job that cannot run.
        wanted: Every costly result that the others need, each once, in the order of need.
        store: Where results are kept.
        pool_records: Records of the largest pool.
    """

    jobs: int
    problems: dict[int, str] = field(default_factory=dict)
    wanted: list[Wanted] = field(default_factory=list)
    store: Path = Path()
    pool_records: int = 0

    @property
    def missing(self) -> list[Cost]:
        """The costs of what is not in the store."""
        return [wanted.cost for wanted in self.wanted if not wanted.found and wanted.cost is not None]

    @property
    def passes(self) -> list[Cost]:
        """One cost for each piece of work: results of a shared pass count once."""
        seen, work = set(), []
        for cost in self.missing:
            if cost.shared is None or cost.shared not in seen:
                work.append(cost)
            seen.add(cost.shared)
        return work


def plan_jobs(jobs: Mapping[int, SelectSettings], mistakes: Mapping[int, str] | None = None) -> Plan:
    """Go through every job as far as it goes without running a model.

    Records are read and tokenised on the way, and kept in the store, so that the run need not do it again. Jobs that
    have no settings come with their error line.

    Raises:
        UserError: if a store cannot be written.
    """
    stores: dict[str, PlanningStore] = {}
    wanted: dict[str, Wanted] = {}
    problems = dict(mistakes or {})
    total, most = len(jobs) + len(problems), 0
    for number, settings in jobs.items():
        place = settings.paths.store_dir
        if place not in stores:
            stores[place] = PlanningStore(writable_directory(place, "paths.store_dir"), settings.paths.store_lock)
        store = stores[place]
        store.wanted.clear()
        try:
            most = max(most, plan_job(settings, store))
        except UserError as error:
            problems[number] = str(error)
            continue
        for item in store.wanted:
            if item.cost is not None:
                wanted.setdefault(f"{store.root}/{item.key.hex}", item).users.add(number)
    root = next(iter(stores.values())).root if len(stores) == 1 else Path()
    return Plan(total, dict(sorted(problems.items())), list(wanted.values()), root, most)


def plan_job(settings: SelectSettings, store: PlanningStore) -> int:
    """Note in the store what one job needs; returns the records of its pool.

    Raises:
        UserError: for anything that the user can mend.
    """
    if isinstance(settings, TrainSettings):
        return plan_training(settings, store)
    return len(plan_selection(settings, store).pool)


def plan_selection(settings: SelectSettings, store: PlanningStore) -> SelectionTask:
    """Note what a selection needs."""
    check_settings(settings)
    selector = load_selector(settings.method)
    task = open_task(settings, selector, store, announce=False)
    with suppress(NotBuilt):
        selector.request(task)
    return task


def plan_training(settings: TrainSettings, store: PlanningStore) -> int:
    """Note what a training needs; returns the records of its pool, 0 without a selection.

    The coreset is known if it is given, or if all that selects it is in the store. Else its size is assumed: as many
    records as the budget allows, of the pool's lengths.
    """
    from trim_lightning.evaluation.evaluate import evaluate
    from trim_lightning.evaluation.harness.run import task_scores
    from trim_lightning.pipeline.checks import check_training
    from trim_lightning.pipeline.measuring import open_measuring
    from trim_lightning.pipeline.training_inputs import make_trainee

    check_training(settings)
    measuring = open_measuring(settings, store)
    held_out = measuring.held_out
    trainee = make_trainee(settings, store, Ledger(quiet=True))
    stop = measuring.check(settings, trainee)
    task = plan_selection(settings, store) if settings.coreset.path is None else None
    tuned = plan_fine_tuning(settings, store, trainee, task, stop)
    for entry, title in ((None, "before"), (tuned, "after")):
        with suppress(NotBuilt):
            if held_out is not None:
                evaluate(trainee, entry, held_out, settings.evaluation, title=title)
        with suppress(NotBuilt):
            if settings.evaluation.tasks:
                task_scores(trainee, entry, settings.evaluation, settings.seed)
    return 0 if task is None else len(task.pool)


def plan_fine_tuning(
    settings: TrainSettings,
    store: PlanningStore,
    trainee: Trainee,
    task: SelectionTask | None,
    stop: tuple[TokenizedRecords, StageKey] | None,
) -> Entry:
    """Note the fine-tuning, on the coreset itself if it is known."""
    from trim_lightning.pipeline.training_inputs import in_one_order, open_coreset

    with tempfile.TemporaryDirectory(prefix="trim-plan-") as folder:
        path = None if settings.coreset.path is None else Path(settings.coreset.path)
        if task is not None and all(item.found for item in store.wanted if item.cost is not None):
            # nothing beside the coreset itself is to be written
            bare = replace(settings, scoring=replace(settings.scoring, profile=False, save_token_scores=False))
            path = run_selection(bare, Path(folder), store, announce=False).directory / CORESET
        if path is not None:
            tokens, entry = trainee.tokenize(in_one_order(open_coreset(settings, path, store), store))
            return trainee.fine_tune(settings.train, tokens, entry.key, stop)
    assert task is not None
    tokens, _ = trainee.tokenize(task.pool)
    rows = stand_in_rows(settings, tokens.lengths, tokens.content_lengths(settings.selection.token_scope))
    assumed = f"a coreset of {len(rows):,} records of the pool's lengths"
    apart = ("logger", "paths", "evaluation", "dry_run", "report", "scoring", "trainer")
    choices = {name: value for name, value in asdict(settings).items() if name not in apart}
    key = StageKey("finetune", 0, {"unknown": choices}, {"pool": task.pool_key.hex, "trainee": trainee.source.digest})
    known: dict[str, Any] = {"training": settings.train, "rows": rows, "assumed": assumed, "loads": True}
    cost = trainee.cost("finetune", f"{settings.train.mode} training", tokens, **known)
    return store.get(key, lambda _: None, cost=cost)


def stand_in_rows(settings: TrainSettings, lengths: np.ndarray, costs: np.ndarray) -> list[int]:
    """Rows spread over the pool, as many as the budget allows; ``costs`` is what a budget in tokens counts."""
    usable = np.flatnonzero(lengths > 0)
    if load_selector(settings.method).takes_all:
        return [int(row) for row in usable]
    most = budget_of(settings.selection, len(lengths))
    if most is None:
        assert settings.selection.tokens is not None
        most = int(settings.selection.tokens / max(1.0, costs[usable].mean()))
    from trim_lightning.engine.speed import spread_out

    return [int(row) for row in spread_out(list(usable), max(1, most))]
