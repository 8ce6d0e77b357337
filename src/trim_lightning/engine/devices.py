"""What a pass runs on: devices, processes, batch size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from trim_lightning.errors import UserError
from trim_lightning.store.processes import ALONE, Processes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from trim_lightning.models.load import ModelRecipe


@dataclass(frozen=True)
class Resources:
    """What a pass runs on.

    Attributes:
        trainer: Arguments of the Lightning Trainer.
        tokens_per_batch: Padded tokens of a batch.
        num_workers: Processes that make batches ahead of the model; None takes 2 for a GPU and 0 otherwise.
        processes: The processes that a launcher started for this command.
    """

    trainer: Mapping[str, Any] = field(default_factory=dict)
    tokens_per_batch: int = 2048
    num_workers: int | None = None
    processes: Processes = ALONE

    def alone(self) -> Resources:
        """One device and this process only."""
        return replace(self, trainer=one_device(self.trainer), processes=ALONE)


ONE_DEVICE = "one_device"


def is_spread(settings: Mapping[str, Any]) -> bool:
    """True if these Trainer arguments spread a pass over several devices."""
    return number_of_devices(settings) * int(settings.get("num_nodes") or 1) > 1


def is_divided(settings: Mapping[str, Any]) -> bool:
    """True if these Trainer arguments divide a model's weights among several devices (FSDP2)."""
    return settings.get("strategy") == "fsdp" and is_spread(settings)


def number_of_devices(settings: Mapping[str, Any]) -> int:
    """Devices of one node that these Trainer arguments name.

    Raises:
        UserError: for a value that names none.
    """
    devices = settings.get("devices", 1)
    if devices in ("auto", -1, "-1"):
        import torch

        return torch.cuda.device_count() if settings.get("accelerator") != "cpu" else 1
    if isinstance(devices, list | tuple):
        return len(devices)
    try:
        if isinstance(devices, str) and "," in devices:
            return len([name for name in devices.split(",") if name.strip()])
        return int(devices)
    except (TypeError, ValueError):
        raise UserError(
            f"trainer.devices={devices}: neither a number of devices nor a list of them; give such as 2"
        ) from None


def one_device(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same Trainer arguments on a single device, the first of those that are named, for what is not spread."""
    named = first_device(settings)
    first = 1 if named is None else [named]
    return {**settings, "devices": first, "num_nodes": 1, "strategy": ONE_DEVICE}


def first_device(trainer: Mapping[str, Any]) -> int | None:
    """Number of the first device that ``trainer.devices`` names; None if it only says how many."""
    devices = named_devices(trainer)
    return devices[0] if devices else None


def named_devices(trainer: Mapping[str, Any]) -> list[int]:
    """Numbers of the devices that ``trainer.devices`` names; none if it only says how many."""
    devices = trainer.get("devices", 1)
    if isinstance(devices, str) and "," in devices:
        devices = [name for name in devices.split(",") if name.strip()]
    return [int(name) for name in devices] if isinstance(devices, list | tuple) else []


def device_of(trainer: Mapping[str, Any], place: int | None = None) -> torch.device:
    """The single device of these Trainer arguments: of the accelerator that they name or that ``auto`` finds.

    ``place`` asks for that of one of several processes, by its number on its machine.
    """
    import torch

    wanted = trainer.get("accelerator") or "auto"
    if wanted in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        named = first_device(trainer) if place is None else (named_devices(trainer) or range(place + 1))[place]
        return torch.device("cuda") if named is None else torch.device("cuda", named)
    if wanted in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


class Weights(Protocol):
    """A model that passes run on; the scorer is one."""

    def model(self) -> PreTrainedModel:
        """The model, loaded when first asked for."""

    def recipe(self) -> ModelRecipe:
        """How another process loads it."""

    def release(self) -> None:
        """Give the memory of a loaded model back."""


def model_for(resources: Resources, weights: Weights) -> PreTrainedModel | ModelRecipe:
    """The loaded model for a pass on one device; for a spread one the recipe by which each process loads it.

    Of a spread pass this process keeps no model: the first device has no room for two.

    Raises:
        UserError: for a model that is itself spread over devices.
    """
    if not is_spread(resources.trainer):
        return weights.model()
    weights.release()
    return recipe_for_each(weights.recipe())


def recipe_for_each(loader: ModelRecipe) -> ModelRecipe:
    """The recipe by which each of several processes loads a model of its own.

    Raises:
        UserError: for a model that is itself spread over devices.
    """
    if loader.source.device_map is not None:
        raise UserError(
            f"model.device_map={loader.source.device_map}: one process spreads the model over all devices; use "
            "trainer.devices=1 with it, or trainer=fsdp without it"
        )
    return loader
