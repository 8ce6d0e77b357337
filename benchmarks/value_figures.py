"""How well a method's scores tell what groups of records teach: rank correlation, best decile, noise ceiling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rank_correlations import rank_correlations, spearman
from value_gains import Gains

Floats = NDArray[np.float64]
SAMPLES = 2_000


@dataclass(frozen=True)
class Figure:
    """A number with its 95 % interval over groups and tasks.

    Attributes:
        value: Mean over the tasks.
        low: 2.5 % of the resampled means.
        high: 97.5 % of them.
        tasks: ``[tasks]`` the number of each task.
    """

    value: float
    low: float
    high: float
    tasks: Floats

    def __str__(self) -> str:
        return f"{self.value:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def special(gains: Floats) -> Floats:
    """``[groups, tasks]`` the part of a gain that belongs to its task.

    Each task's gains are standardised over the groups, then each group's mean over the tasks is taken off.
    """
    standard = standardised(gains)
    whole: Floats = standard - standard.mean(1, keepdims=True)
    return whole


def standardised(table: Floats) -> Floats:
    """``[groups, tasks]`` with mean 0 and deviation 1 over the groups, task by task; 0 for a constant column."""
    spread = table.std(0)
    whole: Floats = (table - table.mean(0)) / np.where(spread > 0, spread, 1)
    return whole


def correlations(
    tables: Mapping[str, Floats], gains: Floats, reference: str = "", seed: int = 0, samples: int = SAMPLES
) -> dict[str, tuple[Figure, Figure]]:
    """Spearman's correlation of each method's ``[groups, tasks]`` scores with gains, the mean over tasks.

    The intervals resample groups and tasks, both with replacement (percentiles), the same ones for all methods: they
    hold for other groups and other tasks of these kinds.

    Args:
        tables: Scores by method.
        gains: ``[groups, tasks]``.
        reference: Method that each is compared with; none compares with zero.
        seed: Of the draws.
        samples: How many.

    Returns:
        By method its figure, and the difference from the reference's.
    """
    stack = np.stack(list(tables.values()), axis=1)
    base = list(tables).index(reference) if reference else None

    def less_reference(values: Floats) -> Floats:
        return values if base is None else values - values[base]

    whole = rank_correlations(stack, gains)
    generator = np.random.default_rng(seed)
    size, number = gains.shape
    means = []
    for _ in range(samples):
        rows, tasks = generator.integers(size, size=size), generator.integers(number, size=number)
        means.append(rank_correlations(stack[rows], gains[rows])[:, tasks].mean(1))
    drawn = np.stack(means, axis=1)  # [methods, samples]
    found = []
    for values, samples_of in ((whole, drawn), (less_reference(whole), less_reference(drawn))):
        low, high = np.percentile(samples_of, [2.5, 97.5], axis=1)
        found.append([Figure(float(own.mean()), float(a), float(b), own)
                      for own, a, b in zip(values, low, high, strict=True)])  # fmt: skip
    return dict(zip(tables, zip(*found, strict=True), strict=True))


def correlation(scores: Floats, gains: Floats, seed: int = 0, samples: int = SAMPLES) -> Figure:
    """`correlations` of one method."""
    return correlations({"": scores}, gains, seed=seed, samples=samples)[""][0]


def best_decile(scores: Floats, gains: Floats) -> Floats:
    """``[tasks]`` mean gain of the tenth of groups with the highest scores, less that of all groups.

    All groups have about the same response tokens, so this is what a method's choice brings at an equal budget.
    """
    number = max(1, round(len(gains) / 10))
    best = np.argsort(-scores, axis=0, kind="stable")[:number]
    chosen: Floats = np.take_along_axis(gains, best, axis=0).mean(0) - gains.mean(0)
    return chosen


def ceiling(gains: Gains, what: str) -> Floats:
    """``[tasks]`` the highest correlation that scores can be expected to have with gains of one seed.

    Two trainings of one group agree with correlation r; what both measure agrees with either by the root of r
    (Spearman's attenuation formula). Gains of two seeds' mean are a little less noisy than that.

    Args:
        gains: With a second seed for some groups.
        what: ``gain`` or ``special``.
    """
    twice = ~np.isnan(gains.second).any(1)
    tables = [gains.first[twice], gains.second[twice]]
    if what == "special":
        tables = [special(table) for table in tables]
    return np.sqrt(np.clip(spearman(*tables), 0, 1))
