"""Spearman's correlation column by column, with NumPy and SciPy alone: another environment's scripts have it too."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Floats = NDArray[np.float64]


def spearman(first: Floats, second: Floats) -> Floats:
    """``[tasks]`` rank correlation of two ``[groups, tasks]`` tables, column by column; 0 for a constant column."""
    correlations: Floats = rank_correlations(first[:, None], second)[0]
    return correlations


def rank_correlations(tables: Floats, gains: Floats) -> Floats:
    """``[methods, tasks]`` Spearman's correlation of ``[groups, methods, tasks]`` scores with ``[groups, tasks]``."""
    ranks = [rankdata(table, axis=0) for table in (tables, gains[:, None])]
    centred = [table - table.mean(0) for table in ranks]
    scale = np.sqrt((centred[0] ** 2).sum(0) * (centred[1] ** 2).sum(0))
    product = (centred[0] * centred[1]).sum(0)
    return np.where(scale > 0, product / np.where(scale > 0, scale, 1), 0.0)
