"""From token similarities to one score a record; arrays only, so that a cached pass needs no torch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Pooled(NamedTuple):
    """Scores of records, each ``[records]`` float64; NaN where a record has no scoped token."""

    score: Floats
    mean: Floats
    max: Floats
    coverage: Floats


def penalise(similarity: Floats, direct: NDArray[np.bool_], mode: str = "scale", penalty: float = 0.9) -> Floats:
    """Apply the fallback penalty lambda to tokens whose class has no fingerprint.

    Args:
        similarity: ``[tokens]`` raw cosines.
        direct: ``[tokens]`` True where the token's own class has a fingerprint.
        mode: ``scale`` (lambda s, default), ``discount`` ((1 - lambda) s) or ``zero``; sources conflict, see
            the method page of the docs.
        penalty: lambda.

    Returns:
        ``[tokens]`` float64.
    """
    factor = {"scale": penalty, "discount": 1 - penalty, "zero": 0.0}[mode]
    return np.where(direct, similarity, factor * similarity)


def pool(
    similarity: Floats,
    direct: NDArray[np.bool_],
    lengths: NDArray[np.int64],
    *,
    name: str = "mean_max_coverage",
    mean_weight: float = 0.5,
    max_weight: float = 0.5,
    coverage_weight: float = 0.05,
    token_weights: Floats | None = None,
    k: int = 8,
    temperature: float = 0.1,
    q: float = 0.9,
) -> Pooled:
    """Pool the scoped tokens of many records.

    ``mean_max_coverage`` is the paper's ``0.5 mean + 0.5 max + 0.05 coverage``. ``mean_max`` leaves coverage
    out; ``mean`` and ``max`` are those alone; ``topk_mean`` (mean of the k highest), ``softmax_mean`` (weights
    ``softmax(s / temperature)``) and ``quantile`` are ours. Token weights (our choice) make the mean a weighted
    mean and multiply similarities before the maximum, the top k, the softmax and the quantile, scaled so that
    the record-independent largest weight is 1; coverage is never weighted.

    Args:
        similarity: ``[tokens]`` penalised similarities of the scoped tokens, record after record.
        direct: ``[tokens]`` direct matches.
        lengths: ``[records]`` scoped tokens of each record; their sum is ``tokens``.
        name: The pooling formula.
        mean_weight: Weight of the mean.
        max_weight: Weight of the maximum.
        coverage_weight: Weight of the coverage.
        token_weights: ``[tokens]`` in (0, 1], or None.
        k: For ``topk_mean``.
        temperature: For ``softmax_mean``.
        q: For ``quantile``.

    Returns:
        Score, mean, maximum and coverage of each record.
    """
    scored = lengths > 0
    empty = np.full(len(lengths), np.nan)
    if not scored.any():
        return Pooled(empty, empty.copy(), empty.copy(), empty.copy())
    sizes = lengths[scored]
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    similarity = similarity.astype(np.float64)
    weighted = similarity if token_weights is None else similarity * token_weights

    def spread(values: Floats) -> Floats:
        result = empty.copy()
        result[scored] = values
        return result

    if token_weights is None:
        mean = np.add.reduceat(similarity, starts) / sizes
    else:
        mean = np.add.reduceat(weighted, starts) / np.add.reduceat(token_weights, starts)
    highest = np.maximum.reduceat(weighted, starts)
    coverage = np.add.reduceat(direct.astype(np.float64), starts) / sizes
    if name in ("mean_max_coverage", "mean_max"):
        score = mean_weight * mean + max_weight * highest
        if name == "mean_max_coverage":
            score = score + coverage_weight * coverage
    elif name == "mean":
        score = mean
    elif name == "max":
        score = highest
    elif name == "softmax_mean":
        heat = np.exp((weighted - np.repeat(highest, sizes)) / temperature)
        score = np.add.reduceat(heat * weighted, starts) / np.add.reduceat(heat, starts)
    elif name in ("topk_mean", "quantile"):
        parts = np.split(weighted, starts[1:])
        if name == "topk_mean":
            score = np.array([np.sort(part)[-k:].mean() for part in parts])
        else:
            score = np.array([np.quantile(part, q) for part in parts])
    else:
        raise ValueError(f"unknown pooler {name!r}")
    return Pooled(spread(score), spread(mean), spread(highest), spread(coverage))


def aggregate_groups(groups: dict[str, Pooled], how: str) -> Pooled:
    """Combine the scores of target groups (our choice; LESS takes the maximum over subtasks).

    Args:
        groups: Group name to its scores.
        how: ``mean`` averages every column; ``max`` and ``round_robin`` take all columns of the best group
            (ties: the first group).

    Returns:
        One `Pooled`.
    """
    stacked = [np.stack([getattr(pooled, column) for pooled in groups.values()]) for column in Pooled._fields]
    if how == "mean":
        return Pooled(*(values.mean(0) for values in stacked))
    best = np.where(np.isnan(stacked[0]), -np.inf, stacked[0]).argmax(0)
    return Pooled(*(values[best, np.arange(values.shape[1])] for values in stacked))
