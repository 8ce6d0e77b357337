"""The page of the value instrument: every method's correlation with what groups of records teach."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from value_bins import bins_table
from value_figures import Figure, best_decile, ceiling, correlations, spearman, special, standardised
from value_gains import Gains
from value_groups import REPORTING, TASKS, TUNING, Group
from value_methods import REFERENCE, few
from value_rule import PLAIN, rule_table
from value_scores import GroupScores

RANDOM_DRAWS = 20
SUMS = ((REFERENCE, "less"),)
ENOUGH = 0.9  # of the groups trained on, in a sample of costly methods


def write_page(
    path: Path, gains: Gains, groups: Sequence[Group], scored: Mapping[str, GroupScores], bins: Path
) -> None:
    """Write the tables, of what is measured alone; what they show is written by hand above them.

    Args:
        path: The page; what stands above its first ``<!-- tables -->`` is kept.
        gains: What was measured.
        groups: The groups, in the order of the gains.
        scored: What each method's scores say of the groups, in their order, and what they cost.
        bins: Of the quantile test, if there is one.
    """
    assert gains.names == tuple(group.name for group in groups), "gains are of other groups"
    measured = judged(gains.measured, groups)
    whole, groups, gains = len(groups), [groups[place] for place in measured], gains.take(measured)
    tables = {"gain": gains.mean, "special": special(gains.mean)}
    means = {name: found.means[measured] for name, found in scored.items()}
    means = {name: table for name, table in means.items() if not np.isnan(table).any()}
    means |= sums(means)
    head = path.read_text().partition(MARK)[0] if path.exists() else "# What a record teaches\n\n"
    part_of = f"Of {len(groups)} groups of {whole}, {np.isfinite(gains.second).all(1).sum()} of them with two seeds."
    parts = [head + MARK, part_of, spread_table(gains)]
    for what, title in (("gain", "The gain itself"), ("special", "What is special to a task")):
        parts += [f"## {title}", method_table(means, tables[what], ceiling(gains, what))]
    if all(name in means for name in PLAIN):
        parts += ["## Against the plain methods, on the reporting tasks"]
        parts += [f"{title}:\n\n{rule_table(means, tables[what])}" for what, title in (
            ("gain", "The gain itself"), ("special", "What is special to a task"))]  # fmt: skip
    parts += ["## The best tenth of the groups", decile_table(means, gains.mean)]
    if bins.exists():
        parts += ["## Ten bins", bins_table(bins)]
    parts += ["## What the scores cost", cost_table(scored)]
    path.write_text("\n\n".join(parts) + "\n")


def sums(means: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """`SUMS` of methods that have scores: what each says of the groups, standardised task by task, added up."""
    whole = {}
    for names in SUMS:
        if all(name in means for name in names):
            whole[" + ".join(names)] = np.sum([standardised(means[name]) for name in names], axis=0)
    return whole


def judged(measured: NDArray[np.int64], groups: Sequence[Group]) -> NDArray[np.int64]:
    """Places of the groups that methods are judged on: those trained on that costly methods score.

    All that were trained on where that would leave out more than a tenth; costly methods are then left out.
    """
    sampled = {group.name for group in few(groups)}
    both = np.array([place for place in measured if groups[place].name in sampled], dtype=np.int64)
    return both if len(both) >= ENOUGH * len(measured) else measured


MARK = "<!-- tables: make value ARGS=table -->"


def spread_table(gains: Gains) -> str:
    """What there is to tell apart: gains of each task over the groups, and how two seeds agree."""
    rows = []
    for place, task in enumerate(gains.tasks):
        values = gains.mean[:, place]
        spread = (values.mean(), values.std(), values.min(), values.max())
        rows.append([task, *(f"{value:+.3f}" for value in spread),
                     f"{ceiling(gains, 'gain')[place]:.2f}", f"{ceiling(gains, 'special')[place]:.2f}"])  # fmt: skip
    headers = ["task", "mean gain", "deviation", "lowest", "highest", "ceiling, gain", "ceiling, special"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def method_table(means: Mapping[str, NDArray[np.float64]], gains: NDArray[np.float64], top: NDArray[np.float64]) -> str:
    """One line a method, best first: correlation over all tasks, those tuned on, those reported, each task."""
    tuning, reporting = ([TASKS.index(task) for task in tasks] for tasks in (TUNING, REPORTING))
    found = correlations(means, gains, REFERENCE)
    rows = []
    for name, (figure, more) in sorted(found.items(), key=lambda item: -item[1][0].value):
        rows.append([name, str(figure), "" if name == REFERENCE else str(more), part(figure, tuning),
                     part(figure, reporting), *(f"{value:+.2f}" for value in figure.tasks)])  # fmt: skip
    chance = [random_figure(gains, seed) for seed in range(RANDOM_DRAWS)]
    rows.append([f"random scores ({RANDOM_DRAWS} draws)", f"{np.mean(chance):+.2f}"] + [""] * (3 + len(TASKS)))
    rows.append(["noise ceiling", f"{top.mean():.2f}", "", "", "", *(f"{value:.2f}" for value in top)])
    headers = ["method", "Spearman", f"against {REFERENCE}", "tuning tasks", "reporting tasks", *TASKS]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def part(figure: Figure, tasks: Sequence[int]) -> str:
    """A figure's mean over some tasks."""
    return f"{figure.tasks[list(tasks)].mean():+.2f}"


def random_figure(gains: NDArray[np.float64], seed: int) -> float:
    """The mean correlation of scores that know nothing."""
    return float(spearman(np.random.default_rng([seed, 5]).normal(size=gains.shape), gains).mean())


def decile_table(means: Mapping[str, NDArray[np.float64]], gains: NDArray[np.float64]) -> str:
    """One line a method: what the groups with its highest scores gain above the mean of all groups.

    In nats per response token for each task; their mean in standard deviations of the task's gains over the groups.
    """
    found = {name: best_decile(table, gains) for name, table in means.items()}
    found["groups with the highest gain"] = best_decile(gains, gains)
    spread = gains.std(0)  # tasks differ tenfold in their gains
    rows = [
        [name, f"{(values / spread).mean():+.2f}", *(f"{value:+.4f}" for value in values)]
        for name, values in sorted(found.items(), key=lambda item: -(item[1] / spread).mean())
    ]
    headers = ["method", "mean, deviations", *TASKS]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def cost_table(scored: Mapping[str, GroupScores]) -> str:
    """One line a method: what scoring took, a record for all tasks, as multiples of TRIM's."""
    rows = []
    for name, found in scored.items():
        command = f"`{found.command}`" if found.command else ""
        time = "" if math.isnan(found.time) else f"{found.time:.2f}"  # without, something else ran beside it
        rows.append([name, f"{found.passes:.2f}", time, command])
    headers = ["method", "passes", f"time, {REFERENCE} = 1", "command"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
