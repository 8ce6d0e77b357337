"""The alignment is the inner product of two whole gradients of the output embedding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trim_lightning.trim.alignment import HeadGradient, alignment, head_gradient

HIDDEN, VOCABULARY = 6, 40


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def places(number: int, seed: int, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(number, HIDDEN, dtype=torch.float64, generator=generator)
    answers = torch.randint(0, VOCABULARY, (number,), generator=generator)
    return states, states @ weight.T, answers


def gradient(states: Tensor, answers: Tensor, weight: Tensor) -> Tensor:
    """What autograd says of the log likelihood of some tokens."""
    free = weight.clone().requires_grad_(True)
    torch.log_softmax(states @ free.T, -1).gather(1, answers[:, None]).sum().backward()
    assert free.grad is not None
    return free.grad


@pytest.mark.parametrize("number", [3, 30])
def test_it_is_the_product_of_autograds_gradients(number: int, weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    targets, candidate = places(number, 1, weight), places(5, 2, weight)
    found = head_gradient([targets], 2, torch.float64)
    assert len(found.factors) == (2 if number == 3 else 1), "few tokens are kept as they are, many as their sum"
    wanted = gradient(targets[0], targets[2], weight) / 2
    torch.testing.assert_close(found.whole.T, wanted, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr("trim_lightning.trim.alignment.CACHED", 2 * VOCABULARY)  # two places at once
    none = HeadGradient((torch.zeros(HIDDEN, VOCABULARY, dtype=torch.float64),))
    own, nothing = alignment([found, none], *candidate)
    assert (nothing == 0).all()
    for place in range(5):
        single = gradient(candidate[0][place : place + 1], candidate[2][place : place + 1], weight)
        assert float(own[place]) == pytest.approx(float((single * wanted).sum()), rel=1e-4, abs=1e-5)


def test_pieces_add_up(weight: Tensor) -> None:
    states, logits, answers = places(50, 1, weight)
    whole = head_gradient([(states, logits, answers)], 1, torch.float64).whole
    cut = [(states[at : at + 4], logits[at : at + 4], answers[at : at + 4]) for at in range(0, 50, 4)]
    torch.testing.assert_close(head_gradient(cut, 1, torch.float64).whole, whole, rtol=1e-5, atol=1e-5)
    assert alignment([HeadGradient((whole,))], states[:0], logits[:0], answers[:0]).shape == (1, 0)


def test_nothing_to_add_up() -> None:
    with pytest.raises(ValueError, match="no response token"):
        head_gradient([], 1, torch.float32)
