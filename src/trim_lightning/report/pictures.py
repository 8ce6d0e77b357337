"""The report's pictures as images, for trackers and documents; pages draw their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from trim_lightning.console.visible import visible
from trim_lightning.report.facts import SelectionFacts
from trim_lightning.report.page import token_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICKED, LEFT, POOL, RANDOM, SALIENCY, INK = "#0f8a80", "#c9ccd2", "#8d929c", "#3b6fc4", "#f3a01d", "#1c1e22"
SHOWN_BARS = 15
STYLE: Any = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#b9bcc3", "axes.grid": True,
    "axes.axisbelow": True, "axes.titlesize": "medium", "axes.titleweight": "bold", "axes.titlelocation": "left",
    "grid.color": "#e3e0d9", "font.size": 10, "text.color": INK, "axes.labelcolor": "#575c66",
    "xtick.color": "#575c66", "ytick.color": "#575c66", "svg.hashsalt": "trim", "legend.frameon": False,
    "text.parse_math": False,
}  # fmt: skip


def pictures(facts: SelectionFacts) -> Iterator[tuple[str, Figure]]:
    """Every picture of a selection by its name."""
    if facts.scores is not None:
        yield "scores", scores_picture(facts)
    if facts.lengths is not None:
        yield "lengths", lengths_picture(facts)
    if facts.mixes:
        yield "mix", mix_picture(facts)
    if facts.classes:
        yield "token_classes", classes_picture(facts)


@contextmanager
def drawing(width: float = 7.2, height: float = 3.4) -> Iterator[tuple[Figure, Any]]:
    """A figure with our style and without a window."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.add_subplot()
        figure.canvas.draw()  # the style holds while it is drawn


def scores_picture(facts: SelectionFacts) -> Figure:
    """Distribution of the scores and the cut."""
    assert facts.scores is not None
    edges, counts = facts.scores.edges, facts.scores.counts
    widths = [right - left for left, right in pairwise(edges)]
    with drawing() as (figure, axes):
        axes.bar(edges[:-1], counts["left"], widths, align="edge", color=LEFT, label="not picked")
        axes.bar(
            edges[:-1], counts["picked"], widths, bottom=counts["left"], align="edge", color=PICKED, label="picked"
        )
        if facts.cut is not None:
            axes.axvline(facts.cut, color=INK, linestyle="--", linewidth=1)
            axes.annotate(
                f"cut {facts.cut:.4f} ", (facts.cut, 1), xycoords=("data", "axes fraction"), ha="right", va="top"
            )
        axes.set(xlabel="score", ylabel="records", title="Scores and the cut")
        axes.legend(loc="upper left")
    return figure


def lengths_picture(facts: SelectionFacts) -> Figure:
    """Lengths of coreset, random coreset and pool."""
    assert facts.lengths is not None
    with drawing() as (figure, axes):
        for name, label, colour, dash in (
            ("pool", "pool", POOL, "-"),
            ("random", "random coreset", RANDOM, "--"),
            ("coreset", "coreset", PICKED, "-"),
        ):
            counts = facts.lengths.counts[name]
            shares = [100 * value / max(1, sum(counts)) for value in counts]
            axes.stairs(shares, facts.lengths.edges, color=colour, label=label, linestyle=dash, linewidth=2)
        axes.set(xlabel="content tokens of a record", ylabel="% of the records", title="Lengths")
        axes.legend(loc="upper right")
    return figure


def mix_picture(facts: SelectionFacts) -> Figure:
    """The coreset against the pool by the first field."""
    mix = facts.mixes[0]
    lines = mix.lines[:SHOWN_BARS][::-1]
    places = range(len(lines))
    with drawing(height=1.2 + 0.28 * len(lines)) as (figure, axes):
        axes.barh(places, [100 * line.coreset_share for line in lines], color=PICKED, label="coreset")
        axes.plot([100 * line.pool_share for line in lines], places, "|", color=INK, markersize=11, label="pool")
        axes.set_yticks(places, [visible(line.value)[:40] + (" ●" if line.wanted else "") for line in lines])
        axes.set(xlabel="% of the records (● the targets' own)", title=f"Mix by {visible(mix.field)}")
        axes.grid(axis="y", visible=False)
        axes.legend(loc="lower right")
    return figure


def classes_picture(facts: SelectionFacts) -> Figure:
    """The heaviest token classes."""
    classes = facts.classes[:SHOWN_BARS][::-1]
    places = range(len(classes))
    with drawing(height=1.2 + 0.26 * len(classes)) as (figure, axes):
        axes.barh(places, [item.mass for item in classes], color=SALIENCY)
        axes.set_yticks(places, [token_text(item.text)[:30] for item in classes], family="monospace")
        axes.set(xlabel="mass (summed saliency)", title="The heaviest token classes")
        axes.grid(axis="y", visible=False)
    return figure
