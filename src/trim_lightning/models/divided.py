"""Models whose weights are divided among processes (FSDP2), without any of them ever holding the whole."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from trim_lightning.errors import UserError, first_line
from trim_lightning.models.attention import NAME, OWN, is_refused, register
from trim_lightning.models.parts import towers
from trim_lightning.models.source import ModelSource

log = logging.getLogger(__name__)


def mesh_of(device: torch.device, processes: int) -> DeviceMesh:
    """All processes, for weights divided among them, under the name by which PEFT knows that layers compute whole."""
    return init_device_mesh(device.type, (processes,), mesh_dim_names=("fsdp",))


def shard_weights(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Divide the weights of the base model's layers and embeddings among the mesh's processes (FSDP2).

    The LM head stays whole in each process, as do embeddings that it shares: some statistics call it by itself, and
    how often depends on the batch. Gradients are summed, not averaged.

    Raises:
        UserError: for an architecture that names its layers otherwise.
    """
    base, whole = divided_base(model), head_weights(model)
    for layer in base.layers:
        fully_shard(layer, mesh=mesh)
    # resharded as all others: between passes the module's parameters are the divided ones, which are trained and saved
    fully_shard(base, mesh=mesh, ignored_params=whole, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            if hasattr(module, "set_force_sum_reduction_for_comms"):  # gloo knows no scaled sums
                module.set_force_sum_reduction_for_comms(True)


def divided_base(model: PreTrainedModel) -> Any:
    """The part of a model whose weights are divided; it has the layers.

    Raises:
        UserError: for an architecture that names its layers otherwise.
    """
    base: Any = model.base_model
    base = getattr(base, "decoder", base)  # OPT has one more level
    if not hasattr(base, "layers"):
        raise UserError(f"trainer=fsdp: the layers of {type(model).__name__} are not known; use trainer=ddp")
    return base


def head_weights(model: PreTrainedModel) -> set[nn.Parameter]:
    """The weights that stay whole in each process."""
    head: Any = model.get_output_embeddings()
    return set() if head is None else set(head.parameters())


def load_divided(source: ModelSource, dtype: torch.dtype, mesh: DeviceMesh) -> PreTrainedModel | None:
    """The causal LM with its weights divided, each process having read its own parts from the files.

    Returns:
        The model, frozen, in evaluation mode; None if its weights cannot be read so: where transformers makes them of
        others in the files, where they come from an adapter, and of models for more than text.

    Raises:
        UserError: if weights are missing, or for an architecture that `shard_weights` does not know.
    """
    if source.adapters:
        return None
    try:
        return _load(source, dtype, mesh)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model.path={source.name}: cannot be loaded ({first_line(error)})") from None


def _load(source: ModelSource, dtype: torch.dtype, mesh: DeviceMesh) -> PreTrainedModel | None:
    config = AutoConfig.from_pretrained(
        str(source.directory), trust_remote_code=source.trust_remote_code, local_files_only=True
    )
    register()
    try:
        model = without_weights(config, dtype, source.trust_remote_code)
    except ValueError:  # no causal class: a model for more than text
        return None
    if towers(model):
        return None
    if getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None):
        return None
    model.tie_weights()
    files = WeightFiles(source.directory, model)
    if not files.plain:
        return None
    shard_weights(model, mesh)
    missing = files.fill(model, dtype, own_device(mesh))
    if missing:
        raise UserError(
            f"model.path={source.name}: weights are missing from its safetensors files ({', '.join(missing[:3])}, ...)"
        )
    model.tie_weights()
    files.fill_buffers(model)
    model.to(own_device(mesh))  # the buffers
    if (source.directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(source.directory), local_files_only=True)
    assert isinstance(model, PreTrainedModel)
    return model


