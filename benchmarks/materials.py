"""What the benchmarks run on: the bundled model, tiny ones, and real or generated records."""

from __future__ import annotations

import gzip
import json
import os
import platform
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trim_lightning.engine.batches import ShardBatches, plan_shards
from trim_lightning.models.load import load_model, load_tokenizer
from trim_lightning.models.source import ModelSource, find_model
from trim_lightning.records.indexing import index
from trim_lightning.records.record_file import LineSource, ReadOptions
from trim_lightning.settings.schema import ModelSettings
from trim_lightning.store import Store
from trim_lightning.tokens.rendering import ChatRenderer
from trim_lightning.tokens.tokenized import TokenizedRecords, tokenize_records
from trim_lightning.trim.fingerprints import FingerprintBank, TargetTokens, build_bank

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "bench"


def smollm2() -> ModelSource:
    """The bundled SmolLM2-135M, converted once."""
    return find_model(ModelSettings(path="bundled:smollm2_135m"), Store(WORK / "store"))


def tiny() -> ModelSource:
    """A LLaMA of two layers and 64 hidden units with SmolLM2's tokenizer."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    directory = WORK / "tiny"
    if not (directory / "config.json").exists():
        torch.manual_seed(0)
        tokenizer = load_tokenizer(smollm2())
        config = LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=len(tokenizer), max_position_embeddings=2048,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return find_model(ModelSettings(path=str(directory)), Store(WORK / "store"))


def half_smollm2() -> Path:
    """SmolLM2-135M without the upper 15 of its 30 layers, as a model folder: a smaller model of another depth."""
    directory = WORK / "smollm2_half"
    if not (directory / "config.json").exists():
        model = model_of(smollm2(), torch.bfloat16)
        model.model.layers = model.model.layers[: model.config.num_hidden_layers // 2]
        model.config.num_hidden_layers = len(model.model.layers)
        model.config.layer_types = None  # one for each layer, derived when the model is loaded
        load_tokenizer(smollm2()).save_pretrained(directory)
        model.save_pretrained(directory)
    return directory


def pool_lines() -> list[str]:
    """The lines of the pool: real data where ``TRIM_DATA_DIR`` has them, else the built-in tasks."""
    folder = os.environ.get("TRIM_DATA_DIR")
    if folder and (Path(folder) / "pool.jsonl.gz").exists():
        with gzip.open(Path(folder) / "pool.jsonl.gz", "rt", encoding="utf-8") as file:
            return file.readlines()
    from trim_lightning.records.sources import open_records
    from trim_lightning.settings.schema import PoolSettings

    store = Store(WORK / "store")
    records = open_records(PoolSettings(source="generated", per_family=40), what="pool", seed=0, spool=store.spool)
    return [records.line(row).decode() + "\n" for row in range(len(records))]


def pool_name() -> str:
    """What `pool_lines` gives, for the table."""
    folder = os.environ.get("TRIM_DATA_DIR")
    return "shared pool" if folder and (Path(folder) / "pool.jsonl.gz").exists() else "generated pool"


def tokens_of(source: ModelSource, number: int, name: str, max_length: int = 2048) -> TokenizedRecords:
    """A seeded sample of the pool, tokenised; longer than the pool it repeats."""
    lines = pool_lines()
    random.Random(0).shuffle(lines)
    chosen = (lines * (1 + number // len(lines)))[:number]
    directory = WORK / f"tokens-{name}"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "pool.jsonl"
    path.write_text("".join(chosen), encoding="utf-8")
    return tokens_of_file(source, path, directory, max_length)


def tokens_of_file(source: ModelSource, path: Path, directory: Path, max_length: int = 2048) -> TokenizedRecords:
    """The records of a JSONL file, tokenised into a folder."""
    records = index(LineSource(path, str(path), path.name, "pool"), ReadOptions())
    tokenize_records(records, ChatRenderer(load_tokenizer(source), None), max_length, directory)
    return TokenizedRecords(directory)


def long_tokens(records: TokenizedRecords, number: int, length: int, directory: Path) -> TokenizedRecords:
    """Records of one length, made of the given ones' tokens end to end."""
    directory.mkdir(parents=True, exist_ok=True)
    flat = np.concatenate([records[row].token_ids for row in range(len(records))])
    flat = np.resize(flat, number * length).astype(np.int32)
    flat.tofile(directory / "token_ids.int32")
    np.full(len(flat), 1, np.uint8).tofile(directory / "roles.uint8")
    (np.arange(number + 1, dtype=np.int64) * length).tofile(directory / "offsets.int64")
    (directory / "summary.json").write_text(json.dumps({"truncated": 0, "unrendered": 0, "problems": []}))
    return TokenizedRecords(directory)


def bank_for(model: Any, classes: int = 400) -> FingerprintBank:
    """A bank of the size that ten targets give; what it holds does not change the time."""
    generator = torch.Generator().manual_seed(0)
    vocabulary, hidden = model.config.vocab_size, model.config.hidden_size
    token_ids = torch.randperm(vocabulary, generator=generator)[:classes].sort().values
    states = torch.randn(classes, hidden, generator=generator)
    return build_bank([TargetTokens(token_ids, states, torch.ones(classes))])


def batches_of(records: TokenizedRecords, tokens_per_batch: int) -> list[dict[str, Any]]:
    """All batches of a pass over some records, made beforehand."""
    plan = plan_shards(records.lengths, tokens_per_batch)
    batches = ShardBatches(records, plan, "all")
    return [batches[place] for place in range(len(batches))]


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call; a GPU is waited for."""
    synchronise()
    started = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - started


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turns(rounds: int, models: Sequence[Any], *works: Callable[[], Any]) -> list[list[float]]:
    """Times of several works, taken in turns so that a slow minute of the machine hits all of them.

    Args:
        rounds: Times that each work is done.
        models: Are put on the GPU before each work, untimed: a Lightning loop leaves its model on the CPU.
        *works: What is timed.
    """
    times: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for place, work in enumerate(works):
            if torch.cuda.is_available():
                for model in models:
                    model.to("cuda")
            times[place].append(seconds(work))
    return times


def median(values: Sequence[float]) -> float:
    """Median."""
    return float(np.median(values))


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    import lightning
    import transformers

    cpu = next(
        (line.split(":")[1].strip() for line in read("/proc/cpuinfo").splitlines() if line.startswith("model name")),
        platform.processor() or "unknown",
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lightning": lightning.__version__,
        "pool": pool_name(),
    }


def read(path: str) -> str:
    """Text of a file, empty if there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def best_dtype() -> torch.dtype:
    """The number format that the product takes here by itself."""
    from trim_lightning.models.precision import resolve_dtype

    return resolve_dtype("auto")


def model_of(source: ModelSource, dtype: torch.dtype, **keywords: Any) -> Any:
    """The model on the device that is there."""
    model: Any = load_model(source, dtype, **keywords)
    return model.cuda() if torch.cuda.is_available() else model
