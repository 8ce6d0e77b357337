"""What training on a response would do for the targets, seen at the output embedding (For-Value, arXiv 2508.10180).

At a place whose state h predicts a token, the loss falls fastest in the output embedding along ``h e^T``, where e is 1
at the token that comes less the model's probability of every token. ``M = sum_j h_j e_j^T`` over the targets' response
tokens is the direction that helps them; ``h^T M e`` is how far a step for one token of a candidate goes along it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

CACHED = 4_000_000  # numbers over the vocabulary that are worked on at once on a CPU: 16 MB


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

    def columns(self, states: Tensor) -> Tensor:
        """``[places, vocabulary]`` ``h^T M`` of ``[places, hidden]`` states."""
        return reduce(torch.matmul, self.factors, states.to(self.factors[0].dtype))


def alignment(gradients: Sequence[HeadGradient], states: Tensor, logits: Tensor, answers: Tensor) -> Tensor:
    """``h^T M e`` of some places, for each M.

    Args:
        gradients: The Ms.
        states: ``[places, hidden]``, each last hidden state that predicts a token.
        logits: ``[places, vocabulary]`` the model's there.
        answers: ``[places]`` int64 the tokens that follow.

    Returns:
        ``[gradients, places]`` float32.
    """
    found = torch.empty(len(gradients), len(answers), device=logits.device)
    # what a processor's cache holds takes a third of the time; a GPU is faster without pieces
    rows = max(1, CACHED // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(answers))
    pieces = [slice(start, start + rows) for start in range(0, len(answers), rows)]
    chances = torch.cat([torch.softmax(logits[piece].float(), dim=-1) for piece in pieces]) if pieces else logits
    for place, gradient in enumerate(gradients):  # one after the other, for each takes as much as the logits
        columns = gradient.columns(states)
        for piece in pieces:
            aligned = columns[piece].float()
            own = aligned.gather(1, answers[piece, None]).squeeze(1)
            found[place, piece] = own - torch.linalg.vecdot(chances[piece], aligned)
    return found


def head_gradient(pieces: Iterable[tuple[Tensor, Tensor, Tensor]], targets: int, dtype: torch.dtype) -> HeadGradient:
    """Add up M, divided by the number of targets.

    Beside one piece it takes what it leaves, and the sum in float32 where it is `HeadGradient.factors` of one matrix.

    Args:
        pieces: States, logits and answers of some response tokens each, as in `alignment`.
        targets: Number of targets.
        dtype: Of the factors.

    Raises:
        ValueError: if there is no token.
    """
    states: list[Tensor] = []
    errors: list[Tensor] = []
    whole: Tensor | None = None
    for piece, logits, answers in pieces:
        error = torch.softmax(logits.float(), dim=-1).neg_()
        error[torch.arange(len(answers), device=error.device), answers] += 1
        tokens, (hidden, vocabulary) = sum(map(len, states)) + len(piece), (piece.shape[1], error.shape[1])
        if whole is None and tokens * (hidden + vocabulary) > hidden * vocabulary:
            whole = torch.zeros(hidden, vocabulary, device=error.device)
            while states:
                whole.addmm_(states.pop().float().T, errors.pop().float())
        if whole is None:
            states.append(piece.to(dtype))
            errors.append(error.to(dtype))
        else:
            whole.addmm_(piece.float().T, error)
    if whole is not None:
        return HeadGradient((whole.div_(targets).to(dtype),))
    if not states:
        raise ValueError("no response token")
    return HeadGradient((torch.cat(states).T / targets, torch.cat(errors)))
