"""What a training needs of memory, and micro-batches that fit into what the device has."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from trim_lightning.models.divided import divided_base, head_weights, own
from trim_lightning.models.loss import IGNORED, summed_loss
from trim_lightning.settings.schema import TuningSettings
from trim_lightning.tokens.tokenized import TokenizedRecords

MOST_TOKENS = {"cpu": 2048, "cuda": 16_384}  # padded tokens of a micro-batch beyond which a device gets no faster
FEWEST_TOKENS = 2048  # with fewer a large GPU idles: activations are recomputed before a micro-batch gets smaller
SAMPLE = 64  # tokens of the sequence that is measured
LIMITS = [Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory/memory.limit_in_bytes")]
USABLE = 0.8  # share of the memory that is planned with; the rest is for what the estimate leaves out


@dataclass(frozen=True)
class MicroBatches:
    """How a training is cut.

    Attributes:
        tokens: Padded tokens of a forward and backward pass; a longer record has one of its own.
        recomputes: Gradient checkpointing.
    """

    tokens: int
    recomputes: bool


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that a training needs beside the weights.

    Attributes:
        state: Of each trained number a gradient and Adam's two moments, and LoRA's numbers themselves (float32).
        token: Of each token of a micro-batch: what the forward pass keeps for the backward pass, and the gradients of
            the logits.
        recomputed_token: The same with gradient checkpointing: each layer's input, and all of one layer.
    """

    state: float
    token: float
    recomputed_token: float

    @classmethod
    def of(cls, model: PreTrainedModel | PeftModel, predicted: float) -> TrainingMemory:
        """That of a model that is ready to be trained, measured on one short sequence: no formula knows every model.

        Args:
            model: Its trainable weights require gradients.
            predicted: Share of the tokens whose logits are computed.
        """
        lora = isinstance(model, PeftModel)
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        assert isinstance(inner, PreTrainedModel)
        config, size = inner.config.get_text_config(), inner.dtype.itemsize
        trained = sum(own(weight).numel() for weight in model.parameters() if weight.requires_grad)
        labelled = max(1, round(predicted * SAMPLE))
        logits = predicted * config.vocab_size * (size + 4)
        kept = kept_bytes(inner, labelled) / SAMPLE
        layers = config.num_hidden_layers
        recomputed = layers * size * config.hidden_size + kept / layers + logits
        return cls((16 if lora else 12) * trained, kept + logits, min(recomputed, kept + logits))

    def needed(self, micro: MicroBatches) -> float:
        """Bytes with these micro-batches."""
        return self.state + micro.tokens * (self.recomputed_token if micro.recomputes else self.token)

    def fitting(self, settings: TuningSettings, most: int, longest: int, room: float) -> MicroBatches:
        """The micro-batches to train with: as set, else the largest for which there is room.

        Halved down to `FEWEST_TOKENS` first, then activations are recomputed, then halved on, down to one record. The
        last of these is taken even if it does not fit, since this is an estimate. Halves, so that small changes of
        the room do not change the result's last digits.

        Args:
            settings: ``tokens_per_micro_batch`` and ``gradient_checkpointing``, None where they are free.
            most: Tokens beyond which the device gets no faster.
            longest: Tokens of the longest record.
            room: Bytes beside the weights.
        """
        wanted, recomputing = settings.tokens_per_micro_batch, settings.gradient_checkpointing
        sizes = [wanted or most]
        while not wanted and sizes[-1] // 2 >= longest:
            sizes.append(sizes[-1] // 2)
        large = [size for size in sizes if size >= FEWEST_TOKENS] or sizes[:1]
        choices = [MicroBatches(size, False) for size in (large if recomputing is None else sizes)]
        if recomputing is not False:
            choices = [*(choices if recomputing is None else []), *(MicroBatches(size, True) for size in sizes)]
        # a record that is longer than a micro-batch is one by itself
        return next((one for one in choices if self.needed(_at_least(one, longest)) <= room), choices[-1])


def _at_least(micro: MicroBatches, longest: int) -> MicroBatches:
    return MicroBatches(max(micro.tokens, longest), micro.recomputes)


def most_tokens(settings: TuningSettings, device: torch.device) -> int:
    """Padded tokens of a micro-batch where memory is no matter: as set, else what suits the device."""
    return settings.tokens_per_micro_batch or MOST_TOKENS.get(device.type, MOST_TOKENS["cpu"])


def most_for_each(settings: TuningSettings, most: int, longest: int, mean: float, processes: int) -> int:
    """`most_tokens`, where they are free halved until a step has a micro-batch for every process.

    Args:
        settings: ``tokens_per_micro_batch`` and ``batch_size``.
        most: See `most_tokens`.
        longest: Tokens of the longest record.
        mean: Those of a record.
        processes: That share the training.
    """
    if settings.tokens_per_micro_batch is None and processes > 1:
        while most > settings.batch_size * mean / processes and most // 2 >= longest:
            most //= 2
    return most


def weight_bytes(model: torch.nn.Module, device: torch.device) -> int:
    """Of a model's weights: all that will be on a device, which is a part where accelerate has spread them.

    Of weights that are divided among processes that is this one's part, and three layers that are put together: the one
    that is computed, the next, and the gradients of one.
    """
    spread = any(getattr(part, "hf_device_map", None) for part in model.modules())
    here = [weight for weight in model.parameters() if not spread or weight.device == device]
    layers = [sum(weight.nbytes for weight in part.parameters()) for part in model.modules() if is_layer(part)]
    return sum(own(weight).nbytes for weight in here) + 3 * max(layers, default=0)


def divided_bytes(model: PreTrainedModel, processes: int) -> tuple[float, int]:
    """What `weight_bytes` will be of a model that is whole here, once so many processes have divided its weights.

    Returns:
        A process's own part, and the layers that are put together.

    Raises:
        UserError: for an architecture that cannot be divided.
    """
    layers = [sum(weight.nbytes for weight in layer.parameters()) for layer in divided_base(model).layers]
    whole = sum(weight.nbytes for weight in head_weights(model))
    return (sum(weight.nbytes for weight in model.parameters()) - whole) / processes + whole, 3 * max(layers)


def is_layer(part: torch.nn.Module) -> bool:
    """True for what FSDP puts together at once and has no such parts itself."""
    return isinstance(part, FSDPModule) and not any(isinstance(inner, FSDPModule) for inner in list(part.modules())[1:])


def room_for_training(device: torch.device, weights: float) -> float:
    """Bytes that a training may take on a device beside its weights, which need not be there yet.

    On a GPU what is free now; of the machine's memory all, or all that the process's control group may have, since
    what others hold there changes from run to run (our choice).
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        own = torch.cuda.memory_reserved(device)  # of this process: weights that are there, and what can be had again
        return USABLE * (free + own) - weights
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in LIMITS:
        with suppress(OSError, ValueError):  # not there, or "max"
            whole = min(whole, int(limit.read_text()))
    return USABLE * whole - weights


def kept_bytes(model: PreTrainedModel, labelled: int) -> int:
    """Bytes that a forward pass in training over `SAMPLE` tokens keeps for the backward pass, weights not counted.

    Args:
        model: On any device; its mode and generators are as before afterwards.
        labelled: Tokens that are predicted.
    """
    weights = {own(tensor).untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # the tensors themselves, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = tensor
        return tensor

    device = next(model.get_input_embeddings().parameters()).device  # others may hold the rest (device_map)
    input_ids = torch.zeros((1, SAMPLE), dtype=torch.long, device=device)
    labels = torch.full_like(input_ids, IGNORED)
    labels[:, SAMPLE - labelled :] = 0
    training = model.training
    model.train()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        summed_loss(model, input_ids, labels)
    model.train(training)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def predicted_share(records: TokenizedRecords) -> float:
    """Share of the tokens that are of responses."""
    return float(records.content_lengths("response").sum() / max(1, records.total_tokens))
