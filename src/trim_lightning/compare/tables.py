"""The comparison as text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tabulate import tabulate

from trim_lightning.compare.differences import equal_budgets, other_differences
from trim_lightning.compare.groups import (
    ABSENT,
    Axis,
    Group,
    axis_text,
    marginal_means,
    mean_of,
)
from trim_lightning.compare.measures import best
from trim_lightning.compare.report import Report
from trim_lightning.compare.statistics import spread
from trim_lightning.runs.run import Measurement, Run, text_of

DASH = "-"
MANY = 30  # different coresets above which only the files have their figures
WIDE = 12  # coresets above which a matrix no longer fits a screen
SHOWN_KEYS = 4  # config keys named before "and N more"
# config keys that a column of their own already shows
COVERED = ("method.name", "seed", "train.seed", "model.path", "train.model", "coreset.file")
DESCRIPTIONS = ("budget", "scorer", "trainee")


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
    shared = [f"{name} {getattr(runs[0], name)}" for name in constant_columns(runs) if getattr(runs[0], name)]
    return counts + (f"; all: {', '.join(shared)}" if shared else "")


def diversity_table(report: Report) -> str:
    """What kind of records each coreset holds; equal lines, as of many trainings on one coreset, stand once."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for run, found in zip(report.runs, report.diversities, strict=True):
        if found is None:
            continue
        cells = (
            decimal(found.median_words, 0),
            decimal(found.response_share, 2),
            whole(found.kinds),
            decimal(found.effective_kinds, 1),
            decimal(found.distinct_bigrams, 2),
            decimal(found.compression, 2),
            decimal(found.near_duplicates, 2),
            decimal(found.effective_records, 1),
        )
        lines.setdefault((run.method, *cells), []).append(run.label)
    if len(lines) > MANY:
        return ""
    rows = [[shortened(labels), *cells] for cells, labels in lines.items()]
    headers = ["coreset of", "method", "median words", "of them response", "kinds", "effective", "distinct pairs",
               "compression", "near duplicates", "effective records"]  # fmt: skip
    if all(found is None or found.effective_records is None for found in report.diversities):
        headers, rows = headers[:-1], [row[:-1] for row in rows]  # no embeddings were asked for
    return "records of the coresets\n" + grid(rows, headers, left=2) if rows else ""


def shortened(labels: Sequence[str]) -> str:
    """A few labels, and how many more."""
    more = len(labels) - 2
    return ", ".join(labels[:2]) + (f" and {more} more" if more > 0 else "")


def constant_columns(runs: Sequence[Run]) -> list[str]:
    """Descriptions that are the same for every run, and so stand above the table."""
    return [name for name in DESCRIPTIONS if len({getattr(run, name) for run in runs}) == 1]


def run_table(report: Report) -> str:
    """One line per run."""
    runs, metrics = report.runs, report.metrics
    constant = constant_columns(runs)
    columns: dict[str, list[str]] = {
        "run": [run.label for run in runs],
        "group": [group.name for group in report.group_of],
        "method": [run.method for run in runs],
        **{name: [getattr(run, name) or DASH for run in runs] for name in DESCRIPTIONS if name not in constant},
        "seed": [run.seed_text for run in runs],
        **extra_columns(report),
        "records": [f"{run.coreset.records:,}" for run in runs],
        "tokens": [whole(run.coreset.tokens) for run in runs],
        "response tokens": [whole(run.coreset.response_tokens) for run in runs],
        "mean length": [decimal(run.coreset.mean_tokens, 1) for run in runs],
        **{metric: [measured(run.measurements.get(metric)) for run in runs] for metric in metrics},
        "tokens trained": [whole(run.trained_tokens) for run in runs],
        "select s": [decimal(run.select_seconds, 1) for run in runs],
        "train s": [decimal(run.train_seconds, 1) for run in runs],
    }
    if not any(run.kind == "train" for run in runs):
        columns = {name: cells for name, cells in columns.items() if name not in ("tokens trained", "train s")}
    if report.numbered:
        columns = {"#": report.names, **columns}
    return table(columns, left=("run", "group", "method", *DESCRIPTIONS, *extra_columns(report)))


def extra_columns(report: Report) -> dict[str, list[str]]:
    """A column for each axis that no other column shows."""
    columns = {}
    for axis in report.axes:
        shown = [key for key in axis.keys if key not in COVERED and not key.startswith("selection.")]
        if not shown or len(shown) < len(axis.keys):
            continue
        more = f" (+{len(shown) - 1})" if len(shown) > 1 else ""
        columns[f"{shown[0]}{more}"] = [text_of(value[0]) for value in axis.values]
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


