"""A dot for each run, a bar for the mean of its group."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

STYLE: Any = {
    "svg.hashsalt": "trim",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def dots(values: Mapping[str, Sequence[float]], label: str) -> str:
    """An SVG with one line per group, the first at the top.

    Args:
        values: Group to the values of its runs.
        label: Of the horizontal axis.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.9 + 0.28 * len(values)), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for place, found in enumerate(values.values()):
            axes.plot(list(found), [place] * len(found), "o", color="#3b6fc4", alpha=0.6, markersize=5)
            axes.plot([sum(found) / len(found)], [place], "|", color="#1c1e22", markersize=13, markeredgewidth=2)
        axes.set_yticks(range(len(values)), list(values))
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.grid(axis="x", color="#e3e0d9")
        axes.set_axisbelow(True)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
