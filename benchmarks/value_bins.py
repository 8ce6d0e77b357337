"""The quantile test: a pool cut into ten bins by a method's score, one training each; do the bins order the gains?

As in "A Critical Look at Targeted Instruction Selection" (arXiv 2602.14696), at equal response tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from tabulate import tabulate

from trim_lightning.engine.response_loss import response_counts
from trim_lightning.files.atomic import write_text
from value_gains import gain_of, tokenized, train_groups
from value_groups import LONGEST, TASKS, Group, fill, made
from value_methods import kept

BINS = 10
METHODS = ("trim_plus", "trim")  # the best by the groups, and what it is built on


def cut(
    scores: NDArray[np.float64], response_tokens: NDArray[np.int64], tokens: NDArray[np.int64], name: str
) -> list[Group]:
    """Ten groups of equal response tokens, each drawn from its tenth of the scored records, the lowest tenth first.

    Args:
        scores: ``[records]``, NaN for those that were not scored.
        response_tokens: ``[records]``.
        tokens: ``[records]``, prompt and template included; long records are left out, as they are of all groups.
        name: Begins the groups' names.
    """
    usable = np.flatnonzero(np.isfinite(scores) & (tokens <= LONGEST) & (response_tokens > 0))
    order = usable[np.argsort(scores[usable], kind="stable")]
    generator = np.random.default_rng(20)
    groups = []
    for place, members in enumerate(np.array_split(order, BINS)):
        found = fill(generator.permutation(members), response_tokens, tokens)
        if found:  # a tenth whose responses are too short for a training of the usual size has none
            groups.append(made(f"{name}-{place}", "bin", found[0], response_tokens, tokens))
    return groups


def measure_bins(folder: Path, path: Path, part: int, parts: int) -> None:
    """Train on the bins of every task's scores, one task after the other, and write down what there is.

    Args:
        folder: With inputs, trainings and scores.
        path: The small file that is kept with the project.
        part: Which part of the missing trainings this process takes, from 0.
        parts: How many there are.
    """
    pool = tokenized(folder / "pool.jsonl")
    counts, lengths = response_counts(pool), np.asarray(pool.lengths)
    scored = kept(folder)
    found: dict[str, dict[str, list[float | None]]] = {}
    for task, name in enumerate(TASKS):
        for method in METHODS:
            groups = cut(scored[method].scores[task], counts, lengths, f"bin-{method}-{name}")
            train_groups(folder, [(group, 0) for group in groups][part::parts])
            found.setdefault(method, {})[name] = gains_of(folder, groups, name)
            write_text(json.dumps({"bins": "lowest tenth first, nats per response token", **found}, indent=1), path)


def gains_of(folder: Path, groups: Sequence[Group], task: str) -> list[float | None]:
    """What each tenth teaches the task; None for one without a training."""
    gains: list[float | None] = [None] * BINS
    for group in groups:
        found = gain_of(folder, group, 0)
        if found is not None:
            gains[int(group.name.rsplit("-", 1)[1])] = found[task]
    return gains


def bins_table(path: Path) -> str:
    """One line for each method and task: the gain of each tenth, and how well the tenths order them."""
    content = json.loads(path.read_text())
    rows = []
    for method in METHODS:
        for task, gains in content.get(method, {}).items():
            known = [(place, gain) for place, gain in enumerate(gains) if gain is not None]
            if len(known) < BINS // 2:
                continue
            rows.append([method, task, f"{spearmanr(*zip(*known, strict=True)).statistic:+.2f}",
                         *("" if gain is None else f"{gain:+.3f}" for gain in gains)])  # fmt: skip
    headers = ["method", "task", "Spearman", "lowest", *("" for _ in range(BINS - 2)), "highest"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
