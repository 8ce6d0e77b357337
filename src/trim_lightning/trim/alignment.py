"""What training on a response would do for the targets, seen at the output embedding (For-Value, arXiv 2508.10180).

At a place whose state h predicts a token, the loss falls fastest in the output embedding along ``h e^T``, where e is 1
at the token that comes less the model's probability of every token. ``M = sum_j h_j e_j^T`` over the targets' response
tokens is the direction that helps them; ``h^T M e`` is how far a step for one token of a candidate goes along it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadGradient:
    """M of some targets.

    Attributes:
        factors: Matrices whose product it is, ``[hidden, vocabulary]``: itself, or ``[hidden, tokens]`` and
            ``[tokens, vocabulary]`` where those are smaller.
    """

    factors: tuple[Tensor, ...]

    @property
    def whole(self) -> Tensor:
        """``[hidden, vocabulary]``."""
        return reduce(torch.matmul, self.factors)

    def alignment(self, states: Tensor, chances: Tensor, answers: Tensor) -> Tensor:
        """``h^T M e`` of some places.

        Args:
            states: ``[places, hidden]``, each last hidden state that predicts a token.
            chances: ``[places, vocabulary]`` the model's probability of every token there, float32.
            answers: ``[places]`` int64 the tokens that follow.

        Returns:
            ``[places]`` float32.
        """
        aligned = reduce(torch.matmul, self.factors, states.to(self.factors[0].dtype)).to(chances.dtype)
        expected = torch.linalg.vecdot(chances, aligned)
        return aligned.gather(1, answers[:, None]).squeeze(1) - expected


def head_gradient(pieces: Iterable[tuple[Tensor, Tensor, Tensor]], targets: int, dtype: torch.dtype) -> HeadGradient:
    """Add up M, divided by the number of targets.

    Args:
        pieces: States, probabilities and answers of some response tokens each, as in `HeadGradient.alignment`.
        targets: Number of targets.
        dtype: Of the factors.

    Raises:
        ValueError: if there is no token.
    """
    states, errors = [], []
    whole: Tensor | None = None
    for piece, chances, answers in pieces:
        error = -chances
        error[torch.arange(len(answers), device=error.device), answers] += 1
        states.append(piece.to(error.dtype))
        errors.append(error)
        if (
            whole is not None
            or sum(map(len, states)) * (piece.shape[1] + error.shape[1]) > piece.shape[1] * error.shape[1]
        ):
            part = torch.cat(states).T @ torch.cat(errors)
            whole = part if whole is None else whole + part
            states, errors = [], []
    if whole is not None:
        return HeadGradient(((whole / targets).to(dtype),))
    if not states:
        raise ValueError("no response token")
    return HeadGradient(((torch.cat(states).T / targets).to(dtype), torch.cat(errors).to(dtype)))
