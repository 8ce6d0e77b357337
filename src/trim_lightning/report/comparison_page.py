"""``compare.html``: several selections or training runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from trim_lightning.compare.report import Report
from trim_lightning.files.atomic import write_text
from trim_lightning.report.comparison_facts import ComparisonFacts, gather_comparison
from trim_lightning.report.page import render

NAME = "compare.html"


def write_comparison(report: Report, folder: Path) -> Path:
    """Write ``compare.html`` into a folder.

    Raises:
        OSError: if it cannot be written.
    """
    path = folder / NAME
    write_text(comparison_page(gather_comparison(report, folder)), path)
    return path


def comparison_page(facts: ComparisonFacts) -> str:
    """The whole page as text."""
    values = {
        "facts": facts,
        "rows": list(zip(*(column.cells for column in facts.columns), strict=True)),
        "runs": len(facts.points),
        "groups": len({point["group"] for point in facts.points}),
        "has_correlations": has_pairs(facts.correlations),
        "has_overlaps": has_pairs(facts.overlaps),
    }
    return render("compare", values, page_data(facts))


def has_pairs(matrix: list[list[float | None]]) -> bool:
    """True if a matrix says something of two different runs."""
    return any(value is not None for row, line in enumerate(matrix) for value in line[:row])


def page_data(facts: ComparisonFacts) -> dict[str, Any]:
    """What the script draws."""
    return {
        "measures": facts.measures,
        "lower": facts.lower_better,
        "axes": [
            {"name": name, "levels": {measure: [asdict(level) for level in levels] for measure, levels in by.items()}}
            for name, by in facts.axes.items()
        ],
        "points": facts.points,
        "sides": facts.sides,
        "exclusive": facts.exclusive,
        "records": facts.records,
    }