def without_weights(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The model without weights, with the first attention that its class supports, as `load_model` chooses it.

    Its buffers, of which there is little, are computed.
    """
    for attention in (NAME, OWN, None):
        try:
            with init_empty_weights(include_buffers=False):
                return AutoModelForCausalLM.from_config(
                    config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
                )
        except Exception as error:
            if attention is None or not is_refused(error):
                raise
    raise AssertionError("the last one raises or returns")


class WeightFiles:
    """The safetensors files of a model: which tensor of which file a weight is.

    Attributes:
        plain: True if every weight of the model that is in the files is one tensor there.
    """

    def __init__(self, directory: Path, model: PreTrainedModel) -> None:
        index = directory / "model.safetensors.index.json"
        self.plain = True
        if index.is_file():
            places = {key: directory / file for key, file in json.loads(index.read_text())["weight_map"].items()}
        else:
            path = directory / "model.safetensors"
            with safe_open(path, framework="pt") as file:
                places = dict.fromkeys(file.keys(), path)
        self._places: dict[str, tuple[str, Path]] = {}
        transforms, names = conversions(model), set(model.state_dict())
        prefix = f"{model.base_model_prefix}."
        for key, path in places.items():
            name = key
            for transform in transforms:
                name, matched = transform.rename_source_key(name)
                if matched is not None and hasattr(transform, "operations"):
                    self.plain = False  # made of several tensors, or changed
            if name not in names:  # files of the base model alone, or the other way round
                name = name.removeprefix(prefix) if name.removeprefix(prefix) in names else prefix + name
            self._places[name] = (key, path)

    def fill(self, model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> list[str]:
        """Read what is this process's of each weight; the names of weights that are not in the files."""
        missing = []
        for name, weight in list(model.named_parameters()):
            if name not in self._places:
                missing.append(name)
                continue
            value = self.read(name, weight).to(device=device, dtype=dtype)
            filled = with_parts(value, weight) if isinstance(weight, DTensor) else value
            owner, _, last = name.rpartition(".")
            model.get_submodule(owner).register_parameter(last, nn.Parameter(filled, requires_grad=False))
        return missing

    def read(self, name: str, weight: Tensor) -> Tensor:
        """This process's rows of a weight, as they are in the file.

        Raises:
            UserError: if they are of another shape.
        """
        key, path = self._places[name]
        with safe_open(path, framework="pt") as file:
            stored = file.get_slice(key)
            if list(stored.get_shape()) != list(weight.shape):
                raise UserError(f"model.path: {name} is {stored.get_shape()} in its files, not {list(weight.shape)}")
            rows: Tensor = stored[own_rows(weight)] if isinstance(weight, DTensor) else file.get_tensor(key)
        return rows

    def fill_buffers(self, model: PreTrainedModel) -> None:
        """Read the buffers that are in the files."""
        for name, buffer in model.named_buffers():
            if name in self._places:
                buffer.copy_(self.read(name, buffer))


def conversions(model: PreTrainedModel) -> list[Any]:
    """What transformers does to the names and tensors of this model's files."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # of a release that has it elsewhere: names then are taken as they are
        return []
    return list(get_model_conversion_mapping(model))


def own_device(mesh: DeviceMesh) -> torch.device:
    """The device of this process in a mesh."""
    cuda = mesh.device_type == "cuda"
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device(mesh.device_type)


def own_rows(weight: DTensor) -> slice:
    """Which rows of a divided weight are this process's: FSDP2 cuts the first dimension as `torch.chunk` does."""
    mesh = weight.device_mesh
    each = -(-weight.shape[0] // mesh.size())
    start = min(mesh.get_local_rank() * each, weight.shape[0])
    return slice(start, start + weight.to_local().shape[0])


def with_parts(rows: Tensor, like: DTensor) -> DTensor:
    """A divided tensor of this process's rows."""
    return DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as the weight ``like`` is kept: divided if that is, on its device."""
    if isinstance(value, DTensor) or not isinstance(like, DTensor):
        return value.to(like.device)
    return with_parts(value[own_rows(like)].to(like.device).contiguous(), like)


def whole(tensor: Tensor, keeps: bool) -> Tensor:
    """A tensor put together on the CPU, in the processes where ``keeps`` is true; empty in others.

    All processes must call it in step.
    """
    together = tensor.detach()
    if isinstance(together, DTensor):
        together = together.full_tensor()
    return together.cpu() if keeps else torch.empty(0)


def own(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_divided(model: nn.Module) -> bool:
    """True if processes hold parts of the model's weights."""
    return any(isinstance(weight, DTensor) for weight in model.parameters())


def whole_weights(model: nn.Module, keeps: bool) -> Iterator[tuple[str, Tensor]]:
    """Name and `whole` of each weight and stored buffer, shared ones once."""
    stored = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    for name, tensor in stored.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, whole(tensor, keeps)
