"""The parts of a comparison page, from the comparison itself and the coresets on disk."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trim_lightning.compare.groups import Axis, axis_text, mean_of
from trim_lightning.compare.measures import best
from trim_lightning.compare.report import Report
from trim_lightning.compare.tables import decimal, difference_columns, run_columns
from trim_lightning.privacy.paths import within
from trim_lightning.records.record_file import RecordFile
from trim_lightning.runs.names import REPORT, SELECTION
from trim_lightning.runs.run import Measurement, Run

MOST_IN_MATRIX = 40  # runs; of more, one of each group
MOST_SIDE_BY_SIDE, MOST_RECORDS, MOST_CHARACTERS = 10, 12, 1500
COSTS: dict[str, Callable[[Run], float | None]] = {
    "records in the coreset": lambda run: float(run.coreset.records),
    "content tokens in the coreset": lambda run: run.coreset.tokens,
    "response tokens in the coreset": lambda run: run.coreset.response_tokens,
    "seconds of the selection": lambda run: run.select_seconds,
    "tokens trained": lambda run: run.trained_tokens,
    "seconds of the training": lambda run: run.train_seconds,
}
TESTED = (
    "group", "against", "metric", "difference", "95 % interval", "p", "Holm p", "verdict", "runs", "over records only",
    "held-out", "equal in", "differs also in",
)  # fmt: skip
NOTHING = ("–", "-", "null")
MEAN_LENGTH = "mean length of a picked record"


@dataclass(frozen=True)
class Cell:
    """A cell of the table: what it shows, what it is sorted by, whether it is the best of its column."""

    text: str
    value: float | str | None
    best: bool = False
    link: str | None = None


@dataclass(frozen=True)
class CellColumn:
    """A column of the table."""

    name: str
    cells: list[Cell]
    numeric: bool


def measures_of(report: Report) -> dict[str, list[float | None]]:
    """Name of each measure to its value for each run: the metrics, then what is known of every selection."""
    found: dict[str, list[float | None]] = {
        metric: [run.measurements[metric].value if metric in run.measurements else None for run in report.runs]
        for metric in report.metrics
    }
    found[MEAN_LENGTH] = [run.coreset.mean_tokens for run in report.runs]
    found.update({name: [cost(run) for run in report.runs] for name, cost in COSTS.items()})
    finite = {name: [finite_or_none(value) for value in values] for name, values in found.items()}
    return {name: values for name, values in finite.items() if any(value is not None for value in values)}


def finite_or_none(value: float | None) -> float | None:
    """A number that JSON can hold."""
    return float(value) if value is not None and math.isfinite(value) else None


def levels_of(axis: Axis, values: Sequence[float | None]) -> list[dict[str, Any]]:
    """A measure over the runs with each value of an axis: its text, how many runs, their mean and bounds."""
    levels = []
    for level, members in axis.split(values):
        known = [value for value in members if value is not None]
        bounds = {"mean": mean_of(known), "low": min(known, default=None), "high": max(known, default=None)}
        levels.append({"text": axis_text(level), "runs": len(members), **bounds})
    return levels


def points_of(report: Report, measures: dict[str, list[float | None]]) -> list[dict[str, Any]]:
    """Each run as a point of the charts."""
    return [
        {
            "label": run.label,
            "method": run.method,
            "group": report.group_of[place].name,
            "values": {name: values[place] for name, values in measures.items()},
            "bounds": {
                metric: [finite_or_none(found.low), finite_or_none(found.high)]
                for metric, found in run.measurements.items()
                if found.low is not None and found.high is not None
            },
        }
        for place, run in enumerate(report.runs)
    ]


def columns_of(report: Report, folder: Path) -> list[CellColumn]:
    """The table, a line for each run, as the terminal shows it; columns that say nothing are left out."""
    columns = []
    for found in run_columns(report):
        if found.name == "run":
            cells = [Cell(run.label, place, link=link_of(run, folder)) for place, run in enumerate(report.runs)]
            columns.append(CellColumn("run", cells, numeric=False))
        elif found.digits is None:
            columns.append(words(found.name, [text or "–" for text in found.values]))
        else:
            values = [value.value if isinstance(value, Measurement) else value for value in found.values]
            known = [math.nan if value is None else value for value in values]
            chosen = best(found.name, known) if found.name in report.metrics else []
            columns.append(numbers(found.name, values, found.digits, chosen))
    return [column for column in columns if any(cell.value is not None for cell in column.cells)]


def words(name: str, texts: Sequence[str]) -> CellColumn:
    """A column of texts; sorted as numbers where all of them are, those that say nothing last."""
    known = [text for text in texts if text not in NOTHING]
    numeric = all(is_finite(text) for text in known)
    values = [None if text in NOTHING else float(text) if numeric else text for text in texts]
    return CellColumn(name, [Cell(text, value) for text, value in zip(texts, values, strict=True)], numeric=False)


def is_finite(text: str) -> bool:
    """True for the text of a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def numbers(name: str, values: Sequence[float | None], digits: int, chosen: Sequence[int] = ()) -> CellColumn:
    """A column of numbers."""
    cells = [
        Cell(decimal(value, digits).replace("-", "–") if value is None else decimal(value, digits),
             finite_or_none(value), best=place in chosen)
        for place, value in enumerate(values)
    ]  # fmt: skip
    return CellColumn(name, cells, numeric=True)


