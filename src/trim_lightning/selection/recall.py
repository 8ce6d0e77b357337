"""How much of the best records a cheap score would keep, said from a random sample that has both scores; ranks only.

All of it is our choice. What is wanted are the best ``top`` of ``pool`` records by the full score; ``ranks`` are the
places that the cheap score gives a random sample of the pool (1 is the best), listed best first by the *full* score.
The records of the sample that belong to the wanted ones stand in front of that list.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

DOUBT, NEGLIGIBLE = 0.025, 1e-6  # one side of a 95 % interval; a probability that is left out of a sum
CHANCE = 0.001  # a guide that is no better than chance passes for one this often
FEWEST = 25  # records of the sample that stand for the wanted ones, be they fewer
NEIGHBOURS = 4  # times that many tell how the two ranks scatter
MOST_KEPT = 0.8  # above it a second stage is not worth its trouble
GRID = 64  # places among the wanted records at which the scatter is looked at


def size(values: NDArray[np.float64]) -> float:
    """Root of the mean square."""
    return float(np.sqrt((values**2).mean()))


@dataclass(frozen=True)
class Guide:
    """What a random sample says of a cheap score.

    Attributes:
        ranks: ``[sample]`` int64, see the module.
        pool: Records that have a score.
        top: How many of them are wanted.
    """

    ranks: NDArray[np.int64]
    pool: int
    top: int

    @property
    def share(self) -> float:
        """Of the pool that is wanted."""
        return self.top / self.pool

    @cached_property
    def front(self) -> int:
        """Records of the sample that stand for the wanted ones: as many as are expected, but not too few."""
        return min(len(self.ranks), max(FEWEST, math.ceil(self.share * len(self.ranks))))

    @cached_property
    def points(self) -> bool:
        """True if the wanted records stand higher by the cheap score than the others of the sample (Mann-Whitney)."""
        from scipy.stats import mannwhitneyu

        front, rest = self.ranks[: self.front], self.ranks[self.front :]
        if not len(rest):
            return False
        return bool(mannwhitneyu(front, rest, alternative="less").pvalue < CHANCE)

    @cached_property
    def _reach(self) -> NDArray[np.float64]:
        """Places by the cheap score where wanted records may lie, as shares of the pool, ascending: a smooth estimate.

        Both ranks become normal scores; a line through the better part of the sample, and each of its residuals at
        each of `GRID` places among the wanted records, say where such records may lie. The sample's own best records
        are too few for a quantile far out, but where they scatter more than the others, all residuals grow by that.
        """
        from scipy.stats import norm

        used = min(len(self.ranks), NEIGHBOURS * self.front)
        full = norm.isf((np.arange(used) + 0.5) / len(self.ranks))
        cheap = norm.isf((self.ranks[:used] - 0.5) / self.pool)
        spread = full - full.mean()
        slope = max(0.0, float(spread @ (cheap - cheap.mean()) / max(spread @ spread, 1e-12)))
        residuals = cheap - cheap.mean() - slope * spread
        residuals *= max(1.0, size(residuals[: self.front]) / max(size(residuals), 1e-12))
        places = norm.isf(self.share * (np.arange(GRID) + 0.5) / GRID) - full.mean()
        found = cheap.mean() + slope * places[:, None] + residuals[None, :]
        return np.sort(norm.sf(found).ravel())

    @property
    def _unseen(self) -> float:
        """Share of the pool that is not in the sample; the sample is scored in full whatever its cheap rank."""
        return 1 - len(self.ranks) / self.pool

    def expected(self, kept: int) -> float:
        """Expected recall of the wanted records if the best ``kept`` and the sample are scored in full."""
        if kept >= self.pool:
            return 1.0
        inside = int(np.searchsorted(self._reach, kept / self.pool, side="right"))
        return 1 - self._unseen * (1 - inside / (len(self._reach) + GRID))  # of one residual more all are lost

    def bound(self, kept: int) -> float:
        """The least recall of the best ``kept``: the lower end of a 95 % interval, whatever the two scores are like.

        A sample is a draw without return: it holds ``n`` of the wanted records, and of ``n`` so many lost ones, by the
        hypergeometric distribution, as Clopper and Pearson have it of the binomial. Which of the sample are wanted ones
        is not known, but they are its first ``n``. So each ``n`` counts by its probability, and the bound is the
        largest number of lost ones with which no more than are seen among the first ``n`` is not too unlikely.
        """
        from scipy.stats import hypergeom

        if kept >= self.pool:
            return 1.0
        lost = np.concatenate([[0], np.cumsum(self.ranks > kept)])
        drawn = hypergeom(self.pool, self.top, len(self.ranks))
        numbers = np.arange(int(drawn.ppf(NEGLIGIBLE)), int(drawn.ppf(1 - NEGLIGIBLE)) + 1)
        weights = drawn.pmf(numbers)
        low, high = 0, min(self.top, self.pool - kept)
        while low < high:
            middle = (low + high + 1) // 2
            if float(weights @ hypergeom.cdf(lost[numbers], self.top, middle, numbers)) > DOUBT:
                low = middle
            else:
                high = middle - 1
        return 1 - low / self.top

    def kept_for(self, recall: float) -> int:
        """The fewest records to score in full for an expected recall; the whole pool where the sample gives none.

        The sample's own best records must lie among them too: as many of them as the recall asks for of one more than
        there are (a quantile's unbiased place), all of them where that is more.
        """
        if not self.points:
            return self.pool
        within = 1 - (1 - recall) / max(self._unseen, 1e-12)
        if within <= 0:
            return min(self.top, self.pool)
        number = math.ceil(within * (len(self._reach) + GRID))
        if number > len(self._reach):
            return self.pool
        smooth = math.ceil(self._reach[number - 1] * self.pool)
        front = np.sort(self.ranks[: self.front])
        seen = int(front[min(self.front, math.ceil(within * (self.front + 1))) - 1])
        kept = max(smooth, seen, self.top)
        return kept if kept <= MOST_KEPT * self.pool else self.pool
