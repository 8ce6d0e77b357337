"""What a causal LM computes: last hidden states, and next-token losses with the LM head run on chosen tokens alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from trim_lightning.errors import UserError

IGNORED = -100  # torch's cross entropy leaves such labels out
AFTER_THE_HEAD = (  # config keys of architectures that do more to logits than their LM head
    "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "logit_scale", "logits_scaling",
    "lm_head_multiplier",
)  # fmt: skip
CHUNK = 1024  # predictions whose logits are held at once when no gradient is needed


def last_hidden_states(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Last hidden states ``[batch, seq, hidden]`` after the final norm, for ``[batch, seq]`` ids.

    Runs the base model without the LM head. There is no attention mask: with causal attention and padding
    on the right a real token never sees padding, and SDPA can take its fastest path.

    Raises:
        UserError: if the architecture has no base model beneath its LM head.
    """
    base: Any = model.base_model
    states: Tensor | None = getattr(base(input_ids=input_ids, use_cache=False), "last_hidden_state", None)
    if states is None:
        raise UserError(
            f"model.path: {type(model).__name__} gives no last hidden state to compare; use another architecture"
        )
    return states.to(input_ids.device)  # accelerate leaves it on the last layer's device


def hidden_width(model: PreTrainedModel) -> int:
    """Width of the last hidden states: what the LM head reads, for OPT may project to less than ``hidden_size``."""
    weight: Any = getattr(model.get_output_embeddings(), "weight", None)
    return int(model.config.get_text_config().hidden_size if weight is None else weight.shape[1])


def response_logits(model: PreTrainedModel, input_ids: Tensor, wanted: Tensor) -> Tensor:
    """Float32 logits ``[wanted, vocabulary]`` of the positions where ``wanted [batch, seq]`` is True.

    The LM head runs on those positions only, unless the architecture changes logits after its head.
    """
    head = model.get_output_embeddings()
    if head is None or changes_logits(model):
        return model(input_ids=input_ids, use_cache=False).logits[wanted].float()
    logits: Tensor = head(last_hidden_states(model, input_ids)[wanted])
    return logits.float()


def changes_logits(model: PreTrainedModel) -> bool:
    """True if the architecture caps or scales logits after its LM head."""
    config = model.config.get_text_config()
    return any(getattr(config, name, None) for name in AFTER_THE_HEAD)


def summed_loss(model: PreTrainedModel, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Summed next-token cross entropy (nats) over the labelled tokens, with gradient.

    Args:
        model: A causal LM.
        input_ids: ``[batch, seq]``.
        labels: ``[batch, seq]``, `IGNORED` where a token is not to be predicted.
    """
    wanted, following = predictions(labels)
    return cross_entropy(response_logits(model, input_ids, wanted), following, reduction="sum")


def record_losses(model: PreTrainedModel, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Summed cross entropy (nats) of each record's labelled tokens, ``[batch]`` float64; no gradient.

    Logits are computed for a thousand predictions at a time.
    """
    wanted, following = predictions(labels)
    owner = wanted.nonzero()[:, 0]
    head = model.get_output_embeddings()
    if head is None or changes_logits(model):
        parts = [cross_entropy(response_logits(model, input_ids, wanted), following, reduction="none")]
    else:
        states = last_hidden_states(model, input_ids)[wanted]
        parts = [
            cross_entropy(head(piece).float().to(answer.device), answer, reduction="none")
            for piece, answer in zip(states.split(CHUNK), following.split(CHUNK), strict=True)
        ]
    losses = torch.zeros(len(input_ids), dtype=torch.float64)
    return losses.index_add_(0, owner.cpu(), torch.cat(parts).double().cpu())


def predictions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Positions ``[batch, seq]`` (bool) whose next token is labelled, and those labels, flat."""
    following = labels[:, 1:]
    wanted = torch.zeros_like(labels, dtype=torch.bool)
    wanted[:, :-1] = following != IGNORED
    return wanted, following[following != IGNORED]
