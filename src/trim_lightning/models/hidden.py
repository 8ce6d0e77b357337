"""The last hidden states of a causal LM, and their width."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from trim_lightning.errors import UserError


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
