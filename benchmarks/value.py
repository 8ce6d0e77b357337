"""``make value``: what groups of records teach, measured once, and how well every method tells it.

    make value ARGS="groups train collect"      hours: about 130 trainings; goes on where it was killed
    make value ARGS="train --part 0/2"          one of two processes that share the trainings
    make value ARGS="score candidates drops bins table"    each method's scores, and docs/results/value.md

`groups`, `collect`, `bins` and `table` write the small files ``groups.json``, ``gains.json``, ``bins.json`` and
``scores.parquet`` in ``benchmarks/value``, which are kept with the project: `train` goes on from the gains, and judging
a method needs neither trainings nor the other methods' scores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import materials
from trim_lightning.engine.response_loss import response_counts
from value_bins import measure_bins
from value_gains import Gains, collect, measure, restore, tokenized
from value_groups import Group, make_groups, pool_records, read_groups, write_groups, write_inputs
from value_lengths import lengths_table
from value_methods import kept, score_candidates, score_drops, score_methods
from value_page import write_page
from value_scores import of_groups, read_scores, renewed, write_scores

WORK = materials.ROOT / "build" / "value"
KEPT = Path(__file__).with_name("value")
GROUPS, GAINS, BINS, SCORES = (KEPT / name for name in ("groups.json", "gains.json", "bins.json", "scores.parquet"))
PAGE = materials.ROOT / "docs" / "results" / "value.md"


def groups() -> None:
    """Draw pool, targets, held-out records and groups."""
    write_inputs(WORK)
    records = tokenized(WORK / "pool.jsonl")
    texts = [f"{record['prompt']}\n{record['response']}" for record in pool_records()]
    found = make_groups(texts, response_counts(records), np.asarray(records.lengths))
    KEPT.mkdir(exist_ok=True)
    write_groups(found, GROUPS)
    kinds = [group.kind for group in found]
    tokens = [group.response_tokens for group in found]
    print(f"{kinds.count('cluster')} clusters, {kinds.count('mixture')} mixtures; response tokens {min(tokens):,} to "
          f"{max(tokens):,}; all tokens {sum(group.tokens for group in found):,}")  # fmt: skip


def judge(all_groups: Sequence[Group]) -> None:
    """Keep what the scores that there are say of the groups, and write the page of these and of those kept before."""
    found = renewed(read_scores(all_groups, SCORES), of_groups(kept(WORK), all_groups))
    write_scores(found, all_groups, SCORES)
    write_page(PAGE, Gains.read(GAINS), all_groups, read_scores(all_groups, SCORES), BINS)


def main() -> int:
    """Do the named steps, one after the other."""
    steps = ("groups", "train", "collect", "score", "candidates", "drops", "bins", "lengths", "table")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="+", choices=steps)
    parser.add_argument("--part", default="0/1", metavar="I/N", help="the part of the trainings that this process does")
    parser.add_argument("--methods", nargs="*", default=(), metavar="NAME", help="the methods that `score` runs")
    parser.add_argument("--untimed", action="store_true", help="something else runs beside: keep no seconds of scores")
    options = parser.parse_args()
    timed = not options.untimed
    part, parts = map(int, options.part.split("/"))
    for step in options.steps:
        if step == "groups":
            groups()
        elif step == "train":
            write_inputs(WORK)
            restore(WORK, read_groups(GROUPS), GAINS)
            measure(WORK, read_groups(GROUPS), part, parts)
        elif step == "collect":
            restore(WORK, read_groups(GROUPS), GAINS)
            collect(WORK, read_groups(GROUPS), GAINS)
        elif step == "score":
            score_methods(WORK, read_groups(GROUPS), options.methods, timed)
        elif step == "candidates":
            score_candidates(WORK, read_groups(GROUPS), timed)
        elif step == "drops":
            score_drops(WORK, read_groups(GROUPS), timed)
        elif step == "bins":
            measure_bins(WORK, BINS, part, parts)
        elif step == "lengths":
            print(lengths_table(kept(WORK), response_counts(tokenized(WORK / "pool.jsonl"))))
        else:
            judge(read_groups(GROUPS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
