"""Figures of whole commands: a sweep against one run, and the plan's estimate against the truth."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import materials
from materials import WORK

RECORDS = 500
LAYERS, POOLERS = (3, 6, 12), ("mean_max_coverage", "mean", "max", "quantile")
CHECKED = ((3, "mean"), (6, "quantile"), (12, "max"))  # cells that are also run by themselves


class SweepFolder:
    """A folder with a pool and a target file, and cold stores; the model is a converted copy."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(dir=WORK))
        lines = random.Random(0).sample(materials.pool_lines(), RECORDS + 10)
        (self.root / "pool.jsonl").write_text("".join(lines[:RECORDS]))
        (self.root / "targets.jsonl").write_text("".join(lines[RECORDS:]))
        self.model = materials.smollm2().directory
        data = Path(os.environ.get("TRIM_DATA_DIR", ""), "gsm8k.train.jsonl")
        self.targets = data if data.is_file() else self.root / "targets.jsonl"

    def run(self, store: str, output: str, *overrides: str, multirun: bool = False) -> float:
        """Run ``trim-select`` and return its wall time in seconds."""
        folder = "hydra.sweep.dir" if multirun else "hydra.run.dir"
        command = [
            str(Path(sys.executable).with_name("trim-select")), *(["-m"] if multirun else []), "model=hf",
            f"model.path={self.model}", "pool=jsonl", f"pool.path={self.root / 'pool.jsonl'}",
            "target=jsonl", f"target.path={self.targets}",
            f"paths.store_dir={self.root / store}", f"{folder}={self.root / output}", *overrides,
        ]  # fmt: skip
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        return time.perf_counter() - started

    def scores(self, output: str) -> bytes:
        """The scores of a run."""
        return (self.root / output / "scores.parquet").read_bytes()

    def planned(self, output: str) -> float:
        """Seconds that a plan estimated."""
        return float(json.loads((self.root / output / "plan" / "plan.json").read_text())["seconds"])


def axes(*more: str) -> list[str]:
    """The axes of the sweep."""
    return [f"saliency.num_layers={','.join(map(str, LAYERS))}", f"pooler={','.join(POOLERS)}", *more]


def sweep() -> dict[str, Any]:
    """(h) A cold sweep of 4 poolers x 3 layer counts over one cold run of 500 records, warm-up included."""
    folder = SweepFolder()
    try:
        one = folder.run("store-one", "one")
        cold = folder.run("store-sweep", "cold", *axes(), multirun=True)
        again = folder.run("store-sweep", "again", *axes(), multirun=True)
        more = folder.run("store-sweep", "more", *axes("fallback.penalty=0.5", "selection.count=10"), multirun=True)
        jobs = [(layers, pooler) for layers in LAYERS for pooler in POOLERS]
        equal = [folder.scores(f"cold/{job}") == folder.scores(f"again/{job}") for job in range(len(jobs))]
        for layers, pooler in CHECKED:
            name = f"alone-{layers}"
            folder.run(name, name, f"saliency.num_layers={layers}", f"pooler={pooler}")
            equal.append(folder.scores(name) == folder.scores(f"cold/{jobs.index((layers, pooler))}"))
        manifests = [json.loads((folder.root / f"more/{job}/manifest.json").read_text()) for job in range(len(jobs))]
        passes = sum(not manifest["stages"]["score"]["cached"] for manifest in manifests)
    finally:
        shutil.rmtree(folder.root)
    return {
        "ratio": cold / one, "wanted": "<= 1.3", "one_run": one, "cold_sweep": cold, "warm_sweep": again,
        "warm_over_cold": again / cold, "wanted_warm": "< 0.25", "new_penalty_and_budget": more,
        "passes_for_those": passes, "all_outputs_identical": all(equal), "pool": materials.pool_name(),
    }  # fmt: skip


def estimate() -> dict[str, Any]:
    """(i) Estimated seconds of `dry_run` over the true wall time, a run and a sweep of 500 records each."""
    folder = SweepFolder()
    try:
        measured = folder.run("store-one", "plan", "dry_run=true")
        one = folder.run("store-one", "one")
        folder.run("store-sweep", "plan-sweep", *axes("dry_run=true"), multirun=True)
        several = folder.run("store-sweep", "sweep", *axes(), multirun=True)
        plans = folder.planned("plan"), folder.planned("plan-sweep")
        detail = json.loads((folder.root / "plan/plan/plan.json").read_text())["stages"]
        stages = json.loads((folder.root / "one/manifest.json").read_text())["stages"]
    finally:
        shutil.rmtree(folder.root)
    return {
        "ratio": plans[0] / one, "wanted": "0.75 to 1.25", "estimated": plans[0], "took": one,
        "sweep_ratio": plans[1] / several, "sweep_estimated": plans[1], "sweep_took": several,
        "the_plan_itself_took": measured,
        "stages": {name: [round(line["seconds"], 1), round(stages[name]["seconds"], 1)]
                   for name, line in detail.items()},
    }  # fmt: skip
