"""Which runs of a group are independent of each other, and so count as runs of their own in a test."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from trim_lightning.compare.groups import BASELINE, Group
from trim_lightning.compare.predictions import Predictions
from trim_lightning.files.atomic import sha256_of


def independent_runs(group: Group, predictions: Sequence[Predictions]) -> list[list[int]]:
    """The places of a group's runs, those together that count as one.

    Where chance is in the selection (random, or coresets that differ), trainings on the same draw are one run: they
    cannot tell a lucky draw. Where every run has the same coreset, each training seed is a run. Runs whose losses are
    the same on every record are one run, whatever their seeds say. Our choice.

    Args:
        group: Training runs.
        predictions: Of each of them.
    """
    coresets = {None if run.coreset.file is None else sha256_of(run.coreset.file) for run in group.runs}
    drawn = group.method == BASELINE or len(coresets) > 1 or (None in coresets and group.draws > 1)
    seeds = [run.seed if drawn else run.train_seed for run in group.runs]
    marks = [{("seed", seed), outcome(found)} for seed, found in zip(seeds, predictions, strict=True)]
    units: list[tuple[set[Hashable], list[int]]] = []
    for place, own in enumerate(marks):
        joined = [unit for unit in units if unit[0] & own]
        units = [unit for unit in units if not unit[0] & own]
        places = [*(old for _, olds in joined for old in olds), place]
        units.append((own.union(*(seen for seen, _ in joined)), places))
    return [places for _, places in units]


def outcome(found: Predictions) -> Hashable:
    """What tells a run from another; right or wrong alone does not, as few records leave few outcomes."""
    return found.values["nll"].tobytes() if "nll" in found.values else object()


def counted_note(group: Group, units: Sequence[Sequence[int]]) -> list[str]:
    """Tell that runs count as fewer than they are."""
    if len(units) == len(group.runs):
        return []
    return [
        f"{group.title}: its {len(group.runs)} runs count as {len(units)} in tests: runs with the same draw, the same "
        "training seed on the same coreset, or the same losses are one"
    ]
