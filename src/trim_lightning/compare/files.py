"""The comparison as machine-readable files: one row per run, one row per difference."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from trim_lightning.compare.differences import Comparison, equal_budgets, other_differences
from trim_lightning.compare.groups import varying_keys
from trim_lightning.compare.report import Report
from trim_lightning.files.atomic import write_text
from trim_lightning.files.tables import write_table
from trim_lightning.runs.run import Measurement, text_of

# columns of the differences that are there without any test too
TESTED = {
    "low": pa.float64(), "high": pa.float64(), "p": pa.float64(), "p_holm": pa.float64(), "verdict": pa.string(),
    "untested": pa.string(),
}  # fmt: skip


def run_rows(report: Report) -> list[dict[str, Any]]:
    """One row per finished run, every column of every metric."""
    keys = varying_keys(report.runs) if len(report.runs) > 1 else []
    rows = []
    for place, run in enumerate(report.runs):
        row: dict[str, Any] = {
            "run": run.label, "kind": run.kind, "group": report.group_of[place].name, "method": run.method,
            "budget": run.budget, "scorer": run.scorer, "trainee": run.trainee, "seed": run.seed,
            "train_seed": run.train_seed, "records": run.coreset.records, "tokens": run.coreset.tokens,
            "response_tokens": run.coreset.response_tokens, "mean_tokens": run.coreset.mean_tokens,
        }  # fmt: skip
        for metric in report.metrics:
            row.update(measurement_cells(metric, run.measurements.get(metric)))
        row.update(
            {"train/tokens": run.trained_tokens, "train/trained_tokens": run.labelled_tokens,
             "select/seconds": run.select_seconds, "train/seconds": run.train_seconds}
        )  # fmt: skip
        found = report.diversities[place]
        row.update({} if found is None else {f"coreset/{name}": value for name, value in asdict(found).items()})
        row.update({f"config/{key}": run.settings.get(key) for key in keys})
        row.update({f"overlap/{name}": report.overlaps[place][other] for other, name in enumerate(report.names)})
        row.update({f"rank_correlation/{name}": report.correlations[place][other]
                    for other, name in enumerate(report.names)})  # fmt: skip
        rows.append(row)
    return rows


def measurement_cells(metric: str, found: Measurement | None) -> dict[str, float | None]:
    """The columns of one metric."""
    parts = (None,) * 4 if found is None else (found.value, found.low, found.high, found.before)
    return dict(zip((f"eval/{metric}{suffix}" for suffix in ("", "_low", "_high", "_before")), parts, strict=True))


def difference_rows(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """One row per comparison."""
    return [
        {
            "group": item.first.name, "method": item.first.method,
            "against_group": item.second.name, "against_method": item.second.method,
            "metric": item.metric, "difference": item.difference, "low": item.low, "high": item.high, "p": item.p,
            "held_out_records": item.records,
            "seeds": len(item.first.runs), "against_seeds": len(item.second.runs),
            "equal_in": equal_budgets(item.first, item.second),
            "records": item.first.records, "against_records": item.second.records,
            "tokens": item.first.tokens, "against_tokens": item.second.tokens,
            "response_tokens": item.first.response_tokens, "against_response_tokens": item.second.response_tokens,
            "train/tokens": item.first.trained_tokens, "against_train/tokens": item.second.trained_tokens,
            "differs_also_in": " ".join(other_differences(item.first, item.second)),
            "p_holm": item.holm, "verdict": item.verdict, "untested": item.untested or None,
            "runs": item.runs[0], "against_runs": item.runs[1],
            "records_low": item.over_records[0], "records_high": item.over_records[1],
        }
        for item in comparisons
    ]  # fmt: skip


def write_rows(
    rows: Sequence[Mapping[str, Any]], stem: Path, always: Mapping[str, pa.DataType] | None = None
) -> list[Path]:
    """Write rows as ``<stem>.csv`` and ``<stem>.parquet``; columns without any value are left out.

    A column that holds values of several types is text.

    Args:
        rows: Column to value.
        stem: Path without suffix.
        always: Columns that stay without any value, and their types.
    """
    always = always or {}
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    columns = {
        name: uniform(values)
        for name, values in columns.items()
        if name in always or any(value is not None for value in values)
    }
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    paths = [stem.with_name(f"{stem.name}.csv"), stem.with_name(f"{stem.name}.parquet")]
    write_text(text.getvalue(), paths[0])
    arrays = {name: pa.array(values, always.get(name)) for name, values in columns.items()}
    write_table(pa.table(arrays), paths[1])
    return paths


def as_float(value: float) -> float:
    """The number as a float; what is beyond every float is infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def uniform(values: Sequence[Any]) -> list[Any]:
    """The values in one type that a column can hold."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float} or (
        kinds == {int} and any(value.bit_length() > 63 for value in values if value is not None)
    ):
        return [None if value is None else as_float(value) for value in values]
    if len(kinds) == 1 and kinds <= {int, float, bool, str}:
        return list(values)
    return [None if value is None else text_of(value) for value in values]
