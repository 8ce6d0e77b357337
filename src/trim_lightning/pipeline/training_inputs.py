"""What a training starts from: the trainee and the coreset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

from trim_lightning.errors import UserError
from trim_lightning.models.source import ModelSource, find_model
from trim_lightning.pipeline.leaks import warn_of_shared
from trim_lightning.pipeline.measuring import (
    MeasuringRecords,
    file_source,
    held_out_source,
    warn_of_answers,
    warn_of_early_stop,
    warn_of_held_out,
    warn_of_watched,
)
from trim_lightning.records.indexing import index
from trim_lightning.records.record import conversation_of
from trim_lightning.records.record_file import FIELD_KEYS, LineSource, ReadOptions, RecordFile
from trim_lightning.records.shared import questions, text_of
from trim_lightning.records.sources import check_source, open_records
from trim_lightning.runs.names import CORESET
from trim_lightning.selection.responses import missing_responses
from trim_lightning.settings.schema import TrainSettings
from trim_lightning.stages.look import look_at
from trim_lightning.stages.trainee import Trainee
from trim_lightning.store import Store
from trim_lightning.store.ledger import Ledger
from trim_lightning.tokens.tokenized import TokenizedRecords

SHOWN = 60  # characters of a record that a warning shows


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


def warn_of_unused(settings: TrainSettings, ledger: Ledger) -> None:
    """Say which keys of a selection do nothing, because the coreset is given."""
    usual = type(settings.selection)()
    given = [f"selection.{item.name}" for item in fields(usual)
             if getattr(settings.selection, item.name) != getattr(usual, item.name)]  # fmt: skip
    given += [f"{name}.path" for name in ("pool", "target") if getattr(settings, name).path is not None]
    if given:
        verb = "changes" if len(given) == 1 else "change"
        ledger.warn(f"coreset.path is given, so that nothing is selected: {', '.join(given)} {verb} nothing")


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


def warn_of_inputs(
    settings: TrainSettings,
    trainee: Trainee,
    coreset: RecordFile,
    tokens: TokenizedRecords,
    measured: Mapping[str, RecordFile],
    measuring: MeasuringRecords,
    ledger: Ledger,
) -> None:
    """Say what a training leaves out, and what makes its result look better than it is.

    ``measured`` are the records to be looked for in the coreset, by what they are.
    """
    warn_of_coreset(trainee.max_length, coreset, tokens, ledger)
    asked = questions(coreset) if measured else set()
    for what, records in measured.items():
        warn_of_shared(records, what, asked, "the coreset", ledger)
    held_out = measuring.held_out
    if held_out is not None:
        limit = settings.evaluation.limit
        if limit is not None and not settings.evaluation.generated and limit > len(held_out):
            ledger.warn(f"evaluation.limit={limit}: there are only {len(held_out)} held-out records; all are measured")
        warn_of_held_out(trainee.max_length, held_out, trainee.tokenize(held_out)[0], ledger)
        warn_of_answers(settings.evaluation, held_out, ledger)
    if measuring.watched is not None:
        if measuring.watched is not held_out:
            warn_of_watched(trainee.max_length, measuring.watched, trainee.tokenize(measuring.watched)[0], ledger)
        warn_of_early_stop(settings, measuring.watched, held_out, coreset, ledger)


def warn_of_coreset(max_length: int, coreset: RecordFile, tokens: TokenizedRecords, ledger: Ledger) -> None:
    """Say which records of the coreset a training leaves out."""
    missing = missing_responses(coreset, tokens, max_length)
    if len(missing):
        first = text_of(coreset.record(int(missing.rows[0])).turns)[:SHOWN]
        ledger.warn(
            f"{len(missing)} of the {len(coreset)} records of the coreset have no response token ({missing}), so that "
            f"the training leaves them out; the first begins: {first!r}"
        )
