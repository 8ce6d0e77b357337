"""Records that begin alike: their prefix runs once, and each goes on from its keys and values."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from trim_lightning.errors import first_line
from trim_lightning.models.check import TOKENS, draws
from trim_lightning.models.loss import base_of, last_hidden_states

log = logging.getLogger(__name__)
APART = {
    torch.float32: 1e-4
}  # 1 - cosine that rounding explains, else 0.01; keys that are not heeded make it many times that
STRETCHED = ("dynamic", "longrope")  # rotary embeddings of early tokens depend on how long the record is


def states_after(model: PreTrainedModel, input_ids: Tensor, prefix: int) -> Tensor:
    """Last hidden states ``[batch, seq, hidden]`` of ``[batch, seq]`` ids whose first ``prefix`` are equal in all.

    The same as `last_hidden_states` up to rounding, in two calls of the base model: one sequence of the prefix, then
    the rest of all. Keys and values of the whole batch are in memory meanwhile.
    """
    base = base_of(model)
    cache = DynamicCache()  # keeps all keys: with a config it drops those beyond a window that not every class heeds
    # transformers 5.24 warns of the name that is the only one before
    name = "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"
    first: Tensor = base(input_ids=input_ids[:1, :prefix], use_cache=True, **{name: cache}).last_hidden_state
    cache.batch_repeat_interleave(len(input_ids))
    rest: Tensor = base(input_ids=input_ids[:, prefix:], use_cache=True, **{name: cache}).last_hidden_state
    return torch.cat([first.expand(len(input_ids), -1, -1), rest], dim=1).to(input_ids.device)


def can_resume(model: PreTrainedModel) -> bool:
    """True if `states_after` gives this model's states, and no slower: tried on a few tokens.

    A model that keeps more than keys and values (recurrent layers), or whose class does not go on from them with more
    than one token, cannot; one whose weights accelerate brings from the CPU or a disk for each call would be slower.
    """
    kinds = set(named(model.config.to_dict(), ("rope_type", "type")))
    places = set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))
    if kinds.intersection(STRETCHED) or places.intersection(("cpu", "disk")):
        return False
    input_ids = draws(model)
    try:
        with torch.no_grad():
            resumed, whole = states_after(model, input_ids, TOKENS // 2), last_hidden_states(model, input_ids)
    except Exception as error:  # whatever a class raises that keeps something else
        log.debug("%s computes shared prefixes for each record (%s)", type(model).__name__, first_line(error))
        return False
    cosines = torch.cosine_similarity(resumed.float(), whole.float(), dim=-1)
    return bool((cosines >= 1 - APART.get(model.dtype, 0.01)).all())


def named(config: Mapping[Any, Any], names: tuple[str, ...]) -> Iterator[str]:
    """The texts that a config and its parts give some names."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from named(value, names)
        elif name in names and isinstance(value, str):
            yield value
