"""What kind a record is of, by the field that says so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from trim_lightning.records.fields import MISSING, lookup

KIND_FIELDS = ("family", "subtask", "category", "source", "task")  # what a record's kind is usually called


def kind_field(record: Mapping[str, Any]) -> str | None:
    """The field that says of what kind a record is: the first of `KIND_FIELDS` that it has, None if it has none."""
    return next((name for name in KIND_FIELDS if lookup(record, name) is not MISSING), None)


def count_kinds(records: Iterable[Mapping[str, Any]], field: str) -> Counter[str]:
    """How often each kind occurs among the records that have the field."""
    found = (lookup(record, field) for record in records)
    return Counter(str(value) for value in found if value is not MISSING)
