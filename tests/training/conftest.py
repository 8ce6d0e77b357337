"""A tiny model, a coreset and held-out records on disk, and runs of ``train.py`` over them."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lightning import LightningModule, Trainer

from running import run_train
from tiny_models import build_tiny_model, write_records
from trim_lightning.cli.hydra_app import train_main
from trim_lightning.pipeline.train import Training
from trim_lightning.tuning.callbacks import PeriodicCheckpoint


@dataclass(frozen=True)
class TrainingFiles:
    """Files that the tests of training share.

    Attributes:
        root: Holds ``model``, ``pool.jsonl``, ``targets.jsonl``, ``coreset.jsonl`` and the held-out records
            ``plain.jsonl``, ``numbers.jsonl`` (with ``answer``), ``options.jsonl`` (with ``choices``).
        store: A stage store for the whole session.
    """

    root: Path
    store: Path

    @property
    def model(self) -> list[str]:
        """Overrides that choose the tiny model."""
        return ["model=hf", f"model.path={self.root / 'model'}", "model.dtype=float32", "trainer=cpu", "logger=none"]

    @property
    def select(self) -> list[str]:
        """Overrides of a small selection and a short training."""
        return [
            *self.model, "pool=jsonl", f"pool.path={self.root / 'pool.jsonl'}", "target=jsonl",
            f"target.path={self.root / 'targets.jsonl'}", "warmup=none", "saliency.num_layers=2",
            "selection.count=10", "train.learning_rate=0.01", "train.epochs=1",
        ]  # fmt: skip

    @property
    def train(self) -> list[str]:
        """Overrides of a short training on the ready coreset."""
        coreset = f"coreset.path={self.root / 'coreset.jsonl'}"
        return [*self.model, coreset, "train.learning_rate=0.01", "train.epochs=1"]

    def held_out(self, kind: str) -> str:
        """The override that names held-out records."""
        return f"evaluation.path={self.root / kind}.jsonl"


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Write records as JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture(scope="session")
def training_files(tmp_path_factory: pytest.TempPathFactory) -> TrainingFiles:
    """Built once."""
    root = tmp_path_factory.mktemp("training_files")
    build_tiny_model("llama", root / "model")
    write_records(root / "pool.jsonl", 40, seed=1)
    write_records(root / "targets.jsonl", 4, seed=2, edge_cases=False)
    write_records(root / "coreset.jsonl", 18, seed=4, edge_cases=False)
    plain = write_records(root / "plain.jsonl", 9, seed=3, edge_cases=False)
    write_lines(root / "numbers.jsonl", [{**record, "answer": str(row)} for row, record in enumerate(plain)])
    choices = ["apples", "twelve eggs", "a train"]
    options = [{**record, "choices": choices, "answer": choices[row % 3]} for row, record in enumerate(plain)]
    write_lines(root / "options.jsonl", options)
    return TrainingFiles(root, tmp_path_factory.mktemp("store"))


@pytest.fixture
def trained(training_files: TrainingFiles, tmp_path: Path) -> Callable[..., Training]:
    """``trained(*overrides, name="run")``: fine-tune on the ready coreset, in the shared store."""

    def run(*overrides: str, name: str = "run", store: Path | None = None) -> Training:
        return run_train(
            *training_files.train, *overrides, output_dir=tmp_path / name, store_dir=store or training_files.store
        )

    return run


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and the text on standard error."""

    code: int
    err: str

    @property
    def last(self) -> str:
        """The last line of standard error."""
        return (self.err.splitlines() or [""])[-1]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Outcome]]:
    """``command(*arguments)`` is ``trim-train *arguments`` in ``tmp_path``, without a new process."""
    monkeypatch.chdir(tmp_path)
    root, environment = logging.getLogger(), dict(os.environ)
    ends = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    handlers, level = root.handlers[:], root.level

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["trim-train", *arguments])
        err = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            code = train_main()
        return Outcome(code, err.getvalue())

    yield run
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    for number, handler in ends.items():
        signal.signal(number, handler)
    for name in set(os.environ) - set(environment):
        monkeypatch.delenv(name)


class PowerCut(Exception):
    """Ends a training in its midst."""


@pytest.fixture
def power_cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Any]:
    """``with power_cut(n):`` ends a training right after its n-th checkpoint."""

    @contextlib.contextmanager
    def cut(after: int) -> Iterator[None]:
        saves = 0
        original = PeriodicCheckpoint.on_train_batch_end

        def save_and_fail(self: PeriodicCheckpoint, trainer: Trainer, module: LightningModule, *arguments: Any) -> None:
            nonlocal saves
            before = self._last
            original(self, trainer, module, *arguments)
            saves += self._last != before
            if saves == after:
                raise PowerCut

        with monkeypatch.context() as patch:
            patch.setattr(PeriodicCheckpoint, "on_train_batch_end", save_and_fail)
            with pytest.raises(PowerCut):
                yield

    return cut
