"""The figures of `make bench`; each is run by ``run.py`` in a process of its own and prints one JSON line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
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
from materials import WORK, in_turns, median, seconds
from trim_lightning.engine.batches import padding_share, plan_shards
from trim_lightning.engine.devices import Resources
from trim_lightning.engine.scoring_pass import ScoringRequest, run_scoring_pass
from trim_lightning.models.hidden import last_hidden_states
from trim_lightning.tokens.tokenized import TokenizedRecords

CPU = {"accelerator": "auto", "devices": 1}
BUDGET = 32_768 if torch.cuda.is_available() else 2048


def score(model: Any, records: TokenizedRecords, bank: Any, **options: Any) -> dict[str, Any]:
    """One whole scoring pass as the product runs it, into a directory that is thrown away."""
    resources = Resources(options.get("trainer", CPU), options.get("tokens_per_batch", BUDGET))
    directory = Path(tempfile.mkdtemp(dir=WORK))
    try:
        request = ScoringRequest({"": bank}, "embedding", "all")
        return run_scoring_pass(model, records, {directory: request}, resources=resources)
    finally:
        shutil.rmtree(directory)


def forward_all(model: Any, batches: list[dict[str, Any]]) -> None:
    """The bare forward pass: the base model on ready batches, and nothing else."""
    with torch.inference_mode():
        for batch in batches:
            last_hidden_states(model, batch["input_ids"].to(model.device))


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


def one_by_one(model: Any, records: TokenizedRecords, rows: list[int], attentions: bool = True) -> None:
    """The common way: one record at a time, all attention matrices, all logits."""
    with torch.inference_mode():
        for row in rows:
            input_ids = torch.from_numpy(records[row].token_ids.astype(np.int64))[None].to(model.device)
            model(input_ids=input_ids, output_attentions=attentions, output_hidden_states=True)


def eager(dtype: torch.dtype) -> Any:
    """SmolLM2 as Hugging Face loads it for ``output_attentions=True``."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(materials.smollm2().directory), dtype=dtype, attn_implementation="eager"
    )
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def plain(dtype: torch.dtype) -> Any:
    """SmolLM2 as Hugging Face loads it by itself."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(materials.smollm2().directory), dtype=dtype)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


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


def checkpoints_of(source: Any, rank: int, number: int) -> list[tuple[Any, Path]]:
    """The model with the adapter of each epoch of a short LESS warm-up, and the file of that epoch's moments."""
    from trim_lightning.engine.adam_moments import FILE
    from trim_lightning.models.adapter import apply_adapter
    from trim_lightning.settings.schema import WarmupSettings
    from trim_lightning.tuning.checkpoints import checkpoint_path, train_checkpoints

    dtype, directory = materials.best_dtype(), WORK / f"checkpoints-{rank}-{number}"
    if not checkpoint_path(directory, number).exists():
        directory.mkdir(parents=True, exist_ok=True)
        # few records: what the warm-up learns does not change the time of what follows
        records = materials.tokens_of(source, 16, "checkpoints", max_length=256)
        settings = WarmupSettings(epochs=number, lora_rank=rank, lora_alpha=2 * rank)
        model = materials.model_of(source, dtype)
        train_checkpoints(model, records, range(len(records)), settings, directory, CPU, seed=0)
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
    from trim_lightning.tuning.run import MICRO_BATCH_TOKENS

    budget = MICRO_BATCH_TOKENS["cuda" if torch.cuda.is_available() else "cpu"]
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
    import pyarrow.parquet as pq

    from trim_lightning.engine.target_pass import read_signals, run_target_pass
    from trim_lightning.settings.schema import FallbackSettings, PoolerSettings, SaliencySettings
    from trim_lightning.stages.fingerprints import banks_of, weigh
    from trim_lightning.stages.token_scores import ScopedTokens, pool_tokens, scaled_idf

    directory = Path(tempfile.mkdtemp(dir=WORK))
    try:
        run_target_pass(model, targets, model.config.num_hidden_layers, directory, trainer=CPU, tokens_per_batch=BUDGET)
        layers = min(SaliencySettings().num_layers, model.config.num_hidden_layers)
        salient = weigh(read_signals(directory), SaliencySettings(num_layers=layers), "all")
        bank = banks_of(salient, {"": list(range(len(targets)))})[""]
        request = ScoringRequest({"": bank}, "embedding", "all")
        run_scoring_pass(model, records, {directory: request}, resources=Resources(CPU, BUDGET))
        idf = scaled_idf(bank.token_ids.cpu().numpy(), bank.idf.cpu().numpy())
        for path in directory.glob("shard-*.parquet"):
            pool_tokens(ScopedTokens.read(pq.read_table(path), ""), FallbackSettings(), PoolerSettings(), idf)
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


