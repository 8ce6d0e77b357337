"""Records that a program hands over: lists, generators, data sets, tables; values as JSON has them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trim_lightning.errors import UserError


def as_records(records: Any) -> Iterator[Mapping[str, Any]]:
    """The records of whatever holds some: an iterable of mappings, a data set, a pandas or polars table, an Arrow one.

    Raises:
        UserError: for what holds none, saying what does.
    """
    if isinstance(records, Mapping):
        if records and all(hasattr(part, "column_names") for part in records.values()):
            raise UserError(f"records: this holds the splits {', '.join(map(str, records))}; give one of them")
        raise UserError("records: this is one mapping; give a list of records, each of them a mapping")
    if isinstance(records, str | bytes):
        raise UserError("records: this is text; give a list of records, each of them a mapping")
    rows: Iterable[Any] = records
    if hasattr(records, "iter_rows"):  # polars
        rows = records.iter_rows(named=True)
    elif hasattr(records, "to_pylist"):  # Arrow
        rows = records.to_pylist()
    elif hasattr(records, "itertuples") and hasattr(records, "columns"):  # pandas
        names = [str(name) for name in records.columns]
        rows = (dict(zip(names, row, strict=True)) for row in records.itertuples(index=False, name=None))
    elif not isinstance(records, Iterable):
        raise UserError(f"records: this is {type(records).__name__}; give a list of records, each of them a mapping")
    for row, record in enumerate(rows):
        if not isinstance(record, Mapping):
            raise UserError(f"record {row}: this is {type(record).__name__}; a record is a mapping of fields to values")
        yield {str(name): plain(value) for name, value in record.items()}


def plain(value: Any) -> Any:
    """A value as JSON has it: arrays as lists, numbers of NumPy as Python's, NaN and pandas' NA as null."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # of NumPy
        return plain(value.tolist())
    return None if type(value).__name__ in ("NAType", "NaTType") else str(value)
