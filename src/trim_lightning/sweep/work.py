"""From the speed of a model's plain forward pass to the time, memory and disk of each kind of work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trim_lightning.models.lora import add_lora
from trim_lightning.models.loss import hidden_width
from trim_lightning.store import Cost


def trained_numbers(cost: Cost, model: Any) -> int:
    """How many numbers get gradients: those of LoRA matrices, or all.

    Raises:
        UserError: if LoRA finds nothing to train.
    """
    if cost.work == "full training" or cost.training is None:
        return sum(weight.numel() for weight in model.parameters())
    wrapped = add_lora(model, cost.training, seed=0)
    number = sum(weight.numel() for weight in wrapped.parameters() if weight.requires_grad)
    wrapped.unload()
    return number


def signal_bytes(cost: Cost, model: Any) -> float:
    """Of the targets' tokens: hidden state, two signals a layer (float32), id (int32), role.

    The hidden state is float32 too, but has no more in it than the model's number format: the rest is compressed away.
    """
    layers = model.config.get_text_config().num_hidden_layers
    return cost.tokens * (model.dtype.itemsize * hidden_width(model) + 8 * layers + 5)


def weight_bytes(cost: Cost, model: Any) -> float:
    """Of what is trained (float32)."""
    return 4 * cost.number * trained_numbers(cost, model)


@dataclass(frozen=True)
class Kind:
    """A kind of work.

    Attributes:
        factor: Its seconds per token over those of the plain forward pass, where `Cost.number` is 1.
        written: Gives the bytes that it leaves in the store, compression not counted.
        each: What each further one of that number adds to the factor.
    """

    factor: float
    written: Callable[[Cost, Any], float] = lambda cost, model: 0.0
    each: float = 0.0


KINDS = {
    "target pass": Kind(1.7, signal_bytes),
    # number: banks; id, scope, and in each bank similarity and match of a token
    "scoring pass": Kind(1.03, lambda cost, model: cost.tokens * (5 + 8 * cost.number), each=0.01),
    # row number (int64) and statistic of a record
    "vectors": Kind(1.05, lambda cost, model: len(cost.records) * (8 + 4 * hidden_width(model))),
    "losses": Kind(1.1, lambda cost, model: len(cost.records) * (8 + 16)),
    # number: of a projected gradient (float16)
    "gradients": Kind(2.9, lambda cost, model: len(cost.records) * (8 + 2 * cost.number)),
    # number: copies of the adapter's size that are kept
    "lora training": Kind(3.3, weight_bytes),
    "full training": Kind(3.5, weight_bytes),  # not measured: products of three forward passes, and the optimiser
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


def factor_of(cost: Cost) -> float:
    """Seconds per token of a piece of work over those of its model's plain forward pass."""
    kind = kind_of(cost)
    recomputes = cost.training is not None and cost.training.gradient_checkpointing and cost.work != "gradients"
    return (kind.factor + kind.each * (cost.number - 1)) * (RECOMPUTING if recomputes else 1)


def training_bytes(cost: Cost, model: Any) -> float:
    """Memory that a backward pass needs beside what the plain forward pass had.

    Of each trained number a gradient and Adam's two moments (float32), and the number itself where it is LoRA's. Of
    each token of a micro-batch, in every layer, what a gated transformer layer with fused attention keeps for its
    backward pass: of the hidden size two float32 vectors for each of two norms, and twelve in the model's format; with
    LoRA three float32 ones for each of four inputs (copy, dropout, its mask); of the intermediate size four. That
    counts as arXiv 2205.05198 does for a plain layer (our choice). With gradient checkpointing it is each layer's
    input, and all of one layer. Of each predicted token the logits: in the model's format, and twice in float32.

    Args:
        cost: The work.
        model: That runs it.

    Raises:
        UserError: if LoRA finds nothing to train.
    """
    if cost.training is None:
        return 0.0
    from trim_lightning.tuning.run import micro_batch_tokens

    config = model.config.get_text_config()
    size, hidden, layers = model.dtype.itemsize, config.hidden_size, config.num_hidden_layers
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    full = cost.work == "full training"
    state = (12 if full else 16) * trained_numbers(cost, model)
    layer = hidden * (16 + 12 * size + (0 if full else 48)) + 4 * size * intermediate
    kept = layers * size * hidden + layer if cost.training.gradient_checkpointing else layers * layer
    predicted = cost.records.content_lengths("response").sum() / max(1, cost.records.total_tokens)
    logits = predicted * config.vocab_size * (size + 8)
    longest = int(cost.records.lengths.max(initial=0))
    tokens = max(micro_batch_tokens(cost.training), longest)
    if cost.work != "gradients":
        tokens = min(tokens, longest * cost.training.batch_size)
    return float(state + tokens * (kept + logits))
