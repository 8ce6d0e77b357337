"""``make removals``: how well scores tell what removing records from a training does, by Bergson's own test (LDS).

    make removals BERGSON=~/bergson               all of it, about half an hour of one core
    make removals ARGS="score table"              other scores against the trainings that are there

Bergson's facts, its trainings and its ``validate`` decide; only the scores are ours, by ``trim-export --format
bergson``. Runs in an environment of its own, which `make` builds; BERGSON is a checkout of
github.com/EleutherAI/bergson, whose folder ``data`` has the names and templates that its package lacks. Work is kept in
``build/removals``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from tabulate import tabulate

from rank_correlations import spearman
from removals_materials import ASKED, BASE, PEOPLE, POOL, TARGETS, prepare

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "removals"
PAGE = ROOT / "docs" / "results" / "removals.md"
MARK = "<!-- tables: make removals ARGS=table -->"
SAMPLES = 1_000
TRAINING = {"batch_size": 64, "num_epochs": 3, "lr_schedule": {"lr": 1e-3}}
# trainings: folder -> removals, share of the pool that each removes, seed
BANKS = {"half-42": (60, 0.5, 42), "half-43": (60, 0.5, 43), "twentieth-44": (55, 0.05, 44)}
KINDS = {"half removed": ("half-42", "half-43"), "5 % removed": ("twentieth-44",)}
TRAINED = "runs/half-42/retrained/base"  # the model trained on the whole pool
TRIM = "method=trim saliency.num_layers=2 warmup=none"  # the model has four layers
PLUS = "method=trim_plus saliency.num_layers=2 warmup=none"
SCORES: Mapping[str, str] = {
    "trim": TRIM,
    "trim, warmed up": "method=trim saliency.num_layers=2",
    "trim, next-token classes": f"{TRIM} fingerprint=next",
    "trim, responses, mean": f"{TRIM} scope=response pooler=mean",
    "trim, responses, mean, error both": f"{TRIM} scope=response pooler=mean saliency=error pooler.token_weight=error",
    "trim_plus": PLUS,
    "trim_plus: alignment": f"{PLUS} method.trim_weight=0",
    "trim_plus with density": f"{PLUS} method.density_weight=1",
    "trim_plus: trim, density": f"{PLUS} method.alignment_weight=0 method.density_weight=1",
    "rds": "method=rds target.aggregate=round_robin",
    "bm25": "method=bm25",
    "less": "method=less",
    "less, warmed up on all": "method=less warmup.fraction=1",
    "trim, at the trained model": f"{TRIM} model.path={TRAINED}",
    "trim_plus, at the trained model": f"{PLUS} model.path={TRAINED}",
    "less, at the trained model": f"method=less warmup.fraction=1 model.path={TRAINED}",
}
# a fact has 7 to 10 statements, so that ten borrows from the truth
TEN, BEST = 10, ": ten best only"
ORDERED = ("trim", "trim_plus", "rds", "bm25", "less", "less, at the trained model", "Bergson, cosine of gradients")
OWN = {  # of Bergson itself, at the trained model
    "Bergson, cosine of gradients": {"unit_normalize": True},
    "Bergson, inner product of gradients": {"unit_normalize": False},
}


def folder_of(name: str) -> Path:
    """Where a score's files are, in Bergson's layout."""
    safe = "".join(letter if letter.isalnum() else "_" for letter in name)
    return Path("scores") / safe


def train(bergson: Path) -> None:
    """Train on what each removal leaves, in the banks that are not there yet."""
    for name, (count, share, seed) in BANKS.items():
        if (WORK / "runs" / name / "summary.csv").exists():
            continue
        same = [other for other in KINDS["half removed"] if share == 0.5 and other != name]
        manifest = [WORK / "runs" / other / "subsets.json" for other in same]
        method: dict[str, Any] = {"kind": "lds", "subsets": "retrain", "count": count, "fraction": share}
        if manifest and manifest[0].exists():  # the same removals with another seed
            method["manifest"] = str(manifest[0].relative_to(WORK))
        step = {
            **step_of(f"runs/{name}", folder_of("random, seed 0"), method), **TRAINING, "seed": seed,
            "save_mode": "final", "save_models": True, "save_optimizer_state": "last",
        }  # fmt: skip
        run_steps(bergson, f"train-{name}", [{"validate": step}])


def score(bergson: Path, trim: Path) -> None:
    """Make the scores that are not there yet: TRIM Lightning's, Bergson's own, controls."""
    controls()
    for name, overrides in SCORES.items():
        target = WORK / folder_of(name)
        if target.exists():
            continue
        run = WORK / "selections" / target.name
        command = [
            str(trim / "trim-select"), "pool=jsonl", f"pool.path={POOL}", "target=jsonl", f"target.path={TARGETS}",
            "target.num_examples=null", "target.single_groups=true", "target.aggregate=mean", "model=hf",
            f"model.path={BASE}", "model.dtype=float32", "trainer=cpu", "logger=none", "report.enabled=false",
            "paths.store_dir=store", f"hydra.run.dir={run}", *overrides.split(),
        ]  # fmt: skip
        subprocess.run(command, cwd=WORK, check=True, stdout=subprocess.DEVNULL)
        exporting = [str(trim / "trim-export"), str(run), "--format", "bergson"]
        subprocess.run(exporting, cwd=WORK, check=True, stdout=subprocess.DEVNULL)
        shutil.copytree(run / "export" / "bergson", target)
    for name, how in OWN.items():
        target = folder_of(name)
        if not (WORK / target / "scores.bin").exists():
            asked = f"runs/questions-{target.name}"
            steps = [
                {"build": {"index_cfg": {"run_path": asked, "model": TRAINED, "overwrite": True, "data": questions()},
                           "preprocess_cfg": how}},
                {"score": {"score_cfg": {"query_path": asked}, "preprocess_cfg": how, "index_cfg": {
                    "run_path": str(target), "model": TRAINED, "overwrite": True, "data": statements()}}},
            ]  # fmt: skip
            run_steps(bergson, target.name, steps)
    best_only()


def best_only() -> None:
    """Of some scores what they say if only each question's ten best statements count, 1 each: their order alone."""
    for name in ORDERED:
        table = read_scores(WORK / folder_of(name))
        best = np.argsort(-table, axis=0, kind="stable")[:TEN]
        mask = np.zeros_like(table)
        np.put_along_axis(mask, best, 1.0, axis=0)
        write_scores(WORK / folder_of(f"{name}{BEST}"), mask)


