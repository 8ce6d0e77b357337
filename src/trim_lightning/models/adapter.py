"""Put a saved LoRA adapter onto its model, and refuse one that is damaged or does nothing."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from trim_lightning.errors import UserError


def apply_adapter(model: PreTrainedModel, directory: Path, *, merge: bool = False) -> PreTrainedModel:
    """The model with the adapter active, as plain PEFT loads it.

    Args:
        model: The base model.
        directory: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        merge: Add the adapter into the weights (less work per token, rounded to the model's dtype).

    Raises:
        UserError: if the adapter is missing, corrupt, pickled, made for another model, or empty.
    """
    check_adapter(directory)
    try:
        wrapped = PeftModel.from_pretrained(model, str(directory), is_trainable=False)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(f"adapter {directory.name}: does not fit the model or is damaged ({reason})") from None
    wrapped.eval()
    inner = wrapped.merge_and_unload() if merge else wrapped.get_base_model()
    assert isinstance(inner, PreTrainedModel)
    inner.requires_grad_(False)
    return inner


def check_adapter(directory: Path) -> None:
    """Refuse an adapter that cannot change anything.

    Raises:
        UserError: naming what is wrong.
    """
    from safetensors import SafetensorError, safe_open

    config, weights = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    for file in (config, weights):
        if not file.is_file():
            raise UserError(f"adapter {directory.name}: {file.name} is missing; train it again")
    try:
        json.loads(config.read_text(encoding="utf-8"))
        with safe_open(str(weights), framework="pt") as file:
            names = list(file.keys())
            tensors = [file.get_tensor(name) for name in names if "lora_B" in name]
    except (ValueError, SafetensorError, OSError) as error:
        raise UserError(
            f"adapter {directory.name}: is corrupt ({str(error).splitlines()[0]}); train it again"
        ) from None
    if not names:
        raise UserError(f"adapter {directory.name}: is empty; train it again")
    if tensors and not any(bool(torch.any(tensor != 0)) for tensor in tensors):
        raise UserError(f"adapter {directory.name}: all its weights are zero, it changes nothing; train it again")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise UserError(f"adapter {directory.name}: its weights are not finite; train it again with a lower rate")
