"""Collect what a comparison page shows, from the comparison itself and the coresets on disk."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trim_lightning.compare.differences import equal_budgets, other_differences
from trim_lightning.compare.groups import Axis, axis_text
from trim_lightning.compare.measures import best, lower_is_better
from trim_lightning.compare.report import Matrix, Report
from trim_lightning.compare.tables import (
    DESCRIPTIONS,
    constant_columns,
    decimal,
    extra_columns,
    key_list,
    p_text,
    whole,
)
from trim_lightning.privacy.paths import within
from trim_lightning.records.record_file import RecordFile
from trim_lightning.runs.run import Run

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
class Column:
    """A column of the table."""

    name: str
    cells: list[Cell]
    numeric: bool


@dataclass(frozen=True)
class Level:
    """One value of an axis, and a measure over the runs with that value."""

    text: str
    runs: int
    mean: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class ComparisonFacts:
    """All of a comparison's page.

    Attributes:
        title: What is compared.
        columns: The table, a line for each run.
        constant: What all runs share, as name and value.
        measures: Names of everything that can be plotted, metrics first.
        lower_better: Those of them that are better when lower.
        axes: Name of each axis to, for each measure, its levels.
        full_grid: True if every combination of the axes was run.
        points: For each run its label, method, costs and measures.
        matrix_names: Runs of the matrices.
        overlaps: Jaccard similarity of coresets.
        correlations: Spearman correlation of scores.
        differences: The paired tests as rows of text, headings first; empty without any.
        sides: Runs that can be put side by side.
        exclusive: ``first-second`` to what the first picked and the second did not.
        records: Key of a record to its id and text.
        broken: Label and reason of runs that are left out.
        notes: What the reader should know.
    """

    title: str
    columns: list[Column]
    constant: list[tuple[str, str]]
    measures: list[str]
    lower_better: list[str]
    axes: dict[str, dict[str, list[Level]]]
    full_grid: bool
    points: list[dict[str, Any]]
    matrix_names: list[str]
    overlaps: Matrix
    correlations: Matrix
    differences: list[list[str]]
    sides: list[str]
    exclusive: dict[str, dict[str, Any]]
    records: dict[str, dict[str, Any]]
    broken: list[tuple[str, str]]
    notes: list[str]


def gather_comparison(report: Report, folder: Path) -> ComparisonFacts:
    """All that the page shows.

    Args:
        report: The comparison.
        folder: Where the page will be, for its links to the runs' reports.
    """
    measures = measures_of(report)
    places = matrix_places(report)
    sides = [group.first for group in report.groups][:MOST_SIDE_BY_SIDE]
    exclusive, records = exclusive_records(sides)
    return ComparisonFacts(
        title=report.sweep.absolute().name if report.sweep else ", ".join(run.label for run in report.runs[:3]),
        columns=columns_of(report, folder),
        constant=[
            (name, str(getattr(report.runs[0], name)))
            for name in constant_columns(report.runs)
            if getattr(report.runs[0], name)
        ],
        measures=list(measures),
        lower_better=[name for name in report.metrics if lower_is_better(name)],
        axes={axis.name: {name: levels_of(axis, values) for name, values in measures.items()} for axis in report.axes},
        full_grid=math.prod(len(axis.levels) for axis in report.axes) == len(report.runs),
        points=points_of(report, measures),
        matrix_names=[f"{report.runs[place].label} {report.runs[place].method}" for place in places],
        overlaps=[[report.overlaps[row][place] for place in places] for row in places],
        correlations=[[report.correlations[row][place] for place in places] for row in places],
        differences=difference_rows(report),
        sides=[side_name(run, report) for run in sides],
        exclusive=exclusive,
        records=records,
        broken=list(report.broken),
        notes=[note.removeprefix("note: ").removeprefix("warning: ") for note in report.notes],
    )


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


def levels_of(axis: Axis, values: Sequence[float | None]) -> list[Level]:
    """A measure over the runs with each value of an axis."""
    levels = []
    for level in axis.levels:
        members = [value for value, own in zip(values, axis.values, strict=True) if own == level]
        known = [value for value in members if value is not None]
        mean = sum(known) / len(known) if known else None
        levels.append(Level(axis_text(level), len(members), mean, min(known, default=None), max(known, default=None)))
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


def columns_of(report: Report, folder: Path) -> list[Column]:
    """The table, a line for each run, as the terminal shows it."""
    runs, constant = report.runs, constant_columns(report.runs)
    links = [link_of(run, folder) for run in runs]
    columns = [
        Column("run", [Cell(run.label, place, link=links[place]) for place, run in enumerate(runs)], numeric=False),
        words("group", [group.name for group in report.group_of]),
        words("method", [run.method for run in runs]),
        *(words(name, [getattr(run, name) or "–" for run in runs]) for name in DESCRIPTIONS if name not in constant),
        words("seed", [run.seed_text for run in runs]),
        *(words(name, cells) for name, cells in extra_columns(report).items()),
        numbers("records", [run.coreset.records for run in runs], 0),
        numbers("tokens", [run.coreset.tokens for run in runs], 0),
        numbers("response tokens", [run.coreset.response_tokens for run in runs], 0),
        numbers("mean length", [run.coreset.mean_tokens for run in runs], 1),
    ]
    for metric in report.metrics:
        values = [run.measurements[metric].value if metric in run.measurements else None for run in runs]
        chosen = best(metric, [math.nan if value is None else value for value in values])
        columns.append(numbers(metric, values, 4, chosen))
    columns += [
        numbers("tokens trained", [run.trained_tokens for run in runs], 0),
        numbers("select s", [run.select_seconds for run in runs], 1),
        numbers("train s", [run.train_seconds for run in runs], 1),
    ]
    return [column for column in columns if any(cell.value is not None for cell in column.cells)]


def words(name: str, texts: Sequence[str]) -> Column:
    """A column of texts; sorted as numbers where all of them are, those that say nothing last."""
    known = [text for text in texts if text not in NOTHING]
    numeric = all(is_finite(text) for text in known)
    values = [None if text in NOTHING else float(text) if numeric else text for text in texts]
    return Column(name, [Cell(text, value) for text, value in zip(texts, values, strict=True)], numeric=False)


def is_finite(text: str) -> bool:
    """True for the text of a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def numbers(name: str, values: Sequence[float | None], digits: int, chosen: Sequence[int] = ()) -> Column:
    """A column of numbers."""
    cells = [
        Cell(decimal(value, digits).replace("-", "–") if value is None else decimal(value, digits),
             finite_or_none(value), best=place in chosen)
        for place, value in enumerate(values)
    ]  # fmt: skip
    return Column(name, cells, numeric=True)


