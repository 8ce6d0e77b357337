"""Draw the pictures of these pages from a finished selection: ``python docs/make_images.py RUN``.

The screenshots need Chromium and Playwright (``make browser``); the figures need neither.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from trim_lightning.report.explain import explain_row
from trim_lightning.report.facts import MatchView
from trim_lightning.report.page import token_text
from trim_lightning.runs.reopened import OpenedRun, open_run

IMAGES = Path(__file__).parent / "images"
FALLBACK = "#8f72ea"
PICKED, SALIENCY, INK = "#0f8a80", "#f3a01d", "#1c1e22"
STYLE: Any = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#b9bcc3", "axes.grid": True,
    "axes.axisbelow": True, "axes.titlesize": "medium", "axes.titleweight": "bold", "axes.titlelocation": "left",
    "grid.color": "#e3e0d9", "font.size": 10, "text.color": INK, "axes.labelcolor": "#575c66",
    "xtick.color": "#575c66", "ytick.color": "#575c66", "svg.hashsalt": "trim", "legend.frameon": False,
    "text.parse_math": False,
}  # fmt: skip


def main(directory: Path) -> None:
    """Write all pictures of one run."""
    run = open_run(directory)
    save("saliency", saliency(run))
    save("match", matches(run))
    save("scores", ranking(run))
    screenshots(directory / "report.html")


@contextmanager
def drawing(width: float = 7.2, height: float = 3.4) -> Iterator[tuple[Figure, Any]]:
    """A figure in the pages' colours and without a window."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.add_subplot()
        figure.canvas.draw()  # the style holds while it is drawn


def save(name: str, figure: Any) -> None:
    """As a small PNG."""
    figure.savefig(IMAGES / f"{name}.png", dpi=120, pil_kwargs={"optimize": True})


def saliency(run: OpenedRun) -> Any:
    """Row, column and combined saliency along one target."""
    (target, *_) = explain_row(run, int(run.scores.to_pandas().query("rank == 1").row.iloc[0])).targets
    places = [place for place, value in enumerate(target.saliency) if value is not None]
    names = [token_text(target.texts[place]) for place in places]
    with drawing(9.5, 3.4) as (figure, axes):
        spots = range(len(places))
        axes.bar(spots, [target.saliency[place] for place in places], color=SALIENCY, label="combined")
        axes.plot(spots, [target.row[place] for place in places], "o", color="#3b6fc4", markersize=4, label="row")
        axes.plot(spots, [target.column[place] for place in places], "^", color="#1c1e22", markersize=4, label="column")
        axes.set_xticks(spots, names, rotation=90, fontsize=8, family="monospace")
        axes.set(ylabel="saliency", title=f"Which tokens of {target.id} matter")
        axes.margins(x=0.01)
        axes.grid(axis="x", visible=False)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
    return figure


def matches(run: OpenedRun) -> Any:
    """The tokens of the best record and of one from the middle of the ranking."""
    scores = run.scores.to_pandas().dropna(subset=["rank"]).sort_values("rank")
    lengths = scores.num_scored
    middle = scores[(scores["rank"] > len(scores) // 2) & (lengths < 45)].iloc[0]
    with drawing(9.5, 6.2) as (figure, first):
        first.remove()
        for axes, line in zip(figure.subplots(2, 1, sharey=True), (scores.iloc[0], middle), strict=True):
            found = explain_row(run, int(line.row))
            view = found.candidate.view
            assert view is not None
            bars(axes, view)
            axes.set(ylabel="similarity", title=f"rank {line['rank']:.0f}, {line.id}: score {line.score:.3f}")
        axes.legend(*legend(axes), loc="upper right", ncols=2)
    return figure


def bars(axes: Any, view: MatchView) -> None:
    """One record's tokens."""
    places = [place for place, value in enumerate(view.similarity) if value is not None]
    colours = [PICKED if view.direct[place] else FALLBACK for place in places]
    axes.bar(range(len(places)), [view.similarity[place] for place in places], color=colours)
    names = [token_text(view.texts[place]) for place in places]
    axes.set_xticks(range(len(places)), names, rotation=90, fontsize=8, family="monospace")
    axes.margins(x=0.01)
    axes.grid(axis="x", visible=False)


def ranking(run: OpenedRun) -> Any:
    """Every record's score by its rank."""
    scores = run.scores.to_pandas().dropna(subset=["rank"]).sort_values("rank")
    wanted = scores.id.str.rpartition("-")[0] == scores.id.iloc[0].rpartition("-")[0]
    with drawing(9.5, 3) as (figure, axes):
        for kind, colour, label in ((~wanted, "#8d929c", "other kinds"), (wanted, PICKED, "the targets' kind")):
            part = scores[kind]
            axes.plot(part["rank"], part.score, "o", color=colour, markersize=3.5, label=label)
        axes.axvline(scores.selected.sum() + 0.5, color="#1c1e22", linestyle="--", linewidth=1)
        axes.annotate(" cut", (scores.selected.sum() + 0.5, 1), xycoords=("data", "axes fraction"), va="top")
        axes.set(xlabel="rank", ylabel="score", title="Every record of the pool")
        axes.legend(loc="upper right")
    return figure


def legend(axes: Any) -> tuple[list[Any], list[str]]:
    """What the two colours mean."""
    import matplotlib.patches as patches

    return [patches.Patch(color=PICKED), patches.Patch(color=FALLBACK)], ["direct", "fallback"]


def screenshots(page_file: Path) -> None:
    """The head of the report, and its token views with a tip."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 1060})
        page.goto(page_file.resolve().as_uri())
        page.wait_for_selector("html[data-ready=true]", state="attached")
        page.screenshot(path=IMAGES / "report.png")
        page.locator("#which").get_by_text("borderline").click()
        token = page.locator("#candidate-views .view").nth(0).locator(".tok.f, .tok.d").nth(10)
        page.locator("#candidates").evaluate("(part) => scrollTo(0, part.offsetTop)")
        page.wait_for_timeout(500)
        token.hover()
        page.screenshot(path=IMAGES / "tokens.png", clip={"x": 0, "y": 40, "width": 1200, "height": 760})
        browser.close()
    for name in ("report", "tokens"):
        shrink(IMAGES / f"{name}.png")


def shrink(path: Path) -> None:
    """256 colours are enough for a page."""
    from PIL import Image

    with Image.open(path) as picture:
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
