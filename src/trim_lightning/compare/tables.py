"""The comparison as text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from tabulate import tabulate

from trim_lightning.compare.between_runs import ENOUGH_RUNS
from trim_lightning.compare.differences import equal_budgets, other_differences
from trim_lightning.compare.groups import ABSENT, Axis, Group, axis_text, marginal_means, mean_of
from trim_lightning.compare.measures import best
from trim_lightning.compare.report import Report
from trim_lightning.compare.statistics import spread
from trim_lightning.runs.run import Measurement, Run, text_of

DASH = "-"
MANY = 30  # different coresets above which only the files have their figures
WIDE = 12  # coresets above which a matrix no longer fits a screen
READ_TESTS = (
    "Holm p is corrected for all tests of a metric, and the verdict goes by it; the interval over records only holds "
    "these runs fixed and is no test"
)
SHOWN_KEYS = 4  # config keys named before "and N more"
# config keys that a column of their own already shows
COVERED = ("method.name", "seed", "train.seed", "model.path", "train.model", "coreset.file")
DESCRIPTIONS = ("budget", "scorer", "trainee")
DIVERSITY = (  # figure, heading, decimals
    ("median_words", "median words", 0),
    ("response_share", "of them response", 2),
    ("kinds", "kinds", 0),
    ("effective_kinds", "effective", 1),
    ("distinct_bigrams", "distinct pairs", 2),
    ("compression", "compression", 2),
    ("near_duplicates", "near duplicates", 2),
    ("effective_records", "effective records", 1),
)


def report_text(report: Report) -> str:
    """The whole comparison for a terminal."""
    parts = [
        headline(report),
        run_table(report),
        seeds_table(report),
        difference_table(report),
        diversity_table(report),
        matrix_table(report, "overlap of the coresets (Jaccard)", report.overlaps),
        matrix_table(report, "rank correlation of the scores (Spearman)", report.correlations),
        sweep_text(report),
        broken_table(report),
        "\n".join(report.notes),
    ]
    return "\n\n".join(part for part in parts if part)


def headline(report: Report) -> str:
    """How many runs, and what they all share."""
    runs, groups = report.runs, report.groups
    counts = f"{plural(len(runs), 'finished run')} in {plural(len(groups), 'group')} (a group differs in seeds only)"
    shared = [f"{name} {text}" for name, text in constants(runs)]
    return counts + (f"; all: {', '.join(shared)}" if shared else "")


def diversity_table(report: Report) -> str:
    """What kind of records each coreset holds; equal lines, as of many trainings on one coreset, stand once."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for run, found in zip(report.runs, report.diversities, strict=True):
        if found is not None:
            cells = (decimal(getattr(found, name), digits) for name, _, digits in DIVERSITY)
            lines.setdefault((run.method, *cells), []).append(run.label)
    if len(lines) > MANY:
        return ""
    rows = [[first_of(labels, 2), *cells] for cells, labels in lines.items()]
    headers = ["coreset of", "method", *(heading for _, heading, _ in DIVERSITY)]
    if all(found is None or found.effective_records is None for found in report.diversities):
        headers, rows = headers[:-1], [row[:-1] for row in rows]  # no embeddings were asked for
    return "records of the coresets\n" + grid(rows, headers, left=2) if rows else ""


def first_of(texts: Sequence[str], most: int) -> str:
    """The first few of some texts, and how many more there are."""
    more = len(texts) - most
    return ", ".join(texts[:most]) + (f" and {more} more" if more > 0 else "")


def constant_columns(runs: Sequence[Run]) -> list[str]:
    """Descriptions that are the same for every run, and so stand above the table."""
    return [name for name in DESCRIPTIONS if len({getattr(run, name) for run in runs}) == 1]


