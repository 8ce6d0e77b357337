"""Gradients and numbers that the processes of a training add up when an optimiser step ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

BUCKET = 2**25  # numbers that are sent at once


def add_up(weights: Sequence[Parameter], numbers: Sequence[float], device: torch.device, processes: int) -> list[float]:
    """Sum the gradients of whole weights over all processes, in place, and some numbers.

    A process that has no gradient of a weight takes part with zeros. A weight of which no process has one keeps none,
    so that the optimiser passes it by as it does in a single process. Gradients of divided weights (`DTensor`) have
    been summed by the backward pass.

    Args:
        weights: The same in every process, in the same order.
        numbers: Others to be summed.
        device: Where the process group's tensors live.
        processes: How many there are.

    Returns:
        The sums of ``numbers``.
    """
    if processes == 1:
        return list(numbers)
    whole = [weight for weight in weights if not isinstance(weight, DTensor)]
    told = [*numbers, *(float(weight.grad is not None) for weight in whole)]
    sums = torch.tensor(told, dtype=torch.float64, device=device)
    distributed.all_reduce(sums)
    totals = sums.tolist()
    learned = [weight for weight, users in zip(whole, totals[len(numbers) :], strict=True) if users]
    for bucket in buckets(learned):
        flat = torch.cat([gradient_of(weight).flatten() for weight in bucket])
        distributed.all_reduce(flat)
        for weight, part in zip(bucket, flat.split([weight.numel() for weight in bucket]), strict=True):
            weight.grad = part.view_as(weight)
    return totals[: len(numbers)]


def buckets(weights: Sequence[Parameter]) -> Iterator[list[Parameter]]:
    """Cut weights into runs of one number format and about `BUCKET` numbers."""
    bucket: list[Parameter] = []
    for weight in weights:
        size = sum(other.numel() for other in bucket) + weight.numel()
        if bucket and (size > BUCKET or weight.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(weight)
    if bucket:
        yield bucket


def gradient_of(weight: Parameter) -> Tensor:
    """A weight's gradient, zeros if it has none."""
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def largest(number: float, processes: int) -> float:
    """The largest of the processes' numbers."""
    if processes == 1:
        return number
    box = torch.tensor(number, dtype=torch.float64)
    distributed.all_reduce(box, op=distributed.ReduceOp.MAX)
    return float(box)


def clip(weights: Sequence[Parameter], most: float) -> None:
    """Scale summed gradients down to the norm ``most`` over all weights, whole and divided ones."""
    divided = [weight for weight in weights if isinstance(weight, DTensor)]
    if not divided:
        clip_grad_norm_(weights, most)
        return
    whole = [weight for weight in weights if not isinstance(weight, DTensor)]
    norms = []
    for part in (divided, whole):
        gradients = [weight.grad for weight in part if weight.grad is not None]
        if gradients:
            norm = get_total_norm(gradients)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.linalg.vector_norm(torch.stack(norms))
    for part in (divided, whole):
        clip_grads_with_norm_(part, most, total)
