"""The parts of a model for more than text: its language model, and towers for images and sounds."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trim_lightning.errors import first_line
from trim_lightning.models.loss import base_of

log = logging.getLogger(__name__)
TOWER = re.compile(r"vision|visual|image|img_|audio|speech|video|multi_?modal|(^|_)vq", re.IGNORECASE)


def towers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The children of the base model, by name, that a text does not run through: neither decoder nor around it."""
    base: Any = base_of(model)
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    around = {id(module) for module in base.modules() if any(part is decoder for part in module.modules())}
    return {
        name: child
        for name, child in base.named_children()
        if decoder is not base and id(child) not in around and TOWER.search(name)
    }


def drop_towers(model: PreTrainedModel) -> None:
    """Take the towers out of a model, so that they need no memory; one that misses them on a text keeps them."""
    base: Any = base_of(model)
    found = towers(model)
    if not found:
        return
    for name in found:
        setattr(base, name, None)
    if not runs_on_text(model):
        for name, child in found.items():
            setattr(base, name, child)


def runs_on_text(model: PreTrainedModel) -> bool:
    """True if the model takes a text alone as it is, without towers perhaps."""
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([[3, 4]], device=model.device), use_cache=False)
    except Exception as error:
        log.debug("%s keeps its towers (%s)", type(model).__name__, first_line(error))
        return False
    return True


def without_towers(kind: type[PreTrainedModel], names: Iterable[str]) -> type[PreTrainedModel]:
    """The class ``kind`` as it is built without some children of its base model: what is not built is not read either.

    The names of all other modules and weights stay. A loaded model is to be given its own class back.
    """

    def build(self: Any, *arguments: Any, **keywords: Any) -> None:
        kind.__init__(self, *arguments, **keywords)
        for name in names:
            setattr(base_of(self), name, None)

    absent = [rf"(^|\.){re.escape(name)}\." for name in names]
    ignored = [*(kind._keys_to_ignore_on_load_unexpected or ()), *absent]
    members = {"__init__": build, "__module__": kind.__module__, "_keys_to_ignore_on_load_unexpected": ignored}
    return type(kind.__name__, (kind,), members)  # by its name transformers finds how its weights are renamed