def link_of(run: Run, folder: Path) -> str | None:
    """The run's own report, relative to the page."""
    for path in (run.directory / REPORT, run.directory / SELECTION / REPORT):
        if path.is_file() and within(os.path.abspath(path), os.path.abspath(folder)):  # a way up could name a user
            return Path(os.path.relpath(path, folder)).as_posix()
    return None


def matrix_places(report: Report) -> list[int]:
    """The runs of the matrices: all, or the first of each group if there are many."""
    if len(report.runs) <= MOST_IN_MATRIX:
        return list(range(len(report.runs)))
    return [report.runs.index(group.first) for group in report.groups][:MOST_IN_MATRIX]


def difference_rows(report: Report) -> list[list[str]]:
    """The differences and their tests, headings first."""
    if not report.comparisons:
        return []
    columns = difference_columns(report)
    return [list(TESTED), *map(list, zip(*(columns[name] for name in TESTED), strict=True))]


def side_name(run: Run, report: Report) -> str:
    """A run in the lists of the side-by-side."""
    group = next(group for group in report.groups if run in group.runs)
    return f"{group.title}, {run.budget}, {run.label}"


def exclusive_records(runs: Sequence[Run]) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """For every two runs what one picked and the other did not, best first, and the text of those records.

    Records are the same if their lines are.
    """
    digests = [run.coreset.digests for run in runs]
    keys = [None if found is None else [digest.hex()[:16] for digest in found] for found in digests]
    picked: dict[str, dict[str, Any]] = {}
    records: dict[str, dict[str, Any]] = {}
    readers = [run.coreset.open_records() for run in runs]
    for first, own in enumerate(keys):
        for second, others in enumerate(keys):
            if first == second or own is None or others is None:
                continue
            theirs = set(others)
            alone = [(place, key) for place, key in enumerate(own) if key not in theirs]
            shown = alone[:MOST_RECORDS]
            picked[f"{first}-{second}"] = {"total": len(alone), "shown": [[place + 1, key] for place, key in shown]}
            for place, key in shown:
                if key not in records:
                    records[key] = record_text(readers[first], place)
    return picked, records


def record_text(records: RecordFile | None, place: int) -> dict[str, Any]:
    """Id and turns of a record, long ones cut."""
    if records is None:
        return {"id": f"line {place + 1}", "turns": []}
    record = records.record(place)
    turns = []
    for turn in record.turns:
        cut = len(turn.text) > MOST_CHARACTERS
        turns.append((turn.role, turn.text[:MOST_CHARACTERS] + (" …" if cut else "")))
    return {"id": record.id, "turns": turns}
