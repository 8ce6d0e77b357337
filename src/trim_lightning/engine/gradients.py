"""Per-record gradients of LoRA weights, a whole batch in one backward pass, projected to a few thousand numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import PreTrainedModel

from trim_lightning.engine.adam_moments import AdamMoments
from trim_lightning.engine.labels import trained_labels
from trim_lightning.engine.sketch import CountSketch
from trim_lightning.errors import UserError
from trim_lightning.models.check import draws
from trim_lightning.models.lora import TRAINED
from trim_lightning.models.loss import IGNORED, last_hidden_states, predictions, response_logits

A, B = "lora_A", "lora_B"


class GradientFeatures:
    """Unit vectors ``[batch, dimension]`` (float16): each record's projected LoRA gradient (LESS, arXiv 2402.04333).

    The loss of a record is the mean over the tokens that training learns from (response and its end); dropout is
    off. With moments, the gradient g is replaced by the step, without learning rate, that Adam would take next from
    the checkpoint's state if the batch were this record alone:

        m' = (beta1 m + (1 - beta1) g) / (1 - beta1^(t+1)),  v' = (beta2 v + (1 - beta2) g²) / (1 - beta2^(t+1)),
        m' / (sqrt(v') + eps)

    (the paper's formula; its code leaves the divisors out, which a cosine does not notice but for eps, and puts eps
    under the root). Betas, eps and t are the optimiser's own. A record without a trained token gets zeros.

    Args:
        dimension: Numbers of a feature.
        seed: Of the projection; features can only be compared under the same one.
        moments: File of Adam's moments; None leaves the gradient as it is.
        last_layers: Take the gradients of so many of the last blocks that have LoRA; the backward pass ends there. None
            takes all (LESS); fewer are our choice.
    """

    stage = "gradients"
    needs_gradients = True

    def __init__(self, dimension: int, seed: int, moments: Path | None = None, last_layers: int | None = None) -> None:
        self.settings: dict[str, Any] = {
            "dimension": dimension,
            "seed": seed,
            "preconditioner": "none" if moments is None else "adam",
        }
        if last_layers is not None:
            self.settings["last_layers"] = last_layers
        self._dimension, self._seed, self._moments, self._last_layers = dimension, seed, moments, last_layers
        self._prepared: tuple[CountSketch, AdamMoments | None, dict[str, int]] | None = None

    def __call__(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> Tensor:
        """One forward and one backward pass."""
        labels = trained_labels(batch["input_ids"], batch["roles"], batch["lengths"])
        sketch, moments, parts = self._prepare(model, labels.device)
        features = torch.zeros(len(labels), self._dimension, device=labels.device)

        def collect(name: str, gradients: Tensor) -> None:
            gradients = gradients.to(features.device)  # a model may lie on several devices
            if moments is not None:
                gradients = moments.precondition(name, gradients)
            sketch.add(parts[name], gradients.flatten(1).float(), features)

        record_gradients(model, batch["input_ids"], labels, collect, self._last_layers)
        features[(labels[:, 1:] == IGNORED).all(1)] = 0  # Adam's step is not zero where the gradient is
        return normalize(features, dim=1).half()

    def _prepare(
        self, model: PreTrainedModel, device: torch.device
    ) -> tuple[CountSketch, AdamMoments | None, dict[str, int]]:
        """Projection and moments on the batches' device; made once."""
        if self._prepared is None:
            weights = {name: module.weight for name, module in lora_matrices(model, self._last_layers).items()}
            sketch = CountSketch([weight.numel() for weight in weights.values()], self._dimension, self._seed, device)
            moments = None if self._moments is None else AdamMoments.load(self._moments, device)
            self._prepared = sketch, moments, {name: place for place, name in enumerate(weights)}
        return self._prepared

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}  # each process makes its own


def lora_matrices(model: nn.Module, last: int | None = None) -> dict[str, nn.Linear]:
    """Name of the weight to module of every trained LoRA A and B, in the model's order; see `lora_layers`."""
    layers = lora_layers(model, last)
    return {weight_of(name, kind): getattr(layers[name], kind)[TRAINED] for name in layers for kind in (A, B)}


def weight_of(layer: str, kind: str) -> str:
    """Name of the weight of a layer's trained A or B."""
    return f"{layer}.{kind}.{TRAINED}.weight"


def lora_layers(model: nn.Module, last: int | None = None) -> dict[str, Any]:
    """Name to module of every layer with LoRA matrices that are trained, not given with the model.

    Args:
        model: With LoRA inside.
        last: Those in so many of its last blocks alone.

    Raises:
        UserError: if fewer blocks have any.
    """
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    layers = {name: layer for name, layer in layers.items() if TRAINED in layer.lora_A}
    if last is None:
        return layers
    blocks = list(dict.fromkeys(block for name in layers if (block := block_of(name))))
    if len(blocks) < last:
        raise UserError(
            f"method.last_layers={last}: LoRA is in {len(blocks)} blocks of the model; take at most so many"
        )
    return {name: layer for name, layer in layers.items() if block_of(name) in blocks[-last:]}


def block_of(name: str) -> str:
    """The block that a module stands in: its name up to the first number, ``model.layers.7``; empty outside of any."""
    words = name.split(".")
    place = next((place for place, word in enumerate(words) if word.isdigit()), -1)
    return ".".join(words[: place + 1])


