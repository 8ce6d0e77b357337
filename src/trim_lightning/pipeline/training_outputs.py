"""The contract's files and metrics of a training run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trim_lightning.errors import UserError
from trim_lightning.files.atomic import copy_atomically, sha256_of
from trim_lightning.pipeline.outputs import clear
from trim_lightning.pipeline.select import Selection
from trim_lightning.privacy.local import LOCAL
from trim_lightning.runs.manifest import write_manifest
from trim_lightning.runs.names import MANIFEST, METRICS, PREDICTIONS, SELECTION
from trim_lightning.settings.schema import TrainSettings
from trim_lightning.store import Entry
from trim_lightning.store.ledger import Ledger

RESULTS = (METRICS, PREDICTIONS, MANIFEST)
ADAPTER, MODEL = "adapter", "model"


def tuning_metrics(tuned: Entry) -> dict[str, Any]:
    """``train/...`` metrics; ``train/epoch``, whose weights are kept, only with an early stop."""
    names = ("loss", "records", "tokens", "trained_tokens", "steps", "seconds")
    kept = {"train/epoch": tuned.facts["epoch"]} if "epoch" in tuned.facts else {}
    return {**{f"train/{name}": tuned.facts.get(name) for name in names}, **kept}


def objective(metrics: Mapping[str, Any], name: str | None) -> float | None:
    """The number that a sweeper optimises.

    Args:
        metrics: Content of ``metrics.json``.
        name: ``evaluation.objective``; None is the held-out loss where there is one.

    Raises:
        UserError: if there is no such number.
    """
    value = metrics.get(name or "eval/nll")
    if name is None:
        return value
    if not isinstance(value, int | float):
        numbers = ", ".join(found for found, other in metrics.items() if isinstance(other, int | float))
        raise UserError(f"evaluation.objective={name}: metrics.json has no such number; it has {numbers}")
    return float(value)


def selection_costs(selection: Selection | None) -> dict[str, Any]:
    """``selection/...`` and ``select/...`` metrics."""
    if selection is None:
        return {}
    counts, stages = selection.manifest["counts"], selection.manifest["stages"]
    return {
        "selection/records": counts["selected"],
        "selection/tokens": counts["selected_tokens"],
        "select/seconds": round(sum(stage["seconds"] for stage in stages.values()), 3),
    }


def clear_training(directory: Path, given: str | None) -> None:
    """Remove an earlier training's files, so that no mixture of two runs is left if this one is killed.

    With a coreset that was given an earlier selection goes too, unless that is where the file is.
    """
    for name in (*RESULTS, LOCAL):
        (directory / name).unlink(missing_ok=True)
    for name in (ADAPTER, MODEL):
        shutil.rmtree(directory / name, ignore_errors=True)
    selection = directory / SELECTION
    if given is not None and selection.is_dir() and Path(given).expanduser().resolve().parent != selection.resolve():
        clear(selection)
        if not any(selection.iterdir()):
            selection.rmdir()


def copy_result(tuned: Entry, directory: Path) -> None:
    """Put ``adapter/`` (or ``model/``) into the output directory, whole or not at all."""
    for name in (ADAPTER, MODEL):
        source, final = tuned.path / name, directory / name
        if not source.is_dir():
            continue
        temporary = directory / f".{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            copy = temporary / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy_atomically(file, copy)  # unlike shutil.copytree it raises the system's own error
        temporary.rename(final)


def adapter_digest(tuned: Entry) -> dict[str, Any]:
    """Name and sha256 of the trained weights."""
    files = sorted([*tuned.path.glob("adapter/*.safetensors"), *tuned.path.glob("model/*.safetensors")])
    return {file.name: sha256_of(file) for file in files}


def write_training_manifest(
    settings: TrainSettings,
    inputs: Mapping[str, Any],
    counts: Mapping[str, int],
    ledger: Ledger,
    selection: Selection | None,
    tuned: Entry,
    tasks: Mapping[str, Any],
    directory: Path,
) -> dict[str, Any]:
    """Write ``manifest.json``, the selection's manifest within it, and return its content.

    ``tasks`` is what the scores of lm-eval tasks depend on.
    """
    own = None if selection is None else selection.manifest
    return write_manifest(
        directory / MANIFEST,
        config=asdict(settings),
        inputs={**inputs, **({} if own is None else own["inputs"])},
        counts={**counts, **({} if own is None else {"pool": own["counts"]["pool"]})},
        ledger=ledger,
        selection=own,
        adapter=adapter_digest(tuned),
        evaluation=tasks,
    )
