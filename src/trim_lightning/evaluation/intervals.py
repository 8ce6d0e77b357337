"""Bootstrap intervals over held-out records."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def bootstrap_ratio(
    numerators: NDArray[np.float64], denominators: NDArray[np.float64], samples: int, seed: int
) -> tuple[float, float]:
    """95 % percentile interval of ``sum(numerators) / sum(denominators)`` over resampled records.

    Args:
        numerators: ``[records]``, e.g. summed losses or correct answers.
        denominators: ``[records]``, e.g. response tokens or ones; a record with 0 carries nothing and is left out.
        samples: Resamples.
        seed: Of the resampling.

    Returns:
        Lower and upper bound.
    """
    generator = np.random.default_rng(seed)
    numerators, denominators = numerators[denominators > 0], denominators[denominators > 0]
    records = len(numerators)
    values = np.empty(samples)
    for sample in range(samples):
        drawn = generator.integers(0, records, records)
        values[sample] = numerators[drawn].sum() / denominators[drawn].sum()
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
