"""A training run in Weights & Biases, offline, read back from the file that `wandb sync` would upload."""

from __future__ import annotations

import hashlib
import json
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cli.test_logging import transactions
from running import run_train
from training.conftest import Outcome, TrainingFiles
from trim_lightning.pipeline.train import Training


@dataclass
class Record:
    """What one offline run holds."""

    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    artifacts: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None

    def curve(self, name: str) -> list[float]:
        """The values of one number, in order."""
        return [line[name] for line in self.history if name in line]


def name_of(item: Any) -> str:
    return "/".join(item.nested_key) or str(item.key)


def read_run(file: Path) -> Record:
    """Read one ``run-*.wandb`` file."""
    found = Record()
    for record in transactions(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            found.config.update({item.key: json.loads(item.value_json) for item in record.run.config.update})
        elif kind == "history":
            found.history.append({name_of(item): json.loads(item.value_json) for item in record.history.item})
        elif kind == "artifact":
            found.artifacts[record.artifact.type, record.artifact.name.rpartition("-")[0]] = record.artifact
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def runs_below(directory: Path) -> list[Record]:
    """The runs of a directory; W&B's own process may close their files a moment after the run."""
    deadline = time.monotonic() + 300
    while True:
        try:
            records = [read_run(file) for file in sorted(directory.rglob("run-*.wandb"))]
            if all(record.exit_code is not None for record in records):
                return records
        except (AssertionError, struct.error):  # a record that is half written
            pass
        assert time.monotonic() < deadline, "the run was not closed"
        time.sleep(0.1)


@pytest.fixture(scope="module", autouse=True)
def nobody_logged_in(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """No key, no home of a user, nothing sent."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("nobody")
        for name in ("WANDB_API_KEY", "WANDB_MODE"):
            patch.delenv(name, raising=False)
        patch.setenv("NETRC", str(folder / "netrc"))
        patch.setenv("WANDB_CONFIG_DIR", str(folder))
        patch.setenv("WANDB_CACHE_DIR", str(folder))
        patch.setenv("WANDB_DATA_DIR", str(folder))
        yield


@pytest.fixture(scope="module")
def logged(training_files: TrainingFiles, tmp_path_factory: pytest.TempPathFactory) -> tuple[Training, Record]:
    """A training with a selection, and its record."""
    directory = tmp_path_factory.mktemp("wandb") / "day" / "time"
    training = run_train(
        *training_files.select, training_files.held_out("numbers"), "evaluation.max_new_tokens=4", "train.epochs=2",
        "train.early_stop=2", "logger=wandb", "logger.tags=[first,second]", "logger.group=together",
        output_dir=directory, store_dir=tmp_path_factory.mktemp("fresh_store"),
    )  # fmt: skip
    (record,) = runs_below(directory)
    return training, record


def test_the_run_is_described(logged: tuple[Training, Record], training_files: TrainingFiles) -> None:
    _, record = logged
    assert record.run.project == "trim-lightning"
    assert record.run.job_type == "train"
    assert record.run.display_name == "time"  # what is above may name a user
    assert record.run.run_group == "together"
    assert list(record.run.tags) == ["first", "second"]
    assert record.exit_code == 0
    assert record.config["train"]["epochs"] == 2
    assert record.config["method"]["name"] == "trim"
    assert record.config["evaluation"]["path"] == ".../numbers.jsonl"


def test_the_curves_have_every_step_and_epoch(logged: tuple[Training, Record]) -> None:
    training, record = logged
    losses = record.curve("train/loss")
    # the last is the closing metric; before it one point a step
    assert len(losses) == training.metrics["train/steps"] + 1 == 5
    assert losses[-2] == losses[-1] == training.metrics["train/loss"]
    assert len(record.curve("train/learning_rate")) == 4
    assert len(record.curve("train/held_out_loss")) == 2
    assert record.curve("train/held_out_loss")[-1] == pytest.approx(training.metrics["eval/nll"], rel=1e-6)


def test_the_closing_metrics_are_those_of_the_file(logged: tuple[Training, Record]) -> None:
    training, record = logged
    last = record.history[-1]
    assert {name: last[name] for name in training.metrics} == training.metrics


def test_artifacts_name_what_they_were_made_from(logged: tuple[Training, Record]) -> None:
    training, record = logged
    made = {("scores", "scores"), ("coreset", "coreset"), ("model", "adapter"), ("evaluation", "evaluation")}
    ours = {(kind, name) for kind, name in record.artifacts if kind != "run_table"}  # that is how W&B keeps tables
    assert ours == made
    by_name = {name: artifact for (_, name), artifact in record.artifacts.items()}
    ancestors = {"scores": [], "coreset": ["scores"], "adapter": ["coreset"], "evaluation": ["adapter"]}
    for name, parents in ancestors.items():
        linked = json.loads(by_name[name].metadata)["made_from"]
        assert [item["digest"] for item in linked] == [by_name[parent].digest for parent in parents]
        assert [item["name"].rpartition("-")[0] for item in linked] == parents
    files = {name: {entry.path for entry in artifact.manifest.contents} for name, artifact in by_name.items()}
    assert files["coreset"] == {"coreset.jsonl"}
    assert files["scores"] == {"scores.parquet", "manifest.json"}
    assert "adapter/adapter_model.safetensors" in files["adapter"]
    assert files["evaluation"] == {"metrics.json", "predictions.jsonl", "manifest.json"}
    weights = next(entry for entry in by_name["adapter"].manifest.contents if entry.path.endswith("model.safetensors"))
    assert weights.size == (training.directory / "adapter" / "adapter_model.safetensors").stat().st_size


def test_a_given_coreset_has_no_ancestors_and_no_artifacts_on_demand(
    training_files: TrainingFiles, tmp_path: Path
) -> None:
    run_train(*training_files.train, "logger=wandb", output_dir=tmp_path / "given", store_dir=training_files.store)
    run_train(
        *training_files.train,
        "logger=wandb",
        "logger.log_artifacts=false",
        output_dir=tmp_path / "none",
        store_dir=training_files.store,
    )
    (given,), (none,) = runs_below(tmp_path / "given"), runs_below(tmp_path / "none")
    assert {name for _, name in given.artifacts} == {"adapter", "evaluation"}
    assert json.loads(given.artifacts["model", "adapter"].metadata)["made_from"] == []
    assert none.artifacts == {}
    assert none.curve("train/trained_tokens")


def test_a_failed_run_says_so(training_files: TrainingFiles, tmp_path: Path) -> None:
    from trim_lightning.errors import UserError

    with pytest.raises(UserError, match="diverged"):
        run_train(
            *training_files.train,
            "train.learning_rate=1e30",
            "logger=wandb",
            output_dir=tmp_path,
            store_dir=tmp_path / "store",
        )
    (record,) = runs_below(tmp_path)
    assert record.exit_code == 1


@pytest.mark.slow
def test_a_multirun_is_one_group_of_separate_runs(
    training_files: TrainingFiles, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    # W&B's process reads a relative path from where it was started, which may have been in another test
    outcome = command(
        "-m", *training_files.train, training_files.held_out("plain"), "train.epochs=1,2", "logger=wandb",
        f"paths.store_dir={tmp_path / 'store'}", f"hydra.sweep.dir={tmp_path / 'sweep' / 'noon'}",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    *records, whole = runs_below(tmp_path / "sweep")
    assert (whole.run.job_type, whole.run.run_group) == ("sweep", "sweep/noon")
    assert [record.config["train"]["epochs"] for record in records] == [1, 2]
    assert [record.run.run_group for record in records] == ["sweep/noon"] * 2
    assert [record.run.display_name for record in records] == ["noon/0", "noon/1"]
    assert len({record.run.run_id for record in records}) == 2
    assert [len(record.curve("train/loss")) for record in records] == [3 + 1, 6 + 1]
    assert [record.exit_code for record in records] == [0, 0]


def test_no_path_of_this_machine_is_in_the_metadata(logged: tuple[Training, Record]) -> None:
    training, _ = logged
    assert not list(training.directory.rglob("wandb-metadata.json"))


def test_the_report_is_shown(logged: tuple[Training, Record]) -> None:
    training, record = logged
    (shown,) = [line for line in record.history if "report/page/_type" in line]
    assert shown["report/page/_type"] == "html-file"
    assert shown["report/coreset_table/ncols"] == 6
    assert training.selection is not None
    assert shown["report/coreset_table/nrows"] == training.selection.manifest["counts"]["selected"]
    own = (training.directory / "selection" / "report.html").read_bytes()
    assert shown["report/page/sha256"] == hashlib.sha256(own).hexdigest()