def link_of(run: Run, folder: Path) -> str | None:
    """The run's own report, relative to the page."""
    for path in (run.directory / "report.html", run.directory / "selection" / "report.html"):
        if path.is_file() and within(os.path.abspath(path), os.path.abspath(folder)):  # a way up could name a user
            return Path(os.path.relpath(path, folder)).as_posix()
    return None


def matrix_places(report: Report) -> list[int]:
    """The runs of the matrices: all, or the first of each group if there are many."""
    if len(report.runs) <= MOST_IN_MATRIX:
        return list(range(len(report.runs)))
    return [report.runs.index(group.first) for group in report.groups][:MOST_IN_MATRIX]


def difference_rows(report: Report) -> list[list[str]]:
    """The paired tests."""
    if not report.comparisons:
        return []
    headings = [
        "group",
        "against",
        "metric",
        "difference",
        "95 % interval",
        "p",
        "held-out",
        "equal in",
        "differs also in",
    ]
    rows = []
    for item in report.comparisons:
        first, second, test = item.first, item.second, item.difference
        interval = f"{test.low:+.4f} to {test.high:+.4f}"
        numbers = [f"{test.value:+.4f}", interval, p_text(test.p), whole(item.records)]
        also = key_list(other_differences(first, second))
        rows.append([first.title, second.title, item.metric, *numbers, equal_budgets(first, second), also])
    return [headings, *rows]


def side_name(run: Run, report: Report) -> str:
    """A run in the lists of the side-by-side."""
    group = next(group for group in report.groups if run in group.runs)
    return f"{group.title}, {run.budget}, {run.label}"


def exclusive_records(runs: Sequence[Run]) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """For every two runs what one picked and the other did not, best first, and the text of those records.

    Records are the same if their lines are.
    """
    keys = [line_keys(run) for run in runs]
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


def line_keys(run: Run) -> list[str] | None:
    """A short digest of each line of a coreset, None if it is not at hand."""
    if run.coreset.file is None:
        return None
    with run.coreset.file.open("rb") as file:
        stripped = (line.rstrip(b"\r\n") for line in file)
        return [hashlib.sha256(line).hexdigest()[:16] for line in stripped if line.strip()]


def record_text(records: RecordFile | None, place: int) -> dict[str, Any]:
    """Id and turns of a record, long ones cut."""
    if records is None:
        return {"id": f"line {place + 1}", "turns": []}
    record = records.record(place)
    turns = []
    for turn in record.turns:
        cut = len(turn.content) > MOST_CHARACTERS
        turns.append((turn.role, turn.content[:MOST_CHARACTERS] + (" …" if cut else "")))
    return {"id": record.id, "turns": turns}
