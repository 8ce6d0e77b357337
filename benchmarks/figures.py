"""The figures of `make bench`; each is run by ``run.py`` in a process of its own and prints one JSON line."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import load
import materials
import sweeps
from figures_adapter import adapter
from figures_cascade import cascade
from figures_kept import kept
from figures_less import less_four, less_one, less_selection, less_selection_paper
from figures_memory import growth, long_forward, saliency
from figures_prefixes import prefixes
from materials import WORK, in_turns, median, seconds
from passes import BUDGET, CPU, eager, forward_all, one_by_one, plain, score
from trim_lightning.engine.batches import padding_share, plan_shards
from trim_lightning.engine.devices import Resources
from trim_lightning.engine.scoring_pass import ScoringRequest, run_scoring_pass
from trim_lightning.tokens.tokenized import TokenizedRecords


def engine() -> dict[str, Any]:
    """(a) The whole scoring pass against the bare forward pass on the same batches, same number format."""
    source = materials.smollm2()
    records = materials.tokens_of(source, 120, "engine")
    model = materials.model_of(source, materials.best_dtype())
    bank, batches = materials.bank_for(model), materials.batches_of(records, BUDGET)
    forward_all(model, batches[:3])
    bare, ours = in_turns(5, [model], lambda: forward_all(model, batches), lambda: score(model, records, bank))
    ratios = [one / two for one, two in zip(bare, ours, strict=True)]
    return {
        "ratio": median(ratios), "wanted": ">= 0.92", "rounds": ratios, "tokens": records.total_tokens,
        "engine_tokens_per_second": records.total_tokens / median(ours),
        "forward_tokens_per_second": records.total_tokens / median(bare),
    }  # fmt: skip


def padding() -> dict[str, Any]:
    """(b) Share of the model's input that is padding, on the whole pool."""
    source = materials.smollm2()
    number = len(materials.pool_lines())
    records = materials.tokens_of(source, number, "padding")
    plan = plan_shards(records.lengths, BUDGET)
    return {"ratio": padding_share(records.lengths, plan), "wanted": "<= 0.03", "records": number}


def against_common_way(
    records: TokenizedRecords, dtype: torch.dtype, rounds: int, attentions: bool = True
) -> list[float]:
    """Ratios of the common way's time to the engine's, on the same records."""
    source = materials.smollm2()
    ours, theirs = materials.model_of(source, materials.best_dtype()), (eager if attentions else plain)(dtype)
    bank, rows = materials.bank_for(ours), list(range(len(records)))
    one_by_one(theirs, records, rows[:3], attentions)
    score(ours, records, bank)
    common, engine_times = in_turns(
        rounds,
        [ours, theirs],
        lambda: one_by_one(theirs, records, rows, attentions),
        lambda: score(ours, records, bank),
    )
    return [one / two for one, two in zip(common, engine_times, strict=True)]


def common() -> dict[str, Any]:
    """(c) Against eager attention with all attention matrices and logits, one record at a time, same format."""
    records = materials.tokens_of(materials.smollm2(), 120, "common")
    ratios = against_common_way(records, materials.best_dtype(), 5)
    return {"ratio": median(ratios), "wanted": ">= 1.2", "rounds": ratios, "tokens": records.total_tokens}


def common_sdpa() -> dict[str, Any]:
    """(c) Against the same without attention matrices: SDPA, logits, one record at a time, same format."""
    records = materials.tokens_of(materials.smollm2(), 120, "common_sdpa")
    ratios = against_common_way(records, materials.best_dtype(), 3, attentions=False)
    return {"ratio": median(ratios), "wanted": "reported", "rounds": ratios, "tokens": records.total_tokens}


def common_long() -> dict[str, Any]:
    """(c) The same at 1,024 tokens a record."""
    short = materials.tokens_of(materials.smollm2(), 120, "common_long")
    records = materials.long_tokens(short, 12, 1024, WORK / "tokens-1024")
    ratios = against_common_way(records, materials.best_dtype(), 3)
    return {"ratio": median(ratios), "wanted": "reported", "rounds": ratios, "tokens": records.total_tokens}


