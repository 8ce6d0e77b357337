"""Which records make up each optimiser step and each forward pass; fixed by data and seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trim_lightning.engine.labels import collate, labels_of
from trim_lightning.models.loss import IGNORED
from trim_lightning.tokens.tokenized import TokenizedRecords


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward pass.

    Attributes:
        rows: Records in it, longest first.
        closes_step: True if the optimiser steps after it.
        closes_epoch: True if it is the last of its epoch.
        step_labels: Trained tokens of the whole optimiser step, the normaliser of its loss: how a step is cut
            into micro-batches does not change it.
    """

    rows: tuple[int, ...]
    closes_step: bool
    closes_epoch: bool
    step_labels: int


def plan_micro_batches(
    records: TokenizedRecords,
    rows: Sequence[int],
    *,
    batch_size: int,
    epochs: int,
    tokens_per_micro_batch: int,
    seed: int,
    length_grouped: bool = False,
) -> list[MicroBatch]:
    """Shuffle the rows anew for every epoch and cut them into optimiser steps and micro-batches.

    Within a step, records of similar length share a micro-batch; ``length_grouped`` also puts records of similar
    length (within 50 steps' worth) into one step. Records without a trained token are left out.

    Returns:
        All micro-batches of all epochs, in order; empty if no record has a response.
    """
    labels = {row: int((labels_of(records[row])[1:] != IGNORED).sum()) for row in rows}
    usable = np.array([row for row in rows if labels[row] > 0], dtype=np.int64)
    generator = np.random.default_rng(seed)
    plan: list[MicroBatch] = []
    for _ in range(epochs):
        order = generator.permutation(usable)
        steps = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        if length_grouped:
            steps = group_by_length(order, records.lengths, batch_size, generator)
        for number, members in enumerate(steps):
            step = sorted(members.tolist(), key=lambda row: (-records.lengths[row], row))
            total = sum(labels[row] for row in step)
            groups = list(cut(step, records.lengths, tokens_per_micro_batch))
            for place, group in enumerate(groups):
                closes = place == len(groups) - 1
                plan.append(MicroBatch(tuple(group), closes, closes and number == len(steps) - 1, total))
    return plan


def trained_rows(records: TokenizedRecords, rows: Sequence[int]) -> list[int]:
    """Those of some rows that have a token to learn; a training leaves the others out."""
    return [row for row in rows if (labels_of(records[row])[1:] != IGNORED).any()]


def group_by_length(
    order: NDArray[np.int64], lengths: NDArray[np.int64], batch_size: int, generator: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Sort shuffled rows by length within 50 steps' worth, cut them into steps, and shuffle the steps."""
    span = 50 * batch_size
    steps = []
    for start in range(0, len(order), span):
        part = order[start : start + span]
        part = part[np.argsort(-lengths[part], kind="stable")]
        steps += [part[place : place + batch_size] for place in range(0, len(part), batch_size)]
    return [steps[place] for place in generator.permutation(len(steps))]


def cut(rows: Sequence[int], lengths: NDArray[np.int64], budget: int) -> Iterator[list[int]]:
    """Cut rows, longest first, into groups whose padded size stays within ``budget`` tokens."""
    place = 0
    while place < len(rows):
        size = max(1, budget // int(lengths[rows[place]]))
        yield list(rows[place : place + size])
        place += size


def steps_of(plan: Sequence[MicroBatch]) -> list[range]:
    """Places in the plan of each optimiser step's micro-batches."""
    ends = [place + 1 for place, micro in enumerate(plan) if micro.closes_step]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def deal(sizes: Sequence[int], processes: int) -> list[list[int]]:
    """Share the micro-batches of one step out among processes; fixed by the sizes and the number of processes.

    The largest goes first, to the process that has least so far, so that all are done at nearly the same time.

    Args:
        sizes: Padded tokens of each micro-batch.
        processes: How many there are.

    Returns:
        For each process the places of its micro-batches, ascending; none where there are fewer than processes.
    """
    parts: list[list[int]] = [[] for _ in range(processes)]
    loads = [0] * processes
    for place in sorted(range(len(sizes)), key=lambda place: (-sizes[place], place)):
        least = loads.index(min(loads))
        parts[least].append(place)
        loads[least] += sizes[place]
    return [sorted(part) for part in parts]


class StepLoader:
    """Yields the optimiser steps of a plan, each with this process's micro-batches as tensors.

    It remembers its place, so that a checkpoint resumes mid-epoch, with any number of processes.

    Args:
        records: The tokens.
        plan: All micro-batches.
        rank: Place of this process among those that share the steps.
        processes: How many there are.
        even: Give every process equally many micro-batches: those with fewer get some of one token without a label.
    """

    def __init__(
        self,
        records: TokenizedRecords,
        plan: Sequence[MicroBatch],
        rank: int = 0,
        processes: int = 1,
        *,
        even: bool = False,
    ) -> None:
        self.records = records
        self.plan = list(plan)
        self.rank, self.processes, self.even = rank, processes, even
        self._steps = steps_of(self.plan)
        self._place = 0

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self._place < len(self._steps):
            self._place += 1
            yield self.step(self._steps[self._place - 1])
        self._place = 0

    def step(self, places: range) -> dict[str, Any]:
        """One step; ``tokens`` are the real ones of all processes, ``place`` that of a micro-batch in the plan."""
        lengths = self.records.lengths
        parts = deal([len(self.plan[at].rows) * int(lengths[self.plan[at].rows[0]]) for at in places], self.processes)
        mine = [self.micro_batch(places[part]) for part in parts[self.rank]]
        if self.even:
            mine += [self.nothing(places[0])] * (max(map(len, parts)) - len(mine))
        last = self.plan[places[-1]]
        return {
            "micro_batches": mine,
            "closes_epoch": last.closes_epoch,
            "step_labels": last.step_labels,
            "tokens": int(sum(lengths[list(self.plan[at].rows)].sum() for at in places)),
        }

    def micro_batch(self, place: int) -> dict[str, Any]:
        """One micro-batch, ``input_ids`` and ``labels`` ``[batch, seq]``."""
        rows = self.plan[place].rows
        input_ids, labels = collate(self.records, rows)
        tokens = int(self.records.lengths[list(rows)].sum())
        return {"input_ids": input_ids, "labels": labels, "place": place, "tokens": tokens}

    def nothing(self, place: int) -> dict[str, Any]:
        """A pass that adds nothing to loss and gradients."""
        token = torch.zeros((1, 1), dtype=torch.long)
        return {"input_ids": token, "labels": torch.full_like(token, IGNORED), "place": place, "tokens": 0}

    def state_dict(self) -> dict[str, int]:
        """Steps handed out so far (Lightning saves it with the checkpoint)."""
        return {"place": self._place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the steps of ``state``."""
        self._place = state["place"]
