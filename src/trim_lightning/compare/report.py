"""All that a comparison found out, before it becomes text or files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trim_lightning.compare.between_runs import ENOUGH_RUNS
from trim_lightning.compare.differences import Comparison, compare_groups, pairs_to_test
from trim_lightning.compare.diversity import Diversity, Embed, diversity
from trim_lightning.compare.groups import BASELINE, Axis, Group, axes, group_runs
from trim_lightning.compare.statistics import overlap, spearman
from trim_lightning.errors import UserError
from trim_lightning.files.atomic import sha256_of
from trim_lightning.runs.find import find_runs
from trim_lightning.runs.run import Run, metric_names, read_runs
from trim_lightning.runs.selection import Coreset

SHORT = 12  # characters of a label that still fit as a column heading
Matrix = list[list[float | None]]


@dataclass(frozen=True)
class Report:
    """A comparison.

    Attributes:
        sweep: The multirun folder, if one was compared.
        runs: The finished runs.
        broken: Label and reason of every other.
        groups: Runs that differ in seeds only.
        metrics: Names of all metrics.
        axes: What varied.
        overlaps: ``[runs][runs]`` Jaccard similarity of coresets, None where it cannot be told.
        diversities: Of each run what kind of records its coreset holds, None if they cannot be read.
        correlations: ``[runs][runs]`` Spearman correlation of scores, None for different pools.
        comparisons: The tests between groups.
        notes: What the reader should know, a line each.
    """

    sweep: Path | None
    runs: list[Run]
    broken: list[tuple[str, str]]
    groups: list[Group]
    metrics: list[str]
    axes: list[Axis]
    overlaps: Matrix
    diversities: list[Diversity | None]
    correlations: Matrix
    comparisons: list[Comparison]
    notes: list[str]

    @property
    def group_of(self) -> list[Group]:
        """The group of each run."""
        return [next(group for group in self.groups if run in group.runs) for run in self.runs]

    @property
    def cells(self) -> int:
        """Combinations of the axes' values."""
        return math.prod(len(axis.levels) for axis in self.axes)

    @property
    def full_grid(self) -> bool:
        """True if every combination was run."""
        return self.cells == len(self.runs)

    @property
    def numbered(self) -> bool:
        """True if labels are too long for column headings, so that runs need numbers."""
        return any(len(run.label) > SHORT for run in self.runs)

    @property
    def names(self) -> list[str]:
        """What a matrix calls each run: its label, or ``#1``, ``#2`` ... if labels are long."""
        return [f"#{place + 1}" if self.numbered else run.label for place, run in enumerate(self.runs)]


def compare(paths: Sequence[Path], *, all_pairs: bool, samples: int, seed: int, embed: Embed | None = None) -> Report:
    """Compare runs.

    Args:
        paths: Run directories or multirun folders.
        all_pairs: Test every pair, not only each method against random.
        samples: Bootstrap resamples of the records.
        seed: Of the resampling.
        embed: Gives a vector per record, for the diversity by embeddings.

    Raises:
        UserError: if a path holds no run, or none of the runs is finished.
    """
    found, sweep = find_runs(paths)
    runs, broken = read_runs(found)
    if not runs:
        label, reason = broken[0]
        raise UserError(f"none of the {len(broken)} runs is finished; {label}: {reason}")
    groups = group_runs(runs)
    pairs = pairs_to_test(groups, all_pairs=all_pairs)
    comparisons, notes = compare_groups(groups, pairs, samples=samples, seed=seed)
    return Report(
        sweep=sweep,
        runs=runs,
        broken=broken,
        groups=groups,
        metrics=list(metric_names(runs)),
        axes=axes(runs),
        overlaps=matrix(runs, overlap),
        diversities=diversities(runs, embed),
        correlations=matrix(runs, correlation),
        comparisons=comparisons,
        notes=[*warnings(groups, compared=bool(pairs)), *(f"note: {note}" for note in notes)],
    )


def diversities(runs: Sequence[Run], embed: Embed | None) -> list[Diversity | None]:
    """Of each run; equal coresets are looked at once."""
    known: dict[str | None, Diversity | None] = {}
    found = []
    for run in runs:
        name = None if run.coreset.file is None else sha256_of(run.coreset.file)
        if name not in known:
            known[name] = diversity(run, embed)
        found.append(known[name])
    return found


def matrix(runs: Sequence[Run], measure: Callable[[Coreset, Coreset], float | None]) -> Matrix:
    """A symmetric measure of every two coresets."""
    cells: Matrix = [[None] * len(runs) for _ in runs]
    for row, run in enumerate(runs):
        for place in range(row, len(runs)):
            cells[row][place] = cells[place][row] = measure(run.coreset, runs[place].coreset)
    return cells


def correlation(first: Coreset, second: Coreset) -> float | None:
    """Spearman correlation of two selections' scores of the same pool records, None for different pools."""
    if first.pool is None or first.pool != second.pool:
        return None
    return spearman(first.scores, second.scores)


def warnings(groups: Sequence[Group], *, compared: bool) -> list[str]:
    """Reasons to mistrust the comparison."""
    lines = []
    for group in groups:
        if group.method == BASELINE and group.draws < ENOUGH_RUNS:
            lines.append(
                f"warning: {group.title}, {group.first.budget}, has {group.draws} selection "
                f"{'seed' if group.draws == 1 else 'seeds'}; at least {ENOUGH_RUNS} are needed to tell a better "
                "method from a lucky draw"
            )
    trained = [group for group in groups if group.first.kind == "train"]
    if len(trained) > 1 and not compared:
        lines.append(
            "note: no random run to compare with: add method=random with seed=0,1,2,3,4, or test all pairs with "
            "--all-pairs"
        )
    if len({group.first.kind for group in groups}) > 1:
        lines.append("note: selections and training runs are compared together; a selection has no metrics")
    return lines
