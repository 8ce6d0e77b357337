"""Put a saved LoRA adapter onto its model, and refuse one that is damaged or does nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from trim_lightning.errors import UserError, first_line
from trim_lightning.files.json_files import read_json_object
from trim_lightning.models.divided import is_divided
from trim_lightning.models.low_rank import beside_weights
from trim_lightning.models.precision import is_quantized


def apply_adapter(model: PreTrainedModel, directory: Path, *, gradients: bool = True) -> PreTrainedModel:
    """The model with the adapter active.

    Args:
        model: The base model.
        directory: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        gradients: True leaves it as plain PEFT loads it; False makes it fast, see `without_gradients`.

    Raises:
        UserError: if the adapter is missing, corrupt, pickled, made for another model, or empty.
    """
    wrapped = load_adapter(model, directory)
    return _ready(wrapped.get_base_model()) if gradients else without_gradients(wrapped)


def load_adapter(model: PreTrainedModel, directory: Path) -> PeftModel:
    """The model in PEFT's hands, with the adapter.

    Raises:
        UserError: see `apply_adapter`.
    """
    names = check_adapter(directory)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*missing adapter keys.*")  # checked below, for good
            wrapped = PeftModel.from_pretrained(model, str(directory), is_trainable=False)
    except Exception as error:
        raise UserError(
            f"adapter {directory.name}: does not fit the model or is damaged ({first_line(error)}); train it again"
        ) from None
    wanted = of_adapter(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    if wanted != names:
        odd = sorted(wanted ^ names)
        raise UserError(
            f"adapter {directory.name}: does not fit the model ({len(odd)} weights without a counterpart, such as "
            f"{odd[0]}); use it with the model that it was trained on"
        )
    return wrapped


def without_gradients(wrapped: PeftModel) -> PreTrainedModel:
    """The model with its adapter, ready to score; see `settled`."""
    return settled(wrapped)[0]


def settled(wrapped: PeftModel) -> tuple[PreTrainedModel, list[str]]:
    """The model with its adapter, and the modules whose adapter PEFT still holds (`beside_weights`).

    The adapter is merged into float32 weights, unless it changes one place of two that share their weights. Lower
    precision would round most of it away (half of an update at a learning rate of 2e-4 and nine tenths at 2e-5 are
    smaller than half a step of a bfloat16 weight), so there it stays beside the weights, in the model's number format.
    """
    model, left = (wrapped.merge_and_unload(), []) if holds_update(wrapped) else beside_weights(wrapped)
    return _ready(model), left


def holds_update(wrapped: PeftModel) -> bool:
    """True for float32 weights, unless embeddings and output share one that the adapter changes in one place only.

    Never for weights that are divided among processes or quantised.
    """
    model: Any = wrapped.get_base_model()
    head = model.get_output_embeddings()
    shared = model.get_input_embeddings().weight
    tied = head is not None and head.weight is shared
    adapted = any(getattr(getattr(part, "base_layer", None), "weight", None) is shared for part in model.modules())
    whole = not (is_divided(model) or is_quantized(model))
    return model.dtype == torch.float32 and not (tied and adapted) and whole


def build_upon(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """The model with an adapter that others than we trained, so that it can be used and trained as any model.

    Raises:
        UserError: as `apply_adapter` does, or if it has other parts than LoRA matrices on linear layers and cannot be
            merged.
    """
    whole, left = settled(load_adapter(model, directory))
    if left:
        raise UserError(
            f"adapter {directory.name}: has more than LoRA matrices on linear layers ({left[0]}, ...), which only "
            "float32 weights of their own can take up; set model.dtype=float32, or merge it with PEFT's "
            "merge_and_unload and give the merged model"
        )
    return whole


def _ready(model: torch.nn.Module) -> PreTrainedModel:
    assert isinstance(model, PreTrainedModel)
    model.eval()
    model.requires_grad_(False)
    return model


def check_adapter(directory: Path) -> set[str]:
    """Refuse an adapter that cannot change anything.

    Returns:
        The names of its weights.

    Raises:
        UserError: naming what is wrong.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config, weights = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    for file in (config, weights):
        if not file.is_file():
            raise UserError(f"adapter {directory.name}: {file.name} is missing; train it again")
    try:
        settings = read_json_object(config)
        tensors = load_file(weights)
    except (ValueError, SafetensorError, OSError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise UserError(f"adapter {directory.name}: is corrupt ({first_line(error)}); train it again") from None
    if settings.get("peft_type", "LORA") != "LORA":
        raise UserError(f"adapter {directory.name}: is of the kind {settings['peft_type']}; only LoRA is taken")
    if settings.get("megatron_config") is not None:
        raise UserError(f"adapter {directory.name}: asks for a library of its own (megatron_core); train it again")
    if not tensors:
        raise UserError(f"adapter {directory.name}: is empty; train it again")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise UserError(f"adapter {directory.name}: its weights are not finite; train it again with a lower rate")
    if not any(changes_something(name, tensors) for name in tensors):
        raise UserError(f"adapter {directory.name}: all its weights are zero, it changes nothing; train it again")
    return of_adapter(tensors)


def of_adapter(names: Iterable[str]) -> set[str]:
    """The adapter's own weights: on embeddings or output PEFT saves those beneath it too."""
    return {name for name in names if ".base_layer." not in name}


def changes_something(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """True for a LoRA B matrix that is not zero and has an A matrix that is not zero."""
    partner = tensors.get(name.replace("lora_B", "lora_A"))
    return "lora_B" in name and partner is not None and bool(tensors[name].any()) and bool(partner.any())
