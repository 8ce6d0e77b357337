"""Evaluation on two processes gives what one finds, however the two are started; a lost process costs little."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from running import run_train
from training.conftest import TrainingFiles

CHECKOUT = Path(__file__).parents[2]
# one thread each, and no launcher of the machine that runs the tests
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | {
    "OMP_NUM_THREADS": "1"
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
DDP = ["trainer=ddp_cpu"]
FSDP = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2"]
Command = Callable[..., list[str]]


@pytest.fixture(scope="session")
def measured(training_files: TrainingFiles) -> list[str]:
    """Overrides that ask for every measure: losses, options, and answers in several batches."""
    many = training_files.root / "many.jsonl"
    lines = (training_files.root / "options.jsonl").read_text().splitlines()
    many.write_text("".join(f"{line}\n" for line in lines * 5))
    cut = "train.tokens_per_micro_batch=150"  # which else depends on the number of processes, and dropout on it
    return [f"evaluation.path={many}", "evaluation.exact_match=always", "evaluation.max_new_tokens=8", cut]


@pytest.fixture(scope="session")
def alone(training_files: TrainingFiles, measured: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run in one process."""
    root = tmp_path_factory.mktemp("alone")
    return run_train(
        *training_files.select, *measured, output_dir=root / "output", store_dir=training_files.store
    ).directory


@pytest.fixture
def command(training_files: TrainingFiles, measured: list[str], tmp_path: Path) -> Command:
    """The command line of the same run with a store of its own."""

    def build(*overrides: str) -> list[str]:
        own = [value for value in training_files.select if not value.startswith("trainer=")]
        return [
            str(CHECKOUT / "train.py"), *own, *measured, f"paths.output_dir={tmp_path / 'output'}",
            f"paths.store_dir={tmp_path / 'store'}", f"hydra.run.dir={tmp_path / 'hydra'}", *overrides,
        ]  # fmt: skip

    return build


def run(command: list[str], cwd: Path) -> str:
    process = subprocess.Popen(
        command, cwd=cwd, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        told, _ = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the processes that it started as well
        raise
    assert process.returncode == 0, told[-3000:]
    return told


def predictions(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "predictions.jsonl").read_text().splitlines()]


def assert_same_evaluation(one: Path, two: Path) -> None:
    first, second = predictions(one), predictions(two)
    assert len(first) == 45
    for left, right in zip(first, second, strict=True):
        for name in ("nll_before", "nll"):
            # summed over a record, after two trainings whose weights agree within 1e-5
            assert left.pop(name) == pytest.approx(right.pop(name), rel=1e-6, abs=1e-5)
        assert left == right
        assert {"prediction", "choice"} <= set(left)
    metrics = [json.loads((path / "metrics.json").read_text()) for path in (one, two)]
    for name in ("eval/nll_before", "eval/nll", "eval/option_accuracy", "eval/exact_match"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], abs=1e-5)


@pytest.mark.parametrize(
    ("launcher", "trainer"),
    [
        pytest.param(TORCHRUN, DDP, id="torchrun", marks=pytest.mark.slow),
        pytest.param([sys.executable], DDP, id="spawned", marks=pytest.mark.slow),
        pytest.param(TORCHRUN, FSDP, id="fsdp", marks=pytest.mark.slow),
    ],
)
def test_two_processes_measure_as_one(
    launcher: list[str], trainer: list[str], alone: Path, command: Command, tmp_path: Path
) -> None:
    told = run([*launcher, *command(*trainer)], tmp_path)
    assert_same_evaluation(alone, tmp_path / "output")
    coresets = [(path / "selection/coreset.jsonl").read_bytes() for path in (alone, tmp_path / "output")]
    assert coresets[0] == coresets[1]
    assert told.count("INFO    evaluate_after:") == 1, "only one process tells"
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert not [path for path in files if {"partial", "passes"} & set(path.parts)]


@pytest.mark.slow
def test_a_lost_process_costs_what_it_was_computing(alone: Path, command: Command, tmp_path: Path) -> None:
    whole = [*TORCHRUN, *command(*DDP)]
    process = subprocess.Popen(
        whole, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    end = time.monotonic() + 300
    while not list((tmp_path / "store/partial").glob("evaluate-*/passes/losses/values-*")):
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)
    (helper,) = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1"]
    helper.kill()
    told, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Traceback" not in told.partition("torch/distributed/elastic")[0], told[-3000:]
    kept = {path.name for path in (tmp_path / "store/partial").glob("evaluate-*/passes/losses/values-*")}
    assert kept
    run(whole, tmp_path)
    assert_same_evaluation(alone, tmp_path / "output")
