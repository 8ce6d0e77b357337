"""Which records may be selected besides their rank: length bounds, caps, duplicates."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trim_lightning.errors import UserError
from trim_lightning.records.layouts import MISSING, lookup
from trim_lightning.records.record_file import RecordFile
from trim_lightning.selection.ranking import ScoreTable
from trim_lightning.settings.schema import SelectionSettings


class RowFilter(Protocol):
    """Says whether a record may be selected, and is told when it is."""

    def admits(self, row: int) -> bool:
        """True if the record may be selected."""

    def take(self, row: int) -> None:
        """Note that the record was selected."""


def admit_row(filters: Sequence[RowFilter], row: int) -> bool:
    """Ask all filters; only if all agree do they note the record."""
    if not all(rule.admits(row) for rule in filters):
        return False
    for rule in filters:
        rule.take(row)
    return True


def make_filters(selection: SelectionSettings, pool: RecordFile, scores: ScoreTable) -> list[RowFilter]:
    """The filters that are switched on."""
    filters: list[RowFilter] = []
    if selection.min_tokens is not None or selection.max_tokens is not None:
        filters.append(LengthBounds(scores.num_tokens, selection.min_tokens or 0, selection.max_tokens))
    if selection.cap_field is not None and selection.cap is not None:
        filters.append(FieldCap(pool, selection.cap_field, selection.cap))
    if selection.dedup == "exact":
        filters.append(ExactDuplicates(pool))
    elif selection.dedup == "near":
        from trim_lightning.selection.near_duplicates import NearDuplicates

        filters.append(NearDuplicates(lambda row: text_of(pool, row), selection.near_threshold))
    return filters


class LengthBounds:
    """Content tokens between two bounds, both included."""

    def __init__(self, num_tokens: NDArray[np.int32] | NDArray[np.int64], low: int, high: int | None) -> None:
        self._num_tokens, self._low, self._high = num_tokens, low, high

    def admits(self, row: int) -> bool:
        """True within the bounds."""
        length = int(self._num_tokens[row])
        return self._low <= length and (self._high is None or length <= self._high)

    def take(self, row: int) -> None:
        """Nothing to note."""


class FieldCap:
    """At most ``cap`` selected records with one value of a field."""

    def __init__(self, pool: RecordFile, field: str, cap: int) -> None:
        self._pool, self._field, self._cap = pool, field, cap
        self._taken: Counter[str] = Counter()

    def admits(self, row: int) -> bool:
        """True while the value's cap is not reached."""
        return self._taken[self._value(row)] < self._cap

    def take(self, row: int) -> None:
        """Count the value."""
        self._taken[self._value(row)] += 1

    def _value(self, row: int) -> str:
        value = lookup(self._pool.object(row), self._field)
        if value is MISSING:
            raise UserError(
                f"selection.cap_field={self._field}: {self._pool.place(row)} has no such field; name one that "
                "every record has"
            )
        return str(value)


class ExactDuplicates:
    """No two selected records with the same text (case and white space evened out)."""

    def __init__(self, pool: RecordFile) -> None:
        self._pool = pool
        self._seen: set[bytes] = set()

    def admits(self, row: int) -> bool:
        """True if no selected record has this text."""
        return self._mark(row) not in self._seen

    def take(self, row: int) -> None:
        """Note the text."""
        self._seen.add(self._mark(row))

    def _mark(self, row: int) -> bytes:
        return hashlib.sha256(text_of(self._pool, row).encode()).digest()


def text_of(pool: RecordFile, row: int) -> str:
    """All turns of a record as one text, case and white space evened out."""
    return " ".join(" ".join(turn.content for turn in pool.record(row).turns).lower().split())
