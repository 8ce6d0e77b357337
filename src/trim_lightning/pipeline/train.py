"""The whole training run, top to bottom: select → evaluate → fine-tune → evaluate → write."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trim_lightning.errors import UserError
from trim_lightning.evaluation.evaluate import evaluate, measures, paired, summarise
from trim_lightning.models.source import ModelSource, find_model
from trim_lightning.pipeline.outputs import clear, copy_atomically, writable_directory, write_text
from trim_lightning.pipeline.select import Selection, check_trainer, for_helper, open_store, run_selection
from trim_lightning.pipeline.summary import training_summary
from trim_lightning.privacy.paths import LOCAL, run_name
from trim_lightning.records.record import Turn
from trim_lightning.records.record_file import LineSource, ReadOptions, RecordFile, index
from trim_lightning.records.sources import open_records
from trim_lightning.runs.manifest import write_manifest
from trim_lightning.selection.budget import check_settings
from trim_lightning.settings.schema import SourceSettings, TrainSettings
from trim_lightning.stages.trainee import Trainee
from trim_lightning.store import Entry, Store
from trim_lightning.store.ledger import Ledger
from trim_lightning.tracking.tracker import Tracker, open_tracker

log = logging.getLogger(__name__)
RESULTS = ("metrics.json", "predictions.jsonl", "manifest.json")
ADAPTER, MODEL = "adapter", "model"
COPY = "coreset.jsonl"
GENERATED_SEED = 2000  # held-out generated records come from another stream than pool (0) and targets (1000)


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


def train(settings: TrainSettings, command: str | None = None) -> Training:
    """Select (or read) a coreset, fine-tune on it, evaluate before and after, and write the contract's files.

    Args:
        settings: All keys.
        command: The command line that repeats this run, for the selection's report.

    Raises:
        UserError: for anything that the user can mend.
    """
    check_training(settings)
    settings = for_helper(settings)
    directory = writable_directory(settings.paths.output_dir, "paths.output_dir")
    store = open_store(settings)
    ledger = Ledger()
    name = run_name(directory)
    tracker = open_tracker(settings.logger, directory, job_type="train", name=name, config=asdict(settings))
    succeeded = False
    try:
        training = _train(settings, directory, store, ledger, tracker, command)
        if training.selection is not None:
            training.selection.show(tracker)
        tracker.metrics(training.metrics)
        log_artifacts(tracker, training)
        succeeded = True
        return training
    finally:
        tracker.finish(succeeded)


def _train(
    settings: TrainSettings, directory: Path, store: Store, ledger: Ledger, tracker: Tracker, command: str | None
) -> Training:
    held_out = open_held_out(settings, store)
    trainee = make_trainee(settings, store, ledger)

    selection = None
    if settings.coreset.path is None:
        selection = run_selection(settings, directory / "selection", store, command=command)
        coreset = open_coreset(settings, directory / "selection" / "coreset.jsonl", store)
    else:
        store.dismiss_helpers()
        coreset = open_coreset(settings, Path(settings.coreset.path), store)
    clear_training(directory, settings.coreset.path)

    coreset_tokens, coreset_entry = trainee.tokenize(in_one_order(coreset, store))
    watched = None
    if held_out is not None:
        tokens, entry = trainee.tokenize(held_out)
        watched = (tokens, entry.key)
        warn_of_held_out(trainee.max_length, held_out, tokens.truncated, coreset, ledger)
    before = None if held_out is None else evaluate(trainee, None, held_out, settings.evaluation, title="before")
    tuned = trainee.fine_tune(settings.train, coreset_tokens, coreset_entry.key, watched, tracker.training_logger)
    after = None if held_out is None else evaluate(trainee, tuned, held_out, settings.evaluation, title="after")

    metrics: dict[str, Any] = {**tuning_metrics(tuned), **selection_costs(selection)}
    if before is not None and after is not None:
        lines = paired(before, after)
        write_text("".join(json.dumps(line) + "\n" for line in lines), directory / "predictions.jsonl")
        metrics.update(summarise(lines, settings.evaluation))
    details: dict[str, Any] = {}
    if settings.evaluation.tasks:
        task_metrics, details = run_tasks(settings, trainee, tuned)
        metrics.update(task_metrics)

    copy_result(tuned, directory)
    write_text(json.dumps(metrics, indent=2) + "\n", directory / "metrics.json")
    manifest = write_manifest(
        directory / "manifest.json",
        config=asdict(settings),
        inputs={
            "coreset": {"name": coreset.name, "sha256": coreset.sha256, "rows": len(coreset)},
            "trainee": {"name": trainee.source.name, "sha256": trainee.source.digest},
            **({} if held_out is None else {"evaluation": describe(held_out)}),
            **({} if selection is None else selection.manifest["inputs"]),
        },
        counts={
            "coreset": len(coreset),
            "truncated": coreset_tokens.truncated,
            "held_out": 0 if held_out is None else len(held_out),
            **({} if selection is None else {"pool": selection.manifest["counts"]["pool"]}),
        },
        ledger=ledger,
        selection=None if selection is None else selection.manifest,
        adapter=adapter_digest(tuned),
        evaluation=details,
    )
    return Training(directory, metrics, manifest, selection, training_summary(metrics, manifest, directory))


def check_training(settings: TrainSettings) -> None:
    """Check keys by themselves and together, before anything is read.

    Raises:
        UserError: naming the keys.
    """
    check_settings(settings)
    check_trainer(settings.trainer)
    evaluation = settings.evaluation
    if evaluation.path is not None and evaluation.generated:
        raise UserError("evaluation.path and evaluation.generated=true: two held-out sets; give one of them")
    if evaluation.tasks:
        from trim_lightning.evaluation.harness.run import check_tasks

        check_tasks(
            evaluation.tasks,
            tasks_path=evaluation.tasks_path,
            data_dir=evaluation.data_dir,
            num_fewshot=evaluation.num_fewshot,
        )
    if (evaluation.objective or "").startswith("eval/") and not (
        evaluation.path or evaluation.generated or evaluation.tasks
    ):
        raise UserError(
            f"evaluation.objective={evaluation.objective} needs something to evaluate; give evaluation.path=FILE, "
            "evaluation=generated or evaluation.tasks"
        )
    if settings.train.early_stop is not None and evaluation.path is None and not evaluation.generated:
        raise UserError("train.early_stop needs held-out records; give evaluation.path=FILE")


def open_held_out(settings: TrainSettings, store: Store) -> RecordFile | None:
    """The held-out records, or None if there are none.

    Raises:
        UserError: if they cannot be read, or a measure is asked that they do not allow.
    """
    evaluation, target = settings.evaluation, settings.target
    if evaluation.generated:
        if target.source != "generated":
            raise UserError("evaluation.generated=true needs target=generated; give evaluation.path=FILE instead")
        source = replace(
            SourceSettings(),
            families=target.families,
            per_family=evaluation.limit or 50,
            generator_seed=GENERATED_SEED + evaluation.seed,
        )
        held_out = open_records(source, what="evaluation", seed=evaluation.seed, spool=store.spool)
    elif evaluation.path is not None:
        kind = "parquet" if evaluation.path.endswith(".parquet") else "jsonl"
        source = replace(SourceSettings(), source=kind, path=evaluation.path)
        held_out = open_records(source, what="evaluation", seed=evaluation.seed, spool=store.spool)
        if evaluation.limit is not None and evaluation.limit < len(held_out):
            held_out = open_records(
                source, what="evaluation", seed=evaluation.seed, spool=store.spool, sample=evaluation.limit
            )
    else:
        return None
    measures(held_out, evaluation)
    return held_out


def make_trainee(settings: TrainSettings, store: Store, ledger: Ledger) -> Trainee:
    """The model to fine-tune: the scorer's own, or ``train.model``."""
    model = settings.model
    if settings.train.model is not None:
        model = replace(model, path=settings.train.model, revision=None)
    try:
        source: ModelSource = find_model(model, store)
    except UserError as error:
        named = str(error) if settings.train.model is None else str(error).replace("model.path=", "train.model=", 1)
        raise UserError(named) from None
    return Trainee(
        source,
        model.dtype,
        store,
        ledger,
        trainer=settings.trainer,
        seed=settings.seed if settings.train.seed is None else settings.train.seed,
        max_length=settings.max_length,
        mode=settings.train.mode,
    )


