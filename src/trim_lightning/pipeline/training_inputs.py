"""What a training starts from: held-out records, the trainee, the coreset."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from trim_lightning.errors import UserError
from trim_lightning.evaluation.evaluate import measures
from trim_lightning.models.source import ModelSource, find_model
from trim_lightning.records.indexing import index
from trim_lightning.records.record import Turn
from trim_lightning.records.record_file import LineSource, ReadOptions, RecordFile
from trim_lightning.records.sources import open_records
from trim_lightning.runs.names import CORESET
from trim_lightning.settings.schema import SourceSettings, TrainSettings
from trim_lightning.stages.trainee import Trainee
from trim_lightning.store import Store
from trim_lightning.store.ledger import Ledger

GENERATED_SEED = 2000  # held-out generated records come from another stream than pool (0) and targets (1000)


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
        kind = "parquet" if evaluation.path.endswith(".parquet") else "jsonl"
        source = replace(SourceSettings(), source=kind, path=evaluation.path)
    else:
        return None
    read = partial(open_records, source, what="evaluation", seed=evaluation.seed, spool=store.spool)
    held_out = read()
    if not evaluation.generated and evaluation.limit is not None and evaluation.limit < len(held_out):
        held_out = read(sample=evaluation.limit)
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
        (directory / CORESET).write_text(text, encoding="utf-8")

    digest = hashlib.sha256(text.encode()).hexdigest()
    path = store.spool("conversations", {"sha256": digest}, build) / CORESET
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
