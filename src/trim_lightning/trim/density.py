"""Nearest records of single targets, each discounted by how many others lie close to it: KNN-KDE of TSDS.

After arXiv 2410.11303, with the constants that "A Critical Look at Targeted Instruction Selection" (arXiv 2602.14696)
sets. Arrays only, so that a stored pass needs no torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
SHARE = 0.1  # of the pool that a target gives to (our choice)
MOST_NEAR = 5_000  # records that it gives to at most
MOST_CROWD = 1_000  # neighbours that make a crowd
WIDTH = 0.75  # distance of unit vectors from which on a record does not crowd another one
BLOCK = 1_024  # records whose distances are held at once
LEAST = 1e-12  # density of a record


def unit(vectors: NDArray[Any]) -> Floats:
    """``[n, width]`` vectors of length 1; a zero vector stays zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    found: Floats = vectors / np.where(norms > 0, norms, 1)
    return found


def nearest(cosines: NDArray[np.floating]) -> NDArray[np.int64]:
    """The records that each target gives to, ``[nearest, targets]`` places, nearest first, ties by place.

    ``cosines`` is ``[records, targets]``.
    """
    number = max(1, min(MOST_NEAR, int(len(cosines) * SHARE)))
    return np.argsort(-cosines, axis=0, kind="stable")[:number].astype(np.int64)


def crowding(vectors: NDArray[np.float32], neighbours: int) -> Floats:
    """How crowded each record is by the others: the sum of ``1 - (distance / WIDTH)^2`` over those that are closer.

    Args:
        vectors: ``[records, width]`` of unit length.
        neighbours: At most so many of the closest count, and no more than `MOST_CROWD`.

    Returns:
        ``[records]``; a record counts itself.
    """
    most = min(neighbours, MOST_CROWD, len(vectors))
    found = np.empty(len(vectors))
    for start in range(0, len(vectors), BLOCK):
        cosines = vectors[start : start + BLOCK] @ vectors.T
        kernel = np.clip(1 - 2 * (1 - cosines) / WIDTH**2, 0, None)  # squared distances of unit vectors
        if most < len(vectors):
            kernel = np.partition(kernel, len(vectors) - most, axis=1)[:, -most:]
        found[start : start + BLOCK] = np.sort(kernel, axis=1).sum(1, dtype=np.float64)
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