def open_coreset(settings: TrainSettings, path: Path, store: Store) -> RecordFile:
    """The coreset's records; those of a selection are read with the pool's field names."""
    pool = settings.pool
    kind = "parquet" if path.suffix == ".parquet" else "jsonl"
    source = replace(SourceSettings(), source=kind, path=str(path))
    if settings.coreset.path is None:
        source = replace(source, prompt_field=pool.prompt_field, response_field=pool.response_field)
    return open_records(source, what="coreset", seed=0, spool=store.spool)


def in_one_order(coreset: RecordFile, store: Store) -> RecordFile:
    """The coreset's conversations, sorted, so that how a method ranks what it selects changes no training.

    Two methods that select the same records then share one fine-tuning, and the difference between two methods holds
    no luck of the order (our choice).
    """
    conversations = [[asdict(turn) for turn in coreset.record(row).turns] for row in range(len(coreset))]
    lines = sorted(json.dumps({"messages": messages}) + "\n" for messages in conversations)
    text = "".join(lines)

    def build(directory: Path) -> None:
        (directory / COPY).write_text(text, encoding="utf-8")

    digest = hashlib.sha256(text.encode()).hexdigest()
    path = store.spool("conversations", {"sha256": digest}, build) / COPY
    return index(LineSource(path, label=coreset.name, name=coreset.name, what="coreset"), ReadOptions())


