"""Scores of the whole pool in the files that other people's benchmarks of selection methods read.

The layouts are those that their public code reads: ``critical_look`` for "A Critical Look at Targeted Instruction
Selection" (arXiv 2602.14696), ``date_lm`` for DATE-LM (arXiv 2507.09424), ``bergson`` for EleutherAI's Bergson.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trim_lightning.errors import UserError
from trim_lightning.files.atomic import replacing, write_text
from trim_lightning.runs.chosen import selection_directory
from trim_lightning.runs.manifest import BrokenRun, Manifest
from trim_lightning.runs.names import SCORES
from trim_lightning.runs.selection import is_count, read_scores

GROUP = "score/"  # what the columns of target groups begin with
ROWS = 65_536  # of the pool that are laid out at once


@dataclass(frozen=True)
class PoolScores:
    """Scores of every pool record, in pool order.

    Attributes:
        manifest: Of the selection.
        scores: ``[pool]`` float32.
        queries: Names of what a record has a score for: the target groups, or "" for the target set as one.
        matrix: ``[queries, pool]`` float32.
        single: True if each query is one target.
        unscored: Records without a score: they have one just below all others, since no reader knows NaN.
        task: Name of the target set.
    """

    manifest: Manifest
    scores: NDArray[np.float32]
    queries: Sequence[str]
    matrix: NDArray[np.float32]
    single: bool
    unscored: int
    task: str


def read_pool_scores(run: Path, task: str | None) -> PoolScores:
    """The scores of a selection run, or of a training run that selected.

    Args:
        run: Its output directory.
        task: What to call the target set; None takes the name of its file.

    Raises:
        UserError: if there is no finished selection, or it has no score at all.
    """
    directory = selection_directory(run)
    try:
        manifest = Manifest.read(directory)
    except BrokenRun as error:
        raise error.refusal(directory) from error
    table = read_scores(directory)
    groups = [name.removeprefix(GROUP) for name in table.column_names if name.startswith(GROUP)]
    columns = ["score", *(GROUP + group for group in groups)]
    if "score" not in table.column_names or not all(
        pa.types.is_floating(table.schema.field(name).type) for name in columns
    ):
        raise BrokenRun(f"{SCORES} has columns of other types than a selection writes").refusal(directory)
    values = np.stack([table[name].to_numpy().astype(np.float32) for name in columns])
    unscored = np.isnan(values[0])
    if unscored.all():
        raise UserError(f"{directory}: no record of the pool has a score; there is nothing to export")
    filled = np.stack([finite(line) for line in values])
    target = manifest.inputs.get("target")
    target = target if isinstance(target, Mapping) else {}
    sizes = target["groups"].values() if isinstance(target.get("groups"), Mapping) else [target.get("rows")]
    return PoolScores(
        manifest=manifest,
        scores=filled[0],
        queries=groups or [""],
        matrix=filled[1:] if groups else filled,
        single=all(is_count(size) and size == 1 for size in sizes),
        unscored=int(unscored.sum()),
        task=task or file_name(str(target.get("name") or "target")),
    )


def finite(line: NDArray[np.float32]) -> NDArray[np.float32]:
    """``[pool]`` scores with a number just below the lowest in place of NaN."""
    known = line[~np.isnan(line)]
    lowest = np.float32(0) if not len(known) else np.nextafter(known.min(), np.float32(-np.inf))
    return np.where(np.isnan(line), lowest, line)


def file_name(name: str) -> str:
    """The part of a data set's name that can begin a file's: ``gsm8k`` of ``gsm8k.jsonl``."""
    return re.sub(r"[^\w-]+", "_", Path(name).name.partition(".")[0]) or "target"


def write_critical_look(found: PoolScores, directory: Path) -> list[Path]:
    """Write ``{task}_cossim.npy``: ``[targets, pool]`` float32.

    Raises:
        UserError: if the run has no score for each single target.
    """
    if not found.single:
        named = found.manifest.inputs.get("target")
        had = "one for each group of them" if found.queries != [""] else "one for all of them together"
        if named is None:
            had = f"none, as method={found.manifest.config['method']['name']} uses no targets"
        raise UserError(
            f"{found.manifest.directory}: critical_look wants a score for each target, and this run has {had}; select "
            "again with target.single_groups=true"
        )
    return [write_array(found.matrix, directory / f"{found.task}_cossim.npy")]


def write_date_lm(found: PoolScores, directory: Path) -> list[Path]:
    """Write ``metrics.npy``: ``[pool]`` float32, the higher the better."""
    return [write_array(found.scores, directory / "metrics.npy")]


def write_bergson(found: PoolScores, directory: Path) -> list[Path]:
    """Write ``scores.bin`` with a score for each query in each record, ``info.json`` that describes it, and
    ``config.yaml``, which says that a higher score is better.

    A record of the file is a pair of float32 and a flag (written) for each query, 8 bytes a pair.
    """
    number = len(found.queries)
    places = {
        "names": [f"{part}_{query}" for query in range(number) for part in ("score", "written")],
        "formats": ["float32", "bool"] * number,
        "offsets": [8 * query + place for query in range(number) for place in (0, 4)],
        "itemsize": 8 * number,
    }
    size, layout = len(found.scores), np.dtype(places)  # type: ignore[call-overload]
    path = directory / "scores.bin"
    with replacing(path) as file:
        for start in range(0, size, ROWS):
            part = found.matrix[:, start : start + ROWS]
            block = np.zeros(part.shape[1], dtype=layout)
            for query, line in enumerate(part):
                block[f"score_{query}"], block[f"written_{query}"] = line, True
            file.write(block.tobytes())
    info = {"attribute_tokens": False, "num_items": size, "num_rows": size, "num_scores": number, "dtype": places}
    write_text(json.dumps(info, indent=2) + "\n", directory / "info.json")
    write_text("steps:\n  - score:\n      score_cfg:\n        higher_is_better: true\n", directory / "config.yaml")
    return [path, directory / "info.json", directory / "config.yaml"]


def write_array(values: NDArray[Any], path: Path) -> Path:
    """Write an array as ``.npy``."""
    with replacing(path) as file:
        np.save(file, values)
    return path


YARDSTICKS: dict[str, Callable[[PoolScores, Path], list[Path]]] = {
    "critical_look": write_critical_look,
    "date_lm": write_date_lm,
    "bergson": write_bergson,
}
