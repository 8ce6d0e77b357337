"""Is one group better than another on the same held-out records, and at the same budget?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from trim_lightning.compare.between_runs import ENOUGH_RUNS, LEVEL, RESOLUTION, compare_runs, holm
from trim_lightning.compare.groups import BASELINE, Group, differing_keys
from trim_lightning.compare.independent import counted_note, independent_runs
from trim_lightning.compare.measures import lower_is_better
from trim_lightning.compare.predictions import FIELDS, Predictions, read_predictions
from trim_lightning.compare.statistics import paired_interval, ratio, resampled_ratios
from trim_lightning.runs.manifest import BrokenRun
from trim_lightning.runs.names import PREDICTIONS

TOLERANCE = 0.02  # token budgets this close count as equal


@dataclass(frozen=True)
class Comparison:
    """One metric of one pair of groups.

    Attributes:
        first: The group that is judged.
        second: The group it is judged against.
        metric: Name of the metric.
        difference: First minus second.
        over_records: 95 % interval over held-out records, these very runs held fixed; tells nothing of the next run.
        runs: Independent runs of either group.
        records: Held-out records.
        low: 95 % interval over runs and records, None without a test; likewise the next three.
        high: Its upper end.
        p: p-value of no difference.
        holm: The same, corrected for all tests of this metric in the comparison.
    """

    first: Group
    second: Group
    metric: str
    difference: float
    over_records: tuple[float, float]
    runs: tuple[int, int]
    records: int
    low: float | None = None
    high: float | None = None
    p: float | None = None
    holm: float | None = None

    @property
    def untested(self) -> str:
        """Why there is no test; empty if there is one."""
        for count, least, noun in ((min(self.runs), ENOUGH_RUNS, "run"), (self.records, 2, "held-out record")):
            if count < least:
                return f"{count} {noun}{'' if count == 1 else 's'}: too few to tell"
        return "nothing varies: no test" if self.p is None else ""

    @property
    def verdict(self) -> str | None:
        """``better``, ``worse`` or ``not told apart``, by Holm's p-value; None without a test."""
        if self.holm is None:
            return None
        if self.holm >= LEVEL:
            return "not told apart"
        return "better" if (self.difference < 0) == lower_is_better(self.metric) else "worse"


@dataclass(frozen=True)
class Panel:
    """Groups measured by one metric on the same records, so that any two of them can be compared.

    Attributes:
        metric: Name of the metric.
        groups: The groups.
        values: Of each group ``[independent runs, records]``.
        weights: ``[records]``, positive.
    """

    metric: str
    groups: list[Group]
    values: list[NDArray[np.float64]]
    weights: NDArray[np.float64]

    @property
    def means(self) -> NDArray[np.float64]:
        """``[groups, records]``."""
        return np.array([runs.mean(axis=0) for runs in self.values])


def equal_budgets(first: Group, second: Group) -> str:
    """In which measures two coresets are equally large: ``records``, ``tokens``, ``response tokens``, or ``neither``.

    Records are counted exactly; content tokens, and those of responses, may differ by 2 % of the larger (our choice).
    Means over seeds. Several measures are joined by ``and``.
    """
    equal = ["records"] if first.records == second.records else []
    equal += ["tokens"] if close(first.tokens, second.tokens) else []
    equal += ["response tokens"] if close(first.response_tokens, second.response_tokens) else []
    return " and ".join(equal) or "neither"


def close(first: float | None, second: float | None) -> bool:
    """True if two amounts are known and differ by at most `TOLERANCE` of the larger."""
    return first is not None and second is not None and abs(first - second) <= TOLERANCE * max(first, second)


def pairs_to_test(groups: Sequence[Group], *, all_pairs: bool) -> list[tuple[Group, Group]]:
    """The pairs to test: every group against its random baselines, or every pair."""
    trained = [group for group in groups if group.first.kind == "train"]
    if all_pairs:
        # random second, so that a difference reads as gain over it
        return [pair if pair[0].method != BASELINE else pair[::-1] for pair in combinations(trained, 2)]
    others = [group for group in trained if group.method != BASELINE]
    return [(group, baseline) for group in others for baseline in baselines_of(group, trained)]


def baselines_of(group: Group, groups: Sequence[Group]) -> list[Group]:
    """The random groups that a group is fairly compared with.

    Of all random groups those with the same trainee, of those the ones with an equal budget, of those the ones that
    differ from the group in the fewest other keys; a step that would leave none is skipped (our choice).
    """
    found = [other for other in groups if other.method == BASELINE and other is not group]
    for fits in (
        lambda other: other.first.trainee == group.first.trainee,
        lambda other: equal_budgets(group, other) != "neither",
    ):
        found = [other for other in found if fits(other)] or found
    distance = {id(other): len(other_differences(group, other)) for other in found}
    return [other for other in found if distance[id(other)] == min(distance.values())]


def other_differences(first: Group, second: Group) -> list[str]:
    """Config keys in which two groups differ, besides the method and the budget."""
    return [key for key in differing_keys(first, second) if not key.startswith("selection.")]


