"""What several selectors share: stored scores against target groups, the table of scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trim_lightning.engine.shards import gather_values, read_values
from trim_lightning.errors import UserError
from trim_lightning.selection.ranking import ScoreTable, merge_in_turns, rank_round_robin, rank_single_targets
from trim_lightning.stages.task import SelectionTask
from trim_lightning.store import Entry, StageKey
from trim_lightning.trim.density import unit

ROUND_ROBIN = "round_robin"
AGGREGATES = ("max", "mean", ROUND_ROBIN)
AGGREGATE = "how the scores against a group's targets become one; round_robin: single targets take turns"


def score_table(
    task: SelectionTask, groups: Mapping[str, NDArray[Any]], order: NDArray[np.int64] | None = None
) -> ScoreTable:
    """The scores of a method that has neither mean, maximum nor coverage.

    Records without scoped tokens get NaN. Scores of several target groups are combined by ``target.aggregate``:
    ``mean``, or for ``max`` and ``round_robin`` the best group's; with ``round_robin`` the groups take turns, unless an
    order is given.
    ``groups`` has ``[records]`` scores by name, ``{"": scores}`` without groups; ``order`` the scored rows best first,
    where the method ranks otherwise than by score.
    """
    scoped = task.pool_tokens.content_lengths(task.settings.scope)
    aggregate = task.settings.target.aggregate
    stacked = np.stack([np.where(scoped > 0, scores, np.nan) for scores in groups.values()])
    combined = stacked.mean(0) if aggregate == "mean" else stacked.max(0)
    named = {group: values.astype(np.float32) for group, values in zip(groups, stacked, strict=True) if group}
    if named and aggregate == ROUND_ROBIN and order is None:
        order = rank_round_robin(list(named.values()))
    return ScoreTable(
        score=combined.astype(np.float32),
        num_tokens=task.pool_tokens.content_lengths().astype(np.int32),
        num_scored=scoped.astype(np.int32),
        groups=named,
        order=order,
    )


def check_aggregates(task: SelectionTask, aggregate: str) -> None:
    """Check ``method.aggregate`` against ``target.aggregate``, before anything is computed.

    Raises:
        UserError: if groups whose targets take turns are to be averaged.
    """
    assert task.targets is not None
    if aggregate == ROUND_ROBIN and task.settings.target.aggregate == "mean" and "" not in task.targets.groups:
        raise UserError(
            "target.aggregate=mean: with method.aggregate=round_robin targets take turns and are not averaged; choose "
            "target.aggregate=round_robin (groups take turns too), or method.aggregate=mean"
        )


def targets_table(
    task: SelectionTask,
    groups: Mapping[str, Sequence[int]],
    aggregate: str,
    score: Callable[[Mapping[str, Sequence[int]], str], dict[str, NDArray[np.float32]]],
) -> ScoreTable:
    """The table of a method that scores a record against every single target.

    With ``round_robin`` a group's score is its best target's, and the targets take turns (`rank_single_targets`): those
    of all groups one after the other, or with ``target.aggregate=round_robin`` those of each group, and then the groups
    (`rank_round_robin`). Takes 4 bytes for each target and record.

    Args:
        task: For settings and token counts.
        groups: Group name to rows of the targets.
        aggregate: One of `AGGREGATES`.
        score: Gives the scores of the pool against groups, folded by ``max`` or ``mean``.
    """
    if aggregate != ROUND_ROBIN:
        return score_table(task, score(groups, aggregate))
    # by row, not by group: the key of the stored scores knows names, not their order
    single = score({str(row): [row] for row in sorted(row for rows in groups.values() for row in rows)}, "max")
    unscoped = task.pool_tokens.content_lengths(task.settings.scope) == 0
    for scores in single.values():
        scores[unscoped] = np.nan
    members = [[single[str(row)] for row in rows] for rows in groups.values()]
    if task.settings.target.aggregate != ROUND_ROBIN:
        members = [[scores for group in members for scores in group]]
    order = merge_in_turns([rank_single_targets(group) for group in members])
    best = {name: np.stack([single[str(row)] for row in rows]).max(0) for name, rows in groups.items()}
    return score_table(task, best, order)


def group_scores(
    task: SelectionTask,
    stage_key: StageKey,
    groups: Sequence[str],
    blocks: Callable[[], Iterable[tuple[Any, NDArray[Any]]]],
) -> dict[str, NDArray[np.float32]]:
    """The stored scores of the pool against every target group.

    ``blocks`` yields places in the ``[groups, records]`` table and the scores that belong there; it is called only if
    nothing is stored.

    Returns:
        Group name to ``[records]`` float32; NaN at places that were not yielded.
    """

    def table() -> NDArray[np.float32]:
        scores = np.full((len(groups), len(task.pool)), np.nan, dtype=np.float32)
        for places, values in blocks():
            scores[places] = values
        return scores

    return dict(zip(groups, stored_array(task, stage_key, "scores.npy", table), strict=True))


def stored_array(
    task: SelectionTask, stage_key: StageKey, name: str, compute: Callable[[], NDArray[Any]]
) -> NDArray[Any]:
    """The array in file ``name`` of a stage, which the manifest books as scoring; computed if nothing is stored."""

    def build(directory: Path) -> dict[str, Any]:
        started = time.perf_counter()
        np.save(directory / name, compute())
        return {"seconds": time.perf_counter() - started}

    entry = task.store.get(stage_key, build)
    task.ledger.book("score", entry)
    array: NDArray[Any] = np.load(entry.path / name)
    return array


def cosine_groups(
    task: SelectionTask, pool: Entry, targets: Entry, groups: Mapping[str, Sequence[int]], aggregate: str
) -> dict[str, NDArray[np.float32]]:
    """The stored cosines of every pool record's vector with each group's targets; one shard in memory at a time.

    Both results hold vectors as `trim_lightning.engine.shards` keeps them; ``max`` or ``mean`` is over the targets.

    Returns:
        Group name to ``[records]`` float32; NaN for a record without a vector.
    """
    settings = {"method": "cosine", "aggregate": aggregate, "groups": groups}
    stage_key = StageKey("similarity", 1, settings, {"pool": pool.key.hex, "targets": targets.key.hex})

    def blocks() -> Iterator[tuple[Any, NDArray[Any]]]:
        assert task.targets is not None
        wanted = unit(gather_values(targets.path, len(task.targets.records)))
        for rows, vectors in read_values(pool.path):
            cosines = unit(vectors.astype(np.float64)) @ wanted.T
            folded = [fold_targets(cosines.T[members], len(members), aggregate) for members in groups.values()]
            yield np.s_[:, rows], np.stack(folded)

    return group_scores(task, stage_key, list(groups), blocks)


def fold_targets(scores: Iterable[NDArray[Any]], number: int, how: str) -> NDArray[Any]:
    """One score a record from its ``[records]`` scores against several targets, without holding them all."""
    folded: NDArray[Any] = reduce(np.maximum if how == "max" else np.add, scores)
    return folded / number if how == "mean" else folded


def usable_groups(
    task: SelectionTask, usable: Callable[[int], bool], lacks: str, *, whatever_scope: bool = False
) -> dict[str, list[int]]:
    """The target groups without the targets that a method cannot use, which lack what ``lacks`` says.

    ``whatever_scope`` is True if another scope would not help.

    Raises:
        UserError: if a group has no target left.
    """
    assert task.targets is not None
    kept = {group: [row for row in rows if usable(row)] for group, rows in task.targets.groups.items()}
    for group, rows in kept.items():
        if not rows:
            where = f"group {group!r} of the target set" if group else "the target set"
            if whatever_scope:
                raise UserError(f"target: {where} has {lacks}; give targets that have one")
            raise UserError(
                f"target: {where} has {lacks} in scope={task.settings.scope}; give targets with text there, "
                "or another scope"
            )
    return kept
