"""What a selection starts from: pool, targets, model, tokens, store."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from trim_lightning.errors import UserError
from trim_lightning.methods.base import Selector
from trim_lightning.models.source import find_model
from trim_lightning.pipeline.checks import check_target, check_trainer
from trim_lightning.pipeline.outputs import writable_directory
from trim_lightning.records.record_file import RecordFile
from trim_lightning.records.sources import check_source, open_records
from trim_lightning.records.targets import TargetSet, choose_targets
from trim_lightning.selection.budget import check_budget
from trim_lightning.selection.filters import check_cap_field
from trim_lightning.selection.responses import has_response
from trim_lightning.settings.schema import LoggerSettings, SelectSettings, TargetSettings
from trim_lightning.stages.attention import check_attention
from trim_lightning.stages.look import look_at
from trim_lightning.stages.scorer import Scorer
from trim_lightning.stages.task import SelectionTask
from trim_lightning.store import Store
from trim_lightning.store.ledger import Ledger
from trim_lightning.store.processes import find_processes, helper_folder
from trim_lightning.tokens.tokenized import TokenizedRecords

log = logging.getLogger(__name__)


Settings = TypeVar("Settings", bound=SelectSettings)


def open_task(
    settings: SelectSettings,
    selector: Selector,
    store: Store,
    announce: bool = True,
    look: bool = False,
    watch: Callable[[Scorer], None] = lambda scorer: None,
) -> SelectionTask:
    """Find the model, read pool and targets, tokenise the pool: all that a selector starts from.

    Args:
        settings: What is asked for.
        selector: The method.
        store: Stage results.
        announce: False, for a look ahead, logs nothing of it.
        look: Load the model first if it was never looked at, so that a class is refused before a record is read.
        watch: Gets the scorer before that.

    Raises:
        UserError: for anything that the user can mend.
    """
    ledger = Ledger(quiet=not announce)
    if selector.uses_model:
        check_trainer(settings.trainer, planned=settings.dry_run)
    check_source(settings.pool, "pool")
    if selector.needs_targets:
        check_target(settings)
        check_source(settings.target, "target")
    scorer = open_scorer(settings, selector, store, ledger)
    watch(scorer)
    if look and selector.uses_model:
        tuning = settings.warmup if selector.warms_up(settings) else None
        seen = look_at(scorer, tuning, gradients=selector.takes_gradients())
        if selector.reads_attention:
            check_attention(seen, settings, scorer.source.name)
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
    check_cap_field(settings.selection, pool)
    targets = choose_targets(settings, pool, store) if selector.needs_targets else None
    if targets is not None:
        warn_of_few_targets(settings.target, targets, ledger)
    warn_of_reading("pool", pool, ledger)
    if targets is not None and targets.read is not pool:
        warn_of_reading("target", targets.read, ledger)
    if announce:
        log.info("pool %s: %s records", pool.name, f"{len(pool):,}")
        if targets is not None:
            log.info("targets %s: %s examples", targets.records.name, f"{len(targets.records):,}")
        log.info("scorer %s", scorer.source.name)
    pool_tokens, tokens_entry = scorer.tokenize(pool)
    if targets is not None:
        target_tokens, _ = scorer.tokenize(targets.records)
        check_targets(targets.records, target_tokens, settings.scope, selector.scores_responses())
        for problem in target_tokens.problems[:5]:
            ledger.warn(f"target {problem}")
    ledger.book("tokenize", tokens_entry)
    return SelectionTask(settings, pool, pool_tokens, tokens_entry.key, targets, scorer, store, ledger)


def open_scorer(settings: SelectSettings, selector: Selector, store: Store, ledger: Ledger) -> Scorer:
    """Find the scorer's files.

    Raises:
        UserError: as `find_model` does, or for more layers of attention than there are.
    """
    source = find_model(settings.model, store)
    if selector.reads_attention and (settings.saliency.row_weight or settings.saliency.column_weight):
        source.check_layers(settings.saliency.num_layers)
    return Scorer(
        source,
        settings.model.dtype,
        store,
        ledger,
        trainer=settings.trainer,
        seed=settings.seed,
        max_length=settings.max_length,
    )


def warn_of_few_targets(target: TargetSettings, targets: TargetSet, ledger: Ledger) -> None:
    """Say that there are fewer targets than a number that the user gave; ten, the default, is no such number."""
    asked = target.num_examples
    if asked is None or asked == TargetSettings().num_examples:
        return
    drawn = {"": range(len(targets.records))} if target.single_groups else targets.groups
    fewer = {group: len(rows) for group, rows in drawn.items() if len(rows) < asked}
    if fewer:
        group, number = next(iter(fewer.items()))
        where = f"group {group!r} has" if group else "there are"
        others = f" ({len(fewer)} groups have fewer)" if len(fewer) > 1 else ""
        ledger.warn(f"target.num_examples={asked}: {where} only {number}{others}; all are taken")


def warn_of_reading(what: str, records: RecordFile, ledger: Ledger) -> None:
    """Say what of an input was not read, or read in a way that the user should know."""
    for remark in records.remarks:
        ledger.warn(f"{what} {records.name}: {remark}")


def check_targets(records: RecordFile, tokens: TokenizedRecords, scope: str, scores_responses: bool = False) -> None:
    """Refuse targets of which none can be used; ``scores_responses`` is True of a method that scores responses.

    Raises:
        UserError: if none can be rendered, or none has a response and all of a record is to be matched.
    """
    size = len(records)
    if tokens.unrendered == size:
        raise UserError(
            f"target {records.name}: none of the {size} targets can be rendered; {tokens.problems[0]}; correct them "
            "or name another template with model.chat_template"
        )
    if scope == "all" and not any(has_response(records, row) for row in range(size)):
        by_prompts = "use method=trim scope=prompt" if scores_responses else "set scope=prompt"
        raise UserError(
            f"target {records.name}: the target set has no response; give targets that have one, or "
            f"{by_prompts} to select by prompts alone"
        )


def open_store(settings: SelectSettings) -> Store:
    """The stage store, shared with the other processes of this command if a launcher started several."""
    directory = writable_directory(settings.paths.store_dir, "paths.store_dir")
    return Store(directory, settings.paths.store_lock, find_processes())


def for_helper(settings: Settings) -> Settings:
    """In a process that helps another one: the same settings, but results and reports go nowhere."""
    if find_processes().leads:
        return settings
    nowhere = helper_folder()
    return replace(settings, logger=LoggerSettings(name="none"), paths=replace(settings.paths, output_dir=nowhere))
