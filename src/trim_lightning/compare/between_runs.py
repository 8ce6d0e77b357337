"""The test between two groups of runs; arrays only.

Two groups of runs differ for three reasons: the method, the chance in each run (the draw of its coreset, the seed of
its training), and which records happen to be held out. Resampling the records alone holds the runs fixed: it calls
lucky draws better or worse. Here both count. Our choice of standard parts (Welch 1947, Satterthwaite 1946, Holm 1979),
not part of the method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ENOUGH_RUNS = 5  # independent runs of either group below which nothing is tested
LEVEL = 0.05
RESOLUTION = 1e-12  # standard errors this small are rounding errors of the sums


@dataclass(frozen=True)
class RunsTest:
    """A difference of two groups with its 95 % t-interval over runs and records, ``[...]`` each.

    Attributes:
        value: First minus second.
        low: Lower end, NaN where nothing varies, so that there is nothing to test by; likewise the next two.
        high: Upper end.
        p: Two-sided p-value of no difference.
    """

    value: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    p: NDArray[np.float64]


def compare_runs(first: NDArray[np.float64], second: NDArray[np.float64], weights: NDArray[np.float64]) -> RunsTest:
    """Welch's test of the runs' metrics, widened by what the held-out records add.

    A run's metric is ``sum(values) / sum(weights)``. The squared standard error has two parts. The first is Welch's
    ``s1² / n1 + s2² / n2``: the chance in the runs. The second is what the records add that all runs of a group share,
    and that more runs would not take away: the variance of the mean paired difference over records, less what the
    runs' own scatter on single records puts into it, at least 0. The whole is never less than the records alone give.
    The degrees of freedom are Satterthwaite's, rounded down; as the second part is known through these runs only, it
    counts with no more of them than the runs have. Runs with the same seed are not paired: nothing ties a seed's luck
    under one method to its luck under another.

    Args:
        first: ``[..., runs, records]`` of one group, e.g. summed losses or correct answers; at least two runs.
        second: Of the other, over the same records.
        weights: ``[..., records]``, positive, at least two, e.g. response tokens or ones.
    """
    from scipy.stats import t

    records, runs = weights.shape[-1], (first.shape[-2], second.shape[-2])
    total = weights.sum(axis=-1, keepdims=True)
    rest = 1 - weights / total  # what each record leaves to the others: makes the sums of squares unbiased
    parts = [scatter(values, weights, total, rest) for values in (first, second)]
    value = parts[0][0] - parts[1][0]
    gains = (first.mean(axis=-2) - second.mean(axis=-2) - value[..., None] * weights) / total
    by_records = (gains**2 / rest).sum(axis=-1)
    by_runs = parts[0][1] + parts[1][1]
    squared = np.maximum(by_runs + np.maximum(0, by_records - parts[0][2] - parts[1][2]), by_records)
    freedom = [(parts[0][1], runs[0] - 1), (parts[1][1], runs[1] - 1)]
    freedom.append((squared - by_runs, min(records - 1, sum(runs) - 2)))
    error = np.where(np.sqrt(squared) > RESOLUTION, np.sqrt(squared), np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        degrees = np.floor(squared**2 / sum(part**2 / own for part, own in freedom) + RESOLUTION)
        half = t.isf(LEVEL / 2, degrees) * error
        p = 2 * t.sf(np.abs(value) / error, degrees)
    return RunsTest(value, value - half, value + half, p)


def scatter(
    values: NDArray[np.float64], weights: NDArray[np.float64], total: NDArray[np.float64], rest: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Mean of the runs' metrics, its variance by the runs, and how much of that comes from single records."""
    runs = values.shape[-2]
    rates = values.sum(axis=-1) / total
    off = (values - rates[..., None] * weights[..., None, :]) / total[..., None]
    single = (off.var(axis=-2, ddof=1) / rest).sum(axis=-1)
    return rates.mean(axis=-1), rates.var(axis=-1, ddof=1) / runs, single / runs


def holm(values: Sequence[float]) -> list[float]:
    """Holm's p-values of tests that are read together: below 5 %, all of them at once are wrong in 5 % of cases."""
    order = np.argsort(values, kind="stable")
    scaled = np.asarray(values, dtype=np.float64)[order] * np.arange(len(values), 0, -1)
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(1, np.maximum.accumulate(scaled)) if len(values) else scaled
    return [float(value) for value in corrected]
