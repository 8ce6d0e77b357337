"""Parts of the GPU kit that are right or wrong: agreement, bytes, memory of saliency, lack of memory."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from figures_memory import peak_mib, reset_peak, resident_mib
from gpu_materials import (
    Place,
    Warnings,
    free,
    lengths_like_instructions,
    limited,
    model_folder,
    random_model,
    random_tokens,
    run_command,
    write_record_file,
)
from materials import ROOT, seconds
from trim_lightning.engine.devices import Resources
from trim_lightning.engine.labels import collate
from trim_lightning.engine.modules import TargetPass
from trim_lightning.engine.response_loss import read_losses, run_loss_pass
from trim_lightning.engine.scoring_pass import ScoringRequest, run_scoring_pass
from trim_lightning.engine.target_pass import read_signals, run_target_pass
from trim_lightning.files.atomic import sha256_of
from trim_lightning.models.lora import add_lora
from trim_lightning.models.loss import last_hidden_states, summed_loss
from trim_lightning.settings.schema import SaliencySettings, TuningSettings
from trim_lightning.stages.fingerprints import banks_of, weigh
from trim_lightning.stages.token_scores import StoredPass
from trim_lightning.tokens.tokenized import TokenizedRecords
from trim_lightning.tuning.run import ADAPTER, TrainingSite, train_model

CLOSE = 1e-4  # share of the largest number within which float32 results of two devices agree
Numbers = dict[str, NDArray[Any]]


def agree(place: Place) -> dict[str, Any]:
    """CPU and GPU agree on saliency, fingerprints, scores, held-out loss and LoRA gradients."""
    torch.set_float32_matmul_precision("highest")  # no TF32
    torch.backends.cudnn.allow_tf32 = False
    shape = place.pick("small", "tiny")
    # the spread makes attention far from uniform at these widths
    model = random_model(shape, "cpu", torch.float32, initializer_range=place.pick(0.05, 0.15))
    vocabulary = model.config.vocab_size
    targets = random_tokens(place.work / "agree-targets", lengths_like_instructions(10, 256, 1), vocabulary)
    pool = random_tokens(place.work / "agree-pool", lengths_like_instructions(place.pick(200, 12), 512), vocabulary)
    on_cpu = replace(place, device=torch.device("cpu"))
    reference = numbers(on_cpu, copy.deepcopy(model), targets, pool, 2048)
    # without a GPU the other side is the CPU with other batches, so that there is a difference to see
    ours = numbers(place, copy.deepcopy(model), targets, pool, place.pick(32_768, 1024))
    half = numbers(place, model.to(torch.bfloat16), targets, pool, place.pick(32_768, 1024))
    exact, rough = ({name: distance(side[name], reference[name]) for name in reference} for side in (ours, half))
    return {
        "ok": max(exact.values()) <= CLOSE,
        "rows": [
            [f"{name}: distance of float32 / bfloat16 from the CPU's float32", f"{exact[name]:.1e} / {rough[name]:.1e}",
             f"≤ {CLOSE:.0e} in float32"]
            for name in reference
        ],
        "float32": exact, "bfloat16": rough, "distance": "largest difference over the largest number",
    }  # fmt: skip


def numbers(place: Place, model: Any, targets: TokenizedRecords, pool: TokenizedRecords, budget: int) -> Numbers:
    """What a selection and a training compute of a model on a device."""
    folder = place.work / "agree"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    layers = model.config.num_hidden_layers
    run_target_pass(model, targets, folder, resources=Resources(place.trainer, budget))
    signals = read_signals(folder)
    salient = weigh(signals, SaliencySettings(num_layers=min(6, layers)), "all")
    bank = banks_of(salient, {"": list(range(len(targets)))})[""]
    run_loss_pass(model, pool, folder / "losses", resources=Resources(place.trainer, budget))
    found: Numbers = {
        "row signal": np.concatenate([signal.row_signal.numpy().ravel() for signal in signals]),
        "column signal": np.concatenate([signal.column_signal.numpy().ravel() for signal in signals]),
        "saliency": np.concatenate([target.saliency.numpy() for target in salient]),
        "fingerprints": bank.vectors.numpy(),
        "scores": similarities(place, model, pool, bank, folder / "scores", budget),
        "held-out loss": read_losses(folder / "losses", pool),
    }
    found["LoRA gradients"] = gradients(model.to(place.device), pool)
    return found


def similarities(
    place: Place, model: Any, pool: TokenizedRecords, bank: Any, folder: Path, budget: int, **trainer: Any
) -> NDArray[np.float64]:
    """Every token's similarity, in the pool's order, of a scoring pass as the product runs it."""
    folder.mkdir(parents=True, exist_ok=True)
    resources = Resources({**place.trainer, **trainer}, budget, num_workers=0)
    run_scoring_pass(model, pool, {folder: ScoringRequest({"": bank}, "embedding", "all")}, resources=resources)
    passed = StoredPass(folder, pool)
    found: dict[int, NDArray[np.float64]] = {}
    for shard in map(passed.shard, range(len(passed))):
        parts = np.split(shard.bank(0).similarity, np.cumsum(shard.lengths)[:-1])
        found.update(zip(shard.rows.tolist(), parts, strict=True))
    shutil.rmtree(folder)
    return np.concatenate([found[row] for row in sorted(found)])


def gradients(model: Any, pool: TokenizedRecords) -> NDArray[np.float64]:
    """Gradients of fresh LoRA matrices, the B ones moved off zero, from one batch of eight records."""
    wrapped: Any = add_lora(model, TuningSettings(lora_dropout=0.0), seed=0)
    draw = torch.Generator().manual_seed(2)
    trained = [weight for weight in wrapped.parameters() if weight.requires_grad]
    for name, weight in wrapped.named_parameters():
        if weight.requires_grad and "lora_B" in name:
            weight.data.copy_(0.02 * torch.randn(weight.shape, generator=draw))
    input_ids, labels = (part.to(model.device) for part in collate(pool, range(8)))
    summed_loss(wrapped.get_base_model(), input_ids, labels).backward()
    return np.concatenate([weight.grad.double().cpu().numpy().ravel() for weight in trained])


def distance(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Largest difference over the largest number; infinite for other shapes or what is not finite."""
    if found.shape != wanted.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found.astype(np.float64) - wanted).max() / np.abs(wanted).max())


