"""Is one group better than another on the same held-out records, and at the same budget?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from trim_lightning.compare.groups import BASELINE, Group, differing_keys
from trim_lightning.compare.predictions import FIELDS, Predictions, read_predictions
from trim_lightning.compare.statistics import Difference, paired_difference, ratio, resampled_ratios
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
        records: Held-out records in the test.
    """

    first: Group
    second: Group
    metric: str
    difference: Difference
    records: int


@dataclass(frozen=True)
class Panel:
    """Groups measured by one metric on the same records, so that any two of them can be paired.

    Attributes:
        metric: Name of the metric.
        groups: The groups.
        values: ``[groups, records]``, averaged over seeds.
        weights: ``[records]``, positive.
    """

    metric: str
    groups: list[Group]
    values: NDArray[np.float64]
    weights: NDArray[np.float64]


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
        samples: Bootstrap resamples.
        seed: Of the resampling.

    Returns:
        The comparisons, pair by pair, and notes on what could not be paired.
    """
    predictions, notes = read_all(groups)
    panels = {metric: panels_of(metric, groups, predictions, notes) for metric in FIELDS}
    resampled = {
        id(panel): resampled_ratios(panel.values, panel.weights, samples, seed)
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
    return comparisons, list(dict.fromkeys(notes))


def compare_pair(panel: Panel, first: Group, second: Group, resampled: NDArray[np.float64]) -> Comparison:
    """Compare two groups of a panel."""
    one, two = panel.groups.index(first), panel.groups.index(second)
    observed = ratio(panel.values, panel.weights)
    difference = paired_difference(resampled[:, one], resampled[:, two], float(observed[one] - observed[two]))
    return Comparison(first, second, panel.metric, difference, len(panel.weights))


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
                    notes.append(f"{group.title} is in no paired test: {error} in run {run.label}")
        if found and len(found) == len(group.runs):
            predictions[group.name] = found
    return predictions, notes


def panels_of(
    metric: str, groups: Sequence[Group], predictions: Mapping[str, list[Predictions]], notes: list[str]
) -> list[Panel]:
    """Sort the groups that have a metric by the records that it was measured on."""
    members: defaultdict[object, list[Group]] = defaultdict(list)
    for group in groups:
        parts = predictions.get(group.name, [])
        if not parts or any(metric not in part.values for part in parts):
            continue
        keys = {(held_out(group, part), part.weights(metric).tobytes()) for part in parts}
        if len(keys) > 1:
            notes.append(
                f"{group.title} is in no paired test of {metric}: its runs were evaluated on different records"
            )
        elif not all(np.isfinite(part.values[metric][part.weights(metric) > 0]).all() for part in parts):
            notes.append(f"{group.title} is in no paired test of {metric}: some of its values are not finite")
        elif parts[0].weights(metric).any():
            members[keys.pop()].append(group)
    return [panel_of(metric, together, predictions) for together in members.values()]


def panel_of(metric: str, groups: list[Group], predictions: Mapping[str, list[Predictions]]) -> Panel:
    """The values of groups that share their records."""
    weights = predictions[groups[0].name][0].weights(metric)
    kept = weights > 0
    means = [np.mean([part.values[metric] for part in predictions[group.name]], axis=0) for group in groups]
    return Panel(metric, groups, np.array(means)[:, kept], weights[kept])


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
