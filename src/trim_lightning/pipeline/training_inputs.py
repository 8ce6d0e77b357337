"""What a training starts from: held-out records, the trainee, the coreset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from trim_lightning.errors import UserError
from trim_lightning.evaluation.evaluate import measures
from trim_lightning.models.source import ModelSource, find_model
from trim_lightning.pipeline.leaks import warn_of_shared
from trim_lightning.records.indexing import index
from trim_lightning.records.record import conversation_of
from trim_lightning.records.record_file import FIELD_KEYS, LineSource, ReadOptions, RecordFile
from trim_lightning.records.shared import first_ids, questions, text_of
from trim_lightning.records.sources import check_source, open_records
from trim_lightning.runs.names import CORESET
from trim_lightning.selection.responses import missing_responses
from trim_lightning.settings.schema import EvaluationSettings, SourceSettings, TrainSettings
from trim_lightning.stages.look import look_at
from trim_lightning.stages.trainee import Trainee
from trim_lightning.store import StageKey, Store
from trim_lightning.store.ledger import Ledger
from trim_lightning.tokens.tokenized import TokenizedRecords

SHOWN = 60  # characters of a record that a warning shows
GENERATED_SEED = 2000  # held-out generated records come from another stream than pool (0) and targets (1000)


def held_out_source(evaluation: EvaluationSettings, path: str) -> SourceSettings:
    """Where held-out records are read, and by which keys."""
    shared = (*FIELD_KEYS, "bad_records", "split")
    return replace(file_source(path), **{name: getattr(evaluation, name) for name in shared})


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
    elif evaluation.path is not None:
        source = held_out_source(evaluation, evaluation.path)
    else:
        return None
    read = partial(open_records, source, what="evaluation", seed=evaluation.seed, spool=store.spool)
    held_out = read()
    if not evaluation.generated and evaluation.limit is not None and evaluation.limit < len(held_out):
        held_out = read(sample=evaluation.limit)
    measures(held_out, evaluation)
    return held_out


def file_source(path: Any) -> SourceSettings:
    """How to read files of records: by their content."""
    return replace(SourceSettings(), source="file", path=path)


def make_trainee(settings: TrainSettings, store: Store, ledger: Ledger) -> Trainee:
    """The model to fine-tune: the scorer's own, or ``train.model``."""
    model = settings.model
    if settings.train.model is not None:
        model = replace(model, path=settings.train.model, revision=None, base=settings.train.base)
    with named_as_trainee(settings):
        source: ModelSource = find_model(model, store)
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


@contextmanager
def named_as_trainee(settings: TrainSettings) -> Iterator[None]:
    """Within it a mistake names the keys of the trainee, if that is not the scorer."""
    try:
        yield
    except UserError as error:
        named = str(error)
        if settings.train.model is not None:
            named = named.replace("model.path=", "train.model=", 1).replace("model.base", "train.base")
        raise UserError(named) from None


def look_at_trainee(settings: TrainSettings, trainee: Trainee) -> None:
    """Load the trainee once, so that a class is refused before a record is read.

    Files that are not there are refused before that.

    Raises:
        UserError: see `trim_lightning.stages.look.look_at`.
    """
    if settings.coreset.path is not None:
        check_source(file_source(str(settings.coreset.path)), "coreset")
    else:
        check_source(settings.pool, "pool")
    if settings.evaluation.path is not None:
        check_source(held_out_source(settings.evaluation, settings.evaluation.path), "evaluation")
    with named_as_trainee(settings):
        look_at(trainee, settings.train if settings.train.mode == "lora" else None)


def open_coreset(settings: TrainSettings, path: Path, store: Store) -> RecordFile:
    """The coreset's records; those of a selection are read with the pool's field names."""
    pool = settings.pool
    source = file_source(str(path))
    if settings.coreset.path is None:
        source = replace(source, **{name: getattr(pool, name) for name in FIELD_KEYS})
    return open_records(source, what="coreset", seed=0, spool=store.spool)


def in_one_order(coreset: RecordFile, store: Store) -> RecordFile:
    """The coreset's conversations, sorted, so that how a method ranks what it selects changes no training.

    Two methods that select the same records then share one fine-tuning, and the difference between two methods holds
    no luck of the order (our choice).
    """
    lines = sorted(json.dumps(conversation_of(coreset.record(row).turns)) + "\n" for row in range(len(coreset)))
    text = "".join(lines)

    def build(directory: Path) -> None:
        (directory / CORESET).write_text(text, encoding="utf-8")

    digest = hashlib.sha256(text.encode()).hexdigest()
    path = store.spool("conversations", {"sha256": digest}, build) / CORESET
    return index(LineSource(path, label=coreset.name, name=coreset.name, what="coreset"), ReadOptions())


