"""Which records of a file count: ``where``, ``exclude``, ``limit``, ``sample``, and the draw of targets.

All of this is our choice; the method itself takes the pool as given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from trim_lightning.errors import UserError, suggest
from trim_lightning.files.json_files import dotted
from trim_lightning.records.fields import MISSING, field_names, lookup, scalar_text

# Field names remembered for the suggestion; a file can have any number of them.
FIELDS_REMEMBERED = 500


def conditions(filters: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Normalise a filter: dotted field -> list of accepted values, sorted by field.

    ``{"meta": {"lang": "en"}}``, which is what an override ``pool.where.meta.lang=en`` gives, is the same as
    ``{"meta.lang": "en"}``.
    """
    flat = sorted(dict(dotted(filters)).items())
    return {field: list(value) if isinstance(value, list | tuple) else [value] for field, value in flat}


def matches(value: Any, accepted: Any) -> bool:
    """Whether a record's JSON value is the accepted one, as a value or as text.

    Null equals only null, and true is not 1; otherwise ``3`` equals ``"3"`` and ``true`` equals ``"true"``.
    """
    if value is None or accepted is None:
        return value is accepted
    if isinstance(value, bool) == isinstance(accepted, bool) and value == accepted:
        return True
    return scalar_text(value) == scalar_text(accepted)


class RecordFilter:
    """Decides record by record, and notices fields that no record has.

    Args:
        where: Field -> value or values; a record is kept if it has one of them, for every field.
        exclude: Field -> value or values; a record is dropped if it has one of them, for any field.
        what: ``pool`` or ``target``, for messages.
    """

    def __init__(self, where: Mapping[str, Any], exclude: Mapping[str, Any], what: str) -> None:
        self.where, self.exclude, self.what = conditions(where), conditions(exclude), what
        self.active = bool(self.where or self.exclude)
        self._unseen = {("where", field) for field in self.where} | {("exclude", field) for field in self.exclude}
        self._fields: set[str] = set()
        self._lacking: Counter[str] = Counter()

    def keep(self, record: Mapping[str, Any]) -> bool:
        """Whether the record passes."""
        if self._unseen and len(self._fields) < FIELDS_REMEMBERED:
            self._fields.update(field_names(record))
        # Every field is looked up in every record, so that `check` knows which ones exist.
        verdicts = [self._has(record, "where", field, values) for field, values in self.where.items()]
        refusals = [self._has(record, "exclude", field, values) for field, values in self.exclude.items()]
        return all(verdicts) and not any(refusals)

    def _has(self, record: Mapping[str, Any], part: str, field: str, values: list[Any]) -> bool:
        value = lookup(record, field)
        if value is MISSING:
            if part == "where":
                self._lacking[field] += 1
            return False
        self._unseen.discard((part, field))
        return any(matches(value, accepted) for accepted in values)

    def check(self, source: str) -> None:
        """After the last record: refuse a filter on a field that no record has.

        Raises:
            UserError: naming the field and the closest one that exists.
        """
        for part, field in sorted(self._unseen):
            known = sorted(self._fields)
            raise UserError(
                f"{self.what}.{part} names the field {field}, which no record of {source} has"
                f"{suggest(field, known) or '; fields: ' + ', '.join(known[:20])}"
            )

    def remarks(self) -> list[str]:
        """How many records lack a field of ``where``, a line for each."""
        return [
            f"{number:,} records without the field {field} are left out by {self.what}.where.{field}"
            for field, number in self._lacking.items()
        ]

    def describe(self) -> str:
        """The filters in one line, for messages; empty if there are none."""
        parts = (("where", self.where), ("exclude", self.exclude))
        return " and ".join(f"{self.what}.{name}={scalar_text(value)}" for name, value in parts if value)


def limit_and_sample(size: int, limit: int | None, sample: int | None, seed: int, what: str) -> np.ndarray:
    """The places that remain of ``size`` records: the first ``limit``, then ``sample`` drawn by seed.

    Returns:
        int64 ``[kept]``, ascending: the order of the records is kept.

    Raises:
        UserError: if ``sample`` asks for more records than there are.
    """
    size = size if limit is None else min(size, limit)
    if sample is None:
        return np.arange(size, dtype=np.int64)
    if sample > size:
        raise UserError(f"{what}.sample={sample}: only {size} records are left to draw from; ask for at most {size}")
    drawn = np.random.default_rng(seed).choice(size, size=sample, replace=False)
    return np.sort(drawn.astype(np.int64))
