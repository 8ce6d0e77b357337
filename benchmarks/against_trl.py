"""``make trl``: LoRA training against TRL's SFTTrainer, in turns, on the same tokens, labels and settings.

TRL runs in an environment of its own (``build/trl``), with the same torch, transformers and peft. It is measured in
several ways of cutting a step, and the fastest one counts. ``python against_trl.py tiny`` shows that all runs through.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import materials
from gpu_materials import environment, quiet
from materials import ROOT, WORK, median, seconds
from passes import CPU
from trim_lightning.engine.labels import collate
from trim_lightning.files.atomic import write_text
from trim_lightning.settings.schema import TuningSettings
from trim_lightning.tokens.tokenized import TokenizedRecords
from trim_lightning.tuning.run import TrainingSite, train_model

PYTHON = ROOT / "build" / "trl" / "bin" / "python"
# how TRL cuts a step; those with "same" take the same records a step as ours
VARIANTS: dict[str, dict[str, Any]] = {
    "one batch a step": {"same": True},
    "four accumulated batches a step": {"parts": 4, "same": True},
    "four accumulated batches, no autocast": {"parts": 4, "autocast": False, "same": True},
    "grouped by length": {"sampling": "group_by_length", "same": True},
    "packed": {"packing": True, "same": False},  # fewer steps, and without flash attention records see each other
}


class TrlSide:
    """A process that trains with TRL when asked; see `trl_side.py`."""

    def __init__(self, python: Path | str, job: Mapping[str, Any], file: Path) -> None:
        write_text(json.dumps(job), file)
        variables = {
            name: value for name, value in environment().items() if name != "PYTHONPATH" or python == sys.executable
        }
        self._process = subprocess.Popen(
            [str(python), str(Path(__file__).with_name("trl_side.py")), str(file)], env=variables, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file.with_suffix(".log").open("w"),
        )  # fmt: skip
        self.log = file.with_suffix(".log")
        self.versions = self._answer()

    def train(self, variant: str) -> dict[str, Any]:
        """One training; it waits for its end."""
        assert self._process.stdin is not None
        self._process.stdin.write(variant + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"TRL's process ended:\n{self.log.read_text()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> TrlSide:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def compare(
    load: Callable[[], Any],
    folder: Path,
    records: TokenizedRecords,
    settings: TuningSettings,
    *,
    trainer: Mapping[str, Any],
    python: Path | str,
    rounds: int,
    work: Path,
) -> dict[str, Any]:
    """Both sides in turns, round after round, once each beforehand.

    Ours is `train_model` as a whole: measuring memory, training, checking and saving the adapter. TRL's is `train`.

    Args:
        load: Gives our model, fresh, untimed.
        folder: The same model for TRL.
        records: Tokens and labels of both.
        settings: Of both.
        trainer: Arguments of the Lightning Trainer.
        python: A Python that has TRL.
        rounds: Times that each side trains.
        work: For what they leave behind.

    Returns:
        ``ratio``: TRL's time a token, in its fastest way with the same steps, over ours; ``processor_ratio``: that of
        the processor's time, which other processes disturb less; and what they are made of.
    """
    work.mkdir(parents=True, exist_ok=True)
    pairs = [collate(records, [row]) for row in range(len(records))]
    lines = [{"input_ids": ids[0].tolist(), "labels": labels[0].tolist()} for ids, labels in pairs]
    steps = settings.epochs * -(-len(records) // settings.batch_size)
    dtype, on_gpu = load().dtype, torch.cuda.is_available()
    job = {
        "model": str(folder), "records": lines, "work": str(work), "on_gpu": on_gpu,
        "bfloat16": dtype == torch.bfloat16, "longest": int(records.lengths.max()),
        "threads": torch.get_num_threads(), "variants": VARIANTS,
        "settings": {
            **asdict(settings), "gradient_checkpointing": bool(settings.gradient_checkpointing),
            "warmup_steps": round(settings.warmup_ratio * steps),
        },
    }  # fmt: skip
    facts: dict[str, Any] = {}

    def ours(model: Any) -> None:
        directory = work / "ours"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        wrapped, found = train_model(
            model, records, range(len(records)), settings, TrainingSite(directory, trainer, "training"), seed=0
        )
        del wrapped
        facts.update(found)

    with TrlSide(python, job, work / "job.json") as theirs:
        variants = [name for name in VARIANTS if "error" not in (told := theirs.train(name)) or note(facts, name, told)]
        ours(load())  # both are warm
        taken: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
        our_seconds, our_processor = [], []
        for _ in range(rounds):
            model = load()
            processor = time.process_time()
            our_seconds.append(seconds(partial(ours, model)))
            our_processor.append(time.process_time() - processor)
            for name in variants:
                taken[name].append(theirs.train(name))
        versions = theirs.versions
    our_rate = facts["tokens"] / median(our_seconds)
    rates = {name: median([line["tokens"] / line["seconds"] for line in lines]) for name, lines in taken.items()}
    same = {name: rate for name, rate in rates.items() if VARIANTS[name]["same"]}
    fastest = max(same, key=lambda name: same[name])
    ratios = [
        (line["seconds"] / line["tokens"]) / (ours_took / facts["tokens"])
        for line, ours_took in zip(taken[fastest], our_seconds, strict=True)
    ]
    return {
        "ratio": median(ratios), "wanted": ">= 1.0, aim 1.2", "rounds": ratios, "fastest": fastest,
        "tokens_per_second": {"ours": our_rate, **rates}, "our_seconds": our_seconds, "trl": taken,
        "versions": versions, "records": len(records), "tokens": facts["tokens"], "settings": asdict(settings),
        "processor_ratio": median([line["processor_seconds"] / line["tokens"] for line in taken[fastest]])
        / (median(our_processor) / facts["tokens"]),
        "our_processor_seconds": our_processor, "our_loss": facts["loss"],
        "trained_tokens": facts["trained_tokens"], "steps": facts["steps"],
        "micro_batch": facts["tokens_per_micro_batch"], "failed": facts.get("failed", {}),
    }  # fmt: skip


def note(facts: dict[str, Any], name: str, told: dict[str, Any]) -> bool:
    """Keep why a way of TRL's does not run here; it is left out."""
    facts.setdefault("failed", {})[name] = told["error"]
    return False


