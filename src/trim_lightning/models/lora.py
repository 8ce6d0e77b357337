"""LoRA matrices: where they go, adding them to a model, saving them."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trim_lightning.errors import UserError, first_line
from trim_lightning.models.loss import base_of
from trim_lightning.settings.schema import TuningSettings, WarmupSettings

TRAINED = "default"  # PEFT's name of the adapter that is in training
# parts of a module's name
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
EXPERTS = re.compile(r"^(shared_)?experts?$")
UNUSED = re.compile(r"cross|encoder_attn|indexer", re.IGNORECASE)  # not run without an encoder, or without a gradient
# towers, and what is in a layer that has LoRA already
OTHER = re.compile(r"vision|visual|image|img_|audio|speech|video|\.base_layer$|\.lora_[AB]\.", re.IGNORECASE)


def add_lora(model: PreTrainedModel, settings: TuningSettings, seed: int) -> PeftModel:
    """Wrap a model with fresh LoRA matrices in float32.

    Raises:
        UserError: if the model has none of ``lora_targets``.
    """
    targets = lora_targets(model, settings)
    try:
        return wrap(model, targets, settings, seed)
    except ValueError as error:
        # names that peft takes for parts of fused experts, as those of a gate within AFMoE's attention
        clash = re.match(r"Cannot convert PEFT target\(s\) ([\w, ]+) without", str(error))
        left = [name for name in targets if clash and last_part(name) not in clash[1].split(", ")]
        if settings.lora_targets == "auto" and left:
            return wrap(model, left, settings, seed)
        raise UserError(
            f"{key_of(settings)}: {first_line(error)}"
        ) from None  # layers that a fast kernel reads past LoRA


def wrap(model: PreTrainedModel, targets: Sequence[str], settings: TuningSettings, seed: int) -> PeftModel:
    """Put LoRA matrices on these modules.

    Raises:
        ValueError: if peft refuses them.
    """
    torch.manual_seed(seed)  # LoRA's A matrices are drawn here
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=short_names(model, targets),
        fan_in_fan_out=all(isinstance(linear_of(model.get_submodule(name)), Conv1D) for name in targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft sees to each layer by itself
        wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel)
    return wrapped


def lora_targets(model: PreTrainedModel, settings: TuningSettings) -> list[str]:
    """Full names of the modules that get LoRA, all of them in the language model, in its order.

    ``auto`` takes every projection within the attention of its layers, by their place and not by their name: fused,
    factored or with a gate. ``all-linear`` takes what PEFT calls so, and a list the modules of these names.

    Raises:
        UserError: if there is none.
    """
    wanted, layers = settings.lora_targets, dict(linear_layers(model))
    if wanted == "auto":
        found = [name for name in layers if in_attention(model, name)]
    elif wanted == "all-linear":
        head = model.get_output_embeddings()
        found = [name for name, layer in layers.items() if layer is not head]
    else:
        found = [name for name in layers if any(is_called(name, target) for target in wanted)]
    if not found:
        names = ", ".join(sorted({last_part(name) for name in layers}))
        what = "no attention to train" if isinstance(wanted, str) else "none of these modules"
        raise UserError(f"{key_of(settings)}: the model has {what}; it has {names}")
    return found


def linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each linear layer of the language model; towers for images and sounds are left out."""
    base = base_of(model)
    names = {module: name for name, module in model.named_modules()}
    whole = names[base]
    own = names.get(base.get_decoder() if hasattr(base, "get_decoder") else base, whole)
    for name, module in model.named_modules():
        outside = is_within(name, whole) and not is_within(name, own)
        if not outside and not OTHER.search(name) and linear_of(module) is not None:
            yield name, module


def linear_of(module: nn.Module) -> nn.Module | None:
    """The linear layer that a module is, without the LoRA that it may have already; None if it is none.

    DeepSeek-V4's grouped layers call themselves linear, but have another product than LoRA's.
    """
    inner = module.get_base_layer() if isinstance(module, LoraLayer) else module
    return inner if isinstance(inner, nn.Linear | Conv1D) and "Group" not in type(inner).__name__ else None


def in_attention(model: PreTrainedModel, name: str) -> bool:
    """True for a layer within a module that is an attention by its name or its class."""
    parts = name.split(".")
    above = [".".join(parts[:end]) for end in range(1, len(parts))]
    return not UNUSED.search(name) and any(
        ATTENTION.search(last_part(holder))
        or re.search(r"Attention\d*$", type(model.get_submodule(holder)).__name__) is not None
        for holder in above
    )


def short_names(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """Names by which PEFT finds these modules and no others: their last parts if those suffice, as in LLaMA."""
    ends = list(dict.fromkeys(last_part(name) for name in targets))
    others = {name for name, _ in model.named_modules()} - set(targets)
    return list(targets) if any(last_part(name) in ends for name in others) else ends


def lora_facts(wrapped: PeftModel, settings: TuningSettings) -> dict[str, Any]:
    """What is trained: ``modules`` (last part of the name to their number), ``parameters`` (numbers), ``absent`` names.

    The latter are those of a list of ``lora_targets`` that the model does not have. Of a mixture, ``experts`` says
    whether they have LoRA: ``trained``, ``frozen``, or ``partly trained`` (shared ones, say, where the routed are one
    tensor).
    """
    modules = [name for name, module in wrapped.named_modules() if TRAINED in getattr(module, "lora_A", ())]
    wanted: Any = [] if isinstance(settings.lora_targets, str) else settings.lora_targets
    experts = {name for name, _ in wrapped.named_modules() if EXPERTS.search(last_part(name)) and ".lora_" not in name}
    having = {name for name in experts if any(is_within(module, name) for module in modules)}
    told = "trained" if having == experts else "partly trained" if having else "frozen"
    return {
        **({"experts": told} if experts else {}),
        "modules": dict(Counter(last_part(name) for name in modules)),
        "parameters": sum(weight.numel() for weight in wrapped.parameters() if weight.requires_grad),
        "absent": [target for target in wanted if not any(is_called(name, target) for name in modules)],
    }


def is_called(name: str, target: str) -> bool:
    """True if a module has this name, or a name that ends with it."""
    return name == target or name.endswith(f".{target}")


def is_within(name: str, holder: str) -> bool:
    """True for a module and what it has in it; all is within the model itself, whose name is empty."""
    return not holder or name == holder or name.startswith(f"{holder}.")


def last_part(name: str) -> str:
    """The last part of a dotted name."""
    return name.rpartition(".")[2]


def key_of(settings: TuningSettings) -> str:
    """The key ``lora_targets`` with its value, for messages."""
    group, wanted = "warmup" if isinstance(settings, WarmupSettings) else "train", settings.lora_targets
    return f"{group}.lora_targets={wanted if isinstance(wanted, str) else ','.join(wanted)}"


def save_adapter(wrapped: PeftModel, directory: Path) -> None:
    """Save the LoRA matrices as PEFT does, in safetensors."""
    inner: Any = wrapped.get_base_model()
    # the model card would name the folder that the config was read from
    inner.config._name_or_path = str(inner.name_or_path)
    # LoRA never resizes embeddings: asked to find out for itself, peft would look for the base model on the Hub
    wrapped.save_pretrained(str(directory), safe_serialization=True, save_embedding_layers=False)
