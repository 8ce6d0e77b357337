"""How well a method's scores tell what groups of records teach: rank correlation, best decile, noise ceiling."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from value_gains import Gains
from value_groups import Group

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


def group_scores(scores: Floats, groups: Sequence[Group]) -> Floats:
    """``[groups, tasks]`` mean score of each group's records, of ``[tasks, records]`` scores; NaN records are left out.

    A record without a score is one that the method never picks; leaving it out favours no method, for every method
    scores nearly all records of the groups.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a group without any score
        return np.stack([np.nanmean(scores[:, list(group.rows)], axis=1) for group in groups])


def special(gains: Floats) -> Floats:
    """``[groups, tasks]`` the part of a gain that belongs to its task.

    Each task's gains are standardised over the groups, then each group's mean over the tasks is taken off.
    """
    spread = gains.std(0)
    standard = (gains - gains.mean(0)) / np.where(spread > 0, spread, 1)
    whole: Floats = standard - standard.mean(1, keepdims=True)
    return whole


def spearman(first: Floats, second: Floats) -> Floats:
    """``[tasks]`` rank correlation of two ``[groups, tasks]`` tables, column by column; 0 for a constant column."""
    ranks = [rankdata(table, axis=0) for table in (first, second)]
    centred = [table - table.mean(0) for table in ranks]
    scale = np.sqrt((centred[0] ** 2).sum(0) * (centred[1] ** 2).sum(0))
    product = (centred[0] * centred[1]).sum(0)
    return np.where(scale > 0, product / np.where(scale > 0, scale, 1), 0.0)


def correlation(scores: Floats, gains: Floats, seed: int = 0, samples: int = SAMPLES) -> Figure:
    """Spearman's correlation of ``[groups, tasks]`` scores with gains, the mean over tasks.

    The interval resamples groups and tasks, both with replacement (percentiles): it holds for other groups and other
    tasks of these kinds.
    """
    return resampled(lambda place: spearman(scores[place], gains[place]), gains.shape, seed, samples)


def difference(first: Floats, second: Floats, gains: Floats, seed: int = 0) -> Figure:
    """How much better one method's scores are correlated with gains than another's, resampled together."""
    return resampled(
        lambda place: spearman(first[place], gains[place]) - spearman(second[place], gains[place]), gains.shape, seed
    )


def resampled(
    measure: Callable[[Any], Floats], shape: tuple[int, ...], seed: int = 0, samples: int = SAMPLES
) -> Figure:
    """``measure`` of the whole ``[groups, tasks]`` tables, with the interval of its mean over resampled ones."""
    generator = np.random.default_rng(seed)
    size, number = shape
    means = []
    for _ in range(samples):
        rows = generator.integers(size, size=size)
        means.append(measure(np.ix_(rows, generator.integers(number, size=number))).mean())
    low, high = np.percentile(means, [2.5, 97.5])
    tasks = measure(...)
    return Figure(float(tasks.mean()), float(low), float(high), tasks)


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
