"""Rank scores and spend the budget; arrays only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

DEFAULT_FRACTION = 0.05
PART = 65_536  # rows


@dataclass(frozen=True)
class ScoreTable:
    """Scores of every pool record; NaN where a record could not be scored.

    Attributes:
        score: ``[records]`` float32.
        num_tokens: ``[records]`` int32 content tokens.
        num_scored: ``[records]`` int32 scoped tokens.
        mean: ``[records]`` float32, None for methods that have no such part; likewise max and coverage.
        max: See mean.
        coverage: See mean.
        groups: Group name to ``[records]`` float32 group scores.
        order: ``[scored]`` int64 rows best first, where the method ranks otherwise than by score.
        cheap_score: ``[records]`` float32 the score by which a cascade chose what gets a ``score``; None without one.
            Records that have only that one come last in ``order``.
        parts: Name to ``[records]`` float32, what the score is a weighted sum of.
    """

    score: NDArray[np.float32]
    num_tokens: NDArray[np.int32]
    num_scored: NDArray[np.int32]
    mean: NDArray[np.float32] | None = None
    max: NDArray[np.float32] | None = None
    coverage: NDArray[np.float32] | None = None
    groups: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    order: NDArray[np.int64] | None = None
    cheap_score: NDArray[np.float32] | None = None
    parts: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def unranked(self) -> NDArray[np.bool_]:
        """``[records]`` True where a record has no score of any kind."""
        missing = np.isnan(self.score)
        return missing if self.cheap_score is None else missing & np.isnan(self.cheap_score)

    def __len__(self) -> int:
        return len(self.score)

    def without(self, rows: NDArray[np.int64]) -> ScoreTable:
        """The same table without score and rank in some rows."""
        if not len(rows):
            return self  # a copy of a table of millions is hundreds of megabytes
        left_out = np.zeros(len(self), dtype=bool)
        left_out[rows] = True

        def cleared(values: NDArray[np.float32]) -> NDArray[np.float32]:
            return np.where(left_out, np.float32(np.nan), values)

        return replace(
            self,
            score=cleared(self.score),
            mean=None if self.mean is None else cleared(self.mean),
            max=None if self.max is None else cleared(self.max),
            coverage=None if self.coverage is None else cleared(self.coverage),
            groups={group: cleared(values) for group, values in self.groups.items()},
            order=None if self.order is None else self.order[~left_out[self.order]],
            cheap_score=None if self.cheap_score is None else cleared(self.cheap_score),
            parts={name: cleared(values) for name, values in self.parts.items()},
        )


def rank_by_score(score: NDArray[np.float32]) -> NDArray[np.int64]:
    """Rows with a score, best first; ties by pool order."""
    # NaN sorts last
    return np.argsort(-score, kind="stable")[: len(score) - int(np.count_nonzero(np.isnan(score)))]


def rank_round_robin(groups: Sequence[NDArray[np.float32]]) -> NDArray[np.int64]:
    """Rows in the order in which groups, taking turns, pick their best record that is still free (our choice).

    Args:
        groups: ``[records]`` scores of each group; a record unscored in all groups is left out.
    """
    return merge_in_turns([rank_by_score(score) for score in groups])


def merge_in_turns(orders: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """One order of all rows in some, each of which in its turn gives the first of its rows that is still free."""
    queues = [rows_of(order) for order in orders]
    taken: set[int] = set()
    result: list[int] = []
    while queues:
        left = []
        for queue in queues:
            row = next((row for row in queue if row not in taken), None)
            if row is not None:
                taken.add(row)
                result.append(row)
                left.append(queue)
        queues = left
    return np.array(result, dtype=np.int64)


def rows_of(order: NDArray[np.int64]) -> Iterator[int]:
    """The rows as Python's numbers, a part at a time: all at once take five times the room of the array."""
    return chain.from_iterable(part.tolist() for part in np.array_split(order, 1 + len(order) // PART))


def rank_single_targets(scores: Sequence[NDArray[np.float32]]) -> NDArray[np.int64]:
    """Rows in the order in which targets, taking turns, name their next best record.

    A target that names a record once more has lost that turn, as in the code of RDS+ (arXiv 2503.01807).

    Args:
        scores: ``[records]`` scores against each target; a record unscored by all is left out.
    """
    never = np.iinfo(np.int64).max
    first = np.full(len(scores[0]), never)
    for place, score in enumerate(scores):
        order = rank_by_score(score)
        first[order] = np.minimum(first[order], np.arange(len(order)) * len(scores) + place)
    return np.argsort(first)[: int((first < never).sum())]


def budget_count(pool_size: int, fraction: float) -> int:
    """``max(1, floor(fraction * pool_size))`` in exact decimal arithmetic: 0.29 of 100 is 29, not 28."""
    return max(1, int(Fraction(str(fraction)) * pool_size))


def choose(
    order: NDArray[np.int64],
    num_tokens: NDArray[np.integer[Any]],
    *,
    count: int | None = None,
    tokens: int | None = None,
    admit: Callable[[int], bool] | None = None,
) -> NDArray[np.int64]:
    """Take records by rank until the budget is spent.

    Args:
        order: Rows best first.
        num_tokens: ``[records]`` tokens that each record costs.
        count: Number of records; or
        tokens: of these tokens: the walk ends at the first admitted record that would overspend, but takes at
            least one.
        admit: Says whether a record may be taken (caps, duplicates, length bounds); it may keep state, since it
            is asked in rank order and a record that it admits is taken or ends the walk.

    Returns:
        Selected rows, best first.
    """
    chosen: list[int] = []
    spent = 0
    for row in rows_of(order):
        if count is not None and len(chosen) >= count:
            break
        if admit is not None and not admit(row):
            continue
        if tokens is not None and chosen and spent + int(num_tokens[row]) > tokens:
            break
        chosen.append(row)
        spent += int(num_tokens[row])
    return np.array(chosen, dtype=np.int64)
