"""Orthogonal matching pursuit: vectors one after the other, until their weighted sum is the mean of all."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RIDGE = 1.0  # of the authors' code of arXiv 2407.15235, likewise the next
TOLERANCE = 1e-4  # of the residual, as a share of what is to be matched


def matching_order(vectors: NDArray[np.float64], share: float) -> NDArray[np.int64]:
    """All vectors in the order in which matching pursuit picks them to add up to their mean.

    A round picks at most ``share`` of the vectors; the next one starts anew on those that are left, as the authors'
    code does when a round ends before its budget is spent. Vectors that point away from the mean come last, those
    with the largest product first.

    Args:
        vectors: ``[n, width]``.
        share: Of ``n``, at least one vector.

    Returns:
        ``[n]`` places.
    """
    mean = vectors.mean(0)
    gram, products, square = vectors @ vectors.T, vectors @ mean, float(mean @ mean)
    picks = max(1, int(share * len(vectors)))
    left, order = np.arange(len(vectors)), []
    while len(left):
        picked = pursue(gram[np.ix_(left, left)], products[left], square, picks)
        if not picked:
            picked = np.argsort(-products[left], kind="stable").tolist()
        order.append(left[picked])
        left = np.delete(left, picked)
    return np.concatenate([*order, np.zeros(0, dtype=np.int64)])


def pursue(gram: NDArray[np.float64], products: NDArray[np.float64], square: float, picks: int) -> list[int]:
    """One round of orthogonal matching pursuit with weights that are not negative, from inner products alone.

    Each step picks the vector with the largest product with the residual, if it is positive, and fits all weights
    anew by ridge regression (non-negative least squares; `RIDGE`). The authors' code drops a vector whose weight
    would become negative; here it keeps its place with the weight 0 (our choice).

    Args:
        gram: ``[n, n]`` inner products of the vectors.
        products: ``[n]`` inner products with what is to be matched.
        square: Its squared length.
        picks: Most vectors to pick.

    Returns:
        Places in the order of picking; fewer than ``picks`` if the residual vanishes or nothing points its way.
    """
    from scipy.linalg import solve_triangular
    from scipy.optimize import nnls

    chosen: list[int] = []
    weights = np.zeros(0)
    for _ in range(min(picks, len(products))):
        residual = products - gram[:, chosen] @ weights
        inner = gram[np.ix_(chosen, chosen)]
        if square - 2 * weights @ products[chosen] + weights @ inner @ weights <= TOLERANCE**2 * square:
            break
        residual[chosen] = -np.inf
        best = int(np.argmax(residual))
        if residual[best] <= 0:
            break
        chosen.append(best)
        # ‖Lᵀw − L⁻¹p‖² is the ridge objective up to a constant, with LLᵀ the Gram matrix plus the ridge
        lower = np.linalg.cholesky(gram[np.ix_(chosen, chosen)] + RIDGE * np.eye(len(chosen)))
        weights, _ = nnls(lower.T, solve_triangular(lower, products[chosen], lower=True))
    return chosen