def warn_of_held_out(
    max_length: int, held_out: RecordFile, truncated: int, coreset: RecordFile, ledger: Ledger
) -> None:
    """Say what makes a measurement on the held-out records mean less than it seems to."""
    if truncated:
        ledger.warn(
            f"{truncated} of the {len(held_out)} held-out records are longer than {max_length} tokens: cut, and "
            "measured on what is left"
        )
    learnt = {prompt_turns(coreset, row) for row in range(len(coreset))} - {(), (Turn("user", ""),)}
    known = [held_out.id(row) for row in range(len(held_out)) if prompt_turns(held_out, row) in learnt]
    if known:
        names = ", ".join(known[:5]) + (", ..." if len(known) > 5 else "")
        ledger.warn(f"{len(known)} of the {len(held_out)} held-out records have a prompt of the coreset: {names}")


def prompt_turns(records: RecordFile, row: int) -> tuple[Turn, ...]:
    """What a record asks: its turns without the last response."""
    turns = records.record(row).turns
    return turns[:-1] if turns and turns[-1].role == "assistant" else turns


def run_tasks(settings: TrainSettings, trainee: Trainee, tuned: Entry) -> tuple[dict[str, float], dict[str, Any]]:
    """lm-eval tasks before and after; metrics and what the scores depend on."""
    from trim_lightning.evaluation.harness.stage import task_scores

    before = task_scores(trainee, None, settings.evaluation, settings.seed)
    after = task_scores(trainee, tuned, settings.evaluation, settings.seed)
    metrics = {f"eval/{name}_before": value for name, value in before.metrics.items()}
    metrics.update({f"eval/{name}": value for name, value in after.metrics.items()})
    return metrics, after.details


def tuning_metrics(tuned: Entry) -> dict[str, Any]:
    """``train/...`` metrics."""
    names = ("loss", "records", "tokens", "trained_tokens", "steps", "seconds")
    return {f"train/{name}": tuned.facts.get(name) for name in names}


def objective(metrics: Mapping[str, Any], name: str | None) -> float | None:
    """The number that a sweeper optimises.

    Args:
        metrics: Content of ``metrics.json``.
        name: ``evaluation.objective``; None is the held-out loss where there is one.

    Raises:
        UserError: if there is no such number.
    """
    value = metrics.get(name or "eval/nll")
    if name is None:
        return value
    if not isinstance(value, int | float):
        numbers = ", ".join(found for found, other in metrics.items() if isinstance(other, int | float))
        raise UserError(f"evaluation.objective={name}: metrics.json has no such number; it has {numbers}")
    return float(value)


def selection_costs(selection: Selection | None) -> dict[str, Any]:
    """``selection/...`` and ``select/...`` metrics."""
    if selection is None:
        return {}
    counts, stages = selection.manifest["counts"], selection.manifest["stages"]
    return {
        "selection/records": counts["selected"],
        "selection/tokens": counts["selected_tokens"],
        "select/seconds": round(sum(stage["seconds"] for stage in stages.values()), 3),
    }


def clear_training(directory: Path, given: str | None) -> None:
    """Remove an earlier training's files, so that no mixture of two runs is left if this one is killed.

    Args:
        directory: The output directory.
        given: ``coreset.path``: with it an earlier selection goes too, unless that is where the file is.
    """
    for name in (*RESULTS, LOCAL):
        (directory / name).unlink(missing_ok=True)
    for name in (ADAPTER, MODEL):
        shutil.rmtree(directory / name, ignore_errors=True)
    selection = directory / "selection"
    if given is not None and selection.is_dir() and Path(given).expanduser().resolve().parent != selection.resolve():
        clear(selection)
        if not any(selection.iterdir()):
            selection.rmdir()


def copy_result(tuned: Entry, directory: Path) -> None:
    """Put ``adapter/`` (or ``model/``) into the output directory, whole or not at all."""
    for name in (ADAPTER, MODEL):
        source, final = tuned.path / name, directory / name
        if not source.is_dir():
            continue
        temporary = directory / f".{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            copy = temporary / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy_atomically(file, copy)  # unlike shutil.copytree it raises the system's own error
        temporary.rename(final)


def adapter_digest(tuned: Entry) -> dict[str, Any]:
    """Name and sha256 of the trained weights."""
    from trim_lightning.store.store import sha256_of

    files = sorted([*tuned.path.glob("adapter/*.safetensors"), *tuned.path.glob("model/*.safetensors")])
    return {file.name: sha256_of(file) for file in files}


def describe(records: RecordFile) -> dict[str, Any]:
    """An input's line in the manifest."""
    return {
        "name": records.name,
        "sha256": records.sha256,
        "rows": len(records),
        "source_rows": records.source_rows,
    }


def log_artifacts(tracker: Tracker, training: Training) -> None:
    """Attach scores, coreset, adapter and results, each linked to what it was made from."""
    directory = training.directory
    if training.selection is not None:
        folder = training.selection.directory
        tracker.artifact("scores", "scores", [folder / "scores.parquet", folder / "manifest.json"])
        tracker.artifact("coreset", "coreset", [folder / "coreset.jsonl"], uses=["scores"])
    used = ["coreset"] if training.selection is not None else []
    tracker.artifact("adapter", "model", [directory / "adapter", directory / "model"], uses=used)
    files = [directory / name for name in RESULTS]
    tracker.artifact("evaluation", "evaluation", files, uses=["adapter"])