def common_float32() -> dict[str, Any]:
    """(c) The engine in its own format against the common way in float32."""
    records = materials.tokens_of(materials.smollm2(), 80, "common32")
    ratios = against_common_way(records, torch.float32, 3)
    return {"ratio": median(ratios), "wanted": ">= 4", "rounds": ratios, "tokens": records.total_tokens}


def processes() -> dict[str, Any]:
    """(g) Seconds in the pass: one process with all cores over two with half of them each (start-up left out)."""
    source = materials.smollm2()
    records = materials.tokens_of(source, 200, "processes")
    from trim_lightning.models.load import ModelRecipe

    model = materials.model_of(source, materials.best_dtype())
    recipe, bank = ModelRecipe(source, materials.best_dtype()), materials.bank_for(model)
    score(model, records, bank)
    one, two, walls = [], [], []
    for _ in range(3):
        one.append(score(model, records, bank, trainer={"accelerator": "cpu", "devices": 1})["seconds"])
        spread = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
        started = time.perf_counter()
        two.append(score(recipe, records, bank, trainer=spread)["seconds"])
        walls.append(time.perf_counter() - started)
    ratio = median(one) / median(two)
    return {"ratio": ratio, "wanted": "reported", "one": one, "two": two, "two_with_start_and_loading": walls}


def compiled() -> dict[str, Any]:
    """Seconds of the plain base model over those of ``torch.compile`` on the same batches, compiling left out."""
    model = materials.model_of(materials.smollm2(), materials.best_dtype())
    records = materials.tokens_of(materials.smollm2(), 120, "compiled")
    batches = materials.batches_of(records, BUDGET)
    base = model.base_model
    faster = torch.compile(base, dynamic=True)

    def run(forward: Any) -> None:
        with torch.inference_mode():
            for batch in batches:
                forward(input_ids=batch["input_ids"].to(model.device), use_cache=False)

    run(base)
    compiling = seconds(lambda: run(faster))
    plain_times, compiled_times = in_turns(3, [], lambda: run(base), lambda: run(faster))
    ratios = [one / two for one, two in zip(plain_times, compiled_times, strict=True)]
    first = compiling - median(compiled_times)
    return {"ratio": median(ratios), "wanted": "reported", "rounds": ratios, "compiling_seconds": first}


def rounding() -> dict[str, Any]:
    """Largest difference of a record's mean similarity when the batch budget is a quarter, in the product's format."""
    from trim_lightning.stages.token_scores import StoredPass

    model = materials.model_of(materials.smollm2(), materials.best_dtype())
    records = materials.tokens_of(materials.smollm2(), 200, "rounding")
    bank = materials.bank_for(model)
    means = []
    for budget in (BUDGET, BUDGET // 4):
        found: dict[int, float] = {}
        with tempfile.TemporaryDirectory(dir=WORK) as folder:
            request = ScoringRequest({"": bank}, "embedding", "all")
            resources = Resources(CPU, budget)
            run_scoring_pass(model, records, {Path(folder): request}, resources=resources)
            passed = StoredPass(Path(folder), records)
            for shard in map(passed.shard, range(len(passed))):
                parts = np.split(shard.bank(0).similarity, np.cumsum(shard.lengths)[:-1])
                found |= {row: float(part.mean()) for row, part in zip(shard.rows.tolist(), parts, strict=True)}
        means.append(found)
    differences = [abs(means[0][row] - means[1][row]) for row in means[0]]
    spread = float(np.std(list(means[0].values())))
    return {
        "ratio": max(differences), "wanted": "reported", "mean": float(np.mean(differences)),
        "standard_deviation_of_scores": spread,
    }  # fmt: skip


FIGURES: dict[str, Callable[[], dict[str, Any]]] = {
    function.__name__: function
    for function in (
        engine, padding, common, common_sdpa, common_long, common_float32, less_one, less_four, less_selection,
        less_selection_paper, saliency, growth, processes, compiled, rounding, prefixes, kept, adapter, cascade,
        sweeps.sweep, sweeps.estimate, load.million, load.stored, load.six_million, load.cells, load.large_page,
    )
}  # fmt: skip

if __name__ == "__main__":
    WORK.mkdir(parents=True, exist_ok=True)
    name, *rest = sys.argv[1:]
    outcome = long_forward(int(rest[0]), bool(rest[1])) if name == "long_forward" else FIGURES[name]()
    print(json.dumps(outcome))
