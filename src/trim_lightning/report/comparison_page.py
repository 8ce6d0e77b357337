"""``compare.html``: several selections or training runs."""

from __future__ import annotations

from pathlib import Path

from trim_lightning.compare.between_runs import ENOUGH_RUNS
from trim_lightning.compare.measures import lower_is_better
from trim_lightning.compare.report import Report
from trim_lightning.compare.tables import READ_TESTS, constants
from trim_lightning.files.atomic import write_text
from trim_lightning.report.comparison_facts import (
    MOST_SIDE_BY_SIDE,
    columns_of,
    difference_rows,
    exclusive_records,
    levels_of,
    matrix_places,
    measures_of,
    points_of,
    side_name,
)
from trim_lightning.report.page import render

NAME = "compare.html"


def write_comparison(report: Report, folder: Path) -> Path:
    """Write ``compare.html`` into a folder.

    Raises:
        OSError: if it cannot be written.
    """
    path = folder / NAME
    write_text(comparison_page(report, folder), path)
    return path


def comparison_page(report: Report, folder: Path) -> str:
    """The whole page as text; its links to the runs' reports are relative to the folder that it will be in."""
    measures = measures_of(report)
    places = matrix_places(report)
    sides = [group.first for group in report.groups][:MOST_SIDE_BY_SIDE]
    exclusive, records = exclusive_records(sides)
    overlaps, correlations = (
        [[matrix[row][place] for place in places] for row in places]
        for matrix in (report.overlaps, report.correlations)
    )
    columns = columns_of(report, folder)
    facts = {
        "title": report.sweep.absolute().name if report.sweep else ", ".join(run.label for run in report.runs[:3]),
        "columns": columns,
        "constant": constants(report.runs),
        "measures": list(measures),
        "axes": report.axes,
        "full_grid": report.full_grid,
        "matrix_names": [f"{report.runs[place].label} {report.runs[place].method}" for place in places],
        "overlaps": overlaps,
        "correlations": correlations,
        "differences": difference_rows(report),
        "enough_runs": ENOUGH_RUNS,
        "read_tests": READ_TESTS,
        "sides": [side_name(run, report) for run in sides],
        "exclusive": exclusive,
        "broken": report.broken,
        "notes": [note.removeprefix("note: ").removeprefix("warning: ") for note in report.notes],
    }
    values = {
        "facts": facts,
        "rows": list(zip(*(column.cells for column in columns), strict=True)),
        "runs": len(report.runs),
        "groups": len(report.groups),
        "has_correlations": has_pairs(correlations),
        "has_overlaps": has_pairs(overlaps),
    }
    data = {
        "measures": facts["measures"],
        "lower": [name for name in report.metrics if lower_is_better(name)],
        "axes": [
            {"name": axis.name, "levels": {name: levels_of(axis, values) for name, values in measures.items()}}
            for axis in report.axes
        ],
        "points": points_of(report, measures),
        "sides": facts["sides"],
        "exclusive": exclusive,
        "records": records,
    }
    return render("compare", values, data)


def has_pairs(matrix: list[list[float | None]]) -> bool:
    """True if a matrix says something of two different runs."""
    return any(value is not None for row, line in enumerate(matrix) for value in line[:row])
