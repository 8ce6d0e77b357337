"""What single targets give to the records near them, from the mean states that a scoring pass has kept of responses."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trim_lightning.console.progress import progress_bar
from trim_lightning.stages.joined_passes import JoinedPasses
from trim_lightning.stages.task import SelectionTask
from trim_lightning.store import Entry, StageKey
from trim_lightning.tokens.tokenized import predicted_responses
from trim_lightning.trim.density import crowding, nearest, shares, unit

Floats = NDArray[np.float64]
DENSITY = "density.npy"


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

    A state that is no finite number is left out, as is a target with one.

    Args:
        passed: The scoring pass.
        wanted: ``[targets, hidden]`` their mean states.
        members: Places of each group's targets.
        size: Records of the pool.
    """
    usable, total, number = np.zeros(size, dtype=bool), np.zeros(wanted.shape[1]), 0
    for rows, responses, states in states_of(passed):
        fine = (responses > 0) & np.isfinite(states).all(1)
        usable[rows] = fine
        total += responses[fine] @ states[fine]
        number += int(responses[fine].sum())
    known, found = np.flatnonzero(usable), np.full((len(members), size), np.nan)
    if not len(known):
        return found
    centre = total / number
    places = np.cumsum(usable) - 1  # of usable rows among them
    targets = unit(wanted - centre)
    cosines = np.empty((len(targets), len(known)), dtype=np.float32)
    for rows, _, states in states_of(passed):
        fine = usable[rows]
        cosines[:, places[rows[fine]]] = targets @ unit(states[fine] - centre).T
    near = [nearest(cosines[[place for place in group if np.isfinite(targets[place]).all()]]) for group in members]
    del cosines
    pooled = np.unique(np.concatenate([group.ravel() for group in near]))
    around = np.empty((len(pooled), wanted.shape[1]), dtype=np.float32)
    for rows, _, states in states_of(passed):
        mine = np.flatnonzero(usable[rows] & np.isin(places[rows], pooled))
        around[np.searchsorted(pooled, places[rows[mine]])] = unit(states[mine] - centre)
    own = [np.unique(group) for group in near]
    with progress_bar("density", total=sum(map(len, own)), unit="records") as bar:
        for place, (group, members_near) in enumerate(zip(near, own, strict=True)):
            whole = len(members_near) == len(pooled)
            vectors = around if whole else around[np.searchsorted(pooled, members_near)]
            density = np.ones(len(known))
            density[members_near] = crowding(vectors, len(group), bar.update)
            found[place, known] = shares(group, density)
    return found


def states_of(passed: JoinedPasses) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int32], Floats]]:
    """Rows, response tokens and mean states ``[records, hidden]`` of every shard."""
    for parts in passed.response_parts():
        assert parts.mean_state is not None, "the pass kept no states"
        yield parts.rows, parts.responses, parts.mean_state.astype(np.float64)
