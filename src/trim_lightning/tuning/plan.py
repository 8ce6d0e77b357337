"""Which records make up each optimiser step and each forward pass; fixed by data and seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trim_lightning.tokens.tokenized import TokenizedRecords, TokenSequence

IGNORED = -100  # torch's cross entropy leaves such labels out


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward pass.

    Attributes:
        rows: Records in it, longest first.
        closes_step: True if the optimiser steps after it.
        step_labels: Trained tokens of the whole optimiser step, the normaliser of its loss: how a step is cut
            into micro-batches does not change it.
    """

    rows: tuple[int, ...]
    closes_step: bool
    step_labels: int


def labels_of(sequence: TokenSequence) -> NDArray[np.int64]:
    """Labels ``[tokens]``: response tokens and the token that ends each response, else `IGNORED`.

    The token after the last response token is the template's end of turn; without it a model never learns to
    stop (our choice).
    """
    response = sequence.roles == 2
    ends = np.zeros_like(response)
    ends[1:] = response[:-1] & (sequence.roles[1:] == 0)
    return np.where(response | ends, sequence.token_ids, IGNORED).astype(np.int64)


def plan_micro_batches(
    records: TokenizedRecords,
    rows: Sequence[int],
    *,
    batch_size: int,
    epochs: int,
    tokens_per_micro_batch: int,
    seed: int,
) -> list[MicroBatch]:
    """Shuffle the rows anew for every epoch and cut them into optimiser steps and micro-batches.

    Within a step, records of similar length share a micro-batch. Records without a trained token are left out.

    Returns:
        All micro-batches of all epochs, in order; empty if no record has a response.
    """
    labels = {row: int((labels_of(records[row])[1:] != IGNORED).sum()) for row in rows}
    usable = np.array([row for row in rows if labels[row] > 0], dtype=np.int64)
    generator = np.random.default_rng(seed)
    plan: list[MicroBatch] = []
    for _ in range(epochs):
        order = generator.permutation(usable)
        for start in range(0, len(order), batch_size):
            step = sorted(order[start : start + batch_size].tolist(), key=lambda row: (-records.lengths[row], row))
            total = sum(labels[row] for row in step)
            groups = list(cut(step, records.lengths, tokens_per_micro_batch))
            plan += [MicroBatch(tuple(group), place == len(groups) - 1, total) for place, group in enumerate(groups)]
    return plan


def cut(rows: Sequence[int], lengths: NDArray[np.int64], budget: int) -> Iterator[list[int]]:
    """Cut rows, longest first, into groups whose padded size stays within ``budget`` tokens."""
    place = 0
    while place < len(rows):
        size = max(1, budget // int(lengths[rows[place]]))
        yield list(rows[place : place + size])
        place += size


def collate(records: TokenizedRecords, rows: Sequence[int], pad_token_id: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels of some records, each ``[batch, seq]`` int64, padded on the right."""
    sequences = [records[row] for row in rows]
    width = max(len(sequence.token_ids) for sequence in sequences)
    input_ids = np.full((len(rows), width), pad_token_id, dtype=np.int64)
    labels = np.full((len(rows), width), IGNORED, dtype=np.int64)
    for line, sequence in enumerate(sequences):
        input_ids[line, : len(sequence.token_ids)] = sequence.token_ids
        labels[line, : len(sequence.token_ids)] = labels_of(sequence)
    return torch.from_numpy(input_ids), torch.from_numpy(labels)


class MicroBatchLoader:
    """Yields the plan's micro-batches as tensors and remembers its place, so that a checkpoint resumes mid-epoch."""

    def __init__(self, records: TokenizedRecords, plan: Sequence[MicroBatch], pad_token_id: int = 0) -> None:
        self.records = records
        self.plan = list(plan)
        self.pad_token_id = pad_token_id
        self._place = 0

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self._place < len(self.plan):
            micro = self.plan[self._place]
            self._place += 1
            input_ids, labels = collate(self.records, micro.rows, self.pad_token_id)
            yield {
                "input_ids": input_ids,
                "labels": labels,
                "closes_step": micro.closes_step,
                "step_labels": micro.step_labels,
                "tokens": int(sum(self.records.lengths[list(micro.rows)])),
            }
        self._place = 0

    def state_dict(self) -> dict[str, int]:
        """Micro-batches handed out so far (Lightning saves it with the checkpoint)."""
        return {"place": self._place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the micro-batches of ``state``."""
        self._place = state["place"]