def compare_groups(
    groups: Sequence[Group], pairs: Sequence[tuple[Group, Group]], *, samples: int, seed: int
) -> tuple[list[Comparison], list[str]]:
    """Test each pair on each metric that both have.

    Args:
        groups: All groups of training runs.
        pairs: What to test.
        samples: Bootstrap resamples of the records.
        seed: Of the resampling.

    Returns:
        The comparisons, pair by pair, and notes on what could not be compared, or counts less than it seems.
    """
    predictions, notes = read_all(groups)
    units = {group.name: independent_runs(group, predictions[group.name])
             for group in groups if group.name in predictions}  # fmt: skip
    notes += [note for group in groups if group.name in units for note in counted_note(group, units[group.name])]
    panels = {metric: panels_of(metric, groups, predictions, units, notes) for metric in FIELDS}
    resampled = {
        id(panel): resampled_ratios(panel.means, panel.weights, samples, seed)
        for found in panels.values()
        for panel in found
        if any(first in panel.groups and second in panel.groups for first, second in pairs)
    }
    comparisons = []
    for first, second in pairs:
        for metric, found in panels.items():
            panel = next((panel for panel in found if first in panel.groups and second in panel.groups), None)
            if panel is not None:
                comparisons.append(compare_pair(panel, first, second, resampled[id(panel)]))
            else:
                notes += unpaired(first, second, metric, found, predictions)
    return corrected(comparisons), list(dict.fromkeys(notes))


def compare_pair(panel: Panel, first: Group, second: Group, resampled: NDArray[np.float64]) -> Comparison:
    """Compare two groups of a panel."""
    one, two = panel.groups.index(first), panel.groups.index(second)
    values, records = (panel.values[one], panel.values[two]), len(panel.weights)
    observed = ratio(panel.means, panel.weights)
    difference = float(observed[one] - observed[two])
    difference = 0.0 if abs(difference) <= RESOLUTION else difference
    over_records = paired_interval(resampled[:, one], resampled[:, two])
    runs = len(values[0]), len(values[1])
    found = Comparison(first, second, panel.metric, difference, over_records, runs, records)
    if min(runs) < ENOUGH_RUNS or records < 2:
        return found
    test = compare_runs(*values, panel.weights)
    return found if np.isnan(test.p) else replace(found, low=float(test.low), high=float(test.high), p=float(test.p))


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same with Holm's correction over the tests of each metric."""
    done = list(comparisons)
    for metric in FIELDS:
        tested = [(place, item.p) for place, item in enumerate(done) if item.metric == metric and item.p is not None]
        for (place, _), value in zip(tested, holm([p for _, p in tested]), strict=True):
            done[place] = replace(done[place], holm=value)
    return done


def read_all(groups: Sequence[Group]) -> tuple[dict[str, list[Predictions]], list[str]]:
    """Predictions of every run of the groups that have them all, by the group's name."""
    predictions, notes = {}, []
    for group in groups:
        found = []
        for run in group.runs:
            try:
                found.append(read_predictions(run.directory / PREDICTIONS))
            except BrokenRun as error:
                if run.measurements.keys() & FIELDS.keys():
                    notes.append(f"{group.title} is in no test: {error} in run {run.label}")
        if found and len(found) == len(group.runs):
            predictions[group.name] = found
    return predictions, notes


def panels_of(
    metric: str,
    groups: Sequence[Group],
    predictions: Mapping[str, list[Predictions]],
    units: Mapping[str, list[list[int]]],
    notes: list[str],
) -> list[Panel]:
    """Sort the groups that have a metric by the records that it was measured on."""
    members: defaultdict[object, list[Group]] = defaultdict(list)
    for group in groups:
        parts = predictions.get(group.name, [])
        if not parts or any(metric not in part.values for part in parts):
            continue
        keys = {(held_out(group, part), part.weights(metric).tobytes()) for part in parts}
        if len(keys) > 1:
            notes.append(f"{group.title} is in no test of {metric}: its runs were evaluated on different records")
        elif not all(np.isfinite(part.values[metric][part.weights(metric) > 0]).all() for part in parts):
            notes.append(f"{group.title} is in no test of {metric}: some of its values are not finite")
        elif parts[0].weights(metric).any():
            members[keys.pop()].append(group)
    return [panel_of(metric, together, predictions, units) for together in members.values()]


def panel_of(
    metric: str,
    groups: list[Group],
    predictions: Mapping[str, list[Predictions]],
    units: Mapping[str, list[list[int]]],
) -> Panel:
    """The values of groups that share their records; runs that count as one are averaged."""
    weights = predictions[groups[0].name][0].weights(metric)
    kept = weights > 0
    values = []
    for group in groups:
        runs = np.array([part.values[metric] for part in predictions[group.name]])[:, kept]
        values.append(np.array([runs[places].mean(axis=0) for places in units[group.name]]))
    return Panel(metric, groups, values, weights[kept])


def held_out(group: Group, part: Predictions) -> tuple[object, object]:
    """Which records a run was evaluated on: the file's bytes and the ids drawn from it."""
    evaluation = group.first.inputs.get("evaluation")
    return evaluation.get("sha256") if isinstance(evaluation, Mapping) else None, part.ids


def unpaired(
    first: Group, second: Group, metric: str, panels: Sequence[Panel], predictions: Mapping[str, list[Predictions]]
) -> list[str]:
    """Say why two groups that both have a metric cannot be paired; nothing if one lacks it or was noted before."""
    if not all(any(group in panel.groups for panel in panels) for group in (first, second)):
        return []
    title = f"{first.title} and {second.title} cannot be paired"
    if held_out(first, predictions[first.name][0]) != held_out(second, predictions[second.name][0]):
        return [f"{title}: they were evaluated on different held-out records"]
    if metric == "nll":
        return [f"{title} by nll: their tokenizers divide the responses differently, so a loss per token differs too"]
    return [f"{title} by {metric}: it was measured on different records"]
