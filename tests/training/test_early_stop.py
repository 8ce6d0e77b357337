"""Early stopping ends a training in time and keeps the best epoch."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from running import unwrapped
from training.conftest import TrainingFiles
from trim_lightning.pipeline.train import Training

TOO_FAST = ("train.learning_rate=0.3", "train.schedule=constant", "train.epochs=12", "logger=csv")


def curve(directory: Path, name: str) -> list[float]:
    """The logged values of one number, in order."""
    with (directory / "training" / "metrics.csv").open() as file:
        return [float(line[name]) for line in csv.DictReader(file) if line.get(name)]


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.mode=lora", "train.learning_rate=0.4", "train.lora_dropout=0", "train.early_stop=2"),
        ("train.mode=full", "train.learning_rate=0.12", "train.early_stop=1"),
    ],
    ids=["lora", "full"],
)
def test_the_best_epoch_is_kept_and_the_rest_not_trained(
    overrides: tuple[str, ...], trained: Callable[..., Training], training_files: TrainingFiles
) -> None:
    run = trained(training_files.held_out("plain"), *TOO_FAST, *overrides)
    losses = curve(run.directory, "train/held_out_loss")
    best = losses.index(min(losses))
    patience = int(overrides[-1][-1])
    assert len(losses) == best + 1 + patience < 12
    assert run.metrics["eval/nll"] == pytest.approx(losses[best], rel=1e-6)
    assert run.metrics["train/epoch"] == best + 1
    assert f"the weights of epoch {best + 1} are kept" in unwrapped(run.summary)


def test_costs_are_those_of_the_epochs_that_ran(
    trained: Callable[..., Training], training_files: TrainingFiles
) -> None:
    one = trained(training_files.held_out("plain"), "train.epochs=1", name="one").metrics
    stopped = trained(training_files.held_out("plain"), *TOO_FAST, "train.early_stop=1", name="stopped")
    epochs = len(curve(stopped.directory, "train/held_out_loss"))
    assert 1 < epochs < 12
    for name in ("train/tokens", "train/trained_tokens", "train/steps"):
        assert stopped.metrics[name] == epochs * one[name]
    assert stopped.manifest["stages"]["finetune"]["tokens"] == stopped.metrics["train/tokens"]
    assert len(curve(stopped.directory, "train/loss")) == stopped.metrics["train/steps"]


def test_a_curve_has_one_point_a_step(trained: Callable[..., Training]) -> None:
    """However many micro-batches a step takes."""
    run = trained("train.epochs=2", "train.tokens_per_micro_batch=150", "logger=csv")
    losses = curve(run.directory, "train/loss")
    assert len(losses) == len(set(losses)) == run.metrics["train/steps"] == 6
    assert losses[-1] == run.metrics["train/loss"]
    rates = curve(run.directory, "train/learning_rate")
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == 0


def test_patience_that_never_runs_out_changes_nothing_but_the_epoch(
    trained: Callable[..., Training], training_files: TrainingFiles
) -> None:
    """While the loss falls every epoch, the last is the best, and the weights are those of a plain training."""
    plain = trained(training_files.held_out("plain"), "train.epochs=3", "train.learning_rate=0.001", name="plain")
    watched = trained(
        training_files.held_out("plain"), "train.epochs=3", "train.learning_rate=0.001", "train.early_stop=3",
        "logger=csv", name="watched",
    )  # fmt: skip
    losses = curve(watched.directory, "train/held_out_loss")
    assert losses == sorted(losses, reverse=True)
    weights = "adapter/adapter_model.safetensors"
    assert (watched.directory / weights).read_bytes() == (plain.directory / weights).read_bytes()


def test_the_held_out_records_matter_only_when_they_are_watched(
    trained: Callable[..., Training], training_files: TrainingFiles, tmp_path: Path
) -> None:
    def cached(*overrides: str) -> bool:
        return bool(trained(*overrides, store=tmp_path / "store").manifest["stages"]["finetune"]["cached"])

    few = [json.loads(line) for line in (training_files.root / "plain.jsonl").read_text().splitlines()][:4]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(record) + "\n" for record in few))
    other = f"evaluation.path={tmp_path / 'few.jsonl'}"
    assert not cached(training_files.held_out("plain"))
    assert cached(other)
    assert not cached(training_files.held_out("plain"), "train.early_stop=1")
    assert not cached(other, "train.early_stop=1")
