"""Overlap, rank correlation and the bootstrap over records; arrays only.

All of this is our choice of standard statistics, none of it is part of the method.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trim_lightning.runs.selection import Coreset

CHUNK = 1 << 22  # draws held at once


@dataclass(frozen=True)
class Spread:
    """A number over seeds.

    Attributes:
        mean: Their mean.
        deviation: Sample standard deviation (n - 1), None of one value.
        low: The smallest.
        high: The largest.
        count: How many.
    """

    mean: float
    deviation: float | None
    low: float
    high: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Mean, standard deviation and range of at least one value."""
    array = np.asarray(values, dtype=np.float64)
    deviation = float(array.std(ddof=1)) if len(array) > 1 else None
    return Spread(float(array.mean()), deviation, float(array.min()), float(array.max()), len(array))


def jaccard_of_rows(first: NDArray[np.int64], second: NDArray[np.int64]) -> float | None:
    """Shared over all rows of two sets of distinct row numbers; None of two empty sets."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    total = len(first) + len(second) - shared
    return shared / total if total else None


def jaccard_of_counts(first: Counter[bytes], second: Counter[bytes]) -> float | None:
    """Jaccard similarity of two multisets: minimum over maximum of the counts; None of two empty ones.

    For sets without repetition this is the usual one.
    """
    total = (first | second).total()
    return (first & second).total() / total if total else None


def spearman(first: NDArray[np.floating], second: NDArray[np.floating]) -> float | None:
    """Rank correlation of two score columns ``[records]`` over the records that both scored (not NaN).

    Returns:
        None if fewer than two such records remain or one column is constant on them.
    """
    from scipy.stats import rankdata

    both = ~(np.isnan(first) | np.isnan(second))
    if both.sum() < 2:
        return None
    ranks = [rankdata(column[both]) for column in (first, second)]
    centred = [column - column.mean() for column in ranks]
    scale = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float(np.clip((centred[0] * centred[1]).sum() / scale, -1, 1)) if scale > 0 else None


def ratio(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """``sum(values) / sum(weights)`` along the records: ``[groups]`` of ``[groups, records]`` and ``[records]``."""
    result: NDArray[np.float64] = values.sum(axis=-1) / weights.sum()
    return result


def resampled_ratios(
    values: NDArray[np.float64], weights: NDArray[np.float64], samples: int, seed: int
) -> NDArray[np.float64]:
    """The ratio of every group over the same resampled records, which is what pairs the groups.

    Args:
        values: ``[groups, records]``, e.g. summed losses or correct answers.
        weights: ``[records]``, e.g. response tokens or ones; their sum is positive.
        samples: Number of resamples, each of as many records as there are, drawn with replacement.
        seed: Of the draws.

    Returns:
        ``[samples, groups]``; NaN where a resample has no weight.
    """
    records = len(weights)
    generator = np.random.default_rng(seed)
    columns = np.vstack([values, weights[None]]).T
    result = np.empty((samples, len(values)))
    step = max(1, CHUNK // records)
    for start in range(0, samples, step):
        size = min(step, samples - start)
        drawn = generator.integers(0, records, (size, records)) + records * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * records).reshape(size, records)
        sums = counts.astype(np.float64) @ columns
        with np.errstate(invalid="ignore", divide="ignore"):
            result[start : start + size] = sums[:, :-1] / sums[:, -1:]
    return result


def paired_interval(
    first: NDArray[np.float64], second: NDArray[np.float64], *, resolution: float = 1e-12
) -> tuple[float, float]:
    """95 % percentile interval of a difference over records, the runs held fixed.

    It says what other held-out records would make of these very runs. It is no test of what the runs stand for: for
    that see `between_runs`.

    Args:
        first: ``[samples]`` resampled ratios of one group.
        second: Of the other, over the same resamples.
        resolution: Differences this small are rounding errors of the sums and count as zero.
    """
    differences = first - second
    differences = differences[~np.isnan(differences)]
    differences[np.abs(differences) <= resolution] = 0
    low, high = np.percentile(differences, [2.5, 97.5])
    return float(low), float(high)


def overlap(first: Coreset, second: Coreset) -> float | None:
    """Jaccard similarity of two coresets.

    By row number where both were chosen from the same records of the same pool, else by the bytes of their lines,
    counting repeated lines as often as they occur. None if one of them is not at hand.
    """
    if first.pool is not None and first.pool == second.pool:
        return jaccard_of_rows(first.rows, second.rows)
    if first.lines is None or second.lines is None:
        return None
    return jaccard_of_counts(first.lines, second.lines)
