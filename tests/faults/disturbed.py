"""Runs in which something goes wrong at a chosen moment, and what must be true of them afterwards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_models import build_tiny_model, write_records
from trim_lightning.store.inventory import damage, items
from trim_lightning.store.receipt import RECEIPT

SECONDS = 120  # after which a run counts as hung
SAME = (
    "selection/scores.parquet", "selection/coreset.jsonl", "selection/fingerprints.safetensors", "predictions.jsonl",
    "adapter/adapter_model.safetensors",
)  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        code: Its exit code, negative for a signal.
        error: Standard error.
        out: Standard output.
        after: Seconds from the fault to the end; None if the fault never came.
        calls: Calls of the point, if they were counted.
    """

    code: int
    error: str
    out: str
    after: float | None
    calls: int

    @property
    def lines(self) -> list[str]:
        """Lines of standard error that begin with ``error:``."""
        return [line for line in self.error.splitlines() if line.startswith("error:")]


class Nursery:
    """A process that runs commands in children, one at a time; see ``nursery.py``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("nursery.py"))], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, cwd=root,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def run(self, program: str, arguments: list[str], folder: Path, label: str, **job: Any) -> Ended:
        """Run one command to its end.

        Args:
            program: ``trim-train`` or ``trim-select``.
            arguments: Its overrides.
            folder: Where it runs.
            label: Name of the files for its output, below the root.
            job: ``fault``, ``clock``, ``seconds``, ``kill_after``, ``environment``: see ``nursery.py``.
        """
        note = folder / "note"
        note.unlink(missing_ok=True)
        files = {name: str(self.root / f"{label}.{name}") for name in ("out", "err")}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = {
            "program": program, "arguments": arguments, "cwd": str(folder), "note": str(note), "seconds": SECONDS,
            **files, **job,
        }  # fmt: skip
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        error, out = (Path(files[name]).read_text(errors="replace") for name in ("err", "out"))
        assert not answer["hung"], f"hung: {error[-2000:]}"
        noted = float(note.read_text()) if note.exists() else None
        counted = (job.get("fault") or {}).get("action") == "count"
        after = answer["ended"] - noted if noted is not None and not counted else None
        return Ended(answer["code"], error, out, after, int(noted or 0) if counted else 0)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


class Undisturbed:
    """One command that goes through every stage, and its undisturbed results."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.counted: dict[str, int] = {}
        build_tiny_model("llama", root / "model")
        write_records(root / "pool.jsonl", 60, seed=1)
        write_records(root / "targets.jsonl", 6, seed=2, edge_cases=False)
        write_records(root / "held_out.jsonl", 9, seed=3, edge_cases=False)
        self.nursery = Nursery(root)
        self.baseline = self.folder("baseline")
        ended = self.run(self.baseline)
        assert ended.code == 0, ended.error
        self.results = {name: (self.baseline / "out" / name).read_bytes() for name in SAME}

    def folder(self, name: str) -> Path:
        """A new folder for a store and an output."""
        path = self.root / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    def finished_copy(self, name: str) -> Path:
        """A folder whose store has everything."""
        path = self.folder(name)
        shutil.copytree(self.baseline / "store", path / "store")
        return path

    def run(self, folder: Path, *more: str, fault: dict[str, Any] | None = None, **job: Any) -> Ended:
        """Warm-up, target pass, scoring, selection, report, evaluation, training, evaluation."""
        root = self.root
        arguments = [
            "model=hf", f"model.path={root / 'model'}", "model.dtype=float32", "pool=jsonl", "target=jsonl",
            f"pool.path={root / 'pool.jsonl'}", f"target.path={root / 'targets.jsonl'}", "selection.count=12",
            "saliency.num_layers=2", "trainer=cpu", "logger=none", "warmup=lora", "warmup.fraction=0.2",
            "warmup.epochs=1", "scoring.tokens_per_batch=256", "train.epochs=1", "train.learning_rate=0.01",
            f"evaluation.path={root / 'held_out.jsonl'}", "evaluation.exact_match=never",
            f"paths.store_dir={folder / 'store'}", f"hydra.run.dir={folder / 'out'}", *more,
        ]  # fmt: skip
        return self.nursery.run("trim-train", arguments, folder, folder.name, fault=fault, **job)

    def calls(self, point: str) -> int:
        """How often an undisturbed run comes by a point."""
        if point not in self.counted:
            ended = self.run(self.folder("counted"), fault={"point": point, "action": "count"})
            self.counted[point] = ended.calls
        return self.counted[point]

    def check_what_is_left(self, folder: Path) -> dict[Path, bytes]:
        """Nothing half written has a final name. Returns the receipts of finished stages."""
        store = folder / "store"
        receipts: dict[Path, bytes] = {}
        if store.is_dir():
            for item in items(store):
                if item.finished:
                    assert damage(store, item) is None, item
                    receipts[item.path] = (item.path / RECEIPT).read_bytes()
        for name, wanted in self.results.items():
            file = folder / "out" / name
            assert not file.exists() or file.read_bytes() == wanted, name
        for file in (folder / "out").rglob("*.json"):
            if not file.name.startswith("."):
                json.loads(file.read_text())
        return receipts

    def check_that_it_goes_on(self, folder: Path, receipts: dict[Path, bytes]) -> None:
        """The same command ends well, repeats nothing that was finished, and gives the undisturbed results."""
        ended = self.run(folder)
        assert ended.code == 0, ended.error
        for path, receipt in receipts.items():
            assert (path / RECEIPT).read_bytes() == receipt, f"{path} was built again"
        for name, wanted in self.results.items():
            assert (folder / "out" / name).read_bytes() == wanted, name
        assert all(damage(folder / "store", item) is None for item in items(folder / "store") if item.finished)
