"""A training that is cut off goes on from its last checkpoint and ends as an unbroken one does."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from running import run_train
from training.conftest import PowerCut, TrainingFiles
from trim_lightning.errors import UserError
from trim_lightning.pipeline.train import Training
from trim_lightning.tuning import run as tuning

TESTS = Path(__file__).resolve().parents[1]
OFTEN = "train.checkpoint_seconds=0.00001"  # a checkpoint after every step
STEPS = 4  # that a killed training has done: it is in its second epoch
CHILD = f"""
import json, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from running import run_train
from trim_lightning.tuning.lora_module import TuningModule

step, done = TuningModule.training_step, []
def stopped_step(self, batch, place):
    if len(done) == {STEPS}:
        print("waiting", flush=True)
        time.sleep(600)  # for the kill
    done.append(place)
    step(self, batch, place)
TuningModule.training_step = stopped_step

folder, *overrides = json.loads(sys.argv[1])
run_train(*overrides, output_dir=Path(folder, "broken"), store_dir=Path(folder, "store"))
"""


def outcome(training: Training) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What must not depend on kills: metrics without times, predictions and weights byte for byte."""
    files = [*training.directory.glob("*/*.safetensors"), *training.directory.glob("predictions.jsonl")]
    metrics = {name: value for name, value in training.metrics.items() if name != "train/seconds"}
    return metrics, {file.name: file.read_bytes() for file in files}