def record_gradients(
    model: PreTrainedModel,
    input_ids: Tensor,
    labels: Tensor,
    collect: Callable[[str, Tensor], None],
    last: int | None = None,
) -> None:
    """Give ``collect`` every LoRA matrix's gradient of each record's mean loss, matrix after matrix.

    One backward pass serves the whole batch: the gradient of a linear layer's weight is, for each record, the sum
    over positions of (gradient of the output) ⊗ (input), so both are kept and multiplied per record, and no weight
    needs a gradient of its own. Padding adds nothing: no trained token sees it.

    Args:
        model: A causal LM with LoRA inside, in evaluation mode.
        input_ids: ``[batch, seq]``, padded on the right.
        labels: ``[batch, seq]``, `IGNORED` where a token is not to be predicted.
        collect: Called with the weight's name and ``[batch, out, in]``; may overwrite it.
        last: Only the matrices in so many of the last blocks; the backward pass goes no deeper.
    """
    wanted, following = predictions(labels)
    if not len(following):
        return
    counts = wanted.sum(1)
    owner = wanted.nonzero()[:, 0]
    with torch.enable_grad(), watching(model, len(input_ids), collect, last):
        losses = cross_entropy(response_logits(model, input_ids, wanted), following, reduction="none")
        (losses / counts[owner]).sum().backward()


def check_layers(model: PreTrainedModel, names: Iterable[str]) -> None:
    """One forward pass over a few tokens, to find before any training what `record_gradients` would refuse.

    Raises:
        UserError: for the first of these linear layers that runs more than once, or has no batch dimension.
    """
    seen: set[str] = set()

    def look(name: str, output: Tensor) -> None:
        if name in seen:
            raise runs_again(name, model)
        if output.dim() < 3 or len(output) != len(ids):
            raise not_by_record(name)
        seen.add(name)

    ids = draws(model)[:2]  # no more than a device that is short of memory takes
    with ExitStack() as hooks, torch.no_grad():
        for name in names:
            module = model.get_submodule(name)
            handle = module.register_forward_hook(lambda module, given, output, name=name: look(name, output))
            hooks.callback(handle.remove)
        last_hidden_states(model, ids)


def runs_again(name: str, model: PreTrainedModel) -> UserError:
    """What is wrong with a layer that runs more than once."""
    return UserError(
        f"warmup.lora_targets: {name} runs more than once in one pass of {type(model).__name__}, so that records have "
        "no gradients of their own; use another method or model"
    )


def not_by_record(name: str) -> UserError:
    """What is wrong with a layer that sees the tokens of all records in one row."""
    return UserError(
        f"warmup.lora_targets: the gradients of {name} cannot be told apart by record; use warmup.lora_targets=auto "
        "with this method"
    )


@contextmanager
def watching(
    model: PreTrainedModel, records: int, collect: Callable[[str, Tensor], None], last: int | None = None
) -> Iterator[None]:
    """Within it, a backward pass gives ``collect`` the LoRA matrices' gradients per record."""
    layers = lora_layers(model, last)
    with ExitStack() as hooks:

        def hook(handle: Any) -> None:
            hooks.callback(handle.remove)

        # all weights are frozen: the graph begins at the embeddings, or where the first block begins that is looked at
        if last is None:
            # cloned, since some classes (CTRL, GIT) write into what comes out of them
            hook(
                model.get_input_embeddings().register_forward_hook(
                    lambda module, given, output: output.requires_grad_(True).clone()
                )
            )
        else:
            block = model.get_submodule(block_of(next(iter(layers))))
            hook(block.register_forward_pre_hook(begin, with_kwargs=True))
        for name, layer in layers.items():
            held: dict[str, Tensor] = {}

            def keep(
                module: nn.Module, given: tuple[Any, ...], held: dict[str, Tensor] = held, name: str = name
            ) -> None:
                if "states" in held or not torch.is_grad_enabled():
                    raise runs_again(name, model)
                held["states"] = given[0].detach()

            # the layer's input as it comes: LoRA's float32 copy of it would be kept for each of q, k and v
            hook(layer.register_forward_pre_hook(keep))
            hook(layer.lora_A[TRAINED].register_forward_hook(watched(weight_of(name, A), records, collect, held)))
            hook(layer.lora_B[TRAINED].register_forward_hook(watched(weight_of(name, B), records, collect)))
        yield


def begin(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of a block: the graph begins at the states that it is given."""
    if given:
        return (given[0].requires_grad_(True).clone(), *given[1:]), named
    return given, {**named, "hidden_states": named["hidden_states"].requires_grad_(True).clone()}


def watched(
    name: str, records: int, collect: Callable[[str, Tensor], None], held: dict[str, Tensor] | None = None
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    """Forward hook of one LoRA matrix: multiplies output gradients with inputs when they arrive.

    Args:
        name: Of the weight.
        records: In the batch.
        collect: Takes name and gradients.
        held: The input under ``states``, if it is kept elsewhere; it is let go after its use.

    The hook raises UserError in a layer whose input has no batch dimension.
    """

    def hook(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        if output.dim() < 3 or len(output) != records:  # experts and routers see the tokens of all records in one row
            raise not_by_record(name.partition(".lora_")[0])
        inputs = {"states": given[0].detach()} if held is None else held

        def arrived(gradient: Tensor) -> None:
            states = inputs.pop("states")
            gradient, states = gradient.flatten(1, -2), states.flatten(1, -2)  # DeepSeek's have an axis for heads
            collect(name, torch.bmm(gradient.transpose(1, 2), states.to(gradient.dtype)))

        output.register_hook(arrived)

    return hook
