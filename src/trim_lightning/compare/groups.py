"""Runs that differ in nothing but a seed, and the config keys in which the others differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from operator import attrgetter
from typing import Any

from trim_lightning.compare.statistics import Spread, spread
from trim_lightning.errors import UserError
from trim_lightning.methods.base import whole_method
from trim_lightning.runs.run import Run, flatten, text_of

SEEDS = ("seed", "train.seed")
INPUTS = ("pool", "target", "model", "trainee", "evaluation")
ABSENT = "-"
BASELINE = "random"


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in nothing but their seeds.

    Attributes:
        name: A letter or two.
        runs: At least one.
    """

    name: str
    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        """Any run, for what all share."""
        return self.runs[0]

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.first.method

    @property
    def title(self) -> str:
        """Method and letter."""
        return f"{self.method} ({self.name})"

    @property
    def draws(self) -> int:
        """Different selection seeds."""
        return len({run.seed for run in self.runs})

    # means over the runs, None if unknown: records of the coreset, its content tokens, those of its responses, and the
    # tokens fed in training
    records = property(lambda self: self.mean("coreset.records"))
    tokens = property(lambda self: self.mean("coreset.tokens"))
    response_tokens = property(lambda self: self.mean("coreset.response_tokens"))
    trained_tokens = property(lambda self: self.mean("trained_tokens"))

    def mean(self, attribute: str) -> float | None:
        """Mean of a dotted attribute of the runs, None if a run lacks it."""
        return mean_of([attrgetter(attribute)(run) for run in self.runs])

    def metric(self, name: str) -> Spread | None:
        """A metric over the seeds, None if a run lacks it."""
        values = [run.measurements[name].value for run in self.runs if name in run.measurements]
        return spread(values) if len(values) == len(self.runs) else None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Dotted config keys without the seeds."""
        return {name: value for name, value in self.first.settings.items() if name not in SEEDS}


@dataclass(frozen=True)
class Axis:
    """Config keys that vary together over the runs.

    Attributes:
        keys: One or more dotted keys.
        values: For each run, the values of those keys.
    """

    keys: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]

    @property
    def name(self) -> str:
        """The keys, joined."""
        return " + ".join(self.keys)

    @property
    def levels(self) -> list[tuple[Any, ...]]:
        """The different values, numbers in order, others as they first occur."""
        found = list(dict.fromkeys(self.values))
        if all(isinstance(part, int | float) and not isinstance(part, bool) for level in found for part in level):
            return sorted(found)
        return found

    def split(self, items: Sequence[Any]) -> list[tuple[tuple[Any, ...], list[Any]]]:
        """Each of the levels with its items, of which there is one for each run."""
        pairs = list(zip(items, self.values, strict=True))
        return [(level, [item for item, value in pairs if value == level]) for level in self.levels]


def mean_of(values: Sequence[float | None]) -> float | None:
    """Mean, or None if one is missing."""
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if values and len(known) == len(values) else None


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group runs by everything but their seeds, in the order of their first run."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(identity(run), []).append(run)
    return [Group(letters(place), tuple(members)) for place, members in enumerate(groups.values())]


def identity(run: Run) -> tuple[Any, ...]:
    """What runs of one group share: kind, config without seeds and housekeeping, and the bytes of the inputs."""
    settings = tuple(sorted((name, repr(value)) for name, value in run.settings.items() if name not in SEEDS))
    inputs = {**run.coreset.inputs, **({} if run.kind == "select" else run.inputs)}
    digests = tuple(digest_in(inputs, name) for name in INPUTS)
    foreign = digest_in(run.inputs, "coreset") if run.coreset.config is None else None
    return run.kind, settings, digests, foreign


def digest_in(inputs: Mapping[str, Any], name: str) -> str | None:
    """sha256 of an input; that of a target set is of what it was drawn from, so that draws by other seeds group."""
    described = inputs.get(name)
    return str(described.get("sha256")) if isinstance(described, Mapping) else None


def letters(place: int) -> str:
    """A, B ... Z, AA, AB ..."""
    name = ""
    place += 1
    while place:
        place, rest = divmod(place - 1, 26)
        name = chr(ord("A") + rest) + name
    return name


def axes(runs: Sequence[Run]) -> list[Axis]:
    """The config keys that vary over the runs; keys that always change together are one axis.

    Keys of a section that a run does not have at all (a selection has no ``train``) do not count, nor do a method's
    own keys where the method alone decides them.
    """
    partitions: dict[tuple[int, ...], list[str]] = {}
    for key in varying_keys(runs):
        partitions.setdefault(partition(runs, key), []).append(key)
    return [
        Axis(tuple(keys), tuple(tuple(run.settings.get(key, ABSENT) for key in keys) for run in runs))
        for keys in partitions.values()
    ]


def varying_keys(runs: Sequence[Run]) -> list[str]:
    """Config keys with more than one value, in config order.

    A method's own key is none if each run has its method's default, which the method's name says already.
    """
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    sections = [{key.partition(".")[0] for key in run.settings} for run in runs]
    shared = [key for key in keys if all(key.partition(".")[0] in present for present in sections)]
    varying = [key for key in shared if len(set(partition(runs, key))) > 1]
    methods = partition(runs, "method.name")
    own = [key for key in varying if key.startswith("method.") and key != "method.name"]
    usual = [key for key in own if all(is_default(run, key) for run in runs)]
    decided = {key for key in usual if decided_by(methods, partition(runs, key))}
    return [key for key in varying if key not in decided]


def is_default(run: Run, key: str) -> bool:
    """True if a run has its method's default in one of the method's keys, or no such key."""
    if key not in run.settings:
        return True
    usual = defaults_of(str(run.settings.get("method.name")))
    return key in usual and usual[key] == run.settings[key]


@cache
def defaults_of(method: str) -> Mapping[str, Any]:
    """A method's keys, as ``method.<key>``, at their defaults; nothing of one that is no more or needs some key."""
    try:
        return flatten({"method": whole_method({"name": method})})
    except UserError:
        return {}


def decided_by(finer: Sequence[int], coarser: Sequence[int]) -> bool:
    """True if the first partition decides the second: it is finer, or the same."""
    return len(set(zip(finer, coarser, strict=True))) == len(set(finer))


def partition(runs: Sequence[Run], key: str) -> tuple[int, ...]:
    """For each run, which of the key's values it has, numbered as they first occur."""
    seen: dict[str, int] = {}
    return tuple(seen.setdefault(repr(run.settings.get(key, ABSENT)), len(seen)) for run in runs)


def differing_keys(first: Group, second: Group) -> list[str]:
    """Config keys in which two groups differ, seeds apart, the method's own keys left out."""
    keys = dict.fromkeys([*first.settings, *second.settings])
    return [
        key
        for key in keys
        if not key.startswith("method.") and first.settings.get(key, ABSENT) != second.settings.get(key, ABSENT)
    ]


def axis_text(level: tuple[Any, ...]) -> str:
    """An axis value for a table."""
    return ", ".join(text_of(value) for value in level)


def marginal_means(axis: Axis, runs: Sequence[Run], metric: str) -> list[float | None]:
    """Mean of a metric over the runs with each value of an axis, in the order of ``axis.levels``."""
    means = []
    for _, members in axis.split(runs):
        values = [run.measurements[metric].value for run in members if metric in run.measurements]
        means.append(mean_of([value for value in values if math.isfinite(value)]))
    return means