def same_bytes(place: Place) -> dict[str, Any]:
    """The same selection twice, in two processes with a store each, with and without a warm-up."""
    model = model_folder(place, place.pick("small", "tiny"))
    pool = write_record_file(place.work / "bytes" / "pool.jsonl", place.pick(400, 30), 1)
    targets = write_record_file(place.work / "bytes" / "targets.jsonl", 8, 2)
    equal = {}
    for warmup in place.pick(("none", "lora"), ("none",)):
        digests = []
        for attempt in ("one", "two"):
            folder = place.work / "bytes" / f"{warmup}-{attempt}"
            shutil.rmtree(folder, ignore_errors=True)
            run_command(
                place,
                [str(ROOT / "select.py"), "model=hf", f"model.path={model}", "pool=jsonl", f"pool.path={pool}",
                 "target=jsonl", f"target.path={targets}", f"warmup={warmup}", "selection.count=10", "logger=none",
                 f"saliency.num_layers={place.pick(6, 2)}", f"trainer={'gpu' if place.on_gpu else 'cpu'}",
                 f"paths.output_dir={folder / 'output'}", f"paths.store_dir={folder / 'store'}"],
            )  # fmt: skip
            digests.append(sha256_of(folder / "output" / "scores.parquet"))
        equal[warmup] = digests[0] == digests[1]
    rows = [[f"scores.parquet of two runs, warmup={name}", "same bytes" if same else "differ", "same bytes"]
            for name, same in equal.items()]  # fmt: skip
    return {"ok": all(equal.values()), "rows": rows, "equal": equal}


def saliency_memory(place: Place) -> dict[str, Any]:
    """Peak memory of the target pass over one sequence, by its length, beside that of a plain forward pass."""
    model = random_model(place.pick("1b", "tiny"), place.device, place.pick(torch.bfloat16, torch.float32))
    run, lines = TargetPass(model), []
    for length in place.pick((2048, 4096, 8192, 16_384, 32_768), (64, 128, 256)):
        input_ids = torch.randint(10, model.config.vocab_size, (1, length), device=place.device)
        batch = {
            "input_ids": input_ids, "lengths": torch.tensor([length], device=place.device),
            "roles": torch.ones_like(input_ids, dtype=torch.uint8), "rows": torch.tensor([0]),
        }  # fmt: skip
        line: dict[str, Any] = {"tokens": length}
        with torch.inference_mode():
            last_hidden_states(model, input_ids[:, :64])
            works = {
                "plain": lambda ids=input_ids: last_hidden_states(model, ids),
                "saliency": lambda one=batch: run.predict_step(one, 0),
            }
            for name, work in works.items():
                free()
                before = resident_mib()
                reset_peak()
                line[f"{name}_seconds"] = seconds(work)
                line[f"{name}_mib"] = peak_mib() - before
        lines.append(line)
    twice = lines[-1]["saliency_mib"] / max(lines[-2]["saliency_mib"], 1e-9)
    rows = [
        [f"{line['tokens']:,} tokens: memory above the weights with saliency / without",
         f"{line['saliency_mib']:,.0f} / {line['plain_mib']:,.0f} MiB", ""]
        for line in lines
    ]  # fmt: skip
    rows.append(["memory at the longest / at half its length (4 would be quadratic)", f"{twice:.2f}", "≤ 2.4"])
    # a process's memory says nothing at tiny sizes
    return {"ok": twice <= 2.4 if place.on_gpu else None, "rows": rows, "lengths": lines}