def rows_of(result: Mapping[str, Any]) -> list[list[Any]]:
    """A comparison as lines of a table: what, tokens a second, ours over it."""
    rates = result["tokens_per_second"]
    return [
        [name if name == "ours" else f"TRL, {name}", round(rate, 1), round(rates["ours"] / rate, 2)]
        for name, rate in rates.items()
    ]


def main(arguments: list[str]) -> int:
    """Take the figure on SmolLM2-135M: ``records=80 batch=16 rounds=3 micro=512``; or on a tiny model: ``tiny``."""
    options = dict(word.split("=", 1) for word in arguments if "=" in word)
    tiny = "tiny" in arguments
    if not PYTHON.exists():
        print("error: no environment with TRL in build/trl; run make trl", file=sys.stderr)
        return 2
    quiet()
    WORK.mkdir(parents=True, exist_ok=True)
    source = materials.tiny() if tiny else materials.smollm2()
    number = int(options.get("records", 8 if tiny else 80))
    records = materials.tokens_of(source, number, "trl", max_length=512)
    dtype = torch.float32 if tiny else materials.best_dtype()
    size = int(options.get("batch", 4 if tiny else 16))
    micro = int(options["micro"]) if "micro" in options else None
    settings = TuningSettings(epochs=1, batch_size=size, gradient_checkpointing=False, tokens_per_micro_batch=micro)
    result = compare(
        lambda: materials.model_of(source, dtype), source.directory, records, settings,
        trainer=CPU, python=PYTHON, rounds=int(options.get("rounds", 1 if tiny else 3)), work=WORK / "trl",
    )  # fmt: skip
    result |= {"machine": materials.machine(), "dtype": str(dtype)}
    name = "trl-tiny.json" if tiny else "trl.json"
    write_text(json.dumps(result, indent=1) + "\n", WORK / name)
    print(tabulate(rows_of(result), headers=["LoRA training", "tokens/s", "ours / it"]))
    told = f"{result['ratio']:.2f} ({result['wanted']}), in processor time {result['processor_ratio']:.2f}"
    print(f"\nours / TRL's fastest with the same steps, {result['fastest']}: {told}")
    print(f"file: {(WORK / name).relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
