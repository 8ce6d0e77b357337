"""What a scoring pass sees of responses beside similarities: their mean state, and what a step for them would do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trim_lightning.engine.memory import is_out_of_memory
from trim_lightning.errors import UserError
from trim_lightning.models.loss import last_hidden_states, next_tokens
from trim_lightning.tokens.spans import RESPONSE
from trim_lightning.tokens.tokenized import TokenSequence
from trim_lightning.trim.alignment import HeadGradient, alignment, head_gradient

PLACES = 256  # whose products with a vocabulary are held at once
LARGEST = torch.finfo(torch.float16).max


def predicted_responses(roles: Tensor) -> Tensor:
    """``[batch, seq]`` bool, the response tokens that something stands before; ``roles`` is 0 at padding."""
    counted = roles == RESPONSE
    counted[:, 0] = False
    return counted


@torch.no_grad()
def gradient_of(model: PreTrainedModel, targets: Sequence[TokenSequence], together: bool = False) -> HeadGradient:
    """`HeadGradient` of some targets, one after the other.

    Args:
        model: A causal LM.
        targets: Their tokens; those without a response add nothing.
        together: See `next_tokens`.

    Raises:
        ValueError: if none has a response.
    """

    def pieces() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for target in targets:
            input_ids = torch.from_numpy(target.token_ids.astype("int64"))[None].to(model.device)
            roles = torch.from_numpy(target.roles.astype("uint8"))[None].to(model.device)
            states = last_hidden_states(model, input_ids)
            yield from next_tokens(model, input_ids, states, predicted_responses(roles)[:, 1:], together)

    return head_gradient(pieces(), len(targets), model.dtype)


def gradients_of(
    model: PreTrainedModel, groups: Sequence[Sequence[TokenSequence]], together: bool = False
) -> list[HeadGradient]:
    """`gradient_of` each group of targets.

    Raises:
        UserError: if memory does not suffice.
    """
    try:
        return [gradient_of(model, targets, together) for targets in groups]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    raise UserError(
        f"target: memory does not suffice for what the responses of {sum(map(len, groups))} targets in {len(groups)} "
        "groups ask of the output embedding; give fewer targets or groups, or choose a smaller model"
    )


def alignments(
    model: PreTrainedModel,
    input_ids: Tensor,
    states: Tensor,
    counted: Tensor,
    gradients: Sequence[HeadGradient],
    together: bool = False,
) -> Tensor:
    """How far a step for each token would go along each of the gradients, ``[gradients, batch, seq]`` float32.

    Args:
        model: A causal LM.
        input_ids: ``[batch, seq]``.
        states: ``[batch, seq, hidden]`` its last hidden states.
        counted: ``[batch, seq]`` bool, see `predicted_responses`; 0 elsewhere.
        gradients: Those of single groups of targets.
        together: See `next_tokens`.
    """
    found = torch.zeros(len(gradients), *input_ids.shape, device=input_ids.device)
    parts = [
        alignment(gradients, *piece).to(found.device)
        for whole in next_tokens(model, input_ids, states, counted[:, 1:], together)
        for piece in zip(*(part.split(PLACES) for part in whole), strict=True)
    ]
    if parts:
        found[:, :, 1:][:, counted[:, 1:]] = torch.cat(parts, dim=1)
    return found


def mean_states(states: Tensor, counted: Tensor) -> Tensor:
    """The mean of ``states [batch, seq, hidden]`` where ``counted [batch, seq]``, ``[hidden, batch]`` float16; or 0."""
    number = counted.sum(1, keepdim=True).clamp(min=1)
    sums = torch.where(counted[..., None], states, 0).sum(1, dtype=torch.float32)  # not times 0: a NaN is left out
    return (sums / number).T.clamp(-LARGEST, LARGEST).half()
