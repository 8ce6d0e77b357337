"""Scores of the instrument's pool: of the package's methods by the command, of candidate formulas by their pass."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

import materials
from trim_lightning.models.load import load_model
from trim_lightning.models.precision import resolve_dtype
from value_candidates import Pass, named
from value_features import response_tokens
from value_gains import tokenized
from value_groups import RECORDS, TARGETS, TASKS, Group

SAMPLED = 20  # records of a group that a costly method scores; the mean of so many stands for the group's

# name -> overrides; what scores the sampled records alone is in COSTLY
METHODS: Mapping[str, str] = {
    "trim": "method=trim warmup=none",
    "trim, warmed up": "method=trim warmup=lora",
    "trim, uniform saliency": "method=trim warmup=none saliency=uniform",
    "trim, responses, mean": "method=trim warmup=none scope=response pooler=mean",
    "rds": "method=rds warmup=none",
    "rds, mean": "method=rds warmup=none method.aggregate=mean",
    "bm25": "method=bm25 warmup=none",
    "dsir": "method=dsir warmup=none",
    "perplexity": "method=perplexity warmup=none",
    "ifd": "method=ifd warmup=lora",
    "longest": "method=longest warmup=none",
}
COSTLY: Mapping[str, str] = {
    "less": "method=less warmup=lora method.num_checkpoints=2",
}


def score_methods(folder: Path, groups: Sequence[Group], names: Sequence[str] = ()) -> None:
    """Run the package's methods that have no scores yet; each scores all tasks in one run, as target groups."""
    sample = write_sample(folder, groups)
    for name, overrides in {**METHODS, **COSTLY}.items():
        file = scores_file(folder, name)
        if file.exists() or (names and name not in names):
            continue
        rows = sample if name in COSTLY else np.arange(RECORDS)
        pool = folder / ("sample.jsonl" if name in COSTLY else "pool.jsonl")
        output = folder / "selections" / file.stem
        command = [
            str(Path(sys.executable).with_name("trim-select")), *overrides.split(), "pool=jsonl", f"pool.path={pool}",
            "target=jsonl", f"target.path={folder / 'targets.jsonl'}", "target.group_field=task",
            f"target.num_examples={TARGETS}", "logger=none", f"paths.store_dir={folder / 'store'}",
            f"hydra.run.dir={output}",
        ]  # fmt: skip
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        keep(file, read_scores(output, rows), time.perf_counter() - started, command_of(overrides))


def write_sample(folder: Path, groups: Sequence[Group]) -> NDArray[np.int64]:
    """Write the records that costly methods score; returns their places in the pool, ascending."""
    generator = np.random.default_rng(20)
    chosen = [generator.choice(group.rows, min(SAMPLED, len(group.rows)), replace=False) for group in groups]
    rows: NDArray[np.int64] = np.unique(np.concatenate(chosen))
    lines = (folder / "pool.jsonl").read_text(encoding="utf-8").split("\n")
    (folder / "sample.jsonl").write_text("".join(f"{lines[row]}\n" for row in rows), encoding="utf-8")
    return rows


def read_scores(output: Path, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """``[tasks, records]`` of a selection; a method without targets has one score for all tasks."""
    table = pq.read_table(output / "scores.parquet")
    places = table["row"].to_numpy()
    scores = np.full((len(TASKS), RECORDS), np.nan)
    for number, task in enumerate(TASKS):
        column = f"score/{task}" if f"score/{task}" in table.column_names else "score"
        scores[number, rows[places]] = table[column].to_numpy()
    return scores


def score_candidates(folder: Path) -> None:
    """Run the pass if it is missing, then every candidate formula that has no scores yet."""
    pool = response_tokens(tokenized(folder / "pool.jsonl"), folder / "features" / "pool", attention=False)
    targets = response_tokens(tokenized(folder / "targets.jsonl"), folder / "features" / "targets", attention=True)
    model = load_model(materials.smollm2(), resolve_dtype("float32"))
    embedding: Any = model.get_input_embeddings()
    candidates = Pass(pool, embedding.weight.detach())
    own = [targets.take(np.arange(place, place + TARGETS)) for place in range(0, len(targets), TARGETS)]
    for name, formula in named():
        file = scores_file(folder, f"one pass: {name}")
        if not file.exists():
            started = time.perf_counter()
            scores = np.stack([formula(candidates, part) for part in own])
            keep(file, scores, time.perf_counter() - started, "")


def command_of(overrides: str) -> str:
    """A method's run as a reader types it."""
    return f"trim-select {overrides}"


def scores_file(folder: Path, name: str) -> Path:
    """Where a method's scores are kept."""
    safe = "".join(letter if letter.isalnum() else "_" for letter in name)
    return folder / "scores" / f"{safe}.npz"


def keep(file: Path, scores: NDArray[np.float64], seconds: float, command: str) -> None:
    """Write scores, and what they cost."""
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_suffix(".part.npz")
    np.savez(temporary, scores=scores, facts=np.array(json.dumps({"seconds": seconds, "command": command})))
    temporary.replace(file)


def kept(folder: Path) -> dict[str, NDArray[np.float64]]:
    """``[tasks, records]`` scores by name, of all methods and candidates that there are."""
    names = [*METHODS, *COSTLY, *(f"one pass: {name}" for name, _ in named())]
    return {name: np.load(scores_file(folder, name))["scores"] for name in names if scores_file(folder, name).exists()}
