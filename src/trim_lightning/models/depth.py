"""The first layers of a model, as a model of its own that shares its weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trim_lightning.errors import UserError, first_line
from trim_lightning.models.loss import last_hidden_states
from trim_lightning.models.reading import NONE, READING, Reading, number_of_layers, reading_of


def first_layers(model: PreTrainedModel, number: int) -> PreTrainedModel:
    """A view of a model that ends after its first layers, the final norm included; the model itself stays whole.

    Raises:
        UserError: if its layers are not a list that can be cut.
    """
    view = shared_copy(model)
    holder: Any = view
    for name in path_to_layers(model).split(".")[:-1]:
        inner = shared_copy(getattr(holder, name))
        setattr(holder, name, inner)
        holder = inner
    cut_layers(view, number)
    try:
        with torch.no_grad():
            last_hidden_states(view, torch.tensor([[3, 4]], device=view.device))
    except Exception as error:
        raise refusal(model, f"does not run without its last layers ({first_line(error)})") from None
    return view


def cut_layers(model: PreTrainedModel, number: int) -> None:
    """Take all but the first layers out of a model.

    Raises:
        UserError: if its layers are not a list that can be cut.
    """
    *parents, name = path_to_layers(model).split(".")
    reading, total = reading_of(model), number_of_layers(model)
    holder: Any = model
    shorten(holder, number, total)
    for parent in parents:
        holder = getattr(holder, parent)
        shorten(holder, number, total)
    setattr(holder, name, getattr(holder, name)[:number])
    layers = tuple(layer for layer in reading.layers if layer < number)
    why = reading.why or f"{type(model).__name__} has no softmax attention in its first {number} layers"
    kept = Reading(reading.way, layers, number, reading.why) if layers else Reading(NONE, (), number, why)
    setattr(model, READING, kept)


def shorten(module: Any, number: int, total: int) -> None:
    """Let a module's config, a copy of its own, speak of fewer layers."""
    if not hasattr(module, "config"):
        return
    module.config = copy.deepcopy(module.config)
    text = module.config.get_text_config(decoder=True)
    text.num_hidden_layers = number
    for name in ("layer_types", "layers_block_type"):
        kinds = getattr(text, name, None)
        if isinstance(kinds, list) and len(kinds) == total:
            setattr(text, name, kinds[:number])


def path_to_layers(model: PreTrainedModel) -> str:
    """Dotted name of the list of a model's layers.

    Raises:
        UserError: if there is none.
    """
    total = number_of_layers(model)
    found = [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == total]
    if not found:
        raise refusal(model, "has no plain list of layers")
    return min(found, key=lambda name: name.count("."))


def shared_copy(module: Any) -> Any:
    """A module with the same parameters, buffers and children, whose children can be replaced.

    Raises:
        UserError: if something has put another forward pass into it, which would run the old children.
    """
    if "forward" in vars(module):
        raise refusal(module, "is run by something around it (model.device_map)")
    other = copy.copy(module)
    other._modules = dict(module._modules)
    return other


def refusal(model: Any, why: str) -> UserError:
    """Says that a model cannot be cut."""
    return UserError(
        f"scoring.cascade.layers: {type(model).__name__} {why}; use scoring.cascade.model or scoring.cascade.by"
    )
