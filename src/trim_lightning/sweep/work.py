"""From the speed of a model's plain forward pass to the time, memory and disk of each kind of work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any

from trim_lightning.engine.token_shards import bytes_of
from trim_lightning.models.lora import add_lora
from trim_lightning.models.loss import hidden_width
from trim_lightning.stages.scoring import KEPT, scoring_kind
from trim_lightning.store import Cost
from trim_lightning.tuning.memory import (
    MicroBatches,
    TrainingMemory,
    divided_bytes,
    most_for_each,
    most_tokens,
    predicted_share,
    room_for_training,
    weight_bytes,
)


def signal_bytes(cost: Cost, model: Any, need: TrainingNeed | None) -> float:
    """Of the targets' tokens: hidden state, two signals a layer (float32), id (int32), role.

    The hidden state is float32 too, but has no more in it than the model's number format: the rest is compressed away.
    """
    layers = model.config.get_text_config().num_hidden_layers
    return cost.tokens * (model.dtype.itemsize * hidden_width(model) + 8 * layers + 5)


def trained_bytes(cost: Cost, model: Any, need: TrainingNeed | None) -> float:
    """Of what is trained (float32)."""
    assert need is not None
    return 4 * cost.number * need.trained


@dataclass(frozen=True)
class Kind:
    """A kind of work.

    Attributes:
        factor: Its seconds per token over those of the plain forward pass, where `Cost.number` is 1.
        written: Gives the bytes that it leaves in the store, compression not counted; takes its `training_need`.
        each: What each further one of that number adds to the factor.
    """

    factor: float
    written: Callable[[Cost, Any, TrainingNeed | None], float] = lambda cost, model, need: 0.0
    each: float = 0.0


def scoring_kinds() -> dict[str, Kind]:
    """Every kind of scoring pass, by what it keeps beside similarities."""
    kinds = {}
    for number in range(len(KEPT) + 1):
        for kept in combinations(KEPT, number):
            # errors: the LM head runs on all content (on responses alone it adds a fifteenth); alignment: on responses,
            # and once more for each bank
            factor = 1.03 + 0.3 * ("errors" in kept) + 0.15 * ("alignment" in kept)
            each = 0.11 if "alignment" in kept else 0.01
            kinds[scoring_kind(kept)] = Kind(factor, partial(scored_bytes, kept), each=each)
    return kinds


def scored_bytes(kept: Sequence[str], cost: Cost, model: Any, need: TrainingNeed | None) -> float:
    """Of a scoring pass: of each token its similarity in every bank (``cost.number``), and what else is ``kept``.

    An error is float16; alignments are float32, of tokens and the means of records, with a length each; states float16.
    """
    banks, records = int(cost.number), len(cost.records)
    taken: float = cost.tokens * bytes_of(banks)
    if "errors" in kept:
        taken += 2 * cost.tokens
    if "alignment" in kept:
        taken += 4 * banks * cost.tokens + (4 + 4 * banks) * records
    return taken + (2 * hidden_width(model) * records if "states" in kept else 0)


KINDS = {
    "target pass": Kind(1.7, signal_bytes),
    **scoring_kinds(),  # number: banks
    # row number (int64) and statistic of a record
    "vectors": Kind(1.05, lambda cost, model, need: len(cost.records) * (8 + 4 * hidden_width(model))),
    "losses": Kind(1.1, lambda cost, model, need: len(cost.records) * (8 + 16)),
    # number: of a projected gradient (float16)
    "gradients": Kind(2.9, lambda cost, model, need: len(cost.records) * (8 + 2 * cost.number)),
    # number: copies of the adapter's size that are kept
    "lora training": Kind(3.3, trained_bytes),
    "full training": Kind(3.5, trained_bytes),  # not measured: products of three forward passes, and the optimiser
    # number: passes for the loss, one and one for each option
    "evaluation": Kind(1.1, each=1.1),
}
"""Measured on a CPU (SmolLM2-135M in bfloat16, generated records) but for one; rounded, our choice.

A factor holds all that a stage does: padding beyond the forward pass's, LM head, loss, backward pass, optimiser,
reading and writing."""
RECOMPUTING = 4 / 3  # one more forward pass beside one forward and a backward of twice its products (arXiv 1604.06174)


def kind_of(cost: Cost) -> Kind:
    """The line of the table; a statistic of someone's own is taken for a loss."""
    return KINDS.get(cost.work, KINDS["losses"])


def factor_of(cost: Cost, recomputes: bool = False) -> float:
    """Seconds per token of a work over the plain forward pass's; ``recomputes`` is with gradient checkpointing."""
    kind = kind_of(cost)
    return (kind.factor + kind.each * (cost.number - 1)) * (RECOMPUTING if recomputes else 1)


@dataclass(frozen=True)
class TrainingNeed:
    """What a backward pass needs beside weights and forward pass, on each device.

    Attributes:
        bytes: Of memory.
        room: Bytes that this device has for it.
        micro: The micro-batches that it is planned with.
        trained: Numbers that get gradients: those of LoRA matrices, or all.
        weights: Bytes of weights on a device.
        devices: Number of them.
    """

    bytes: float
    room: float
    micro: MicroBatches
    trained: int
    weights: float
    devices: int


def held_bytes(cost: Cost, model: Any) -> float:
    """Of the model's weights that each device holds.

    Raises:
        UserError: if they are to be divided and cannot be.
    """
    return sum(divided_bytes(model, cost.devices)) if cost.divided else weight_bytes(model, model.device)


def sharing(cost: Cost, model: Any) -> int:
    """How many devices make a piece of work faster.

    Processes on a CPU share its cores, and a step of a training has a part for no more devices than it has records.
    """
    devices = cost.devices // cost.per_machine if model.device.type == "cpu" else cost.devices
    trains = cost.training is not None and cost.work.endswith(" training")
    return min(devices, cost.training.batch_size) if trains and cost.training is not None else devices


def training_need(cost: Cost, model: Any) -> TrainingNeed | None:
    """That of a piece of work; None of one without a backward pass.

    Raises:
        UserError: if LoRA finds nothing to train.
    """
    if cost.training is None:
        return None
    full = cost.work == "full training"
    weights = held_bytes(cost, model)
    share = divided_bytes(model, cost.devices)[0] / weight_bytes(model, model.device) if full and cost.divided else 1.0
    trained = model.requires_grad_(True) if full else add_lora(model, cost.training, seed=0)
    memory = TrainingMemory.of(trained, predicted_share(cost.records))
    memory = replace(memory, state=memory.state * share)  # LoRA's is whole in each process
    number = sum(weight.numel() for weight in trained.parameters() if weight.requires_grad)
    _ = model.requires_grad_(False) if full else trained.unload()
    lengths = cost.records.lengths
    longest, mean = int(lengths.max(initial=1)), float(lengths[lengths > 0].mean()) if lengths.any() else 1.0
    most = most_for_each(cost.training, most_tokens(cost.training, model.device), longest, mean, cost.devices)
    sharers = cost.per_machine if model.device.type == "cpu" else 1  # of the machine's memory
    room = room_for_training(model.device, sharers * weights) / sharers
    if cost.work == "gradients":  # as many as are set, in halves where that is too much
        micro = MicroBatches(most, recomputes=False)
    else:
        micro = memory.fitting(cost.training, most, longest, room)
    used = max(longest, min(micro.tokens, longest * cost.training.batch_size))
    return TrainingNeed(memory.needed(replace(micro, tokens=used)), room, micro, number, weights, cost.devices)
