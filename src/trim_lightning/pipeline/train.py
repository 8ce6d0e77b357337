"""The whole training run, top to bottom: select → evaluate → fine-tune → evaluate → write."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trim_lightning.errors import UserError
from trim_lightning.evaluation.evaluate import evaluate, paired, summarise
from trim_lightning.files.atomic import write_text
from trim_lightning.methods.base import whole_method
from trim_lightning.pipeline.checks import check_training
from trim_lightning.pipeline.measuring import MeasuringRecords, measured_records, open_measuring
from trim_lightning.pipeline.opening import for_helper, open_store, warn_of_reading
from trim_lightning.pipeline.outputs import describe, writable_directory, write_bad_records
from trim_lightning.pipeline.select import Selection, run_selection
from trim_lightning.pipeline.summary import training_summary
from trim_lightning.pipeline.training_inputs import (
    in_one_order,
    look_at_trainee,
    make_trainee,
    open_coreset,
    warn_of_inputs,
    warn_of_unused,
)
from trim_lightning.pipeline.training_outputs import (
    ADAPTER,
    MODEL,
    RESULTS,
    clear_training,
    copy_result,
    selection_costs,
    tuning_metrics,
    write_training_manifest,
)
from trim_lightning.runs.names import BAD_RECORDS, CORESET, METRICS, PREDICTIONS, SELECTION
from trim_lightning.settings.schema import TrainSettings
from trim_lightning.stages.trainee import Trainee
from trim_lightning.store import Entry, StageKey, Store
from trim_lightning.store.ledger import Ledger
from trim_lightning.tokens.tokenized import TokenizedRecords
from trim_lightning.tracking.open import tracked
from trim_lightning.tracking.tracker import Tracker


@dataclass(frozen=True)
class Training:
    """A finished training run.

    Attributes:
        directory: Where its files are.
        metrics: Content of ``metrics.json``.
        manifest: Content of ``manifest.json``.
        selection: The selection, or None if the coreset was given.
        summary: The table that a user sees at the end.
    """

    directory: Path
    metrics: dict[str, Any]
    manifest: dict[str, Any]
    selection: Selection | None
    summary: str

    def attach(self, tracker: Tracker) -> None:
        """Attach scores, coreset, adapter and results to a tracker, each linked to what it was made from."""
        if self.selection is not None:
            self.selection.attach(tracker)
        used = ["coreset"] if self.selection is not None else []
        tracker.artifact("adapter", "model", [self.directory / ADAPTER, self.directory / MODEL], uses=used)
        tracker.artifact("evaluation", "evaluation", [self.directory / name for name in RESULTS], uses=["adapter"])


def train(
    settings: TrainSettings, command: str | None = None, tell: Callable[[Selection], None] | None = None
) -> Training:
    """Select (or read) a coreset, fine-tune on it, evaluate before and after, and write the contract's files.

    The selection's report shows ``command`` as the one that repeats the run. ``tell`` is given the selection as soon as
    it is made, long before the training ends.

    Raises:
        UserError: for anything that the user can mend.
    """
    check_training(settings)
    settings = for_helper(replace(settings, method=whole_method(settings.method)))
    directory = writable_directory(settings.paths.output_dir, "paths.output_dir")
    store = open_store(settings)
    with tracked(settings.logger, directory, job_type="train", config=asdict(settings)) as tracker:
        training = run_training(settings, directory, store, tracker.training_logger, command, tell)
        if training.selection is not None:
            training.selection.show(tracker)
        tracker.metrics(training.metrics)
        training.attach(tracker)
    return training


def run_training(
    settings: TrainSettings,
    directory: Path,
    store: Store,
    training_logger: Callable[[], Any],
    command: str | None,
    tell: Callable[[Selection], None] | None = None,
) -> Training:
    """Select, evaluate, fine-tune, evaluate, write, reporting to no tracker but the curves of the training.

    Raises:
        UserError: for anything that the user can mend.
    """
    ledger = Ledger()
    trainee = make_trainee(settings, store, ledger)
    look_at_trainee(settings, trainee)
    measuring = open_measuring(settings, store)
    held_out = measuring.held_out
    measured = measured_records(settings, held_out)
    for what, records in measuring.named.items():
        warn_of_reading(what, records, ledger)
    stop = check_measuring(measuring, settings, trainee, directory)

    selection = None
    if settings.coreset.path is None:
        selection = run_selection(
            settings, directory / SELECTION, store, command=command, measured=measured, keep_helpers=True
        )
        ledger.warnings += selection.leaks  # already told
        if tell is not None and store.processes.leads:
            tell(selection)
        if not len(selection.chosen):
            raise UserError(
                "selection: no record of the pool is left to train on; loosen the filters of selection (min_tokens, "
                "max_tokens, cap, dedup), or the pool's"
            )
        coreset = open_coreset(settings, directory / SELECTION / CORESET, store)
    else:
        warn_of_unused(settings, ledger)
        coreset = open_coreset(settings, Path(settings.coreset.path), store)
    clear_training(directory, settings.coreset.path)
    given = {} if selection is not None else {"coreset": coreset}
    for what, records in given.items():
        warn_of_reading(what, records, ledger)
    write_bad_records({**given, **measuring.named}, directory / BAD_RECORDS)

    ordered = in_one_order(coreset, store)
    coreset_tokens, coreset_entry = trainee.tokenize(ordered)
    told = {} if selection is not None else measured  # the selection has told what it shares with them
    warn_of_inputs(settings, trainee, ordered, coreset_tokens, told, measuring, ledger)
    before, after = [], []
    if held_out is not None:
        before = evaluate(trainee, None, held_out, settings.evaluation, title="before")
    tuned = trainee.fine_tune(settings.train, coreset_tokens, coreset_entry.key, stop, training_logger)
    if held_out is not None:
        after = evaluate(trainee, tuned, held_out, settings.evaluation, title="after")
    task_metrics, details = run_tasks(settings, trainee, tuned) if settings.evaluation.tasks else ({}, {})
    store.dismiss_helpers()
    trainee.release()  # nothing runs it any more

    lines = paired(before, after)
    metrics = {**tuning_metrics(tuned), **selection_costs(selection)}
    if held_out is not None:
        write_text("".join(json.dumps(line) + "\n" for line in lines), directory / PREDICTIONS)
        metrics |= summarise(lines, settings.evaluation)
    metrics |= task_metrics
    copy_result(tuned, directory)
    write_text(json.dumps(metrics, indent=2) + "\n", directory / METRICS)
    inputs: dict[str, Any] = {
        "coreset": {"name": coreset.name, "sha256": coreset.sha256, "rows": len(coreset)},
        "trainee": trainee.source.describe(),
        **({} if held_out is None else {"evaluation": describe(held_out)}),
        **({"early_stop": describe(own)} if (own := measuring.named.get("early_stop")) else {}),
    }
    counts = {
        "coreset": len(coreset),
        "truncated": coreset_tokens.truncated,
        "held_out": 0 if held_out is None else len(held_out),
    }
    manifest = write_training_manifest(settings, inputs, counts, ledger, selection, tuned, details, directory)
    return Training(directory, metrics, manifest, selection, training_summary(metrics, manifest, directory))


def check_measuring(
    measuring: MeasuringRecords, settings: TrainSettings, trainee: Trainee, directory: Path
) -> tuple[TokenizedRecords, StageKey] | None:
    """`MeasuringRecords.check`; where it refuses, the lines that could not be read are listed all the same."""
    try:
        return measuring.check(settings, trainee)
    except UserError:
        if any(records.bad for records in measuring.named.values()):
            write_bad_records(measuring.named, directory / BAD_RECORDS)
        raise


def run_tasks(settings: TrainSettings, trainee: Trainee, tuned: Entry) -> tuple[dict[str, float], dict[str, Any]]:
    """lm-eval tasks before and after; metrics and what the scores depend on."""
    from trim_lightning.evaluation.harness.run import task_scores

    before = task_scores(trainee, None, settings.evaluation, settings.seed)
    after = task_scores(trainee, tuned, settings.evaluation, settings.seed)
    metrics = {f"eval/{name}_before": value for name, value in before.metrics.items()}
    metrics.update({f"eval/{name}": value for name, value in after.metrics.items()})
    return metrics, after.details
