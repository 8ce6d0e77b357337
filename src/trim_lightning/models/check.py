"""What a model is asked once, when it is loaded: how its attention is read, if it is causal, what its logits are."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trim_lightning.errors import UserError, first_line
from trim_lightning.models.loss import HEAD_ALONE, last_hidden_states
from trim_lightning.models.reading import look

log = logging.getLogger(__name__)
TOKENS, DRAWS = 12, 4  # of a sequence, the second half of which is drawn anew for each
# Shares of the largest number. The same pass twice differs in its last bit at most, and a soft cap shows above that.
# Beside other tokens a mixture of experts adds in another order, or even chooses another expert in one draw.
LAST_BIT = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}


def check_model(model: PreTrainedModel, name: str) -> None:
    """Note how attention is read and whether losses may run the output embedding on chosen positions alone.

    One forward pass over a few tokens, and one of the base model. A model spread by accelerate runs them too. One that
    cannot run where it was loaded is left to its own forward pass, which is right whatever there is to its logits; that
    it is causal is then taken from its class.

    Raises:
        UserError: if a later token changes the logits of earlier ones: it looks ahead;
            or if the model wants more than a text.
    """
    setattr(model, HEAD_ALONE, False)
    input_ids = draws(model)
    try:
        with torch.no_grad():  # not inference mode: a model may keep what it computes, and be trained later
            logits = look(model, lambda: model(input_ids=input_ids, use_cache=False)).logits.float()
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"model.path={name}: {type(model).__name__} cannot run on a text alone ({first_line(error)})"
        ) from None
    except Exception as error:
        log.debug("%s could not be checked where it was loaded (%s)", name, first_line(error))
        return
    if not torch.isfinite(logits).all():  # says nothing; who runs it will see
        return
    first, *others = logits[:, : TOKENS // 2]
    rounding = ROUNDING.get(model.dtype, 0.05)
    if not any(alike(other, first, rounding) for other in others):
        raise UserError(
            f"model.path={name}: is not causal as it is loaded: what {type(model).__name__} computes for a token "
            "depends on later ones; choose a decoder, or set is_decoder in its config.json if it was trained as one"
        )
    with torch.no_grad():
        setattr(model, HEAD_ALONE, is_head_alone(model, input_ids, logits))


def is_head_alone(model: PreTrainedModel, input_ids: Tensor, logits: Tensor) -> bool:
    """True if the output embedding of the base model's last hidden states gives these logits."""
    head: Any = model.get_output_embeddings()
    if head is None:
        return False
    try:
        shortcut = head(last_hidden_states(model, input_ids)).float()
    except (UserError, RuntimeError):  # states of another width than the output embedding reads, say
        return False
    return alike(shortcut, logits, LAST_BIT.get(model.dtype, 2**-8))


def alike(one: Tensor, other: Tensor, share: float) -> bool:
    """True if two tensors differ by no more than a share of the largest number."""
    if one.shape != other.shape:
        return False
    one, other = one.float(), other.to(one.device).float()
    return bool((one - other).abs().max() <= share * other.abs().max())


def draws(model: PreTrainedModel) -> Tensor:
    """Sequences ``[DRAWS, TOKENS]`` with one first half, of ordinary tokens: an image's would want an image."""
    special = set(token_ids(model.config.to_dict()))
    weight: Any = model.get_input_embeddings().weight
    ordinary = [token for token in range(min(len(weight), 4096)) if token not in special] or [0]
    places = torch.randint(len(ordinary), (DRAWS, TOKENS), generator=torch.Generator().manual_seed(0))
    places[:, : TOKENS // 2] = places[0, : TOKENS // 2]
    device = "cpu" if weight.device.type == "meta" else weight.device  # kept elsewhere by accelerate, which moves these
    return torch.tensor(ordinary)[places].to(device)


def token_ids(config: Mapping[Any, Any]) -> Iterator[int]:
    """The tokens with a meaning of their own that a config names, those of its parts too."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from token_ids(value)
        elif "token" in str(name):
            yield from (each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int))
