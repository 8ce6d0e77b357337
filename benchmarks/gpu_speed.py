"""Parts of the GPU kit about speed: scoring against the bare forward pass, training, LESS, the compiler."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import against_trl
from gpu_materials import (
    SHAPES,
    Place,
    free,
    lengths_like_instructions,
    model_folder,
    product_rate,
    random_model,
    random_tokens,
)
from materials import bank_for, batches_of, in_turns, median, seconds
from passes import BUDGET, forward_all, score
from trim_lightning.errors import UserError
from trim_lightning.models.load import load_model
from trim_lightning.models.lora import add_lora
from trim_lightning.models.source import find_model
from trim_lightning.settings.schema import ModelSettings, TuningSettings, WarmupSettings
from trim_lightning.store import Store
from trim_lightning.tokens.tokenized import TokenizedRecords
from trim_lightning.tuning.memory import MicroBatches, TrainingMemory, predicted_share
from trim_lightning.tuning.run import TrainingSite, train_model

ROUNDS = 3


def operations(shape: str, lengths: NDArray[np.int64]) -> dict[str, float]:
    """Floating-point operations that a forward pass of the base model over some records cannot do without.

    ``linear``: two for each weight of its linear layers and each real token, padding and LM head not counted.
    ``attention``: two products of queries, keys and values, for the keys that a query may see.
    """
    config = SHAPES[shape]
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    shared = config.get("num_key_value_heads", heads) / heads  # of keys and values
    layer = hidden * hidden * (2 + 2 * shared) + 3 * hidden * config["intermediate_size"]
    seen = float((lengths * (lengths + 1) / 2).sum())
    layers = config["num_hidden_layers"]
    return {"linear": 2 * layers * layer * float(lengths.sum()), "attention": 2 * layers * 2 * hidden * seen}


def scoring_1b(place: Place) -> dict[str, Any]:
    """A 1B-shaped random model: the scoring pass against the bare forward pass, and the share of the card's rate."""
    return scoring(place, place.pick("1b", "tiny"), place.pick(4000, 40))


def scoring_7b(place: Place) -> dict[str, Any]:
    """The same with a 7B-shaped one."""
    return scoring(place, place.pick("7b", "tiny"), place.pick(1500, 40))


def scoring(place: Place, shape: str, number: int) -> dict[str, Any]:
    """Bare forward and scoring pass in turns, then the forward pass with one attention kernel after the other."""
    model = random_model(shape, place.device, torch.bfloat16)
    records = random_tokens(place.work / f"scoring-{shape}", lengths_like_instructions(number), model.config.vocab_size)
    bank, batches = bank_for(model, place.pick(400, 50)), batches_of(records, BUDGET)
    forward_all(model, batches[:2])
    score(model, records, bank)
    rate = product_rate(place)
    bare, ours = [], []
    for _ in range(ROUNDS):
        model.to(place.device)  # untimed: a Lightning loop leaves its model on the CPU
        bare.append(seconds(lambda: forward_all(model, batches)))
        ours.append(score(model, records, bank)["seconds"])
    rate = max(rate, product_rate(place))
    model.to(place.device)
    kernels = attention_kernels(model, batches)
    needed, took = operations(shape, records.lengths), median(ours)
    ratio = median([one / two for one, two in zip(bare, ours, strict=True)])
    share = (needed["linear"] + needed["attention"]) / took / rate
    tokens = records.total_tokens
    rows = [
        ["bare forward pass / scoring pass", f"{ratio:.3f}", "≥ 0.95"],
        ["scoring, tokens/s", f"{tokens / took:,.0f}", ""],
        ["share of the measured product rate", f"{share:.1%} of {rate / 1e12:,.3g} TFLOP/s", "≥ 55 %"],
        *([f"forward pass, attention kernel {name}", rate_of(tokens, value), ""] for name, value in kernels.items()),
    ]  # fmt: skip
    return {
        "ok": ratio >= 0.95 and share >= 0.55 if place.on_gpu else None, "rows": rows, "ratio": ratio, "share": share,
        "linear_share": needed["linear"] / took / rate, "operations": needed, "product_rate": rate, "tokens": tokens,
        "forward_seconds": bare, "scoring_seconds": ours, "kernels": kernels, "tokens_per_batch": BUDGET,
        "shape": SHAPES[shape],
    }  # fmt: skip


def rate_of(tokens: int, found: float | str) -> str:
    """Tokens a second, or what was found instead of seconds."""
    return f"{tokens / found:,.0f} tokens/s" if isinstance(found, float) else found


