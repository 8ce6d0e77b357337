"""Warm-up: a short LoRA training of the scorer on a random part of the pool."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


def draw_warmup_rows(lengths: NDArray[np.int64], fraction: float, seed: int) -> list[int]:
    """Rows of the warm-up subset: ``max(1, floor(fraction * N))`` of the non-empty records, drawn by seed.

    Args:
        lengths: ``[records]`` tokens of each pool record.
        fraction: Share of the pool.
        seed: Of the draw.

    Returns:
        Ascending rows.
    """
    usable = np.flatnonzero(lengths > 0)
    number = min(len(usable), max(1, int(Fraction(str(fraction)) * len(lengths))))
    drawn = np.random.default_rng([seed, 0x5741]).choice(usable, size=number, replace=False)
    return sorted(int(row) for row in drawn)
