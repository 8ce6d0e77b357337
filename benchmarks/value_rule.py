"""Whether a score is to be shipped: on the reporting tasks nowhere below the plain methods, and above their mean."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from rank_correlations import rank_correlations
from value_figures import SAMPLES
from value_groups import REPORTING, TASKS

Floats = NDArray[np.float64]
PLAIN = ("trim", "rds", "bm25")  # and random scores, whose correlation is 0
ASKED = (
    "trim_plus", "trim_plus: alignment", "trim_plus with density", "trim_plus: trim, density",
    "trim_plus: alignment, density",
)  # fmt: skip


def rule_table(means: Mapping[str, Floats], gains: Floats, samples: int = SAMPLES) -> str:
    """One line for each of `ASKED` that has scores: what it is ahead by, and where it is behind beyond the noise.

    Differences are of Spearman's correlation, the mean over the reporting tasks, with 95 % intervals that resample
    groups and tasks; ``behind at`` names the tasks at which a plain method is ahead in 97.5 % of samples of groups.

    Args:
        means: ``[groups, tasks]`` scores by method.
        gains: ``[groups, tasks]``.
        samples: Draws behind an interval.
    """
    names = [name for name in (*ASKED, *PLAIN) if name in means]
    places = [TASKS.index(task) for task in REPORTING]
    stack = np.stack([means[name][:, places] for name in names], axis=1)
    own = gains[:, places]
    generator = np.random.default_rng(0)
    drawn = np.stack([
        rank_correlations(stack[rows], own[rows])
        for rows in generator.integers(len(own), size=(samples, len(own)))
    ])  # [samples, methods, tasks]  # fmt: skip
    tasks = generator.integers(len(places), size=(samples, len(places)))
    resampled = np.take_along_axis(drawn, tasks[:, None], axis=2).mean(2)
    whole = rank_correlations(stack, own)
    rivals = [names.index(name) for name in PLAIN]
    # random scores, at the end, have a correlation of 0
    plain, plain_drawn = np.append(whole[rivals].mean(1), 0.0), np.vstack([resampled[:, rivals].T, np.zeros(samples)])
    single = np.concatenate([drawn[:, rivals], np.zeros((samples, 1, len(places)))], axis=1)
    lines = []
    for place, name in enumerate(names):
        if name not in ASKED:
            continue
        value, draws = float(whole[place].mean()), resampled[:, place]
        differences = [interval(value - plain[other], draws - plain_drawn[other]) for other in range(len(plain))]
        differences.append(interval(value - plain.mean(), draws - plain_drawn.mean(0)))
        behind = np.percentile(drawn[:, [place]] - single, 97.5, axis=0) < 0  # [rivals, tasks]
        told = [
            f"{task} ({rival})"
            for number, task in enumerate(REPORTING)
            for other, rival in enumerate((*PLAIN, "random"))
            if behind[other, number]
        ]
        lines.append([name, f"{value:+.2f}", *differences, ", ".join(told) or "none"])
    less = [f"less {name}" for name in (*PLAIN, "random", "their mean")]
    headers = ["method", "reporting tasks", *less, "behind at"]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def interval(value: float, draws: Floats) -> str:
    """A difference with its 95 % interval."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})"
