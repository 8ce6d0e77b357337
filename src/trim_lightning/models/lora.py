"""LoRA matrices: adding them to a model, saving them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from trim_lightning.errors import UserError
from trim_lightning.settings.schema import TuningSettings, WarmupSettings


def add_lora(model: PreTrainedModel, settings: TuningSettings, seed: int) -> PeftModel:
    """Wrap a model with fresh LoRA matrices in float32.

    Raises:
        UserError: if the model has none of ``lora_targets``.
    """
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    targets = [name for name in settings.lora_targets if name in names]
    if not targets:
        group = "warmup" if isinstance(settings, WarmupSettings) else "train"
        raise UserError(
            f"{group}.lora_targets={','.join(settings.lora_targets)}: the model has none of these modules; it has "
            f"{', '.join(sorted(names))}"
        )
    torch.manual_seed(seed)  # LoRA's A matrices are drawn here
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel)
    return wrapped


def save_adapter(wrapped: PeftModel, directory: Path) -> None:
    """Save the LoRA matrices as PEFT does, in safetensors."""
    inner: Any = wrapped.get_base_model()
    # the model card would name the folder that the config was read from
    inner.config._name_or_path = str(inner.name_or_path)
    # LoRA never resizes embeddings: asked to find out for itself, peft would look for the base model on the Hub
    wrapped.save_pretrained(str(directory), safe_serialization=True, save_embedding_layers=False)
