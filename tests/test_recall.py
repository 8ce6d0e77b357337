"""What a sample says of a cheap score: the bound holds, the recall asked for comes about, no guide is no guide."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from trim_lightning.selection.recall import Guide

POOL, SAMPLE, TOP, DRAWS = 4000, 500, 200, 100
Pair = tuple[NDArray[np.float64], NDArray[np.float64]]


def gaussian(draw: np.random.Generator, correlation: float) -> Pair:
    full, noise = draw.normal(size=(2, POOL))
    return full, correlation * full + np.sqrt(1 - correlation**2) * noise


def heavy_tails(draw: np.random.Generator) -> Pair:
    full = draw.normal(size=POOL)
    return full, full + 0.3 * draw.standard_t(2, size=POOL)


def some_at_random(draw: np.random.Generator) -> Pair:
    full = draw.normal(size=POOL)
    cheap = full + 0.3 * draw.normal(size=POOL)
    blind = draw.random(POOL) < 0.04
    cheap[blind] = draw.normal(size=int(blind.sum()))
    return full, cheap


def worse_at_the_top(draw: np.random.Generator) -> Pair:
    full = draw.normal(size=POOL)
    return full, full + (0.2 + 0.5 * (full > 1.5)) * draw.normal(size=POOL)


POPULATIONS: dict[str, Callable[[np.random.Generator], Pair]] = {
    "weak": lambda draw: gaussian(draw, 0.8),
    "strong": lambda draw: gaussian(draw, 0.95),
    "heavy tails": heavy_tails,
    "some at random": some_at_random,
    "worse at the top": worse_at_the_top,
}


class Population:
    """Two scores of a pool, and samples of it."""

    def __init__(self, draw: np.random.Generator, scores: Pair) -> None:
        self.draw, (self.full, cheap) = draw, scores
        self.ranks = np.empty(POOL, dtype=np.int64)
        self.ranks[np.argsort(-cheap)] = np.arange(1, POOL + 1)
        self.top = np.argsort(-self.full)[:TOP]

    def sample(self) -> tuple[Guide, NDArray[np.int64]]:
        rows = self.draw.choice(POOL, SAMPLE, replace=False)
        rows = rows[np.argsort(-self.full[rows])]
        return Guide(self.ranks[rows], POOL, TOP), rows

    def recall(self, kept: int) -> float:
        return float((self.ranks[self.top] <= kept).mean())


@pytest.mark.parametrize("name", POPULATIONS)
def test_the_bound_holds_and_the_recall_comes_about(name: str) -> None:
    draw = np.random.default_rng(1)
    population = Population(draw, POPULATIONS[name](draw))
    held, found, bounds = 0, [], []
    for _ in range(DRAWS):
        guide, rows = population.sample()
        kept = guide.kept_for(0.98)
        bounds.append(guide.bound(kept))
        held += population.recall(kept) >= bounds[-1]
        inside = (population.ranks[population.top] <= kept) | np.isin(population.top, rows)
        found.append(float(inside.mean()))
    assert held >= 95
    assert np.mean(found) >= 0.97, "the sample, which is scored in full anyway, counts"
    assert np.mean(bounds) > 0.7, "the bound says something"


@pytest.mark.parametrize("share", [0.06, 0.1, 0.2])
def test_the_bound_of_a_share_that_was_set_holds_where_it_is_low(share: float) -> None:
    """Many misses are seen of a narrow share, so that the bound is near the truth and could be wrong."""
    draw = np.random.default_rng(2)
    population = Population(draw, gaussian(draw, 0.8))
    kept = int(share * POOL)
    truth = population.recall(kept)
    bounds = np.array([population.sample()[0].bound(kept) for _ in range(DRAWS)])
    assert (bounds <= truth).sum() >= 95
    assert bounds.mean() > truth - 0.25
    assert abs(np.mean([population.sample()[0].expected(kept) for _ in range(DRAWS)]) - truth) < 0.15


def test_more_recall_keeps_more() -> None:
    draw = np.random.default_rng(3)
    guide, _ = Population(draw, gaussian(draw, 0.9)).sample()
    kept = [guide.kept_for(recall) for recall in (0.8, 0.9, 0.95, 0.98)]
    assert kept == sorted(kept)
    assert TOP <= kept[0] < kept[-1] < POOL
    assert guide.expected(kept[-1]) >= 0.98
    assert guide.kept_for(1.0) == POOL, "no sample promises all"


def test_a_perfect_guide_keeps_little_and_none_keeps_all() -> None:
    draw = np.random.default_rng(4)
    full = draw.normal(size=POOL)
    perfect, _ = Population(draw, (full, full)).sample()
    assert perfect.points
    assert TOP <= perfect.kept_for(0.98) <= 1.5 * TOP
    for cheap in (draw.normal(size=POOL), -full):
        guide, _ = Population(draw, (full, cheap)).sample()
        assert not guide.points
        assert guide.kept_for(0.5) == POOL
    assert guide.expected(POOL) == guide.bound(POOL) == 1.0


def test_the_bound_is_the_binomial_one_where_nothing_is_missed() -> None:
    """500 of 1,000,000 without a miss exclude more misses than 1 - 0.025 ** (1 / 500) of the pool."""
    ranks = np.arange(1, 501, dtype=np.int64)
    guide = Guide(ranks, 1_000_000, 50_000)
    assert guide.bound(100_000) == pytest.approx(1 - (1 - 0.025 ** (1 / 500)) / 0.05, abs=1e-3)
