"""How long the responses are that a method's scores put first."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from value_groups import TASKS
from value_methods import Scored

PART = 20  # the best one in so many of the scored records


def lengths_table(scored: Mapping[str, Scored], response_tokens: NDArray[np.int64]) -> str:
    """One line a method: median response tokens of its best twentieth for each task, beside those of all it scored.

    Args:
        scored: By method.
        response_tokens: ``[records]`` of the pool.
    """
    rows = [[name, *(f"{best_median(scores, response_tokens):.0f}" for scores in found.scores),
             f"{np.median(response_tokens[np.isfinite(found.scores[0])]):.0f}"]
            for name, found in scored.items()]  # fmt: skip
    return tabulate(rows, headers=["method", *TASKS, "all scored"], tablefmt="github", disable_numparse=True)


def best_median(scores: NDArray[np.float64], response_tokens: NDArray[np.int64]) -> float:
    """Median response tokens of the best twentieth by ``[records]`` scores, NaN for those that have none."""
    known = np.flatnonzero(np.isfinite(scores))
    best = known[np.argsort(-scores[known], kind="stable")][: max(1, len(known) // PART)]
    return float(np.median(response_tokens[best]))
