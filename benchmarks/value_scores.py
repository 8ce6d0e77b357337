"""The small file of what every method's scores say of the groups: judging a method again needs no model and no pass."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trim_lightning.files.atomic import replacing
from value_groups import TASKS, Group
from value_methods import COSTLY, DROPS, SAMPLED_REFERENCE, Cost, Scored, few

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class GroupScores:
    """What a method's scores say of groups.

    Attributes:
        means: ``[groups, tasks]`` mean score of each group's records; NaN for groups that were not scored.
        cost: What scoring took.
        command: How a reader gets such scores; empty for a formula that the instrument alone knows.
    """

    means: Floats
    cost: Cost
    command: str

    def take(self, places: NDArray[np.int64]) -> GroupScores:
        """Those of some groups."""
        return GroupScores(self.means[places], self.cost, self.command)


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
    sampled = {group.name for group in few(groups)}
    outside = [place for place, group in enumerate(groups) if group.name not in sampled]
    found = {}
    for name, own in scored.items():
        means = group_scores(own.scores, groups)
        if name in (*COSTLY, *DROPS, SAMPLED_REFERENCE):
            means[outside] = np.nan
        found[name] = GroupScores(means, own.cost, own.command)
    return found


def write_scores(found: Mapping[str, GroupScores], groups: Sequence[Group], path: Path) -> None:
    """One row for each group and task, one column a method, its price beside it."""
    labels = {
        "group": pa.array([group.name for group in groups for _ in TASKS]),
        "task": pa.array([*TASKS] * len(groups)),
    }
    fields = [pa.field(name, column.type) for name, column in labels.items()]
    for name, scores in found.items():
        facts = json.dumps({**asdict(scores.cost), "command": scores.command})
        fields.append(pa.field(name, pa.float32(), metadata={"cost": facts}))
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
        if field.metadata and b"cost" in field.metadata:
            facts = json.loads(field.metadata[b"cost"])
            command = facts.pop("command")
            means = table[field.name].to_numpy().astype(np.float64).reshape(len(groups), len(TASKS))
            found[field.name] = GroupScores(means, Cost(**facts), command)
    return found