def controls() -> None:
    """Scores that need no model: random ones, and whether a statement is of the fact that is asked for."""
    pool, asked = ([json.loads(line) for line in (WORK / name).open()] for name in (POOL, TARGETS))
    fact = [[(one["identifier"], one["field"]) == (other["person"], other["field"]) for other in asked] for one in pool]
    tables = {"1 for the fact that is asked for": np.array(fact, dtype=np.float32)}
    for seed in range(3):
        drawn = np.random.default_rng(seed).standard_normal((len(pool), len(asked)))
        tables[f"random, seed {seed}"] = drawn.astype(np.float32)
    for name, table in tables.items():
        write_scores(WORK / folder_of(name), table)


def write_scores(folder: Path, table: NDArray[np.float32]) -> None:
    """``[statements, questions]`` in the layout of Bergson's score writer."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, columns = table.shape
    layout: Any = {
        "names": [f"{part}_{place}" for place in range(columns) for part in ("score", "written")],
        "formats": ["float32", "bool"] * columns,
        "offsets": [8 * place + offset for place in range(columns) for offset in (0, 4)],
        "itemsize": 8 * columns,
    }
    packed = np.zeros(rows, dtype=np.dtype(layout))
    for place in range(columns):
        packed[f"score_{place}"], packed[f"written_{place}"] = table[:, place], True
    packed.tofile(folder / "scores.bin")
    facts = {"attribute_tokens": False, "num_items": rows, "num_rows": rows, "num_scores": columns, "dtype": layout}
    (folder / "info.json").write_text(json.dumps(facts))
    steps = [{"score": {"score_cfg": {"higher_is_better": True}}}]
    (folder / "config.yaml").write_text(yaml.safe_dump({"steps": steps}))


def read_scores(folder: Path) -> NDArray[np.float32]:
    """``[statements, questions]`` of a folder in Bergson's layout."""
    facts = json.loads((folder / "info.json").read_text())
    layout: Any = np.dtype(facts["dtype"])
    packed = np.fromfile(folder / "scores.bin", dtype=layout)
    return np.stack([packed[f"score_{place}"] for place in range(facts["num_scores"])], axis=1)


def statements() -> dict[str, Any]:
    """The pool, as Bergson reads it."""
    return {"dataset": f"data/statements_{PEOPLE}p_seed0.hf", "prompt_column": "fact"}


def questions() -> dict[str, Any]:
    """The queries; the loss is of the answers alone."""
    return {"dataset": f"data/questions_{PEOPLE}p_seed0.hf", "prompt_column": "question", "completion_column": "answer"}


def step_of(run: str, scores: Path, method: Mapping[str, Any]) -> dict[str, Any]:
    """A ``validate`` step."""
    return {
        "run_path": run, "overwrite": True, "scores": str(scores), "model": BASE, "wandb_project": "",
        "data": statements(), "query": {**questions(), "aggregation": "none"}, "method": dict(method),
    }  # fmt: skip


