"""What a model is asked once, when it is loaded: is it causal, and what is there to its logits."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trim_lightning.errors import UserError, first_line
from trim_lightning.models.loss import HEAD_ALONE, last_hidden_states

log = logging.getLogger(__name__)
TOKENS = 12  # of a sequence; the second half of it is changed
DRAWS = 3
# Shares of the largest number. The same pass twice differs in its last bit at most, and a soft cap shows above that.
# With other tokens a mixture of experts adds in another order.
LAST_BIT = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}


def check_model(model: PreTrainedModel, name: str) -> None:
    """Note whether losses may run the output embedding on chosen positions alone; refuse a model that looks ahead.

    Two forward passes over a few tokens, and one of the base model. A model spread by accelerate runs them too. One
    that cannot run where it was loaded is left to its own forward pass, which is right whatever there is to its
    logits; that it is causal is then taken from its class.

    Raises:
        UserError: if a later token changes the logits of earlier ones, or the attention hook refuses the model.
    """
    setattr(model, HEAD_ALONE, False)
    first, *others = draws(model)
    try:
        with torch.no_grad():  # not inference mode: a model may keep what it computes, and be trained later
            logits = model(input_ids=first, use_cache=False).logits.float()
            ahead = all(looks_ahead(model, first, logits, other) for other in others)
    except UserError:
        raise
    except Exception as error:
        log.debug("%s could not be checked where it was loaded (%s)", name, first_line(error))
        return
    if ahead:
        raise UserError(
            f"model.path={name}: is not causal as it is loaded: what {type(model).__name__} computes for a token "
            "depends on later ones; choose a decoder, or set is_decoder in its config.json if it was trained as one"
        )
    with torch.no_grad():
        setattr(model, HEAD_ALONE, is_head_alone(model, first, logits))


def looks_ahead(model: PreTrainedModel, input_ids: Tensor, logits: Tensor, other: Tensor) -> bool:
    """True if the logits of the first half change with the tokens of the second."""
    half = TOKENS // 2
    changed = torch.cat([input_ids[:, :half], other[:, half:]], dim=1)
    now = model(input_ids=changed, use_cache=False).logits.float()
    return not alike(now[:, :half], logits[:, :half], ROUNDING[model.dtype])


def is_head_alone(model: PreTrainedModel, input_ids: Tensor, logits: Tensor) -> bool:
    """True if the output embedding of the base model's last hidden states gives these logits."""
    head: Any = model.get_output_embeddings()
    if head is None:
        return False
    try:
        shortcut = head(last_hidden_states(model, input_ids)).float()
    except (UserError, RuntimeError):  # states of another width than the output embedding reads, say
        return False
    return alike(shortcut, logits, LAST_BIT[model.dtype])


def alike(one: Tensor, other: Tensor, share: float) -> bool:
    """True if two tensors differ by no more than a share of the largest number."""
    if one.shape != other.shape:
        return False
    one, other = one.float(), other.to(one.device).float()
    return bool((one - other).abs().max() <= share * other.abs().max())


def draws(model: PreTrainedModel) -> list[Tensor]:
    """Sequences ``[1, TOKENS]`` of ordinary tokens: an image token, say, would be waited upon by its image."""
    special = set(token_ids(model.config.to_dict()))
    weight: Any = model.get_input_embeddings().weight
    ordinary = [token for token in range(min(len(weight), 4096)) if token not in special] or [0]
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(ordinary), (DRAWS + 1, 1, TOKENS), generator=generator)
    device = "cpu" if weight.device.type == "meta" else weight.device  # kept elsewhere by accelerate, which moves these
    return list(torch.tensor(ordinary)[places].to(device))


def token_ids(config: Mapping[Any, Any]) -> Iterator[int]:
    """The tokens with a meaning of their own that a config names, those of its parts too."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from token_ids(value)
        elif "token" in str(name):
            yield from (each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int))
