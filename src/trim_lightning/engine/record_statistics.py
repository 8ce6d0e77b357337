"""What a forward pass can say of a whole record: a pooled vector, or the loss of its response."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trim_lightning.engine.modules import last_hidden_states
from trim_lightning.models.loss import IGNORED, record_losses
from trim_lightning.tokens.spans import RESPONSE


class RecordStatistic(Protocol):
    """Computes a fixed number of values for each record of a batch.

    Attributes:
        stage: Name of the stage that stores them.
        settings: What they depend on besides model and tokens; part of the stage's key.
        needs_gradients: True if it runs a backward pass.
    """

    stage: str
    needs_gradients: bool

    @property
    def settings(self) -> Mapping[str, Any]:
        """See above."""

    def __call__(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> Tensor:
        """Values ``[batch, width]``, float32 or float64, of a batch as `ShardBatches` makes it."""


class PositionWeightedMean:
    """Mean of the last hidden states with weights proportional to the position, ``[batch, hidden]`` float32.

    Positions count from 1 in the rendered sequence, scaffolding included; the weights of a record sum to 1.
    The pooling of RDS+ (arXiv 2503.01807).

    Args:
        scope: Content tokens that are averaged (our choice); None averages all real tokens (RDS+).
    """

    stage = "vectors"
    needs_gradients = False

    def __init__(self, scope: str | None = None) -> None:
        self.settings = {"pooling": "position_weighted_mean", "scope": scope}
        self._scoped = scope is not None

    def __call__(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> Tensor:
        """Pool; a record without a token to average gets zeros."""
        hidden = last_hidden_states(model, batch["input_ids"]).float()
        positions = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
        used = batch["scope"] if self._scoped else positions <= batch["lengths"][:, None]
        weights = positions * used
        share = weights / weights.sum(1, keepdim=True).clamp(min=1)
        return torch.einsum("bs,bsh->bh", share.float(), hidden)


class ResponseLoss:
    """Summed loss (nats) of a record's response tokens and their number, ``[batch, 2]`` float64.

    Only content counts: neither template words nor the end-of-turn token. A sequence's first token has
    nothing before it and is not predicted.

    Args:
        prompt: ``given`` or ``removed``: which sequences the pass is run on, part of the stage's key.
        whole: Count every token of the rendered record instead, template words too.
    """

    stage = "losses"
    needs_gradients = False

    def __init__(self, prompt: str = "given", *, whole: bool = False) -> None:
        self.settings = {"prompt": prompt} | ({"tokens": "all"} if whole else {})
        self._whole = whole

    def __call__(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> Tensor:
        """Sum; a record without a response has 0 of 0 tokens."""
        counted = batch["roles"] == RESPONSE
        if self._whole:
            places = torch.arange(1, counted.shape[1] + 1, device=counted.device)
            counted = places <= batch["lengths"][:, None]
        labels = torch.where(counted, batch["input_ids"], IGNORED)
        counts = (labels[:, 1:] != IGNORED).sum(1).cpu().double()
        return torch.stack([record_losses(model, batch["input_ids"], labels), counts], dim=1)
