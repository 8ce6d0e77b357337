"""The target set: a handful of examples that show what the model must get good at."""

from __future__ import annotations

from trim_lightning.errors import UserError
from trim_lightning.methods.base import TargetSet
from trim_lightning.records.filters import draw_targets, group_of
from trim_lightning.records.record_file import RecordFile
from trim_lightning.records.sources import open_records
from trim_lightning.settings import SelectSettings
from trim_lightning.store import Store


def check_target(settings: SelectSettings) -> None:
    """Refuse the built-in targets for a pool of the user's own: a forgotten target set would give a wrong coreset.

    Raises:
        UserError: saying how to name a target set.
    """
    if settings.pool.source != "generated" and settings.target.source == "generated":
        raise UserError(
            "target: the pool is your own, the target set still the built-in one; give target=jsonl target.path=FILE, "
            "or target=from_pool"
        )


def choose_targets(settings: SelectSettings, pool: RecordFile, store: Store) -> TargetSet:
    """Draw the target examples, per group if there are groups.

    ``target=from_pool`` (in-domain selection) draws them from the pool itself.

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
    return TargetSet(drawn, dict(sorted(groups.items())))
