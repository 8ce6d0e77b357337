"""Which metrics are better when lower, and which runs are best."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

LOWER_IS_BETTER = re.compile(r"(nll|loss|perplexity|bits_per_byte|_err|error)$")


def lower_is_better(metric: str) -> bool:
    """True for losses and their like, whatever task or filter the name carries."""
    return bool(LOWER_IS_BETTER.search(metric.rpartition("/")[2].partition(",")[0]))


def best(metric: str, values: Sequence[float]) -> list[int]:
    """Places of the best value; none if no value is a finite number."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return []
    wanted = min(finite) if lower_is_better(metric) else max(finite)
    return [place for place, value in enumerate(values) if value == wanted]