def out_of_memory(place: Place) -> dict[str, Any]:
    """Memory really runs out, in a pass and in a training: both go on in parts, with the same results."""
    in_pass, in_training = pass_without_memory(place), training_without_memory(place)
    rows = [
        ["pass: batches halved, largest change of a similarity", f"{in_pass['halved']}, {in_pass['change']:.1e}",
         "≥ 1, ≤ 1e-05"],
        ["training: parts of a micro-batch, change of the adapter", f"{in_training['parts']}, "
         f"{in_training['change']:.1e}", "≥ 2, ≤ 1e-03"],
    ]  # fmt: skip
    good = in_pass["halved"] >= 1 and in_pass["change"] <= 1e-5
    good = good and in_training["parts"] >= 2 and in_training["change"] <= 1e-3
    return {"ok": good, "rows": rows, "pass": in_pass, "training": in_training}


def pass_without_memory(place: Place) -> dict[str, Any]:
    """A scoring pass with all memory, and with its weights and three fifths of what it took above them."""
    from materials import bank_for

    model = random_model(place.pick("small", "tiny"), place.device, torch.float32)
    lengths = lengths_like_instructions(place.pick(1200, 24), 512)
    pool = random_tokens(place.work / "short-pool", lengths, model.config.vocab_size)
    bank, budget = bank_for(model, place.pick(400, 50)), place.pick(65_536, 2048)
    weights = sum(weight.nbytes for weight in model.parameters())

    def once() -> NDArray[np.float64]:
        return similarities(place, model, pool, bank, place.work / "short-scores", budget)

    free()
    whole, limit = once(), between(weights)
    with limited(place, limit, 2), Warnings("trim_lightning.engine.memory", "is run in halves") as halved:
        parts = once()
    return {"halved": halved.number, "change": float(np.abs(whole - parts).max()), "limit_mib": limit / 2**20}


def training_without_memory(place: Place) -> dict[str, Any]:
    """A LoRA training with all memory, and with less."""
    from safetensors.torch import load_file

    shape, budget = place.pick("small", "tiny"), place.pick(16_384, 1024)
    lengths = lengths_like_instructions(place.pick(256, 12), 512)
    settings = TuningSettings(
        epochs=1, batch_size=place.pick(128, 6), lora_dropout=0.0, tokens_per_micro_batch=budget,
        gradient_checkpointing=False,
    )  # fmt: skip

    def once(name: str, model: Any) -> tuple[Mapping[str, Any], dict[str, torch.Tensor]]:
        pool = random_tokens(place.work / "short-training", lengths, model.config.vocab_size)
        directory = place.work / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        site = TrainingSite(directory, place.trainer, "training")
        _, facts = train_model(model, pool, range(len(pool)), settings, site, seed=0)
        return facts, load_file(directory / ADAPTER / "adapter_model.safetensors")

    model = random_model(shape, place.device, torch.float32)
    weights = sum(weight.nbytes for weight in model.parameters())
    free()
    whole, expected = once("training-whole", model)
    limit = between(weights)
    model = random_model(shape, place.device, torch.float32)
    with limited(place, limit, 2):
        parts, found = once("training-parts", model)
    change = max(float((found[name] - value).norm() / value.norm()) for name, value in expected.items())
    return {
        "parts": parts["micro_batch_parts"], "change": change, "loss": [whole["loss"], parts["loss"]],
        "limit_mib": limit / 2**20,
    }  # fmt: skip


def between(weights: float) -> float:
    """Bytes between those of the weights and the peak so far: enough for parts, too few for the whole."""
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 2 * weights
    return weights + 0.6 * (peak - weights)