def constants(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Name and text of the descriptions that all runs share."""
    shared = [(name, getattr(runs[0], name)) for name in constant_columns(runs)]
    return [(name, str(text)) for name, text in shared if text]


@dataclass(frozen=True)
class Column:
    """A column of the table of runs, for the terminal and the page.

    Attributes:
        name: Its heading.
        values: For each run a text, a number, or None where there is nothing to say.
        digits: Decimals of its numbers, None for a column of texts.
    """

    name: str
    values: Sequence[Any]
    digits: int | None = None


def run_columns(report: Report) -> list[Column]:
    """What is told of each run, in the order of the columns."""
    constant = constant_columns(report.runs)

    def column(name: str, attribute: str, digits: int | None = None) -> Column:
        return Column(name, list(map(attrgetter(attribute), report.runs)), digits)

    return [
        column("run", "label"),
        Column("group", [group.name for group in report.group_of]),
        *(column(name, name) for name in ("method", *DESCRIPTIONS) if name not in constant),
        column("seed", "seed_text"),
        *extra_columns(report),
        column("records", "coreset.records", 0),
        column("tokens", "coreset.tokens", 0),
        column("response tokens", "coreset.response_tokens", 0),
        column("mean length", "coreset.mean_tokens", 1),
        *(Column(name, [run.measurements.get(name) for run in report.runs], 4) for name in report.metrics),
        column("tokens trained", "trained_tokens", 0),
        column("select s", "select_seconds", 1),
        column("train s", "train_seconds", 1),
    ]


def run_table(report: Report) -> str:
    """One line per run."""
    trained = any(run.kind == "train" for run in report.runs)
    shown = [found for found in run_columns(report) if trained or found.name not in ("tokens trained", "train s")]
    columns = {"#": report.names} if report.numbered else {}
    columns.update({found.name: [cell_of(value, found.digits) for value in found.values] for found in shown})
    return table(columns, left=[found.name for found in shown if found.digits is None and found.name != "seed"])


def cell_of(value: Any, digits: int | None) -> str:
    """A value of a run in the terminal's table."""
    if digits is None:
        return value or DASH
    return measured(value) if digits == 4 else decimal(value, digits) if digits else whole(value)


def extra_columns(report: Report) -> list[Column]:
    """A column for each axis that no other column shows."""
    columns = []
    for axis in report.axes:
        shown = [key for key in axis.keys if key not in COVERED and not key.startswith("selection.")]
        if shown and len(shown) == len(axis.keys):
            more = f" (+{len(shown) - 1})" if len(shown) > 1 else ""
            columns.append(Column(f"{shown[0]}{more}", [text_of(value[0]) for value in axis.values]))
    return columns


def seeds_table(report: Report) -> str:
    """Mean, standard deviation and range of every metric, and of the mean length, over the seeds of a group."""
    rows = []
    for group in (group for group in report.groups if len(group.runs) > 1):
        found = {metric: group.metric(metric) for metric in report.metrics}
        lengths = [run.coreset.mean_tokens for run in group.runs if run.coreset.mean_tokens is not None]
        if lengths:
            found["mean length"] = spread(lengths)
        for name, over in found.items():
            if over is not None:
                digits = 4 if name in report.metrics else 1
                bounds = f"{decimal(over.low, digits)} to {decimal(over.high, digits)}"
                numbers = [str(over.count), decimal(over.mean, digits), decimal(over.deviation, digits), bounds]
                rows.append([group.name, group.method, group.first.budget, name, *numbers])
    if not rows:
        return ""
    headers = ["group", "method", "budget", "metric", "seeds", "mean", "std", "range"]
    return "over seeds\n" + grid(rows, headers, left=4)


def difference_columns(report: Report) -> dict[str, list[str]]:
    """The differences by column: the tests, or why there is none, and whether the budgets were equal."""
    items = report.comparisons
    pairs = [(item.first, item.second) for item in items]

    def both(name: str) -> list[str]:
        measure = attrgetter(name)
        return [f"{whole(measure(first))}/{whole(measure(second))}" for first, second in pairs]

    return {
        "group": [first.title for first, _ in pairs],
        "against": [second.title for _, second in pairs],
        "metric": [item.metric for item in items],
        "difference": [f"{item.difference:+.4f}" for item in items],
        "95 % interval": [bounds_text(item.low, item.high) for item in items],
        "p": [p_text(item.p) for item in items],
        "Holm p": [p_text(item.holm) for item in items],
        "verdict": [item.verdict or item.untested for item in items],
        "runs": ["/".join(map(str, item.runs)) for item in items],
        "over records only": [bounds_text(*item.over_records) for item in items],
        "held-out": [whole(item.records) for item in items],
        "equal in": [equal_budgets(first, second) for first, second in pairs],
        "records": both("records"),
        "tokens": both("tokens"),
        "response tokens": both("response_tokens"),
        "tokens trained": both("trained_tokens"),
        "differs also in": [first_of(other_differences(*pair), SHOWN_KEYS) or DASH for pair in pairs],
    }


def difference_table(report: Report) -> str:
    """The differences as a table."""
    if not report.comparisons:
        return ""
    title = f"differences (group minus the other; tested over runs and held-out records from {ENOUGH_RUNS} runs each)"
    left = ("group", "against", "metric", "verdict", "equal in", "differs also in")
    return f"{title}\n" + table(difference_columns(report), left) + f"\n{READ_TESTS}"


def matrix_table(report: Report, title: str, matrix: Sequence[Sequence[float | None]]) -> str:
    """A symmetric matrix over runs; of many runs their groups' means, of many groups each run's mean and bounds."""
    pairs = [value for row, line in enumerate(matrix) for place, value in enumerate(line) if row != place]
    if not any(value is not None for value in pairs):
        return ""
    if len(matrix) <= WIDE:
        rows = [[name, *(decimal(value, 3) for value in line)] for name, line in zip(report.names, matrix, strict=True)]
        return f"{title}\n" + grid(rows, ["", *report.names], left=1)
    if len(report.groups) <= WIDE:
        return f"{title}, mean over the runs of two groups\n" + group_matrix(report, matrix)
    rows = []
    for place, line in enumerate(matrix):
        others = [value for other, value in enumerate(line) if other != place and value is not None]
        bounds = (mean_of(others), min(others, default=None), max(others, default=None))
        rows.append([report.names[place], *(decimal(value, 3) for value in bounds)])
    return f"{title} with the other runs\n" + grid(rows, ["run", "mean", "least", "greatest"], left=1)


def group_matrix(report: Report, matrix: Sequence[Sequence[float | None]]) -> str:
    """Mean over all pairs of different runs, one of either group."""
    places = {group.name: [report.runs.index(run) for run in group.runs] for group in report.groups}

    def mean(first: Group, second: Group) -> float | None:
        pairs = [(row, other) for row in places[first.name] for other in places[second.name] if row != other]
        return mean_of([matrix[row][other] for row, other in pairs])

    rows = [[group.title, *(decimal(mean(group, other), 3) for other in report.groups)] for group in report.groups]
    return grid(rows, ["", *(group.name for group in report.groups)], left=1)


def sweep_text(report: Report) -> str:
    """Axes, best cells and marginal means."""
    if not report.axes:
        return ""
    parts = [f"varied: {'; '.join(f'{axis.name} ({len(axis.levels)})' for axis in report.axes)}"]
    if report.sweep is not None:
        parts += [best_table(report), marginal_table(report)]
    return "\n\n".join(part for part in parts if part)


def best_table(report: Report) -> str:
    """The best group by every metric, by its mean over seeds; equally good ones are all named."""
    rows = []
    for metric in report.metrics:
        spreads = [group.metric(metric) for group in report.groups]
        places = best(metric, [math.nan if found is None else found.mean for found in spreads])
        found = spreads[places[0]] if places else None
        if found is not None:
            groups = [report.groups[place] for place in places]
            cell = cell_text(groups[0], report.axes) if len(groups) == 1 else f"{len(groups)} equally good"
            rows.append([metric, " ".join(group.name for group in groups), decimal(found.mean, 4), cell])
    return (
        "best by metric (by the mean, no test)\n"
        + grid(rows, ["metric", "group", "mean", "cell"], left=2, left_too=(3,))
        if rows
        else ""
    )


def cell_text(group: Group, axes: Sequence[Axis]) -> str:
    """The axis values of a group, seeds apart."""
    pairs = [(key, group.settings.get(key, ABSENT)) for axis in axes for key in axis.keys]
    return ", ".join(f"{key}={text_of(value)}" for key, value in pairs if key in group.settings)


def marginal_table(report: Report) -> str:
    """Mean of each metric, and of the length, over the runs with each value of each axis."""
    rows = []
    for axis in report.axes:
        means = [marginal_means(axis, report.runs, metric) for metric in report.metrics]
        for place, (level, members) in enumerate(axis.split(report.runs)):
            lengths = decimal(mean_of([run.coreset.mean_tokens for run in members]), 1)
            numbers = (decimal(column[place], 4) for column in means)
            rows.append([axis.name, axis_text(level), str(len(members)), *numbers, lengths])
    warning = "" if report.full_grid else (
        f"\n{len(report.runs)} runs do not fill the grid of {report.cells} cells: these means mix the axes"
    )  # fmt: skip
    headers = ["axis", "value", "runs", *report.metrics, "mean length"]
    return "marginal means (mean over the runs with that value, no test)\n" + grid(rows, headers, left=2) + warning


def broken_table(report: Report) -> str:
    """Runs that are left out, with the reason."""
    if not report.broken:
        return ""
    return f"left out: {plural(len(report.broken), 'run')}\n" + grid(
        [list(pair) for pair in report.broken], ["run", "reason"], left=2
    )


def table(columns: Mapping[str, Sequence[str]], left: Sequence[str]) -> str:
    """A table from columns."""
    text = [place for place, name in enumerate(columns) if name in left]
    return grid(list(zip(*columns.values(), strict=True)), list(columns), left=0, left_too=text)


def grid(rows: Sequence[Sequence[str]], headers: Sequence[str], *, left: int, left_too: Sequence[int] = ()) -> str:
    """A table from rows; the first ``left`` columns and those of ``left_too`` are text."""
    sides = ["left" if place < left or place in left_too else "right" for place in range(len(headers))]
    return tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True, colalign=sides)


def measured(found: Measurement | None) -> str:
    """A value with its interval."""
    if found is None:
        return DASH
    interval = f" [{found.low:.4f}, {found.high:.4f}]" if found.low is not None and found.high is not None else ""
    return f"{found.value:.4f}{interval}"


def decimal(value: float | None, digits: int) -> str:
    """A number, or a dash."""
    return DASH if value is None else f"{value:,.{digits}f}"


def whole(value: float | None) -> str:
    """A number without decimals unless it has some, or a dash."""
    return DASH if value is None else f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def bounds_text(low: float | None, high: float | None) -> str:
    """An interval, or a dash."""
    return DASH if low is None or high is None else f"{low:+.4f} to {high:+.4f}"


def p_text(p: float | None) -> str:
    """A p-value with three digits, or more if it is smaller; a dash without one."""
    return DASH if p is None else f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


def plural(count: int, noun: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
