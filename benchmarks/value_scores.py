"""The small file of what every method's scores say of the groups: judging a method again needs no model and no pass."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trim_lightning.files.atomic import replacing
from value_groups import TASKS, Group
from value_methods import COSTLY, DROPS, REFERENCE, SAMPLED_REFERENCE, Scored, few

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class GroupScores:
    """What a method's scores say of groups.

    Attributes:
        means: ``[groups, tasks]`` mean score of each group's records; NaN for groups that were not scored.
        passes: Tokens that went through the model, by tokens of the records; a gradient counts like a forward pass.
        time: Seconds a token over those of the reference on the same machine; NaN where something else ran beside.
        command: How a reader gets such scores; empty for a formula that the instrument alone knows.
    """

    means: Floats
    passes: float
    time: float
    command: str


def group_scores(scores: Floats, groups: Sequence[Group]) -> Floats:
    """``[groups, tasks]`` mean score of each group's records, of ``[tasks, records]`` scores; NaN records are left out.

    A record without a score is one that the method never picks; leaving it out favours no method, for every method
    scores nearly all records of the groups.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a group without any score
        return np.stack([np.nanmean(scores[:, list(group.rows)], axis=1) for group in groups])


def of_groups(scored: Mapping[str, Scored], groups: Sequence[Group]) -> dict[str, GroupScores]:
    """By method, what its scores of records say of the groups; of a costly one, of those that it has a sample of.

    The others share some records with those.
    """
    usual = scored[REFERENCE].cost.each if REFERENCE in scored else math.nan
    sampled = {group.name for group in few(groups)}
    outside = [place for place, group in enumerate(groups) if group.name not in sampled]
    found = {}
    for name, own in scored.items():
        means = group_scores(own.scores, groups)
        if name in (*COSTLY, *DROPS, SAMPLED_REFERENCE):
            means[outside] = np.nan
        found[name] = GroupScores(means, own.cost.passes, own.cost.each / usual, own.command)
    return found


def renewed(kept: Mapping[str, GroupScores], found: Mapping[str, GroupScores]) -> dict[str, GroupScores]:
    """What was kept with what was found now in its place; a time that was measured gives way only to another one."""
    both = {**kept, **found}
    for name in kept.keys() & found.keys():
        if math.isnan(found[name].time):
            both[name] = replace(found[name], time=kept[name].time)
    return both


def write_scores(found: Mapping[str, GroupScores], groups: Sequence[Group], path: Path) -> None:
    """One row for each group and task, one column a method, its price beside it."""
    labels = {
        "group": pa.array([group.name for group in groups for _ in TASKS]),
        "task": pa.array([*TASKS] * len(groups)),
    }
    fields = [pa.field(name, column.type) for name, column in labels.items()]
    for name, scores in found.items():
        facts = json.dumps({"passes": scores.passes, "time": scores.time, "command": scores.command})
        fields.append(pa.field(name, pa.float32(), metadata={"facts": facts}))
    columns = [*labels.values(), *(pa.array(scores.means.reshape(-1), pa.float32()) for scores in found.values())]
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_arrays(columns, schema=pa.schema(fields)), temporary, compression="zstd")


def read_scores(groups: Sequence[Group], path: Path) -> dict[str, GroupScores]:
    """What `write_scores` wrote, by method; nothing where there is no such file."""
    if not path.exists():
        return {}
    table = pq.read_table(path)
    assert table["group"].to_pylist()[:: len(TASKS)] == [group.name for group in groups], "scores are of other groups"
    found = {}
    for field in table.schema:
        if field.metadata and b"facts" in field.metadata:
            means = table[field.name].to_numpy().astype(np.float64).reshape(len(groups), len(TASKS))
            found[field.name] = GroupScores(means, **json.loads(field.metadata[b"facts"]))
    return found
