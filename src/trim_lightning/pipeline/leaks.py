"""What makes a result look better than it is: records that pool, targets and held-out records share."""

from __future__ import annotations

from collections.abc import Mapping, Set

import numpy as np
from numpy.typing import NDArray

from trim_lightning.records.record_file import RecordFile
from trim_lightning.records.shared import asked_too, first_ids, questions, text_of
from trim_lightning.stages.task import SelectionTask
from trim_lightning.stages.texts import rows_with_texts, text_digests
from trim_lightning.store.ledger import Ledger


def warn_of_leaks(task: SelectionTask, chosen: NDArray[np.int64], measured: Mapping[str, RecordFile]) -> list[str]:
    """Warn of what a selection shares with what it was made for and with what measures it; returns the warnings.

    ``measured`` has the records that will measure it, by what they are.
    """
    before = len(task.ledger.warnings)
    if task.targets is not None and task.settings.target.source != "from_pool":  # those are meant to be in the pool
        warn_of_targets_in_pool(task, chosen)
    asked = questions(task.pool.take(chosen.tolist())) if measured else set()
    for what, records in measured.items():
        if task.targets is not None:
            warn_of_shared(task.targets.records, "targets", questions(records), f"the {what}", task.ledger)
        warn_of_shared(records, what, asked, "the coreset", task.ledger)
    return task.ledger.warnings[before:]


def warn_of_targets_in_pool(task: SelectionTask, chosen: NDArray[np.int64]) -> None:
    """Warn of targets that the pool holds too; those that `target.noise` took from it are meant to be there."""
    assert task.targets is not None
    targets = task.targets.records
    texts = {
        place: text_of(targets.record(place).turns)
        for place in range(len(targets))
        if place not in task.targets.substitutes
    }
    found = rows_with_texts(text_digests(task.store, task.pool), list(texts.values()))
    places = [place for place, text in texts.items() if text in found]
    if places:
        rows = np.unique(np.concatenate([found[texts[place]] for place in places]))
        first = found[texts[places[0]]][0]
        task.ledger.warn(
            f"{len(places)} of the {len(targets)} targets are in the pool too, {len(np.intersect1d(rows, chosen))} of "
            f"whose records there are selected: {first_ids(targets, places)} (the first is row {first} of the pool)"
        )


def warn_of_shared(records: RecordFile, what: str, asked: Set[bytes], whose: str, ledger: Ledger) -> None:
    """Warn of records that ask one of the `questions` of others; ``what`` and ``whose`` say what both are."""
    rows = asked_too(records, asked)
    if rows:
        ledger.warn(f"{len(rows)} of the {len(records)} {what} have a prompt of {whose}: {first_ids(records, rows)}")