def open_watched(settings: TrainSettings, store: Store, held_out: RecordFile | None) -> RecordFile | None:
    """The records that early stop watches; None without an early stop.

    Raises:
        UserError: if they cannot be read.
    """
    tuning = settings.train
    if tuning.early_stop is None or tuning.early_stop_path is None:
        return None if tuning.early_stop is None else held_out
    try:
        return open_records(file_source(tuning.early_stop_path), what="early_stop", seed=0, spool=store.spool)
    except UserError as error:
        raise UserError(str(error).replace("early_stop.path=", "train.early_stop_path=", 1)) from None


def measured_records(settings: TrainSettings, held_out: RecordFile | None) -> dict[str, RecordFile]:
    """All records that measure the model, by what they are: held-out ones, and the test records of local tasks."""
    measured = {} if held_out is None else {"held-out records": held_out}
    if settings.evaluation.tasks:
        from trim_lightning.evaluation.harness.tasks import local_test_files

        for task, path in local_test_files(settings.evaluation).items():
            source = LineSource(path, label=f"evaluation.data_dir: {path.name}", name=path.name, what="evaluation")
            with suppress(
                UserError
            ):  # passages with questions are in no layout; lm-eval says what is wrong with others
                measured[f"test records of {task}"] = index(source, ReadOptions())
    return measured


def tokenize_watched(trainee: Trainee, watched: RecordFile) -> tuple[TokenizedRecords, StageKey]:
    """The tokens that early stop watches, and their key.

    Raises:
        UserError: if none of them is a response token.
    """
    tokens, entry = trainee.tokenize(watched)
    if not tokens.content_lengths("response").any():
        raise UserError(f"train.early_stop: {watched.name} has no response token to watch; give records with responses")
    return tokens, entry.key


def warn_of_inputs(
    settings: TrainSettings,
    trainee: Trainee,
    coreset: RecordFile,
    tokens: TokenizedRecords,
    measured: Mapping[str, RecordFile],
    held_out: RecordFile | None,
    watched: RecordFile | None,
    ledger: Ledger,
) -> None:
    """Say what a training leaves out, and what makes its result look better than it is.

    ``measured`` are the records to be looked for in the coreset, by what they are.
    """
    warn_of_coreset(trainee.max_length, coreset, tokens, ledger)
    asked = questions(coreset) if measured else set()
    for what, records in measured.items():
        warn_of_shared(records, what, asked, "the coreset", ledger)
    if held_out is not None:
        warn_of_held_out(trainee.max_length, held_out, trainee.tokenize(held_out)[0], ledger)
    if watched is not None:
        warn_of_early_stop(settings, watched, held_out, coreset, ledger)


def warn_of_held_out(max_length: int, held_out: RecordFile, tokens: TokenizedRecords, ledger: Ledger) -> None:
    """Say what makes a measurement on the held-out records mean less than it seems to."""
    if tokens.truncated:
        ledger.warn(
            f"{tokens.truncated} of the {len(held_out)} held-out records are longer than {max_length} tokens: cut, and "
            "measured on what is left"
        )
    missing = missing_responses(held_out, tokens, max_length)
    if 0 < len(missing) < len(held_out):  # where none has one, answers alone are judged
        ledger.warn(
            f"{len(missing)} of the {len(held_out)} held-out records have no response token ({missing}), so that they "
            f"count for nothing in the loss: {first_ids(held_out, missing.rows.tolist())}"
        )


def warn_of_coreset(max_length: int, coreset: RecordFile, tokens: TokenizedRecords, ledger: Ledger) -> None:
    """Say which records of the coreset a training leaves out."""
    missing = missing_responses(coreset, tokens, max_length)
    if len(missing):
        first = text_of(coreset.record(int(missing.rows[0])).turns)[:SHOWN]
        ledger.warn(
            f"{len(missing)} of the {len(coreset)} records of the coreset have no response token ({missing}), so that "
            f"the training leaves them out; the first begins: {first!r}"
        )


def warn_of_early_stop(
    settings: TrainSettings, watched: RecordFile, held_out: RecordFile | None, coreset: RecordFile, ledger: Ledger
) -> None:
    """Say where the records that early stop watches are also those that are reported, or trained on."""
    given = f"records of train.early_stop_path={settings.train.early_stop_path}"
    if held_out is watched:
        ledger.warn(
            f"train.early_stop={settings.train.early_stop} watches the {len(held_out)} held-out records that are "
            "reported: the epoch that is kept was chosen on them, which flatters it; give train.early_stop_path=FILE"
        )
        return
    if held_out is not None:
        warn_of_shared(watched, given, questions(held_out), "the held-out records", ledger)
    warn_of_shared(watched, given, questions(coreset), "the coreset", ledger)
