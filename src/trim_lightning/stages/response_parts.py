"""What whole responses of the pool say of target groups, from what a scoring pass has kept of them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trim_lightning.stages.joined_passes import JoinedPasses
from trim_lightning.stages.task import SelectionTask
from trim_lightning.store import Entry, StageKey
from trim_lightning.tokens.tokenized import predicted_responses
from trim_lightning.trim.density import crowding, nearest, shares, unit

Floats = NDArray[np.float64]
DENSITY = "density.npy"


def mean_alignments(passed: JoinedPasses, size: int) -> dict[str, Floats]:
    """Group name to ``[size]`` mean alignment of each record's response tokens; NaN without one."""
    found = np.full((len(passed.groups), size), np.nan)
    for parts in passed.response_parts():
        found[:, parts.rows] = parts.mean_alignment
    return dict(zip(passed.groups, found, strict=True))


def densities(
    task: SelectionTask, passed: JoinedPasses, scored: Entry, signals: Entry, groups: Mapping[str, Sequence[int]]
) -> dict[str, Floats]:
    """Group name to ``[records]`` shares by `trim_lightning.trim.density`, of mean states; NaN without a response.

    States are centred by the mean over all response tokens of the pool (our choice). Stored.

    Args:
        task: For pool, store and ledger.
        passed: The scoring pass.
        scored: Its entry.
        signals: That of the target pass.
        groups: Group name to the rows of its targets that have a response.
    """
    key = StageKey("density", 1, {"groups": groups}, {"score": scored.key.hex, "signals": signals.key.hex})

    def build(directory: Path) -> dict[str, Any]:
        started = time.perf_counter()
        rows = sorted({row for members in groups.values() for row in members})
        wanted = target_states(signals.path, rows)
        places = {row: place for place, row in enumerate(rows)}
        members = [[places[row] for row in group] for group in groups.values()]
        np.save(directory / DENSITY, shares_of(passed, wanted, members, len(task.pool)))
        return {"seconds": time.perf_counter() - started}

    entry = task.store.get(key, build)
    task.ledger.book("density", entry)
    return dict(zip(groups, np.load(entry.path / DENSITY), strict=True))


def target_states(directory: Path, rows: Sequence[int]) -> Floats:
    """``[rows, hidden]`` mean state of each target's response, of what the target pass has seen."""
    from trim_lightning.engine.target_pass import read_signals

    by_row = {signal.row: signal for signal in read_signals(directory)}
    found = []
    for row in rows:
        roles = by_row[row].roles.numpy()
        counted = predicted_responses(roles, np.array([len(roles)]))
        found.append(by_row[row].hidden.numpy()[counted].mean(0, dtype=np.float64))
    return np.stack(found)


def shares_of(passed: JoinedPasses, wanted: Floats, members: Sequence[Sequence[int]], size: int) -> Floats:
    """``[groups, size]`` shares; one shard's states in memory at a time, then those of records near a target.

    Args:
        passed: The scoring pass.
        wanted: ``[targets, hidden]`` their mean states.
        members: Places of each group's targets.
        size: Records of the pool.
    """
    counts, total = np.zeros(size, dtype=np.int64), np.zeros(wanted.shape[1])
    for parts in passed.response_parts():
        counts[parts.rows] = parts.responses
        total += parts.responses @ parts.mean_state.astype(np.float64)
    centre = total / max(counts.sum(), 1)
    targets = unit(wanted - centre)
    known = np.flatnonzero(counts)
    found = np.full((len(members), size), np.nan)
    if not len(known):
        return found
    cosines = np.zeros((size, len(targets)), dtype=np.float32)
    for parts in passed.response_parts():
        cosines[parts.rows] = unit(parts.mean_state - centre) @ targets.T
    near = [nearest(cosines[known][:, group]) for group in members]
    pooled = np.unique(np.concatenate([group.ravel() for group in near]))
    states = np.zeros((len(pooled), wanted.shape[1]), dtype=np.float32)
    for parts in passed.response_parts():
        mine = np.flatnonzero(np.isin(parts.rows, known[pooled]))
        places = np.searchsorted(known[pooled], parts.rows[mine])
        states[places] = unit(parts.mean_state[mine] - centre)
    for place, group in enumerate(near):
        own = np.unique(group)
        density = np.ones(len(known))
        density[own] = crowding(states[np.searchsorted(pooled, own)], len(group))
        found[place, known] = shares(group, density)
    return found
