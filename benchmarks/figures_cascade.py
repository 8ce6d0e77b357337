"""`scoring=cascade` over the scorer's first layers against the plain pass: time, recall, and whether its bound holds.

``TRIM_BENCH_RECORDS`` and ``TRIM_BENCH_LAYERS`` set the pool's size and the depth; ``TRIM_DATA_DIR`` has all the data.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import materials
from materials import WORK
from trim_lightning.methods.cascade import SAMPLE_LEAST, SAMPLE_SHARE
from trim_lightning.pipeline.select import Selection, select
from trim_lightning.selection.recall import Guide
from trim_lightning.settings.compose import composed, to_settings
from trim_lightning.settings.schema import SelectSettings

TASKS, TARGETS, SHARE, RECALL, DRAWS = ("gsm8k", "commonsense_qa", "bbh"), 10, 0.05, 0.98, 100


def cascade() -> dict[str, Any]:
    """(j) Seconds of the plain pass over those of a cascade, the least of three target sets; recall of the top 5 %."""
    number, layers = (
        int(os.environ.get(f"TRIM_BENCH_{name}", least)) for name, least in (("RECORDS", 4000), ("LAYERS", 4))
    )
    if not os.environ.get("TRIM_DATA_DIR"):
        raise RuntimeError("TRIM_DATA_DIR must name the folder with pool.jsonl.gz and the tasks' targets")
    folder = Path(tempfile.mkdtemp(dir=WORK))
    try:
        lines = random.Random(0).sample(materials.pool_lines(), number)
        (folder / "pool.jsonl").write_text("".join(lines), encoding="utf-8")
        found = {task: compare(folder, task, layers) for task in TASKS}
    finally:
        shutil.rmtree(folder)
    return {
        "ratio": min(each["ratio"] for each in found.values()), "wanted": ">= 1.6",
        "recall": min(each["recall"] for each in found.values()), "wanted_recall": ">= 0.97",
        "bound_held_of_100": min(each["bound_held"] for each in found.values()), "wanted_held": ">= 95",
        "records": number, "layers": layers, "tasks": found, "pool": materials.pool_name(),
    }  # fmt: skip


def compare(folder: Path, task: str, layers: int) -> dict[str, Any]:
    """One target set: both ways from cold stores, then 100 other samples of the two scores."""

    def run(name: str, *overrides: str) -> Selection:
        command = [
            "model=hf", f"model.path={materials.smollm2().directory}", "warmup=none", "logger=none",
            "pool=jsonl", f"pool.path={folder / 'pool.jsonl'}", f"selection.fraction={SHARE}", "report.enabled=false",
            "target=jsonl", f"target.path={Path(os.environ['TRIM_DATA_DIR'], f'{task}.train.jsonl')}",
            f"target.num_examples={TARGETS}", f"paths.store_dir={folder / f'{task}-{name}'}",
            f"paths.output_dir={folder / f'{task}-{name}-out'}", *overrides,
        ]  # fmt: skip
        return select(to_settings(composed("select", command), SelectSettings))

    plain = run("plain")
    cascaded = run("cascade", "scoring=cascade", f"scoring.cascade.layers={layers}", f"scoring.cascade.recall={RECALL}")
    seconds = [sum(each.manifest["stages"][name]["seconds"] for name in ("cascade", "score")
                   if name in each.manifest["stages"]) for each in (plain, cascaded)]  # fmt: skip
    counts = cascaded.manifest["counts"]
    top = plain.order[: counts["wanted"]]
    recall = float(np.isin(top, cascaded.order[: len(top)]).mean())
    return {
        "ratio": seconds[0] / seconds[1], "recall": recall, "plain_seconds": seconds[0], "cascade_seconds": seconds[1],
        **{name: counts[name] for name in ("scored_in_full", "expected_recall", "recall_bound")},
        **resampled(plain, cascaded, len(top)),
    }  # fmt: skip


def resampled(plain: Selection, cascaded: Selection, top: int) -> dict[str, float]:
    """How often the bound held in samples of other seeds, and what recall they would have led to."""
    full, cheap = plain.scores.score, cascaded.scores.cheap_score
    if cheap is None:
        return {"bound_held": 0, "mean_recall": float("nan")}
    rows = np.flatnonzero(~np.isnan(full))
    order = rows[np.argsort(-cheap[rows], kind="stable")]
    ranks = np.zeros(len(full), dtype=np.int64)
    ranks[order] = np.arange(1, len(order) + 1)
    best, draw = rows[np.argsort(-full[rows], kind="stable")][:top], np.random.default_rng(1)
    size = max(SAMPLE_LEAST, int(np.ceil(SAMPLE_SHARE * len(rows))))
    held, recalls, kept_shares = 0, [], []
    for _ in range(DRAWS):
        sample = draw.choice(rows, min(size, len(rows)), replace=False)
        sample = sample[np.argsort(-full[sample], kind="stable")]
        guide = Guide(ranks[sample], len(rows), top)
        kept = guide.kept_for(RECALL)
        inside = (ranks[best] <= kept) | np.isin(best, sample)
        held += bool(inside.mean() >= guide.bound(kept))
        recalls.append(float(inside.mean()))
        kept_shares.append(kept / len(rows))
    return {
        "bound_held": held, "mean_recall": float(np.mean(recalls)), "least_recall": min(recalls),
        "mean_kept": float(np.mean(kept_shares)),
    }  # fmt: skip
