"""Nearest records of single targets, each discounted by how many others lie close to it: KNN-KDE of TSDS.

After arXiv 2410.11303, with the constants that "A Critical Look at Targeted Instruction Selection" (arXiv 2602.14696)
sets, but for one thing: TSDS ends a target's neighbours sooner where going on costs more than it spreads, and draws
from what comes out; here every target gives to all of them, and what a record gets is its score (our choice). Arrays
only, so that a stored pass needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
PART = 10  # one in so many of the pool's records gets something from a target
MOST_NEAR = 5_000  # records that it gives to at most
MOST_CROWD = 1_000  # neighbours that make a crowd
WIDTH = 0.75  # distance of unit vectors from which on a record does not crowd another one
BLOCK = 16_000_000  # distances that are held at once, three times: 192 MB
LEAST = 1e-12  # density of a record


def unit(vectors: NDArray[Any]) -> Floats:
    """``[n, width]`` vectors of length 1; a zero vector stays zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    found: Floats = vectors / np.where(norms > 0, norms, 1)
    return found


def nearest(cosines: NDArray[np.floating]) -> NDArray[np.int64]:
    """The records that each target gives to, ``[nearest, targets]`` places, nearest first, ties by place.

    Of equal records at the end of the row the first are taken. ``cosines`` is ``[targets, records]``.
    """
    number = max(1, min(MOST_NEAR, cosines.shape[1] // PART))
    if not len(cosines):
        return np.empty((0, 0), dtype=np.int64)
    return np.stack([np.argsort(-row, kind="stable")[:number] for row in cosines], axis=1)


def crowding(
    vectors: NDArray[np.float32], neighbours: int, tell: Callable[[int], object] = lambda number: None
) -> Floats:
    """How crowded each record is by the others: the sum of ``1 - (distance / WIDTH)^2`` over those that are closer.

    Args:
        vectors: ``[records, width]`` of unit length.
        neighbours: At most so many of the closest count, and no more than `MOST_CROWD`.
        tell: Is called with the number of records that were done, again and again.

    Returns:
        ``[records]``; a record counts itself.
    """
    most = min(neighbours, MOST_CROWD, len(vectors))
    found = np.empty(len(vectors))
    rows = max(1, BLOCK // max(len(vectors), 1))
    for start in range(0, len(vectors), rows):
        kernel = vectors[start : start + rows] @ vectors.T
        kernel -= 1
        kernel *= 2 / WIDTH**2  # less the squared distance of unit vectors
        kernel += 1
        np.clip(kernel, 0, None, out=kernel)
        if most < len(vectors):
            kernel = np.partition(kernel, len(vectors) - most, axis=1)[:, -most:]
        found[start : start + rows] = np.sort(kernel, axis=1).sum(1, dtype=np.float64)
        tell(len(kernel))
    return np.maximum(found, LEAST)


def shares(near: NDArray[np.int64], density: Floats) -> Floats:
    """What the targets give to each record: every target one over their number, divided by one over the density.

    Args:
        near: ``[nearest, targets]`` places.
        density: ``[records]``; only that of near records is looked at.

    Returns:
        ``[records]``; together 1.
    """
    found = np.zeros(len(density))
    for members in near.T:
        given = 1 / density[members]
        found[members] += given / given.sum() / near.shape[1]
    return found