def difference_table(report: Report) -> str:
    """Paired differences with their intervals, and whether the budgets were equal."""
    items = report.comparisons
    if not items:
        return ""
    pairs = [(item.first, item.second) for item in items]
    tests = [item.difference for item in items]
    columns = {
        "group": [first.title for first, _ in pairs],
        "against": [second.title for _, second in pairs],
        "metric": [item.metric for item in items],
        "difference": [f"{test.value:+.4f}" for test in tests],
        "95 % interval": [f"{test.low:+.4f} to {test.high:+.4f}" for test in tests],
        "p": [p_text(test.p) for test in tests],
        "held-out": [f"{item.records:,}" for item in items],
        "seeds": [f"{len(first.runs)}/{len(second.runs)}" for first, second in pairs],
        "equal in": [equal_budgets(first, second) for first, second in pairs],
        "records": [f"{whole(first.records)}/{whole(second.records)}" for first, second in pairs],
        "tokens": [f"{whole(first.tokens)}/{whole(second.tokens)}" for first, second in pairs],
        "response tokens": [
            f"{whole(first.response_tokens)}/{whole(second.response_tokens)}" for first, second in pairs
        ],
        "tokens trained": [f"{whole(first.trained_tokens)}/{whole(second.trained_tokens)}" for first, second in pairs],
        "differs also in": [key_list(other_differences(first, second)) for first, second in pairs],
    }
    title = "differences (group minus the other; paired bootstrap over held-out records, averaged over seeds)"
    many = f"\np-values are not corrected for the {len(items)} tests" if len(items) > 1 else ""
    return f"{title}\n" + table(columns, ("group", "against", "metric", "equal in", "differs also in")) + many


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
    return "best by metric\n" + grid(rows, ["metric", "group", "mean", "cell"], left=2, left_too=(3,)) if rows else ""


def cell_text(group: Group, axes: Sequence[Axis]) -> str:
    """The axis values of a group, seeds apart."""
    pairs = [(key, group.settings.get(key, ABSENT)) for axis in axes for key in axis.keys]
    return ", ".join(f"{key}={text_of(value)}" for key, value in pairs if key in group.settings)


def marginal_table(report: Report) -> str:
    """Mean of each metric, and of the length, over the runs with each value of each axis."""
    rows = []
    for axis in report.axes:
        means = [marginal_means(axis, report.runs, metric) for metric in report.metrics]
        for place, level in enumerate(axis.levels):
            members = [run for run, value in zip(report.runs, axis.values, strict=True) if value == level]
            lengths = mean_of([run.coreset.mean_tokens for run in members])
            rows.append([axis.name, axis_text(level), str(len(members)),
                         *(decimal(column[place], 4) for column in means), decimal(lengths, 1)])  # fmt: skip
    cells = math.prod(len(axis.levels) for axis in report.axes)
    warning = "" if cells == len(report.runs) else (
        f"\n{len(report.runs)} runs do not fill the grid of {cells} cells: these means mix the axes"
    )  # fmt: skip
    headers = ["axis", "value", "runs", *report.metrics, "mean length"]
    return "marginal means (mean over the runs with that value)\n" + grid(rows, headers, left=2) + warning


def broken_table(report: Report) -> str:
    """Runs that are left out, with the reason."""
    if not report.broken:
        return ""
    return f"left out: {plural(len(report.broken), 'run')}\n" + grid(
        [list(pair) for pair in report.broken], ["run", "reason"], left=2
    )


def table(columns: Mapping[str, Sequence[str]], left: Sequence[str]) -> str:
    """A table from columns."""
    sides = ["left" if name in left else "right" for name in columns]
    rows = list(zip(*columns.values(), strict=True))
    return tabulate(rows, headers=list(columns), tablefmt="simple", disable_numparse=True, colalign=sides)


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


def p_text(p: float) -> str:
    """A p-value with three digits, or more if it is smaller."""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


def key_list(keys: Sequence[str]) -> str:
    """The first few keys."""
    more = len(keys) - SHOWN_KEYS
    return (", ".join(keys[:SHOWN_KEYS]) + (f" and {more} more" if more > 0 else "")) or DASH


def plural(count: int, noun: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
