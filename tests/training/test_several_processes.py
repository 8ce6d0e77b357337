"""The commands with several processes: torchrun's, and those that a training starts itself."""

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
import torch
from safetensors.torch import load_file

from training.conftest import TrainingFiles

CHECKOUT = Path(__file__).parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | {
    "OMP_NUM_THREADS": "1"
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
SHORT = ["train.batch_size=6", "train.tokens_per_micro_batch=60", "train.epochs=2", "train.lora_dropout=0.2"]
Command = Callable[..., list[str]]


@pytest.fixture
def command(training_files: TrainingFiles, tmp_path: Path) -> Command:
    """The command line of a training, with a store and an output directory of their own by name."""

    def line(name: str, given: list[str], *overrides: str) -> list[str]:
        return [
            str(CHECKOUT / "train.py"), *given, *SHORT, f"paths.output_dir={tmp_path / name}", "logger=csv",
            f"paths.store_dir={tmp_path / name}-store", f"hydra.run.dir={tmp_path / name}-hydra", *overrides,
        ]  # fmt: skip

    return line


def run(arguments: list[str], cwd: Path, code: int | None = 0) -> str:
    process = subprocess.Popen(
        arguments, cwd=cwd, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        told, _ = process.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == code if code is not None else process.returncode, told[-3000:]
    return told


def metrics(directory: Path) -> dict[str, Any]:
    found = json.loads((directory / "metrics.json").read_text())
    return {name: value for name, value in found.items() if "seconds" not in name}


def assert_same(one: Path, two: Path) -> None:
    assert metrics(two) == pytest.approx(metrics(one), abs=1e-5)
    expected, found = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (one, two))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)
    curves = [(folder / "training/metrics.csv").read_text().splitlines() for folder in (one, two)]
    assert len(curves[0]) == len(curves[1]) > 2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["spawned", "torchrun"])
def test_selection_warm_up_and_training_on_two_processes(
    launcher: str, training_files: TrainingFiles, command: Command, tmp_path: Path
) -> None:
    given = [*training_files.select, "warmup.fraction=0.5"]
    given = [value for value in given if not value.startswith(("trainer=", "logger=", "warmup="))]
    given.append(training_files.held_out("plain"))
    run([sys.executable, *command("one", given, "trainer=cpu")], tmp_path)
    start = TORCHRUN if launcher == "torchrun" else [sys.executable]
    told = run([*start, *command("two", given, "trainer=ddp_cpu")], tmp_path)
    assert_same(tmp_path / "one", tmp_path / "two")
    for stage in ("warmup", "finetune"):
        (entry,) = (tmp_path / "two-store" / stage).iterdir()
        assert json.loads((entry / "entry.json").read_text())["facts"]["processes"] == 2
    assert told.count("fine-tune: LoRA on") == 1, "only one process tells"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["spawned", "torchrun"])
def test_a_killed_process_ends_the_command_and_loses_nothing(
    launcher: str, training_files: TrainingFiles, command: Command, tmp_path: Path
) -> None:
    given = [value for value in training_files.train if not value.startswith(("trainer=", "logger="))]
    start = TORCHRUN if launcher == "torchrun" else [sys.executable]
    often = ["trainer=ddp_cpu", "train.checkpoint_seconds=0.00001", "train.epochs=15"]
    line = [*start, *command("cut", given, *often)]
    process = subprocess.Popen(
        line, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 200
    while not (checkpoint := list((tmp_path / "cut-store").glob("partial/finetune-*/resume.ckpt"))):
        assert time.monotonic() < end, "no checkpoint"
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [one for one in children if any(word in one.cmdline() for word in ("--multiprocessing-fork", line[-1]))]
    workers[-1].send_signal(signal.SIGKILL)
    told, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    if launcher == "spawned":
        assert process.returncode == 2
        assert told.splitlines()[-1].startswith("error: trainer.devices: one of the training's processes was ended")
        assert "Traceback" not in told
    else:  # torchrun adds lines of its own
        assert told.count("another process of this command has ended") == 1
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert checkpoint[0].exists()
    told = run(line, tmp_path)
    assert "fine-tune: resuming from its last checkpoint" in told
