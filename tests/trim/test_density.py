"""KNN-KDE against its definition, pair by pair."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trim_lightning.trim import density
from trim_lightning.trim.density import crowding, nearest, shares, unit


@pytest.fixture
def vectors() -> np.ndarray:
    middle = np.array([1.0, 0, 0, 0])
    generator = np.random.default_rng(0)
    close = middle + 0.1 * generator.normal(size=(8, 4))
    return unit(np.concatenate([close, generator.normal(size=(22, 4))])).astype(np.float32)


def kernel(one: np.ndarray, other: np.ndarray) -> float:
    return max(0.0, 1 - (math.dist(one, other) / density.WIDTH) ** 2)


def test_crowding(vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(density, "BLOCK", 7 * len(vectors))
    for neighbours in (3, 30, 100):
        expected = [
            sum(sorted((kernel(one, other) for other in vectors), reverse=True)[:neighbours]) for one in vectors
        ]
        np.testing.assert_allclose(crowding(vectors, neighbours), expected, rtol=1e-5)
    assert crowding(vectors, 30)[:8].min() > crowding(vectors, 30)[8:].mean(), "eight lie together"
    monkeypatch.setattr(density, "MOST_CROWD", 2)
    assert crowding(vectors, 30).max() <= 2.000001


def test_a_target_gives_to_the_nearest_tenth(vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = unit(np.array([[1.0, 0.2, 0, 0], [0, 0, 1, 0]]))
    cosines = targets @ vectors.T
    near = nearest(cosines)
    assert near.shape == (3, 2)
    assert near[:, 1].tolist() == sorted(range(30), key=lambda place: -cosines[1, place])[:3]
    found = shares(near, np.arange(1.0, 31.0))
    assert found.sum() == pytest.approx(1)
    expected = np.zeros(30)
    for column in near.T:
        whole = sum(1 / (place + 1) for place in column)
        for place in column:
            expected[place] += 1 / (place + 1) / whole / 2
    np.testing.assert_allclose(found, expected)
    monkeypatch.setattr(density, "MOST_NEAR", 2)
    assert nearest(cosines).shape == (2, 2)
    assert nearest(cosines[:, :4]).shape == (1, 2)


def test_a_copy_shares_what_one_would_get() -> None:
    lone, twin = np.array([1.0, 0]), np.array([0, 1.0])
    vectors = np.stack([lone, twin, twin]).astype(np.float32)
    near = np.array([[0], [1], [2]])
    np.testing.assert_allclose(shares(near, crowding(vectors, 3)), [0.5, 0.25, 0.25])


def test_unit() -> None:
    np.testing.assert_allclose(unit(np.array([[3.0, 4], [0, 0]])), [[0.6, 0.8], [0, 0]])