def run_steps(bergson: Path, name: str, steps: Sequence[Mapping[str, Any]]) -> None:
    """Let Bergson do some steps.

    Raises:
        SystemExit: with the end of what it said, if it fails.
    """
    file = WORK / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"run_path": f"runs/{name}", "steps": list(steps)}, sort_keys=False))
    quiet = {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [str(bergson / "bergson"), file.name], cwd=WORK, env={**os.environ, **quiet}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"error: bergson {file}: {done.stderr[-2000:]}")


def validated(bergson: Path) -> dict[str, dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]]:
    """By kind of removal and score: what removals did to each question's loss, and their summed scores."""
    best = [f"{name}{BEST}" for name in ORDERED]
    names = [*SCORES, *OWN, *best, *(f"random, seed {seed}" for seed in range(3)), "1 for the fact that is asked for"]
    found: dict[str, dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]] = {}
    for kind, banks in KINDS.items():
        method = {"kind": "lds", "subsets": "bank", "paths": [f"runs/{bank}" for bank in banks]}
        where = {name: f"runs/validated/{kind.split(maxsplit=1)[0]}-{folder_of(name).name}" for name in names}
        steps = [
            {"validate": {**step_of(where[name], folder_of(name), method), "batch_size": TRAINING["batch_size"]}}
            for name in names
        ]
        run_steps(bergson, f"validate-{kind.split(maxsplit=1)[0]}", steps)
        found[kind] = {name: read_validation(WORK / where[name] / "validation.csv") for name in names}
    return found


def read_validation(path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``[removals, questions]`` change of the loss, and summed score of what was removed."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    shape = tuple(max(int(row[name]) for row in rows) + 1 for name in ("subset", "query"))
    changes, sums = np.zeros(shape), np.zeros(shape)
    for row in rows:
        place = int(row["subset"]), int(row["query"])
        changes[place], sums[place] = float(row["diff"]), float(row["score_sum"])
    return changes, sums


def figure(tables: tuple[NDArray[np.float64], NDArray[np.float64]], people: NDArray[np.int64]) -> str:
    """LDS, the mean over questions, with an interval that resamples removals and people (percentiles)."""
    changes, sums = tables
    generator, drawn = np.random.default_rng(0), []
    for _ in range(SAMPLES):
        rows = generator.integers(0, len(changes), len(changes))
        asked = np.concatenate([np.flatnonzero(people == one) for one in generator.integers(0, PEOPLE, PEOPLE)])
        drawn.append(spearman(changes[rows], sums[rows])[asked].mean())
    low, high = np.percentile(drawn, [2.5, 97.5])
    return f"{spearman(changes, sums).mean():+.2f} ({low:+.2f} to {high:+.2f})"


def first_right(name: str) -> str:
    """For how many of the questions a statement of the fact asked for has the highest score."""
    if name.endswith(BEST):
        return ""
    pool, asked = ([json.loads(line) for line in (WORK / file).open()] for file in (POOL, TARGETS))
    table = read_scores(WORK / folder_of(name))
    right = 0
    for place, question in enumerate(asked):
        best = pool[int(np.argmax(table[:, place]))]
        right += (best["identifier"], best["field"]) == (question["person"], question["field"])
    return f"{right} of {len(asked)}"


def table(bergson: Path) -> None:
    """Judge every score, and write the page's table."""
    people = np.array([json.loads(line)["person"] for line in (WORK / TARGETS).open()])
    found = validated(bergson)
    names = list(found["half removed"])
    rows = [
        [name, *(figure(found[kind][name], people) for kind in KINDS), first_right(name),
         f"`{SCORES[name].replace(TRAINED, 'TRAINED')}`" if name in SCORES else ""]
        for name in names
    ]  # fmt: skip
    rows.sort(key=lambda row: -float(row[1].split()[0]))
    headers = ["score", *(f"LDS, {kind}" for kind in KINDS), f"right first, of {ASKED} questions", "trim-select"]
    head = PAGE.read_text().partition(MARK)[0] if PAGE.exists() else "# What a removal does\n\n"
    PAGE.write_text(f"{head}{MARK}\n\n{tabulate(rows, headers=headers, tablefmt='github', disable_numparse=True)}\n")


def main() -> int:
    """Do the named steps, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="+", choices=("prepare", "train", "score", "table"))
    parser.add_argument("--checkout", type=Path, help="Bergson's repository, for the names of its facts")
    parser.add_argument("--trim", type=Path, default=ROOT / ".venv" / "bin", help="where trim-select is")
    options = parser.parse_args()
    bergson = Path(sys.executable).parent
    for step in options.steps:
        if step == "prepare":
            prepare(WORK, options.checkout)
            controls()
        elif step == "train":
            train(bergson)
        elif step == "score":
            score(bergson, options.trim.absolute())
        else:
            table(bergson)
    return 0


if __name__ == "__main__":
    sys.exit(main())
