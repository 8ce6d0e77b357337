"""Figures about LESS: its gradients and its selection stage against TRIM's."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import materials
from materials import WORK, in_turns, median
from passes import BUDGET, CPU, score
from trim_lightning.engine.devices import Resources
from trim_lightning.engine.scoring_pass import ScoringRequest, run_scoring_pass
from trim_lightning.tokens.tokenized import TokenizedRecords


def checkpoints_of(source: Any, rank: int, number: int) -> list[tuple[Any, Path]]:
    """The model with the adapter of each epoch of a short LESS warm-up, and the file of that epoch's moments."""
    from trim_lightning.engine.adam_moments import FILE
    from trim_lightning.models.adapter import apply_adapter
    from trim_lightning.settings.schema import WarmupSettings
    from trim_lightning.tuning.callbacks import checkpoint_path
    from trim_lightning.tuning.run import TrainingSite, train_checkpoints

    dtype, directory = materials.best_dtype(), WORK / f"checkpoints-{rank}-{number}"
    if not checkpoint_path(directory, number).exists():
        directory.mkdir(parents=True, exist_ok=True)
        # few records: what the warm-up learns does not change the time of what follows
        records = materials.tokens_of(source, 16, "checkpoints", max_length=256)
        settings = WarmupSettings(epochs=number, lora_rank=rank, lora_alpha=2 * rank)
        model = materials.model_of(source, dtype)
        around = TrainingSite(directory, CPU, "warm-up")
        train_checkpoints(model, records, range(len(records)), settings, around, seed=0)
    result = []
    for place in range(1, number + 1):
        folder = checkpoint_path(directory, place)
        result.append((apply_adapter(materials.model_of(source, dtype), folder), folder / FILE))
    return result


def less_pass(model: Any, records: TokenizedRecords, moments: Path | None) -> list[Any]:
    """One pass of `method=less` over some records at one checkpoint, into a directory that is thrown away."""
    from trim_lightning.engine.gradients import GradientFeatures
    from trim_lightning.engine.record_pass import run_record_pass
    from trim_lightning.engine.shards import read_values
    from trim_lightning.tuning.memory import MOST_TOKENS

    budget = MOST_TOKENS["cuda" if torch.cuda.is_available() else "cpu"]
    directory = Path(tempfile.mkdtemp(dir=WORK))
    try:
        features = GradientFeatures(8192, 0, moments)
        run_record_pass(
            model, records, features, directory, scope="all", resources=Resources(CPU, budget), title="less"
        )
        return list(read_values(directory))
    finally:
        shutil.rmtree(directory)


def gradients(checkpoints: int, number: int, rounds: int) -> dict[str, Any]:
    """(d) The product's LESS features of some records at one checkpoint after the other, against the engine's pass."""
    source = materials.smollm2()
    records = materials.tokens_of(source, number, f"gradients{checkpoints}")
    model, points = materials.model_of(source, materials.best_dtype()), checkpoints_of(source, 128, checkpoints)
    bank = materials.bank_for(model)
    less_pass(points[0][0], records, points[0][1])
    score(model, records, bank)

    def less() -> None:
        for point, moments in points:
            less_pass(point, records, moments)

    theirs, ours = in_turns(rounds, [model, *(point for point, _ in points)], less, lambda: score(model, records, bank))
    ratios = [one / two for one, two in zip(theirs, ours, strict=True)]
    return {"ratio": median(ratios), "wanted": "reported", "rounds": ratios, "tokens": records.total_tokens}


def less_one() -> dict[str, Any]:
    """(d) LESS's features (batched, LoRA rank 128) at one checkpoint / the engine's pass over the same records."""
    return gradients(1, 60, 3)


def less_four() -> dict[str, Any]:
    """(d) The same at LESS's four checkpoints."""
    return gradients(4, 30, 3)


def trim_selection(model: Any, records: TokenizedRecords, targets: TokenizedRecords) -> None:
    """TRIM's selection stage: target pass, banks, scoring pass, pooling."""
    from trim_lightning.engine.target_pass import read_signals, run_target_pass
    from trim_lightning.settings.schema import FallbackSettings, PoolerSettings, SaliencySettings
    from trim_lightning.stages.fingerprints import banks_of, weigh
    from trim_lightning.stages.token_scores import StoredPass, pool_tokens, scaled_idf

    directory = Path(tempfile.mkdtemp(dir=WORK))
    try:
        run_target_pass(model, targets, directory, resources=Resources(CPU, BUDGET))
        layers = min(SaliencySettings().num_layers, model.config.num_hidden_layers)
        salient = weigh(read_signals(directory), SaliencySettings(num_layers=layers), "all")
        bank = banks_of(salient, {"": list(range(len(targets)))})[""]
        request = ScoringRequest({"": bank}, "embedding", "all")
        run_scoring_pass(model, records, {directory: request}, resources=Resources(CPU, BUDGET))
        idf = scaled_idf(bank.token_ids.cpu().numpy(), bank.idf.cpu().numpy())
        passed = StoredPass(directory, records)
        for index in range(len(passed)):
            pool_tokens(passed.shard(index).bank(0), FallbackSettings(), PoolerSettings(), idf)
    finally:
        shutil.rmtree(directory)


def less_scores(points: list[tuple[Any, Path]], records: TokenizedRecords, targets: TokenizedRecords) -> None:
    """LESS's selection stage: at every checkpoint, gradients of targets and pool, then cosines."""
    from trim_lightning.methods.shared import unit

    for point, moments in points:
        wanted = np.concatenate([values for _, values in less_pass(point, targets, None)]).astype(np.float64)
        direction = unit(wanted).mean(0)
        for _, values in less_pass(point, records, moments):
            unit(values.astype(np.float64)) @ direction


def selection_stages(rank: int, wanted: str, number: int = 60, rounds: int = 3) -> dict[str, Any]:
    """LESS's selection stage at four checkpoints against TRIM's: ten targets, the same pool, model and machine.

    Both run as the product runs them, shards on disk and all; warm-up and loading models are left out of both.
    """
    source = materials.smollm2()
    number = int(os.environ.get("TRIM_BENCH_RECORDS", number))
    records = materials.tokens_of(source, number, f"selection{rank}")
    targets = materials.tokens_of(source, 10, f"targets{rank}")
    model, points = materials.model_of(source, materials.best_dtype()), checkpoints_of(source, rank, 4)
    trim_selection(model, targets, targets)  # caches are warm, memory is there
    less_scores(points[:1], targets, targets)
    theirs, ours = in_turns(
        rounds,
        [model, *(point for point, _ in points)],
        lambda: less_scores(points, records, targets),
        lambda: trim_selection(model, records, targets),
    )
    ratios = [one / two for one, two in zip(theirs, ours, strict=True)]
    return {
        "ratio": median(ratios), "wanted": wanted, "rounds": ratios, "tokens": records.total_tokens,
        "target_tokens": targets.total_tokens, "lora_rank": rank, "less_seconds": theirs, "trim_seconds": ours,
    }  # fmt: skip


def less_selection() -> dict[str, Any]:
    """LESS's selection stage (four checkpoints, batched, LoRA rank 16 as in warmup=lora) / TRIM's."""
    return selection_stages(16, ">= 10")


def less_selection_paper() -> dict[str, Any]:
    """The same with the LoRA rank of LESS, 128."""
    return selection_stages(128, ">= 10")
