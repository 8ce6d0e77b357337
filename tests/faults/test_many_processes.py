"""Eight processes at a time on one store and one output root, killed at random: the store stays sound."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from disturbed import SAME, Nursery

from cli.conftest import run_process
from tiny_models import build_tiny_model, write_records
from trim_lightning.store.inventory import damage, items

pytestmark = pytest.mark.faults

PROCESSES = 8
SECONDS = float(os.environ.get("TRIM_SOAK_SECONDS", "600"))
KILLED = 0.4  # of the runs
LATEST_KILL = 15.0  # seconds after the start; a run takes about as long among seven others
# stages in common: one warm-up for most, three passes, several poolings, one other method, two trainings
COMMANDS = {
    "mean": ["trim-select", "pooler=mean"],
    "max": ["trim-select", "pooler=max"],
    "one_layer": ["trim-select", "saliency.num_layers=1"],
    "prompts": ["trim-select", "scope=prompt"],
    "cold": ["trim-select", "warmup=none"],
    "rds": ["trim-select", "method=rds"],
    "less": ["trim-select", "method=less", "method.num_checkpoints=2"],
    "other_seed": ["trim-select", "seed=1"],
    "trained": ["trim-train", "train.epochs=1"],
    "trained_longer": ["trim-train", "train.epochs=3", "train.checkpoint_seconds=0.01"],
}


class Yard:
    """Inputs, a store and an output root.

    Attributes:
        root: All of it lies below.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        build_tiny_model("llama", root / "model")
        write_records(root / "pool.jsonl", 60, seed=1)
        write_records(root / "targets.jsonl", 6, seed=2, edge_cases=False)
        write_records(root / "held_out.jsonl", 9, seed=3, edge_cases=False)

    def arguments(self, name: str, store: Path, output: Path) -> list[str]:
        """The overrides of a command."""
        program, *own = COMMANDS[name]
        root = self.root
        training = [f"evaluation.path={root / 'held_out.jsonl'}", "evaluation.exact_match=never"]
        return [
            "model=hf", f"model.path={root / 'model'}", "model.dtype=float32", "pool=jsonl", "target=jsonl",
            f"pool.path={root / 'pool.jsonl'}", f"target.path={root / 'targets.jsonl'}", "selection.count=12",
            "trainer=cpu", "logger=none", "warmup=lora", "warmup.fraction=0.2", "warmup.epochs=1",
            "saliency.num_layers=2", "scoring.tokens_per_batch=256", *(training if program == "trim-train" else []),
            *own, f"paths.store_dir={store}", f"hydra.run.dir={output}",
        ]  # fmt: skip

    def work(self, number: int, until: float) -> list[tuple[str, Path, float | None, int, str]]:
        """Run commands until the time is over; each with its name, place, moment of the kill, exit code, error."""
        draw = random.Random(number)
        nursery = Nursery(self.root)
        runs = []
        while time.monotonic() < until:
            name = draw.choice(sorted(COMMANDS))
            kill = draw.uniform(0.2, LATEST_KILL) if draw.random() < KILLED else None
            output = self.root / "runs" / f"{number}-{name}"
            job = {} if kill is None else {"kill_after": kill}
            arguments = self.arguments(name, self.root / "store", output)
            ended = nursery.run(COMMANDS[name][0], arguments, self.root, f"process-{number}", **job)
            runs.append((name, output, kill, ended.code, ended.error))
        nursery.close()
        return runs


def test_many_processes_on_one_store(
    tmp_path: Path, count_fault: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    yard = Yard(tmp_path)
    until = time.monotonic() + SECONDS
    with ThreadPoolExecutor(PROCESSES) as threads:
        runs = [run for part in threads.map(lambda number: yard.work(number, until), range(PROCESSES)) for run in part]
    killed = [run for run in runs if run[3] == -9]
    for name, _, kill, code, error in runs:
        assert code == 0 or (code == -9 and kill is not None), (name, code, error[-3000:])
        assert "Traceback" not in error, error[-3000:]
    assert {name for name, *_ in runs} == set(COMMANDS) or SECONDS < 300
    count_fault("SIGKILL", "eight processes", len(killed))

    store = tmp_path / "store"
    finished = [item for item in items(store) if item.finished]
    assert finished
    assert [item for item in finished if damage(store, item)] == []
    verified = run_process(Path(sys.executable).with_name("trim-store"), "--store", str(store), "verify", cwd=tmp_path)
    assert verified.code == 0, verified.out + verified.err

    last = {output: (name, code) for name, output, _, code, _ in runs}
    nursery, compared = Nursery(tmp_path), 0
    for name in sorted(set(COMMANDS) & {name for name, _ in last.values()}):
        alone = tmp_path / "alone" / name
        arguments = yard.arguments(name, tmp_path / "alone_store", alone)
        ended = nursery.run(COMMANDS[name][0], arguments, tmp_path, "alone")
        assert ended.code == 0, ended.error
        files = [file for file in (*SAME, *(Path(file).name for file in SAME)) if (alone / file).is_file()]
        for output, (of, code) in last.items():
            for file in files if of == name else []:
                there = output / file
                assert there.is_file() or code != 0, there
                if there.is_file():  # a killed run may have left some of its files, but no other ones
                    assert there.read_bytes() == (alone / file).read_bytes(), there
                    compared += 1
    nursery.close()
    assert compared
    with capsys.disabled():
        print(
            f"\n{PROCESSES} processes, {SECONDS:g} s: {len(runs)} runs, {len(killed)} killed, "
            f"{len(finished)} entries sound, {compared} files as of a run alone"
        )
