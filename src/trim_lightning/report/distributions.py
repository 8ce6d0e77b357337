"""Distributions of a selection: bins and quantiles."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from trim_lightning.report.facts import Histogram, Quantiles

BINS = 48
TAIL = 0.995  # lengths beyond this quantile share the last bin, or one long record would flatten all others


def histogram(populations: Mapping[str, NDArray[np.floating]], bins: int = BINS) -> Histogram | None:
    """Counts over common bins from the least to the largest value; None if there is nothing to count."""
    known = np.concatenate([values[np.isfinite(values)] for values in populations.values()])
    if not len(known):
        return None
    edges = np.histogram_bin_edges(known, bins)
    return Histogram(
        [float(f"{edge:.6g}") for edge in edges], {name: _counts(values, edges) for name, values in populations.items()}
    )


def length_histogram(populations: Mapping[str, NDArray[np.integer]]) -> Histogram | None:
    """Counts of lengths over bins of whole numbers; the longest records share the last one."""
    known = np.concatenate(list(populations.values()))
    if not len(known):
        return None
    low, longest = int(known.min()), int(known.max())
    high = max(int(np.quantile(known, TAIL)), low + 1)
    width = max(1, -(-(high - low) // BINS))
    edges = np.arange(low, high + width + 1, width, dtype=np.float64)
    counts = {
        name: _counts(np.minimum(values, values.dtype.type(edges[-1])), edges) for name, values in populations.items()
    }
    return Histogram(edges.tolist(), counts, overflow=bool(longest > edges[-1]))


def quantiles_of(name: str, values: NDArray[np.number]) -> Quantiles:
    """Mean, 10 %, 50 % and 90 % quantile of the finite values."""
    known = values[np.isfinite(values)]
    if not len(known):
        return Quantiles(name, 0, None, None, None, None)
    low, median, high = (round(float(part), 4) for part in np.quantile(known, (0.1, 0.5, 0.9)))
    return Quantiles(name, len(known), round(float(known.mean(dtype=np.float64)), 4), low, median, high)


def _counts(values: NDArray[np.number], edges: NDArray[np.float64]) -> list[int]:
    counts: list[int] = np.histogram(values[np.isfinite(values)], edges)[0].tolist()
    return counts
