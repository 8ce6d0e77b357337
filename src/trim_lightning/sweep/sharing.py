"""Before the jobs of a sweep run: every pass over the pool that several of them want, once for all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trim_lightning.errors import UserError, first_line
from trim_lightning.methods.base import load_selector
from trim_lightning.methods.trim import TrimSelector
from trim_lightning.pipeline.checks import check_settings
from trim_lightning.pipeline.measuring import open_measuring
from trim_lightning.pipeline.opening import open_store, open_task
from trim_lightning.pipeline.training_inputs import make_trainee
from trim_lightning.settings.schema import SelectSettings, TrainSettings
from trim_lightning.stages.scorer import Scorer
from trim_lightning.stages.scoring import ScoringWork
from trim_lightning.stages.task import SelectionTask
from trim_lightning.store import StageKey
from trim_lightning.store.ledger import Ledger

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedJob:
    """One job of a sweep, ready for a pass over the pool: the whole of it, or a cascade's cheap pass or sample."""

    task: SelectionTask
    work: ScoringWork

    def shares_with(self, other: PreparedJob) -> bool:
        """True if one pass serves both: same pool, scorer, batches, shared prefixes, devices and store."""
        same_devices = self.work.resources.trainer == other.work.resources.trainer
        return same_devices and self.work.shares_pass_with(other.work) and self.task.store.root == other.task.store.root


def share_passes(jobs: Sequence[SelectSettings]) -> int:
    """Run the passes over the pool that several jobs share, with the banks of all of them.

    Warm-up and target passes that jobs share are run once on the way. A job that cannot be prepared is left out: it
    will say itself what is wrong with it. Passes of a single job are left to it.

    Returns:
        Number of passes that were run.
    """
    groups: list[list[PreparedJob]] = []
    watch = one_model_at_a_time()
    for settings in jobs:
        for job in prepare(settings, watch):
            group = next((group for group in groups if group[0].shares_with(job)), None)
            if group is None:
                groups.append([job])
            else:
                group.append(job)
    passes = 0
    for group in groups:
        try:
            passes += share_pass(group)
        except Exception as error:  # each job then runs its own pass, and says itself what is wrong with it
            log.warning("the shared pass failed (%s); each job runs its own", first_line(error))
            for job in group:
                job.task.scorer.release()
    return passes


def one_model_at_a_time() -> Callable[[Scorer], None]:
    """Gives what watches scorers: before one loads its model, that of the one before is released."""
    holding: list[Scorer] = []  # copies of many jobs have no room beside each other

    def watch(scorer: Scorer) -> None:
        def before_load() -> None:
            for other in holding:
                if other is not scorer:
                    other.release()
            holding[:] = [scorer]

        scorer.before_load = before_load

    return watch


def prepare(settings: SelectSettings, watch: Callable[[Scorer], None]) -> list[PreparedJob]:
    """A job up to its passes over the pool; none if it has none to share, or fails: it will say itself why."""
    try:
        check_settings(settings)
        selector = load_selector(settings.method)
        if not isinstance(selector, TrimSelector):
            return []
        store = open_store(settings)
        if store.processes.size > 1:
            return []  # processes of a launcher share passes in their own way
        if isinstance(settings, TrainSettings):
            trainee = make_trainee(settings, store, Ledger(quiet=True))
            open_measuring(settings, store).check(settings, trainee)  # else the job is refused after the pass
        task = open_task(settings, selector, store, announce=False, look=True, watch=watch)
        cheaply = selector.cheaply(task)
        if cheaply is not None:
            watch(cheaply.task.scorer)
        return [PreparedJob(part, work) for part, work in selector.shared_works(task, cheaply)]
    except UserError:
        return []
    except Exception as error:
        log.warning("looking ahead at a job failed (%s); it runs by itself", first_line(error))
        return []


def share_pass(group: Sequence[PreparedJob]) -> bool:
    """Run one pass for a group of jobs; False if there is nothing to share."""
    works = {job.work.key: job for job in group}
    first = next((job for job in group if job.task.scorer.holds_model), group[0])
    missing = [key for key in works if first.task.store.find(key) is None]
    if not missing or len(group) < 2:  # a job alone runs its own pass
        first.task.scorer.release()
        return False
    banks = "bank" if len(missing) == 1 else "banks"
    log.info("one pass over the pool for %d jobs with %d %s", len(group), len(missing), banks)

    def build(workspaces: Mapping[StageKey, Path]) -> dict[str, Any]:
        from trim_lightning.engine.devices import model_for
        from trim_lightning.engine.scoring_pass import run_scoring_pass

        resources = first.work.resources
        return run_scoring_pass(
            model_for(resources, first.task.scorer),
            first.work.records(first.task.pool_tokens),
            {workspace: works[key].work.request() for key, workspace in workspaces.items()},
            resources=resources,
            share_prefixes=first.work.shares_prefixes,
        )

    entries = first.task.store.get_many(missing, build)
    first.task.ledger.book("score", entries[0])
    first.task.scorer.release()
    return True