def attention_kernels(model: Any, batches: list[dict[str, Any]]) -> dict[str, float | str]:
    """Seconds of the forward pass under each of SDPA's kernels, or why there is none; ``chosen`` is torch's choice."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    forward_all(model, batches[:1])
    found: dict[str, float | str] = {"chosen": seconds(lambda: forward_all(model, batches))}
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                forward_all(model, batches[:1])
                found[name] = seconds(lambda: forward_all(model, batches))
        except (RuntimeError, AttributeError) as error:
            found[name] = f"not here ({str(error).splitlines()[0][:80]})"
            free()
    return found


def compiled(place: Place) -> dict[str, Any]:
    """The base model's forward pass against the same under torch.compile, which must not recompile for each shape."""
    shape = place.pick("1b", "tiny")
    model = random_model(shape, place.device, torch.bfloat16)
    records = random_tokens(
        place.work / "compiled", lengths_like_instructions(place.pick(2000, 20)), model.config.vocab_size
    )
    batches, base = batches_of(records, BUDGET), model.base_model
    backend = place.pick("inductor", "eager")  # a compiler takes its time
    faster = torch.compile(base, dynamic=True, backend=backend)

    def run(forward: Any) -> None:
        with torch.inference_mode():
            for batch in batches:
                forward(input_ids=batch["input_ids"].to(place.device), use_cache=False)

    run(base)
    first = seconds(lambda: run(faster))
    plain, ours = in_turns(ROUNDS, [], lambda: run(base), lambda: run(faster))
    ratio = median([one / two for one, two in zip(plain, ours, strict=True)])
    rows = [
        [f"forward pass / the same under torch.compile ({backend})", f"{ratio:.2f}", ""],
        ["seconds that compiling took", f"{first - median(ours):.1f}", ""],
    ]
    return {"ok": None, "rows": rows, "ratio": ratio, "plain": plain, "compiled": ours, "first": first}


def training(place: Place) -> dict[str, Any]:
    """LoRA on a 1B-shaped model: tokens/s, memory foretold and taken, the largest micro-batch."""
    shape = place.pick("1b", "tiny")
    fixed, rows, found = place.pick(8192, 512), [], {}
    for name, recomputes in (("off", False), ("on", True)):
        line = train_once(place, shape, fixed, recomputes, steps=place.pick(4, 1))
        found[f"checkpointing {name}"] = line
        rows.append(
            [f"micro-batches of {fixed:,} tokens, gradient checkpointing {name}: tokens/s; memory foretold / taken",
             f"{line['tokens_per_second']:,.0f}; {line['foretold_mib']:,.0f} / {line['peak_mib']:,.0f} MiB", ""]
        )  # fmt: skip
    itself = train_once(place, shape, None, None, steps=1)
    found["chosen"] = itself
    chosen = f"{itself['tokens_per_micro_batch']:,} tokens, checkpointing {'on' if itself['recomputes'] else 'off'}"
    rows.append(
        ["micro-batches that training takes by itself", f"{chosen}; {itself['tokens_per_second']:,.0f} tokens/s", ""]
    )
    for name, recomputes in (("off", False), ("on", True)):
        size, last = fixed, None
        while size <= place.pick(262_144, 1024):
            line = train_once(place, shape, size, recomputes, steps=1)
            if line["parts"] > 1:
                break
            size, last = 2 * size, line
        found[f"largest, checkpointing {name}"] = last or {}
        if last:
            rows.append(
                [f"largest micro-batch, gradient checkpointing {name}", f"{last['tokens_per_micro_batch']:,} tokens; "
                 f"{last['foretold_mib']:,.0f} MiB foretold / {last['peak_mib']:,.0f} taken; "
                 f"{last['tokens_per_second']:,.0f} tokens/s", ""]
            )  # fmt: skip
    short = [line["foretold_mib"] / line["peak_mib"] for line in found.values() if line.get("peak_mib")]
    good = None
    if short:  # the CPU's peak is not measured
        rows.append(
            ["memory foretold / taken, over all of these", f"{min(short):.2f} to {max(short):.2f}", "0.8 to 1.5"]
        )
        good = min(short) >= 0.8 and max(short) <= 1.5
    return {"ok": good, "rows": rows, "trainings": found}


def train_once(place: Place, shape: str, micro: int | None, recomputes: bool | None, steps: int) -> dict[str, Any]:
    """A few steps of one micro-batch each, from a fresh model, with peak memory and what was foretold of it."""
    free()
    model = random_model(shape, place.device, torch.bfloat16)
    size = micro or place.pick(16_384, 1024)
    batch = max(1, int(0.9 * size / 256))
    generator = np.random.default_rng(3)
    lengths = generator.integers(192, 257, batch * (steps + 1))  # near one length: it is about memory, not padding
    records = random_tokens(place.work / "training", lengths, model.config.vocab_size)
    settings = TuningSettings(
        epochs=1, batch_size=batch, tokens_per_micro_batch=micro, gradient_checkpointing=recomputes
    )
    directory = place.work / "training-run"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    site = TrainingSite(directory, place.trainer, "training")
    with_lora = add_lora(random_model(shape, place.device, torch.bfloat16), settings, 0)
    memory = TrainingMemory.of(with_lora, predicted_share(records))
    del with_lora
    free()
    weights = sum(weight.nbytes for weight in model.parameters())
    try:
        took, facts = timed_training(model, records, settings, site)
    except UserError:  # not even a single record
        return {"parts": 2}
    chosen = MicroBatches(facts["tokens_per_micro_batch"], facts["gradient_checkpointing"])
    peak = torch.cuda.max_memory_allocated() if place.on_gpu else 0
    return {
        "tokens_per_second": facts["tokens"] / took, "parts": facts["micro_batch_parts"],
        "tokens_per_micro_batch": chosen.tokens, "recomputes": chosen.recomputes,
        "foretold_mib": (weights + memory.needed(chosen)) / 2**20, "peak_mib": peak / 2**20, "seconds": took,
        "memory": asdict(memory),
    }  # fmt: skip


