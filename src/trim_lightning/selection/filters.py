"""Which records may be selected besides their rank: length bounds, caps, duplicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trim_lightning.errors import UserError, suggest
from trim_lightning.records.fields import MISSING, field_names, lookup
from trim_lightning.records.record_file import RecordFile
from trim_lightning.records.shared import digest_of_text, text_of
from trim_lightning.records.word_file import split_words
from trim_lightning.selection.ranking import ScoreTable
from trim_lightning.settings.schema import SelectionSettings

PERMUTATIONS = 128
SHINGLE = 3  # words
MISSES_WEIGH = 0.98  # the index would rather propose too many candidates, which are then compared exactly
HIGHEST = 0.95  # above it the index has too few bands


class RowFilter:
    """Says whether a record may be selected, and is told when it is."""

    def admits(self, row: int) -> bool:
        """True if the record may be selected."""
        raise NotImplementedError

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
        filters.append(Cap(partial(field_value, pool, selection.cap_field), selection.cap))
    if selection.dedup == "exact":
        filters.append(Cap(lambda row: digest_of_text(text_of(pool.record(row).turns)), 1))
    elif selection.dedup == "near":
        filters.append(NearDuplicates(lambda row: text_of(pool.record(row).turns), selection.near_threshold))
    return filters


def check_cap_field(selection: SelectionSettings, pool: RecordFile) -> None:
    """Look for the capped field in the first record: a misspelt one should not be found after all is scored.

    Raises:
        UserError: if it is not there.
    """
    if selection.cap_field is not None and len(pool):
        field_value(pool, selection.cap_field, 0)


class LengthBounds(RowFilter):
    """Content tokens between two bounds, both included."""

    def __init__(self, num_tokens: NDArray[np.integer[Any]], low: int, high: int | None) -> None:
        self._num_tokens, self._low, self._high = num_tokens, low, high

    def admits(self, row: int) -> bool:
        length = int(self._num_tokens[row])
        return self._low <= length and (self._high is None or length <= self._high)


class Cap(RowFilter):
    """At most ``cap`` selected records that are alike.

    Args:
        value_of: Gives what is equal for rows that are alike.
        cap: Their largest number.
    """

    def __init__(self, value_of: Callable[[int], Hashable], cap: int) -> None:
        self._value_of, self._cap = value_of, cap
        self._taken: Counter[Hashable] = Counter()

    def admits(self, row: int) -> bool:
        return self._taken[self._value_of(row)] < self._cap

    def take(self, row: int) -> None:
        self._taken[self._value_of(row)] += 1


def field_value(pool: RecordFile, field: str, row: int, key: str = "selection.cap_field") -> str:
    """The value of a field in a record.

    Args:
        pool: The records.
        field: Dotted name.
        row: Of the record.
        key: Config key that names the field, for the message.

    Raises:
        UserError: if it has no such field.
    """
    record = pool.object(row)
    value = lookup(record, field)
    if value is MISSING:
        known = suggest(field, list(field_names(record)))
        raise UserError(f"{key}={field}: {pool.place(row)} has no such field{known}; name one that every record has")
    return str(value)


class NearDuplicates(RowFilter):
    """No selected record too similar to a better one, by shared word triples; MinHash finds candidates.

    Args:
        text_of: Text of a row.
        threshold: Jaccard similarity of word triples from which two texts are near duplicates.

    Raises:
        UserError: if datasketch is not installed.
    """

    def __init__(self, text_of: Callable[[int], str], threshold: float) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise UserError(
                "selection.dedup=near: needs the library datasketch; run pip install 'trim-lightning[dedup]'"
            ) from None
        self._text_of = text_of
        self._new = MinHash
        self._threshold = threshold
        self._index = MinHashLSH(
            threshold=min(threshold, HIGHEST), num_perm=PERMUTATIONS, weights=(1 - MISSES_WEIGH, MISSES_WEIGH)
        )
        self._taken: dict[int, set[str]] = {}
        self._last: tuple[int, set[str], object] | None = None

    def admits(self, row: int) -> bool:
        pieces, sketch = self._sketch(row)
        return all(
            similarity(pieces, self._taken[candidate]) < self._threshold for candidate in self._index.query(sketch)
        )

    def take(self, row: int) -> None:
        self._taken[row], sketch = self._sketch(row)
        self._index.insert(row, sketch)

    def _sketch(self, row: int) -> tuple[set[str], object]:
        """Word triples of a record and their MinHash."""
        if self._last is None or self._last[0] != row:
            words = split_words(self._text_of(row))
            pieces = {" ".join(words[at : at + SHINGLE]) for at in range(max(1, len(words) - SHINGLE + 1))}
            sketch = self._new(num_perm=PERMUTATIONS, seed=1)
            sketch.update_batch([piece.encode() for piece in sorted(pieces)])
            self._last = (row, pieces, sketch)
        return self._last[1:]


def similarity(one: set[str], two: set[str]) -> float:
    """Jaccard similarity of two sets that are not empty."""
    return len(one & two) / len(one | two)
