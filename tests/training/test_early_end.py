"""A scheduler's signal: a training writes a checkpoint and ends, and the same command goes on from it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from training.conftest import Outcome, TrainingFiles
from trim_lightning.engine.ending import deferred
from trim_lightning.tuning.lora_module import TuningModule

CHECKOUT = Path(__file__).parents[2]
RARELY = "train.checkpoint_seconds=1000"  # a signal alone makes a checkpoint
OFTEN = "train.checkpoint_seconds=0.00001"  # so that a first one tells that the training has begun


def test_a_training_writes_a_checkpoint_before_it_ends_and_goes_on_from_it(
    training_files: TrainingFiles,
    command: Callable[..., Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = [*training_files.train, training_files.held_out("plain"), RARELY, "train.epochs=2", "train.lora_dropout=0.2"]
    step, begun = TuningModule.training_step, []

    def signalled(self: TuningModule, batch: dict[str, object], place: int) -> None:
        begun.append(self.done.steps)
        if len(begun) == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        step(self, batch, place)

    monkeypatch.setattr(TuningModule, "training_step", signalled)
    outcome = command(*line, "paths.output_dir=cut", "paths.store_dir=store")
    assert (outcome.code, outcome.last) == (
        130, "interrupted: finished work is kept; the same command goes on from there"
    )  # fmt: skip
    assert "Traceback" not in outcome.err
    assert begun == [0, 1, 2], "the step is finished, and no other begun"
    assert command(*line, "paths.output_dir=cut", "paths.store_dir=store").code == 0
    assert begun[3] == 3
    assert command(*line, "paths.output_dir=whole", "paths.store_dir=other").code == 0
    files = [(tmp_path / name / "adapter/adapter_model.safetensors").read_bytes() for name in ("cut", "whole")]
    assert files[0] == files[1]


def test_a_signal_that_nobody_handles_is_not_held_back() -> None:
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL
    with deferred():
        assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL


def test_a_handler_that_goes_on_does_not_make_half_a_training_a_result() -> None:
    heard = []

    def half_trained() -> None:
        with deferred() as ending:
            signal.raise_signal(signal.SIGUSR2)
            assert (heard, ending.asked) == ([], signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    try:
        with pytest.raises(KeyboardInterrupt):
            half_trained()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert heard == [signal.SIGUSR2]


def started(store: Path, line: list[str], cwd: Path) -> subprocess.Popen[str]:
    """A command whose fine-tuning has done a step."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    process = subprocess.Popen(
        line, cwd=cwd, env={**environment, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + 400
    while not list(store.glob("partial/finetune-*/resume.ckpt")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "no training"
        time.sleep(0.05)
    return process


@pytest.mark.slow
def test_processes_of_one_training_end_together(training_files: TrainingFiles, tmp_path: Path) -> None:
    given = [value for value in training_files.train if not value.startswith("trainer=")]
    line = [
        sys.executable, str(CHECKOUT / "train.py"), *given, "trainer=ddp_cpu", OFTEN, "train.epochs=15",
        "paths.output_dir=out", "paths.store_dir=store", "hydra.run.dir=hydra",
    ]  # fmt: skip
    process = started(tmp_path / "store", line, tmp_path)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGUSR1)
    told, _ = process.communicate(timeout=200)
    assert process.returncode == 130, told
    assert "Traceback" not in told
    assert "a signal asks for an early end; the checkpoint is written" in told
    assert not psutil.wait_procs(children, timeout=20)[1]
    assert list((tmp_path / "store").glob("partial/finetune-*/resume.ckpt"))
    again = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert again.returncode == 0, again.stderr
    assert "fine-tune: resuming from its last checkpoint" in again.stdout + again.stderr


@pytest.mark.slow
def test_submitit_puts_a_job_back_into_the_queue_after_its_checkpoint(
    training_files: TrainingFiles, tmp_path: Path
) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    line = [
        sys.executable, str(CHECKOUT / "train.py"), "-m", "hydra/launcher=submitit_local", *training_files.train,
        OFTEN, "train.epochs=30", "train.seed=0,1", "paths.store_dir=store", "hydra.sweep.dir=sweep",
    ]  # fmt: skip
    process = started(tmp_path / "store", line, tmp_path)
    tasks = [
        one for one in psutil.Process(process.pid).children(recursive=True) if "submitit.core._submit" in one.cmdline()
    ]
    for task in tasks:
        task.send_signal(signal.SIGUSR2)
    told, _ = process.communicate(timeout=400)
    assert process.returncode == 0, told
    logs = "".join(file.read_text() for file in (tmp_path / "sweep/.submitit").glob("*/*") if file.suffix != ".pkl")
    assert "Caught signal SIGUSR2" in logs
    assert "a signal asks for an early end; the checkpoint is written" in logs
    assert "fine-tune: resuming from its last checkpoint" in logs
    assert len(list((tmp_path / "sweep").glob("*/adapter/adapter_model.safetensors"))) == 2