def timed_training(
    model: Any, records: TokenizedRecords, settings: TuningSettings, site: TrainingSite
) -> tuple[float, dict[str, Any]]:
    """`train_model` as a whole: measuring memory, training, checking and saving the adapter."""
    facts: dict[str, Any] = {}

    def work() -> None:
        _, found = train_model(model, records, range(len(records)), settings, site, seed=0)
        facts.update(found)

    return seconds(work), facts


def trl(place: Place) -> dict[str, Any]:
    """LoRA training against TRL's SFTTrainer on the same tokens, labels and settings, where trl can be imported."""
    if importlib.util.find_spec("trl") is None:
        return {"ok": None, "rows": [["LoRA training against TRL", "trl is not installed here", "≥ 1.0"]]}
    dtype = place.pick(torch.bfloat16, torch.float32)
    folder = model_folder(place, place.pick("1b", "tiny"), dtype)
    source = find_model(ModelSettings(path=str(folder)), Store(place.work / "store"))
    vocabulary = SHAPES[place.pick("1b", "tiny")]["vocab_size"]
    records = random_tokens(place.work / "trl", lengths_like_instructions(place.pick(512, 8), 512), vocabulary)
    settings = TuningSettings(epochs=1, batch_size=place.pick(32, 4), gradient_checkpointing=False)

    def load() -> Any:
        free()
        model: Any = load_model(source, dtype)
        return model.to(place.device)

    result = against_trl.compare(
        load, folder, records, settings, trainer=place.trainer, python=sys.executable, rounds=place.pick(ROUNDS, 1),
        work=place.work / "trl-run",
    )  # fmt: skip
    rows = [[f"LoRA training, tokens/s: {name}", f"{rate:,.0f}", ""] for name, rate, _ in against_trl.rows_of(result)]
    rows.append([f"ours / TRL's fastest with the same steps ({result['fastest']})", f"{result['ratio']:.2f}", "≥ 1.0"])
    return {**result, "ok": result["ratio"] >= 1 if place.on_gpu else None, "rows": rows}


def less(place: Place) -> dict[str, Any]:
    """LESS's pass of gradients (rank 128, whole batches, one checkpoint) against TRIM's scoring pass, 1B-shaped."""
    from figures_less import less_pass
    from trim_lightning.engine.adam_moments import FILE
    from trim_lightning.models.adapter import apply_adapter
    from trim_lightning.tuning.callbacks import checkpoint_path
    from trim_lightning.tuning.run import TrainingSite, train_checkpoints

    shape = place.pick("1b", "tiny")
    model = random_model(shape, place.device, torch.bfloat16)
    vocabulary = model.config.vocab_size
    records = random_tokens(place.work / "less", lengths_like_instructions(place.pick(600, 16)), vocabulary)
    rank = place.pick(128, 8)
    settings = WarmupSettings(epochs=1, lora_rank=rank, lora_alpha=2 * rank, learning_rate=1e-3)
    folder = place.work / "less-checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    trainee = random_model(shape, place.device, torch.bfloat16)
    train_checkpoints(trainee, records, range(16), settings, TrainingSite(folder, place.trainer, "warm-up"), seed=0)
    del trainee
    free()
    point = checkpoint_path(folder, 1)
    adapted = apply_adapter(random_model(shape, place.device, torch.bfloat16), point)
    moments, bank = point / FILE, bank_for(model, place.pick(400, 50))
    less_pass(adapted, records, moments)
    score(model, records, bank)
    theirs, ours = in_turns(
        ROUNDS, [model, adapted], lambda: less_pass(adapted, records, moments), lambda: score(model, records, bank)
    )
    ratio = median([one / two for one, two in zip(theirs, ours, strict=True)])
    rows = [[f"LESS's pass at one checkpoint (rank {rank}) / TRIM's scoring pass", f"{ratio:.1f}", ""]]
    return {"ok": None, "rows": rows, "ratio": ratio, "less": theirs, "trim": ours, "tokens": records.total_tokens}
