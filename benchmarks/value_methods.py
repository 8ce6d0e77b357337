"""Scores of the instrument's pool: of the package's methods by the command, of candidate formulas by their pass."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

import materials
from trim_lightning.models.load import load_model
from trim_lightning.models.precision import resolve_dtype
from value_candidates import Pass, named
from value_drops import loss_drops
from value_features import pass_seconds, response_tokens
from value_gains import in_drawn_order, tokenized
from value_groups import RECORDS, TARGETS, TASKS, Group

DROPS = ("loss drop, nats", "loss drop, share")  # what `loss_drops` gives, in its order
REFERENCE = "trim"  # what every other line is compared with
SAMPLED_REFERENCE = "trim, sampled records"  # beside what only scores those
ONE_PASS = "one pass: "  # begins the names of candidate formulas
# files of pool records: those of any group, and some of each of the groups first trained on
GROUPED, SAMPLE = "grouped", "sample"
SAMPLED = 10  # records of a group that a costly method scores; their mean stands for the group's
FEW_GROUPS = 64  # of the drawn order; the table leaves a costly method out where more were trained on

# one sweep whose jobs share their forward pass: METHODS find what it left in the store
TOGETHER = "method=trim warmup=none saliency=trim,uniform,error scope=all,response"
# name -> overrides; what scores the sampled records alone is in COSTLY
METHODS: Mapping[str, str] = {
    "trim": "method=trim warmup=none",
    "trim, uniform saliency": "method=trim warmup=none saliency=uniform",
    "trim, error saliency": "method=trim warmup=none saliency=error",
    "trim, responses, mean": "method=trim warmup=none scope=response pooler=mean",
    "trim, responses, mean, uniform": "method=trim warmup=none scope=response pooler=mean saliency=uniform",
    "trim, responses, mean, error": "method=trim warmup=none scope=response pooler=mean saliency=error",
    "trim_plus": "method=trim_plus warmup=none",
    "trim_plus, length exponent 0.5": "method=trim_plus warmup=none method.length_exponent=0.5",
    "trim_plus: alignment": "method=trim_plus warmup=none method.trim_weight=0",
    "trim_plus with density": "method=trim_plus warmup=none method.density_weight=1",
    "trim_plus: trim, density": "method=trim_plus warmup=none method.alignment_weight=0 method.density_weight=1",
    "trim_plus: alignment, density": "method=trim_plus warmup=none method.trim_weight=0 method.density_weight=1",
    "rds": "method=rds warmup=none",
    "rds, mean": "method=rds warmup=none method.aggregate=mean",
    "bm25": "method=bm25 warmup=none",
    "dsir": "method=dsir warmup=none",
    "longest": "method=longest warmup=none",
}
COSTLY: Mapping[str, str] = {
    "perplexity": "method=perplexity warmup=none",
    # the warm-up has 190 records, about 5 % of the whole pool as in the original
    "trim, warmed up": "method=trim warmup=lora warmup.fraction=0.3125",
    "ifd": "method=ifd warmup=lora warmup.fraction=0.3125",
    "less": "method=less warmup=lora warmup.fraction=0.3125",
    "less, last 2 blocks": "method=less warmup=lora warmup.fraction=0.3125 method.last_layers=2",
}


def score_drops(folder: Path, groups: Sequence[Group], timed: bool = True) -> None:
    """Run the candidate that has a pass for each task, on the sampled records; ``timed`` as in `score_methods`."""
    if all(scores_file(folder, name).exists() for name in DROPS):
        return
    rows = write_part(folder, SAMPLE, sampled(few(groups), SAMPLED))
    records = tokenized(folder / f"{SAMPLE}.jsonl")
    for name, (_, drop, seconds) in zip(DROPS, loss_drops(records, tokenized(folder / "targets.jsonl")), strict=True):
        scores = np.full((len(TASKS), RECORDS), np.nan)
        scores[:, rows] = drop
        keep(
            scores_file(folder, name),
            scores,
            Cost(seconds if timed else math.nan, 1.0 + len(TASKS), int(records.lengths.sum())),
            "",
        )


@dataclass(frozen=True)
class Cost:
    """What scores of some records took.

    Attributes:
        seconds: Of the stages that run a model, or search; NaN where something else ran beside them.
        passes: Tokens that went through the model, by tokens of the records; a gradient counts like a forward pass.
        tokens: Of the records.
    """

    seconds: float
    passes: float
    tokens: int

    @property
    def each(self) -> float:
        """Seconds a token."""
        return self.seconds / self.tokens


def score_methods(folder: Path, groups: Sequence[Group], names: Sequence[str] = (), timed: bool = True) -> None:
    """Run the package's methods that have no scores yet; each scores all tasks in one run, as target groups.

    Args:
        folder: With inputs and trainings; scores go to ``scores/`` in it.
        groups: All of the instrument's.
        names: Of the methods; all without any.
        timed: Keep the seconds; to be false where something else runs beside.
    """
    rows = {
        GROUPED: write_part(folder, GROUPED, grouped(groups)),
        SAMPLE: write_part(folder, SAMPLE, sampled(few(groups), SAMPLED)),
    }
    missing = [
        name for name in {**METHODS, **COSTLY}
        if not scores_file(folder, name).exists() and (not names or name in names)
    ]  # fmt: skip
    if "trim" in missing:
        select(folder, TOGETHER, GROUPED, "-m", f"hydra.sweep.dir={folder / 'selections' / 'together'}")
    for name in missing:
        part = SAMPLE if name in COSTLY else GROUPED
        overrides, file = {**METHODS, **COSTLY}[name], scores_file(folder, name)
        output = folder / "selections" / file.stem
        select(folder, overrides, part, f"hydra.run.dir={output}")
        keep(file, read_scores(output, rows[part]), cost_of(output, timed), f"trim-select {overrides}")


def select(folder: Path, overrides: str, part: str, *more: str) -> None:
    """One ``trim-select`` over a part of the pool, with all tasks' targets."""
    command = [
        str(Path(sys.executable).with_name("trim-select")), *more, *overrides.split(), "pool=jsonl",
        f"pool.path={folder / part}.jsonl", "target=jsonl", f"target.path={folder / 'targets.jsonl'}",
        "target.group_field=task", f"target.num_examples={TARGETS}", "logger=none",
        f"paths.store_dir={folder / 'store'}",
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def grouped(groups: Sequence[Group]) -> NDArray[np.int64]:
    """Places in the pool of the records of any group, ascending: no other record's score is ever looked at."""
    rows: NDArray[np.int64] = np.unique(np.concatenate([group.rows for group in groups]))
    return rows


def few(groups: Sequence[Group]) -> list[Group]:
    """The groups that costly methods score some records of, in the order of all."""
    first = {group.name for group in in_drawn_order(groups)[:FEW_GROUPS]}
    return [group for group in groups if group.name in first]


def sampled(groups: Sequence[Group], number: int) -> NDArray[np.int64]:
    """Places in the pool of the records that costly methods score, ascending."""
    generator = np.random.default_rng(20)
    return np.unique(
        np.concatenate([
            generator.choice(group.rows, min(number, len(group.rows)), replace=False) for group in groups
        ])
    )  # fmt: skip


def write_part(folder: Path, part: str, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Write those records of the pool as a file of their own; returns the rows."""
    lines = (folder / "pool.jsonl").read_text(encoding="utf-8").split("\n")
    text = "".join(f"{lines[row]}\n" for row in rows)
    path = folder / f"{part}.jsonl"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        shutil.rmtree(path.with_suffix(".tokens"), ignore_errors=True)  # of other records
        path.write_text(text, encoding="utf-8")
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


def score_candidates(folder: Path, groups: Sequence[Group], timed: bool = True) -> None:
    """Run the pass if it is missing, then every candidate formula that has no scores yet; ``timed`` as above."""
    rows = write_part(folder, GROUPED, grouped(groups))
    pool = response_tokens(tokenized(folder / f"{GROUPED}.jsonl"), folder / "features" / GROUPED, attention=False)
    targets = response_tokens(tokenized(folder / "targets.jsonl"), folder / "features" / "targets", attention=True)
    model = load_model(materials.smollm2(), resolve_dtype("float32"))
    embedding: Any = model.get_input_embeddings()
    candidates = Pass(pool, embedding.weight.detach())
    own = [targets.take(np.arange(place, place + TARGETS)) for place in range(0, len(targets), TARGETS)]
    seconds = pass_seconds(folder / "features" / GROUPED)
    tokens = int(tokenized(folder / f"{GROUPED}.jsonl").lengths.sum())
    for name, formula in named():
        file = scores_file(folder, f"{ONE_PASS}{name}")
        if not file.exists():
            started = time.perf_counter()
            scores = np.full((len(TASKS), RECORDS), np.nan)
            scores[:, rows] = [formula(candidates, part) for part in own]
            spent = time.perf_counter() - started
            keep(file, scores, Cost(seconds + spent if timed else math.nan, 1.0, tokens), "")
            print(f"{name}: {spent:.1f} s", flush=True)


def cost_of(output: Path, timed: bool) -> Cost:
    """What the stages of a selection took that run a model or search, whichever job ran them; reading is left out."""
    stages: Mapping[str, Any] = json.loads((output / "manifest.json").read_text())["stages"]
    tokens = stages["tokenize"]["tokens"]
    spent = [stage for name, stage in stages.items() if name not in ("tokenize", "select")]
    fed = sum(stage["tokens"] for stage in spent)
    return Cost(sum(stage["seconds"] for stage in spent) if timed else math.nan, fed / tokens, tokens)


def scores_file(folder: Path, name: str) -> Path:
    """Where a method's scores are kept."""
    safe = "".join(letter if letter.isalnum() else "_" for letter in name)
    return folder / "scores" / f"{safe}.npz"


def keep(file: Path, scores: NDArray[np.float64], cost: Cost, command: str) -> None:
    """Write scores, and what they cost."""
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_suffix(".part.npz")
    np.savez(temporary, scores=scores, facts=np.array(json.dumps({**asdict(cost), "command": command})))
    temporary.replace(file)


@dataclass(frozen=True)
class Scored:
    """A method's scores with their price.

    Attributes:
        scores: ``[tasks, records]``; NaN for records that were not scored.
        cost: What they took.
        command: How a reader gets them; empty for a candidate formula.
    """

    scores: NDArray[np.float64]
    cost: Cost
    command: str


def kept(folder: Path) -> dict[str, Scored]:
    """By name, all methods and candidates that have scores."""
    names = [*METHODS, *COSTLY, *DROPS, *(f"{ONE_PASS}{name}" for name, _ in named())]
    found = {}
    for name in names:
        if scores_file(folder, name).exists():
            with np.load(scores_file(folder, name)) as content:
                facts = json.loads(str(content["facts"]))
                command = facts.pop("command")
                found[name] = Scored(content["scores"], Cost(**facts), command)
    if REFERENCE in found and (costly := [name for name in (*COSTLY, *DROPS) if name in found]):
        seen = np.isfinite(found[costly[0]].scores)
        found[SAMPLED_REFERENCE] = replace(found[REFERENCE], scores=np.where(seen, found[REFERENCE].scores, np.nan))
    return found