def resident_mib() -> float:
    """Memory that this process, or the GPU, holds now."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**20
    (line,) = [line for line in materials.read("/proc/self/status").splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def reset_peak() -> None:
    """Forget the memory that loading the model took."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Peak resident memory of this process since `reset_peak`, or peak memory of the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    (line,) = [line for line in materials.read("/proc/self/status").splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def long_forward(length: int, saliency: bool) -> dict[str, Any]:
    """Time and peak memory of one forward pass over one long sequence, in this process."""
    from trim_lightning.engine.modules import TargetPass

    model = materials.model_of(materials.smollm2(), materials.best_dtype())
    input_ids = torch.randint(10, 40_000, (1, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    batch = {
        "input_ids": input_ids, "lengths": torch.tensor([length], device=model.device),
        "roles": torch.ones_like(input_ids, dtype=torch.uint8), "rows": torch.tensor([0]),
    }  # fmt: skip
    run = TargetPass(model, model.config.num_hidden_layers)
    before = resident_mib()
    with torch.inference_mode():
        last_hidden_states(model, input_ids[:, :64])
        reset_peak()
        taken = seconds(
            (lambda: run.predict_step(batch, 0)) if saliency else (lambda: last_hidden_states(model, input_ids))
        )
    return {"seconds": taken, "peak_mib": peak_mib(), "increase_mib": peak_mib() - before}


def saliency() -> dict[str, Any]:
    """(e) Peak memory and time of a forward with saliency in every layer, over those of a plain one."""
    rows = []
    for length in (512, 1024, 2048, 4096, 8192):
        plain, with_saliency = (child(["long_forward", str(length), flag]) for flag in ("", "1"))
        rows.append(
            {
                "tokens": length,
                "memory_ratio": with_saliency["peak_mib"] / plain["peak_mib"],
                "time_ratio": with_saliency["seconds"] / plain["seconds"],
                "plain_mib": plain["peak_mib"],
                "increase_ratio": with_saliency["increase_mib"] / plain["increase_mib"],
                "seconds": with_saliency["seconds"],
            }
        )
    return {"ratio": rows[-1]["memory_ratio"], "wanted": "<= 1.25 at 8,192 tokens", "lengths": rows}


def growth() -> dict[str, Any]:
    """(f) Exponent of the growth of the pass's seconds with the pool's tokens, 1k to 100k records, tiny model."""
    source = materials.tiny()
    model = materials.model_of(source, torch.float32)
    bank = materials.bank_for(model)
    sizes, times = (1_000, 3_162, 10_000, 31_623, 100_000), []
    records = [
        materials.tokens_of(source, size, f"growth{size}", max_length=64) for size in sizes
    ]  # short: it is about size
    score(model, records[0], bank)
    for part in records:
        times.append(median([score(model, part, bank)["seconds"] for _ in range(3)]))
    exponent = float(np.polyfit(np.log([part.total_tokens for part in records]), np.log(times), 1)[0])
    return {"ratio": exponent, "wanted": "1 +- 0.05", "records": sizes, "seconds": times}


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
    import pyarrow.parquet as pq

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
            for path in Path(folder).glob("shard-*.parquet"):
                for line in pq.read_table(path).to_pylist():
                    found[line["row"]] = float(np.mean(line["similarity"]))
        means.append(found)
    differences = [abs(means[0][row] - means[1][row]) for row in means[0]]
    spread = float(np.std(list(means[0].values())))
    return {
        "ratio": max(differences), "wanted": "reported", "mean": float(np.mean(differences)),
        "standard_deviation_of_scores": spread,
    }  # fmt: skip


def gpu() -> dict[str, Any]:
    """A LLaMA-2-7B-shaped random model on a GPU: the engine against bare forward and the card's product rate."""
    if not torch.cuda.is_available():
        return {"ratio": None, "wanted": ">= 0.95 and >= 55 % of the card's rate", "note": "no GPU here: not run"}
    from transformers import LlamaConfig

    return on_card(LlamaConfig(vocab_size=49_152, max_position_embeddings=4096), 600)


def on_card(config: Any, number: int) -> dict[str, Any]:
    """The GPU figures for a random model of a shape."""
    from transformers import AutoModelForCausalLM

    from trim_lightning.models.attention import register

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=register())
    model.eval().requires_grad_(False)
    weights = sum(weight.numel() for weight in model.base_model.parameters()) - model.config.vocab_size * (
        model.config.hidden_size
    )
    records = materials.tokens_of(materials.smollm2(), number, "card")
    bank, batches = materials.bank_for(model), materials.batches_of(records, BUDGET)
    forward_all(model, batches[:2])
    bare, ours = [], []
    for _ in range(3):
        model.to(device)  # untimed: a Lightning loop leaves its model on the CPU
        bare.append(seconds(lambda: forward_all(model, batches)))
        ours.append(score(model, records, bank)["seconds"])
    rate = 2 * weights * records.total_tokens / median(ours)
    best = product_rate(device)
    ratios = [one / two for one, two in zip(bare, ours, strict=True)]
    return {
        "ratio": median(ratios), "wanted": ">= 0.95 and >= 55 % of the card's rate", "share_of_rate": rate / best,
        "tflops": rate / 1e12, "card_tflops": best / 1e12, "tokens_per_second": records.total_tokens / median(ours),
    }  # fmt: skip


def product_rate(device: str, size: int = 8192) -> float:
    """Measured floating-point operations a second of large bfloat16 matrix products."""
    size = size if device == "cuda" else 1024
    one, two = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        one @ two
    times = [seconds(lambda: [one @ two for _ in range(10)]) for _ in range(5)]
    return 10 * 2 * size**3 / min(times)


def child(arguments: list[str]) -> dict[str, Any]:
    """Run a part of this file in a process of its own, for a peak of memory that is its own."""
    command = [sys.executable, __file__, *arguments]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return result


FIGURES: dict[str, Callable[[], dict[str, Any]]] = {
    function.__name__: function
    for function in (
        engine, padding, common, common_sdpa, common_long, common_float32, less_one, less_four, less_selection,
        less_selection_paper, saliency, growth, processes, compiled, rounding, gpu, sweeps.sweep, sweeps.estimate,
        load.million, load.cells, load.large_page,
    )
}  # fmt: skip

if __name__ == "__main__":
    WORK.mkdir(parents=True, exist_ok=True)
    name, *rest = sys.argv[1:]
    outcome = long_forward(int(rest[0]), bool(rest[1])) if name == "long_forward" else FIGURES[name]()
    print(json.dumps(outcome))
