"""From cosines with single targets to one score a record: taking turns, optimal transport, nearest by density.

The last two as "A Critical Look at Targeted Instruction Selection" (arXiv 2602.14696) sets them.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Floats = NDArray[np.float64]
AGGREGATES = ("mean", "max", "turns", "density", *(("transport",) if find_spec("ot") else ()))  # POT is no dependency
REGULARISATION = 0.01  # of the transport's entropy
RELAXED = 1e-4  # how much it counts that records do not get equal shares; targets give exactly theirs
WIDTH = 0.75  # distance at which a record no longer crowds another one
NEAREST = 10  # a target gives to a tenth of the pool


def aggregate(cosines: Floats, vectors: NDArray[np.float32], how: str) -> Floats:
    """``[records]`` scores.

    Args:
        cosines: ``[records, targets]``, NaN rows for records that have no score.
        vectors: ``[records, width]`` of unit length, what the cosines are of.
        how: ``mean``, ``max``, ``turns`` (1 / best rank, what taking turns picks first), ``transport`` or ``density``.
    """
    scores = np.full(len(cosines), np.nan)
    known = np.isfinite(cosines).all(1)
    some = cosines[known]
    ways: Mapping[str, Floats] = {"mean": some.mean(1), "max": some.max(1)}
    if how in ways:
        scores[known] = ways[how]
    elif how == "turns":
        scores[known] = 1 / np.stack([rankdata(-column) for column in some.T]).min(0)
    elif how == "density":
        scores[known] = nearest_by_density(some, vectors[known])
    else:
        scores[known] = transport(some)
    return scores


def transport(cosines: Floats) -> Floats:
    """``[records]`` mass that unbalanced optimal transport moves from the targets to each record."""
    from ot.unbalanced import sinkhorn_unbalanced

    cost = (1 - cosines.T) / 2
    given, taken = (np.full(size, 1 / size) for size in cost.shape)
    plan = sinkhorn_unbalanced(given, taken, cost, reg=REGULARISATION, reg_m=(float("inf"), RELAXED), reg_type="kl")
    mass: Floats = plan.sum(0)
    return mass


def nearest_by_density(cosines: Floats, vectors: NDArray[np.float32]) -> Floats:
    """``[records]`` mass that each gets from the targets near it, the less the more records are close by.

    Every target gives to the nearest tenth of the pool, by one over the density there (KNN-KDE, from TSDS, arXiv
    2410.11303). The original ends a target's neighbours sooner where going on costs more than it spreads; here
    none ends.
    """
    number = max(1, len(cosines) // NEAREST)
    near = np.argsort(-cosines, axis=0, kind="stable")[:number]  # [neighbours, targets]
    pooled = np.unique(near)
    squared = 2 * (1 - vectors[pooled] @ vectors[pooled].T)  # squared distances of unit vectors
    kernel = np.clip(1 - squared / WIDTH**2, 0, None)
    crowd = np.sort(kernel, axis=1)[:, -number:].sum(1)
    density = np.ones(len(cosines))
    density[pooled] = np.maximum(crowd, 1e-12)
    mass = np.zeros(len(cosines))
    for members in near.T:
        share = 1 / density[members]
        mass[members] += share / share.sum() / cosines.shape[1]
    return mass
