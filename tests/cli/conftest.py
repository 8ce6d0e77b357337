"""Run ``trim-select`` in the test process, over a tiny model and small files."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tiny_models import build_tiny_model, write_records
from trim_lightning.cli.hydra_app import select_main

PROGRESS = re.compile(r"[a-z-]+: \d+% of ")
CONSOLE_SCRIPT = Path(sys.executable).with_name("trim-select")
FINAL_NAMES = (
    "scores.parquet", "coreset.jsonl", "token_scores.parquet", "target_tokens.parquet", "fingerprints.safetensors",
    "manifest.json", "local.json", "report.html", "metrics.csv",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and the text on standard output and error."""

    code: int
    out: str
    err: str

    @property
    def complaints(self) -> list[str]:
        """Lines on standard error, without the progress lines that a slow machine brings about."""
        return [line for line in self.err.splitlines() if not PROGRESS.match(line)]

    @property
    def last(self) -> str:
        """The last line of standard error."""
        lines = self.err.splitlines()
        return lines[-1] if lines else ""


@dataclass(frozen=True)
class Inputs:
    """A tiny model, a pool of 40 records and 8 targets on disk, and a stage store for the whole session."""

    root: Path

    @property
    def arguments(self) -> list[str]:
        """Overrides of a small selection; the model has 4 layers."""
        return [
            "model=hf", f"model.path={self.root / 'tiny'}", "model.dtype=float32",
            "pool=jsonl", f"pool.path={self.root / 'pool.jsonl'}",
            "target=jsonl", f"target.path={self.root / 'targets.jsonl'}",
            "saliency.num_layers=2", f"paths.store_dir={self.root / 'store'}",
        ]  # fmt: skip


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Built once for all tests of the command line."""
    root = tmp_path_factory.mktemp("inputs")
    build_tiny_model("llama", root / "tiny")
    write_records(root / "pool.jsonl", 40, seed=1, groups=("first", "second", "third"))
    write_records(root / "targets.jsonl", 8, seed=2, edge_cases=False, groups=("alpha", "beta"))
    return Inputs(root)


Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Run]:
    """``run(*arguments)`` is ``trim-select *arguments`` in ``tmp_path``, without a new process.

    With ``main=train_main`` it is ``trim-train``.
    """
    monkeypatch.chdir(tmp_path)
    root, ends = logging.getLogger(), {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)}
    handlers, level, environment = root.handlers[:], root.level, dict(os.environ)

    def run_here(*arguments: str, main: Callable[[], int] = select_main) -> Outcome:
        program = "trim-select" if main is select_main else "trim-train"
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main()
        return Outcome(code, out.getvalue(), err.getvalue())

    yield run_here
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    for number, end in ends.items():
        signal.signal(number, end)
    for name in set(os.environ) - set(environment):
        del os.environ[name]  # what monkeypatch deletes comes back


def run_process(
    *arguments: str | Path, cwd: Path, environment: dict[str, str] | None = None, timeout: float = 600
) -> Outcome:
    """Run a command in a process of its own."""
    done = subprocess.run(
        list(map(str, arguments)),
        cwd=cwd,
        env=dict(os.environ) if environment is None else environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def final_files(directory: Path) -> list[str]:
    """Results, and temporary files of theirs, anywhere below a directory."""
    return sorted(
        path.name
        for path in directory.rglob("*")
        if path.name in FINAL_NAMES or any(path.name.startswith(f".{name}.") for name in FINAL_NAMES)
    )
