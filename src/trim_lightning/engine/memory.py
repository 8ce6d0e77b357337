"""A batch for which memory does not suffice is run in halves: the run goes on, its results stay as they are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from trim_lightning.errors import UserError

log = logging.getLogger(__name__)


def in_halves(step: Callable[[Mapping[str, Any]], Any], batch: Mapping[str, Any]) -> Any:
    """Run a step on a batch; when memory runs out, on its halves, and on theirs, down to single records.

    Args:
        step: Gives a list with an item for each record, a tensor ``[batch, …]``, or a dict of tensors whose last
            dimension counts records or their tokens.
        batch: Has ``rows [batch]``; tensors with as many lines are divided, all else is left as it is.

    Returns:
        What the step gives for the whole batch. The halves keep the padded width, so at most
        the last digits differ.

    Raises:
        UserError: if memory does not suffice for a single record.
    """
    try:
        return step(batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # out of the handler: its exception holds the frames, and they hold the tensors that took the memory
    size = len(batch["rows"])
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if size == 1:
        length = int(batch["input_ids"].shape[1])
        raise UserError(
            f"memory does not suffice for a single record of {length} tokens: lower max_length, choose a smaller "
            "model, or spread it (model.device_map=auto); finished work is kept"
        )
    log.warning("a batch of %d records did not fit into memory and is run in halves (*.tokens_per_batch)", size)
    middle = (size + 1) // 2
    return joined(
        in_halves(step, part_of(batch, slice(None, middle))), in_halves(step, part_of(batch, slice(middle, None)))
    )


def is_out_of_memory(error: BaseException) -> bool:
    """True for what PyTorch raises when an accelerator's memory or the machine's runs out."""
    told = str(error)
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(name in told for name in ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED"))


def part_of(batch: Mapping[str, Any], lines: slice) -> dict[str, Any]:
    """Some of a batch's records."""
    size = len(batch["rows"])
    return {
        name: value[lines] if isinstance(value, torch.Tensor) and value.ndim and len(value) == size else value
        for name, value in batch.items()
    }


def joined(first: Any, second: Any) -> Any:
    """The results of two parts as one."""
    if isinstance(first, dict):
        return {name: torch.cat([value, second[name]], dim=-1) for name, value in first.items()}
    if isinstance(first, torch.Tensor):
        return torch.cat([first, second])
    return [*first, *second]
