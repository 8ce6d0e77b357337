"""The records that measure a training: held-out ones, and those that early stop watches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from trim_lightning.errors import UserError
from trim_lightning.evaluation.evaluate import answered, has_options, measurable, measures
from trim_lightning.pipeline.leaks import warn_of_shared
from trim_lightning.records.indexing import index
from trim_lightning.records.record_file import FIELD_KEYS, LineSource, ReadOptions, RecordFile
from trim_lightning.records.shared import first_ids, questions
from trim_lightning.records.sources import open_records
from trim_lightning.selection.responses import missing_responses
from trim_lightning.settings.schema import EvaluationSettings, SourceSettings, TrainSettings
from trim_lightning.stages.trainee import Trainee
from trim_lightning.store import StageKey, Store
from trim_lightning.store.ledger import Ledger
from trim_lightning.tokens.tokenized import TokenizedRecords

GENERATED_SEED = 2000  # held-out generated records come from another stream than pool (0) and targets (1000)


@dataclass(frozen=True)
class MeasuringRecords:
    """What measures a training.

    Attributes:
        held_out: Records whose loss and answers are reported; None without any.
        watched: Records that early stop watches, the held-out ones or others; None without an early stop.
    """

    held_out: RecordFile | None
    watched: RecordFile | None

    @property
    def named(self) -> dict[str, RecordFile]:
        """Those that there are, by what they are; the same records once."""
        found = {} if self.held_out is None else {"evaluation": self.held_out}
        if self.watched is not None and self.watched is not self.held_out:
            found["early_stop"] = self.watched
        return found

    def check(self, settings: TrainSettings, trainee: Trainee) -> tuple[TokenizedRecords, StageKey] | None:
        """See that they can measure, which needs no model: a refusal should not come after a selection's hours.

        Returns:
            The tokens that early stop watches, and their key.

        Raises:
            UserError: if a measure is asked for that no record allows, or there is nothing to measure or to watch.
        """
        if self.held_out is not None:
            measurable(trainee, self.held_out, settings.evaluation)
        return None if self.watched is None else tokenize_watched(trainee, self.watched)


def open_measuring(settings: TrainSettings, store: Store) -> MeasuringRecords:
    """Open both.

    Raises:
        UserError: if they cannot be read, or a measure is asked that they do not allow.
    """
    held_out = open_held_out(settings, store)
    return MeasuringRecords(held_out, open_watched(settings, store, held_out))


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
            # passages with questions are in no layout; lm-eval says what is wrong with others
            with suppress(UserError):
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


def undecided(asked: str, rows: Sequence[int]) -> bool:
    """True if a measure would be taken of these records, but for the first of all."""
    return asked == "auto" and len(rows) > 0 and 0 not in rows


def warn_of_answers(evaluation: EvaluationSettings, held_out: RecordFile, ledger: Ledger) -> None:
    """Say of how many records exact match and option accuracy are, where that is not all of them."""
    wanted, size = measures(held_out, evaluation), len(held_out)
    rows = answered(held_out)
    known = [row for row in rows if has_options(held_out.object(row))]
    if wanted["option_accuracy"]:
        if len(known) < size:
            ledger.warn(
                f"option_accuracy is of {len(known)} of the {size} held-out records: the others have no choices with "
                "their answer among them"
            )
    elif wanted["exact_match"]:
        if len(rows) < size:
            ledger.warn(f"exact_match is of {len(rows)} of the {size} held-out records: the others have no answer")
    elif undecided(evaluation.exact_match, rows) or undecided(evaluation.option_accuracy, known):
        ledger.warn(
            f"{len(rows)} of the {size} held-out records have an answer, but the first, which decides, does not allow "
            "to judge it: nothing but the loss is measured; put one with an answer first"
        )


def warn_of_watched(max_length: int, watched: RecordFile, tokens: TokenizedRecords, ledger: Ledger) -> None:
    """Say which of the records that early stop watches count for nothing."""
    missing = missing_responses(watched, tokens, max_length)
    if len(missing):
        ledger.warn(
            f"{len(missing)} of the {len(watched)} records of train.early_stop_path have no response token "
            f"({missing}), so that they count for nothing: {first_ids(watched, missing.rows.tolist())}"
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