def killed(training_files: TrainingFiles, folder: Path, *overrides: str) -> Path:
    """Leave in a folder what a training process leaves that is killed between two of its steps."""
    given = [str(folder), *training_files.train, training_files.held_out("plain"), OFTEN, *overrides]
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, json.dumps(given)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert "waiting\n" in iter(process.stdout.readline, "")
    process.kill()
    assert process.wait() == -signal.SIGKILL
    return folder


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("train.epochs=3", "train.lora_dropout=0.3"), id="dropout"),
        pytest.param(
            ("train.epochs=5", "train.lora_dropout=0.1", "train.early_stop=4"), id="early-stop", marks=pytest.mark.slow
        ),
    ],
)
def test_a_killed_process_is_taken_up_where_it_was(
    options: tuple[str, ...], training_files: TrainingFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = (*training_files.train, training_files.held_out("plain"), *options)
    store = killed(training_files, tmp_path, *options) / "store"
    checkpoint = torch.load(next(store.glob("partial/finetune-*/resume.ckpt")), weights_only=True)
    unbroken = run_train(*overrides, output_dir=tmp_path / "unbroken", store_dir=tmp_path / "whole")
    assert checkpoint["trim_done"]["steps"] == STEPS < unbroken.metrics["train/steps"]
    assert not list(store.glob("finetune/*"))
    with caplog.at_level(logging.INFO, "trim_lightning"):
        resumed = run_train(*overrides, output_dir=tmp_path / "broken", store_dir=store)
    assert "resuming from its last checkpoint" in caplog.text
    assert outcome(resumed) == outcome(unbroken)
    assert not [path for path in store.glob("finetune/*/*") if "ckpt" in path.name]


Cut = Callable[[int], AbstractContextManager[None]]


def resumed_and_unbroken(
    training_files: TrainingFiles, directory: Path, cut: Cut, after: int, *overrides: str
) -> list[Training]:
    """The same training cut off after so many checkpoints and taken up again, and in one go."""
    given = (*training_files.train, OFTEN, training_files.held_out("plain"), *overrides)
    with cut(after):
        run_train(*given, output_dir=directory / "resumed", store_dir=directory / "broken")
    return [
        run_train(*given, output_dir=directory / name, store_dir=directory / store)
        for name, store in (("resumed", "broken"), ("unbroken", "whole"))
    ]


def test_full_fine_tuning_resumes(training_files: TrainingFiles, tmp_path: Path, power_cut: Cut) -> None:
    runs = resumed_and_unbroken(training_files, tmp_path, power_cut, 4, "train.mode=full", "train.epochs=2")
    assert outcome(runs[0]) == outcome(runs[1])


def test_several_micro_batches_a_step_resume(training_files: TrainingFiles, tmp_path: Path, power_cut: Cut) -> None:
    options = ("train.tokens_per_micro_batch=200", "train.length_grouped=true", "train.schedule=cosine")
    runs = resumed_and_unbroken(training_files, tmp_path, power_cut, 2, *options, "train.epochs=2")
    assert outcome(runs[0]) == outcome(runs[1])


def test_a_training_cut_off_after_its_last_step_is_whole(
    training_files: TrainingFiles, tmp_path: Path, power_cut: Cut
) -> None:
    runs = resumed_and_unbroken(training_files, tmp_path, power_cut, 3)  # 18 records, 8 a step, 1 epoch
    assert outcome(runs[0]) == outcome(runs[1])
    assert runs[0].metrics["train/loss"] is not None


@pytest.mark.slow
def test_a_decision_to_stop_survives(training_files: TrainingFiles, tmp_path: Path, power_cut: Cut) -> None:
    """Cut off right after the epoch that made the training stop: it must not go on with the next epoch."""
    bad = ("train.early_stop=1", "train.epochs=20", "train.learning_rate=0.3", "train.schedule=constant")
    unbroken = run_train(
        *training_files.train,
        training_files.held_out("plain"),
        *bad,
        output_dir=tmp_path / "first",
        store_dir=tmp_path / "first_store",
    )
    steps = unbroken.metrics["train/steps"]
    assert steps < 60
    runs = resumed_and_unbroken(training_files, tmp_path, power_cut, steps, *bad)
    assert outcome(runs[0]) == outcome(runs[1]) == outcome(unbroken)


def test_resuming_twice(training_files: TrainingFiles, tmp_path: Path, power_cut: Cut) -> None:
    given = (*training_files.train, OFTEN, "train.epochs=3", "train.lora_dropout=0.3")
    for after in (2, 3):
        with power_cut(after):
            run_train(*given, output_dir=tmp_path / "resumed", store_dir=tmp_path / "broken")
    resumed = run_train(*given, output_dir=tmp_path / "resumed", store_dir=tmp_path / "broken")
    unbroken = run_train(*given, output_dir=tmp_path / "unbroken", store_dir=tmp_path / "whole")
    assert outcome(resumed) == outcome(unbroken)


def test_a_half_written_checkpoint_is_no_part_of_the_result(
    training_files: TrainingFiles, tmp_path: Path, power_cut: Cut
) -> None:
    given = (*training_files.train, OFTEN, "train.epochs=2")
    with power_cut(1):
        run_train(*given, output_dir=tmp_path / "run", store_dir=tmp_path / "store")
    (workspace,) = (tmp_path / "store").glob("partial/finetune-*")
    (workspace / ".resume.ckpt.tmp").write_bytes(b"cut off while it was written")
    run_train(*given, "train.checkpoint_seconds=1000", output_dir=tmp_path / "run", store_dir=tmp_path / "store")
    (entry,) = (tmp_path / "store" / "finetune").iterdir()
    assert {path.name for path in entry.iterdir()} == {"adapter", "entry.json"}


def test_seconds_are_those_of_all_attempts(training_files: TrainingFiles, tmp_path: Path, power_cut: Cut) -> None:
    step = tuning.TuningModule.training_step

    def slow(self: tuning.TuningModule, batch: Any, place: int) -> None:
        time.sleep(0.3)
        step(self, batch, place)

    given = (*training_files.train, OFTEN)  # three steps
    with pytest.MonkeyPatch.context() as patch, power_cut(2):
        patch.setattr(tuning.TuningModule, "training_step", slow)
        run_train(*given, output_dir=tmp_path / "run", store_dir=tmp_path / "store")
    resumed = run_train(*given, output_dir=tmp_path / "run", store_dir=tmp_path / "store")
    assert resumed.metrics["train/seconds"] > 0.6


def test_nothing_final_is_there_while_a_training_is_unfinished(
    training_files: TrainingFiles, tmp_path: Path, power_cut: Cut
) -> None:
    with power_cut(1):
        run_train(*training_files.train, OFTEN, output_dir=tmp_path / "run", store_dir=tmp_path / "store")
    assert not list((tmp_path / "run").iterdir())


def fail(*_: Any) -> None:
    raise PowerCut


def test_a_failure_before_saving_repeats_nothing(
    training_files: TrainingFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (*training_files.train, OFTEN, "train.epochs=2")
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "require_effect", fail)
        with pytest.raises(PowerCut):
            run_train(*given, output_dir=tmp_path / "run", store_dir=tmp_path / "store")
    steps: list[int] = []
    step = tuning.TuningModule.training_step

    def counted(self: tuning.TuningModule, batch: Any, place: int) -> None:
        steps.append(place)
        step(self, batch, place)

    monkeypatch.setattr(tuning.TuningModule, "training_step", counted)
    resumed = run_train(*given, output_dir=tmp_path / "run", store_dir=tmp_path / "store")
    assert steps == []
    unbroken = run_train(*given, output_dir=tmp_path / "unbroken", store_dir=tmp_path / "whole")
    assert len(steps) == 6
    assert outcome(resumed) == outcome(unbroken)


def test_a_diverged_training_leaves_no_result(training_files: TrainingFiles, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="diverged"):
        run_train(
            *training_files.train, "train.learning_rate=1e30", output_dir=tmp_path / "run", store_dir=tmp_path / "store"
        )
    assert not list((tmp_path / "store").glob("finetune/*"))
    assert not list((tmp_path / "run").iterdir())
