"""The coreset against the pool by any metadata field that takes a few values."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from trim_lightning.records.kinds import KIND_FIELDS
from trim_lightning.records.record_file import RecordFile
from trim_lightning.records.targets import TargetSet
from trim_lightning.report.facts import Mix, MixLine

LARGEST_COUNT = 10_000  # pool records that are read; of a larger pool every k-th
MOST_VALUES = 200  # a field with more is no kind of record
LONGEST_VALUE = 80  # characters
SHOWN_VALUES, SHOWN_FIELDS = 15, 12
LEAST_PRESENCE = 0.5  # share of the records that must have the field

Counts = dict[str, Counter[str]]
_remembered: dict[str, Counts] = {}  # of the last pools: the jobs of a sweep read the same one


def mixes_of(pool: RecordFile, targets: TargetSet | None, chosen: Sequence[int]) -> tuple[list[Mix], int]:
    """Every field by which the coreset can be compared with the pool, the usual names of a kind first.

    Returns:
        The fields, and the number of pool records that were counted.
    """
    rows = counted_rows(len(pool))
    everything = pool_counts(pool, rows)
    if not len(chosen):
        return [], len(rows)
    selected = count_fields(pool.object(row) for row in chosen)
    wanted = {} if targets is None else count_fields(map(targets.records.object, range(len(targets.records))))
    found = []
    for field, counts in everything.items():
        present = sum(counts.values())
        if not 2 <= len(counts) <= MOST_VALUES or present < LEAST_PRESENCE * len(rows) or len(counts) > 0.5 * present:
            continue
        picked = selected.get(field, Counter())
        lines = [
            MixLine(value, number, number / len(chosen), counts[value] / len(rows), value in wanted.get(field, ()))
            for value, number in order_values(picked, counts)
        ]
        found.append(Mix(field, lines[:SHOWN_VALUES], max(0, len(lines) - SHOWN_VALUES)))
    found.sort(key=lambda mix: place_of(mix.field, len(everything[mix.field])))
    return found[:SHOWN_FIELDS], len(rows)


def order_values(picked: Counter[str], counts: Counter[str]) -> list[tuple[str, int]]:
    """Values with their numbers in the coreset, most selected first, then by their number in the pool."""
    names = {*picked, *counts}
    return sorted(((name, picked[name]) for name in names), key=lambda pair: (-pair[1], -counts[pair[0]], pair[0]))


def place_of(field: str, values: int) -> tuple[int, int, str]:
    """Usual names of a kind first, then fields with few values."""
    name = field.rpartition(".")[2]
    return (KIND_FIELDS.index(name) if name in KIND_FIELDS else len(KIND_FIELDS), values, field)


def counted_rows(size: int) -> range:
    """All rows of a pool, or evenly spread ones of a large pool."""
    return range(0, size, max(1, -(-size // LARGEST_COUNT)))


def pool_counts(pool: RecordFile, rows: range) -> Counts:
    """Counts of every field, remembered while the process works on the same pool."""
    name = json.dumps([pool.identity(), len(pool)], sort_keys=True, default=str)
    if name not in _remembered:
        if len(_remembered) >= 2:
            _remembered.clear()
        _remembered[name] = count_fields(pool.object(row) for row in rows)
    return _remembered[name]


def count_fields(records: Iterable[Mapping[str, Any]]) -> Counts:
    """Values of every short field; a field with too many different ones is given up."""
    counts: Counts = {}
    given_up: set[str] = set()
    for record in records:
        for name, value in short_fields(record):
            if name in given_up:
                continue
            field = counts.setdefault(name, Counter())
            field[value] += 1
            if len(field) > MOST_VALUES:
                given_up.add(name)
                del counts[name]
    return counts


def short_fields(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and texts of the scalar fields that are short enough to be a label, one level deep."""
    for name, value in record.items():
        if isinstance(value, Mapping) and not prefix:
            yield from short_fields(value, f"{name}.")
        elif isinstance(value, bool):
            yield f"{prefix}{name}", str(value).lower()
        elif isinstance(value, int) or (isinstance(value, str) and len(value) <= LONGEST_VALUE):
            yield f"{prefix}{name}", str(value)
