"""The target set: a handful of examples that show what the model must get good at."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trim_lightning.errors import UserError
from trim_lightning.records.fields import clean_text, scalar_field, scalar_text
from trim_lightning.records.indexing import index
from trim_lightning.records.record import conversation_of
from trim_lightning.records.record_file import LineSource, ReadOptions, RecordFile
from trim_lightning.records.sources import open_records
from trim_lightning.settings.schema import SelectSettings
from trim_lightning.store import Store

# Keeps the draws of noise independent of other draws that use the same seed.
_NOISE_STREAM = 0x6E6F
_NOISY = "targets.jsonl"


def choose_targets(settings: SelectSettings, pool: RecordFile, store: Store) -> TargetSet:
    """Draw the target examples, per group if a field names groups; with ``target.single_groups`` each is then one.

    ``target=from_pool`` (in-domain selection) draws them from the pool itself. ``target.noise`` replaces a share of
    them, of each group if there are groups; a substitute takes the group of the target that it replaces.

    Raises:
        UserError: if the target set cannot be read or is empty.
    """
    target = settings.target
    if target.source == "from_pool":
        source = pool
    else:
        source = open_records(target, what="target", seed=settings.seed, spool=store.spool)
    rows = draw_targets(source, target.num_examples, settings.seed, target.group_field)
    if not rows:
        raise UserError("target: the target set is empty; give at least one example")
    drawn = source.take(rows)
    groups: dict[str, list[int]] = {}
    for place in range(len(drawn)):
        name = group_of(drawn, place, target.group_field) if target.group_field else ""
        groups.setdefault(name, []).append(place)
    # by name: round robin and the columns of scores.parquet must not depend on which examples were drawn
    groups = dict(sorted(groups.items()))
    every: list[int] = []
    places: list[int] = []
    for members in groups.values():
        order = noisy_order(members, settings.seed)
        every += order
        places += order[: int(np.floor(target.noise * len(members) + 0.5))]
    if target.single_groups:
        width = len(str(len(drawn) - 1))
        groups = {f"{place:0{width}d}": [place] for place in range(len(drawn))}  # by name in the targets' order
    if not places:
        return TargetSet(drawn, groups, source)
    taken = set(rows) if source is pool else set()
    # each place has its own substitute, whatever the share and the other groups
    noisy = replace_targets(drawn, {place: every.index(place) for place in places}, pool, taken, settings.seed, store)
    return TargetSet(noisy, groups, source, substitutes=frozenset(places))


def noisy_order(places: list[int], seed: int) -> list[int]:
    """The order in which noise takes some places of the target set: a larger share contains a smaller (our choice)."""
    return [places[place] for place in np.random.default_rng([seed, _NOISE_STREAM]).permutation(len(places))]


def replace_targets(
    targets: RecordFile, places: Mapping[int, int], pool: RecordFile, taken: set[int], seed: int, store: Store
) -> RecordFile:
    """The targets with records of the pool at some places: noise, to see how much of it a selection stands.

    The records are drawn by seed, without repetition, from all of the pool; they stay in the pool, and nothing keeps
    one from being of the targets' own kind. Their ids say ``pool:``. An experiment's tool, and our choice.

    Args:
        targets: The drawn targets.
        places: Which of them go, and the number of the draw that takes each one's place.
        pool: Where their substitutes are drawn from.
        taken: Rows of the pool that are targets already.
        seed: Seed of the draw.
        store: Holds the mixture; its content decides its key.

    Raises:
        UserError: if the pool has too few records.
    """
    others = np.array([row for row in range(len(pool)) if row not in taken], dtype=np.int64)
    if len(others) <= max(places.values()):
        raise UserError(
            f"target.noise: {len(places)} of {len(targets)} targets are to be replaced, the pool has only "
            f"{len(others)} other records; "
            "give a larger pool or a smaller target.num_examples"
        )
    drawn = np.random.default_rng([seed, _NOISE_STREAM, 1]).permutation(others)
    substitutes = {place: int(drawn[number]) for place, number in places.items()}
    lines = []
    for place in range(len(targets)):
        row = substitutes.get(place)
        record = targets.record(place) if row is None else pool.record(row)
        name = record.id if row is None else f"pool:{record.id}"
        lines.append(json.dumps({"id": name, **conversation_of(record.turns)}) + "\n")
    text = "".join(lines)

    def build(directory: Path) -> None:
        (directory / _NOISY).write_text(text, encoding="utf-8")

    digest = hashlib.sha256(text.encode()).hexdigest()
    path = store.spool("conversations", {"targets": digest}, build) / _NOISY
    label = f"{targets.name} with target.noise"
    mixed = index(LineSource(path, label=label, name=targets.name, what="target"), ReadOptions())
    mixed.source_rows = targets.source_rows
    return mixed


# Keeps the draw of targets independent of other draws that use the same seed.
_TARGET_STREAM = 0x7A67


def group_of(file: RecordFile, row: int, group_field: str) -> str:
    """The group of a record: the value of its group field as text.

    Raises:
        UserError: if the record has no such field, or a list, an object or null in it.
    """
    place = f"{file.what}.group_field={group_field}: {file.place(row)}"
    value = scalar_field(file.object(row), group_field, place, "a group is text, a number or true/false")
    return clean_text(scalar_text(value))


def draw_targets(file: RecordFile, num_examples: int | None, seed: int, group_field: str | None = None) -> list[int]:
    """Draw the targets: ``num_examples`` by seed, from every group if there are groups.

    A group's draw depends on the seed and its own records only, so another group changes nothing in it. Where
    fewer are available than asked for, all are taken.

    Returns:
        Rows of ``file``, ascending.

    Raises:
        UserError: if a record has no group.
    """
    if group_field is None:
        return _draw(list(range(len(file))), num_examples, [seed, _TARGET_STREAM])
    groups: dict[str, list[int]] = {}
    for row in range(len(file)):
        groups.setdefault(group_of(file, row, group_field), []).append(row)
    rows: list[int] = []
    for name, members in groups.items():
        stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        rows += _draw(members, num_examples, [seed, _TARGET_STREAM, stream])
    return sorted(rows)


def _draw(rows: list[int], count: int | None, seed: list[int]) -> list[int]:
    if count is None or count >= len(rows):
        return rows
    places = np.random.default_rng(seed).choice(len(rows), size=count, replace=False)
    return sorted(rows[place] for place in places)


@dataclass(frozen=True)
class TargetSet:
    """The drawn target examples.

    Attributes:
        records: Only the drawn records, in file order.
        groups: Group name to places in ``records``; ``{"": all}`` without groups.
        read: The records that they were drawn from.
        substitutes: Places in ``records`` of noise in place of targets.
    """

    records: RecordFile
    groups: Mapping[str, list[int]]
    read: RecordFile
    substitutes: frozenset[int] = frozenset()

    @property
    def replaced(self) -> int:
        """How many of the records are noise."""
        return len(self.substitutes)

    def describe(self) -> dict[str, Any]:
        """The target set's line among the inputs of a manifest."""
        entry: dict[str, Any] = {
            "name": self.records.name,
            "sha256": self.records.sha256,
            "rows": len(self.records),
            "source_rows": self.records.source_rows,
        }
        if set(self.groups) != {""}:
            entry["groups"] = {group: len(rows) for group, rows in self.groups.items()}
        if self.replaced:
            entry["replaced"] = self.replaced
        return entry
