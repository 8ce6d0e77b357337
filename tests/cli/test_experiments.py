"""Every experiment, as it is written, on a tiny model in ``debug=fast``: all cells, and what they differ in."""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tiny_models import build_tiny_model, write_records
from trim_lightning.cli.hydra_app import select_main, train_main

from .conftest import Inputs, Run
from .recipes import sweeps

SWEEPS = sweeps()
TRAINING_ONLY = {name for name, axes in SWEEPS.items() if any(key.startswith("train.") for key in axes)}
# the others in the slow tests
OFTEN_SELECTED = {"in_domain"}
OFTEN_TRAINED = {"transfer"}
ONE_SEED = {"method_table", "in_domain"}  # all of them in the slow tests


@pytest.fixture(scope="module")
def recipe_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with as many layers as the recipes ask for, a second trainee, data, and one store for all."""
    folder = tmp_path_factory.mktemp("recipe_files")
    build_tiny_model("llama", folder / "model", layers=12)
    build_tiny_model("opt", folder / "other", seed=1)
    write_records(folder / "pool.jsonl", 24, seed=1)
    write_records(folder / "responses.jsonl", 24, seed=4, edge_cases=False)  # all can be learnt from
    write_records(folder / "targets.jsonl", 20, seed=2, edge_cases=False)
    write_records(folder / "held_out.jsonl", 3, seed=3, edge_cases=False)
    return folder


def inputs_of(recipe_files: Path, pool: str = "pool") -> list[str]:
    """Overrides that a small run needs, whatever it is."""
    return [
        "debug=fast", "model=hf", f"model.path={recipe_files}/model", "model.dtype=float32", "logger=none",
        f"paths.store_dir={recipe_files}/store", "pool=jsonl", f"pool.path={recipe_files}/{pool}.jsonl",
        "target=jsonl", f"target.path={recipe_files}/targets.jsonl",
    ]  # fmt: skip


def cells_of(
    run: Run, recipe_files: Path, tmp_path: Path, name: str, *overrides: str, train: bool = False
) -> list[Path]:
    """Run an experiment with one command; the folders of its cells, in order."""
    files = inputs_of(recipe_files, "responses" if train else "pool")
    if name == "in_domain":
        files = [word for word in files if not word.startswith("target")]
    if train:
        files += [f"evaluation.path={recipe_files}/held_out.jsonl", "evaluation.exact_match=never", "train.epochs=1"]
    folder = f"hydra.sweep.dir={tmp_path}/sweep"
    outcome = run(f"experiment={name}", folder, *files, *overrides, main=train_main if train else select_main)
    assert outcome.code == 0, outcome.err
    jobs = [path for path in (tmp_path / "sweep").iterdir() if path.name.isdigit()]
    return sorted(jobs, key=lambda path: int(path.name))


def manifest_of(cell: Path) -> dict[str, Any]:
    """A cell's manifest; of a training that of its selection too."""
    manifest: dict[str, Any] = json.loads((cell / "manifest.json").read_text())
    return manifest


def held(config: dict[str, Any], name: str) -> Any:
    """The value of a dotted key."""
    for part in name.split("."):
        config = config[part]
    return config


def assert_the_grid(cells: list[Path], axes: dict[str, list[str]]) -> None:
    """As many cells as the product of the axes, no two alike, each value of a swept key met equally often."""
    assert len(cells) == math.prod(map(len, axes.values()))
    configs = [manifest_of(cell)["config"] for cell in cells]
    assert len({json.dumps({**config, "paths": None}) for config in configs}) == len(cells)
    for name, values in axes.items():
        if "." not in name and name not in ("seed", "scope"):
            continue  # a group: what its options set is tested with the options
        met = [held(config, name) for config in configs]
        for value in values:
            assert met.count(yaml.safe_load(value)) == len(cells) / len(values), (name, value)


def often(chosen: set[str], names: Iterable[str]) -> list[Any]:
    """The names as parameters, slow but for the chosen."""
    return [pytest.param(name, marks=[] if name in chosen else [pytest.mark.slow]) for name in sorted(names)]


@pytest.mark.parametrize("name", often(OFTEN_SELECTED, SWEEPS.keys() - TRAINING_ONLY))
def test_as_a_selection(name: str, run: Run, recipe_files: Path, tmp_path: Path) -> None:
    axes, overrides = dict(SWEEPS[name]), []
    if name in ONE_SEED:
        axes["seed"], overrides = ["0"], ["seed=0"]
    cells = cells_of(run, recipe_files, tmp_path, name, *overrides)
    assert_the_grid(cells, axes)
    for cell in cells:
        assert (cell / "coreset.jsonl").stat().st_size > 0
    check = CHECKS.get(name)
    if check is not None:
        check([manifest_of(cell) for cell in cells])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ONE_SEED))
def test_as_a_selection_with_all_seeds(name: str, run: Run, recipe_files: Path, tmp_path: Path) -> None:
    assert_the_grid(cells_of(run, recipe_files, tmp_path, name), SWEEPS[name])


@pytest.mark.parametrize("name", often(OFTEN_TRAINED, SWEEPS))
def test_as_a_training(name: str, run: Run, recipe_files: Path, tmp_path: Path) -> None:
    axes, overrides = dict(SWEEPS[name]), []
    if name == "transfer":  # its own models are on the Hub: a folder takes the place of each key
        axes["train.model"] = [".../model", ".../other"]  # as a manifest writes them
        overrides = [f"train.model={recipe_files}/model,{recipe_files}/other"]
    cells = cells_of(run, recipe_files, tmp_path, name, *overrides, train=True)
    assert_the_grid(cells, axes)
    for cell in cells:
        metrics = json.loads((cell / "metrics.json").read_text())
        assert metrics["eval/nll"] != metrics["eval/nll_before"]
        assert metrics["train/steps"] >= 1


# what an axis must have moved


def one_pass(manifests: list[dict[str, Any]]) -> None:
    """The cells had one pass over the pool: before them, or in the first for all if all but one were known."""
    assert sum(not manifest["stages"]["score"]["cached"] for manifest in manifests) <= 1


def more_targets(manifests: list[dict[str, Any]]) -> None:
    one_pass(manifests)
    assert [manifest["inputs"]["target"]["rows"] for manifest in manifests] == [1, 5, 10, 20]
    shares = [manifest["counts"]["fallback_share"] for manifest in manifests]
    coverage = [manifest["counts"]["bank_coverage"] for manifest in manifests]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1]
    assert coverage == sorted(coverage)
    assert 0 < coverage[0] < coverage[-1] <= 1


def more_noise(manifests: list[dict[str, Any]]) -> None:
    one_pass(manifests)
    # debug=fast draws 2 targets; half a target is rounded up
    assert [manifest["inputs"]["target"].get("replaced") for manifest in manifests] == [None, 1, 1, 2]
    assert len({manifest["inputs"]["target"]["sha256"] for manifest in manifests}) == 3
    assert [manifest["inputs"]["target"]["rows"] for manifest in manifests] == [2] * 4


def larger_coresets(manifests: list[dict[str, Any]]) -> None:
    one_pass(manifests)
    assert [manifest["counts"]["selected"] for manifest in manifests] == [1, 1, 2, 23]  # one record is empty


def from_the_pool(manifests: list[dict[str, Any]]) -> None:
    for manifest in manifests:
        inputs = manifest["inputs"]
        if manifest["config"]["method"]["name"] == "trim":
            assert inputs["target"]["name"] == inputs["pool"]["name"]


def drawn_anew(manifests: list[dict[str, Any]]) -> None:
    assert len({manifest["stages"]["warmup"]["key"] for manifest in manifests}) == 5


CHECKS: dict[str, Callable[[list[dict[str, Any]]], None]] = {
    **dict.fromkeys(
        ["pooling_ablation", "layer_ablation", "saliency_ablation", "row_weight_ablation", "fallback_ablation",
         "scope_ablation"],
        one_pass,
    ),
    "target_size": more_targets,
    "target_noise": more_noise,
    "budget_curve": larger_coresets,
    "in_domain": from_the_pool,
    "seed_spread": drawn_anew,
}  # fmt: skip


# the command line beside a recipe


def test_a_swept_key_on_the_command_line_takes_the_place_of_its_axis(
    run: Run, recipe_files: Path, tmp_path: Path
) -> None:
    cells = cells_of(run, recipe_files, tmp_path, "pooling_ablation", "pooler=max")
    assert [manifest_of(cell)["config"]["pooler"]["name"] for cell in cells] == ["max"]


@pytest.mark.slow
def test_a_list_takes_the_place_of_an_axis_or_adds_one(run: Run, recipe_files: Path, tmp_path: Path) -> None:
    cells = cells_of(run, recipe_files, tmp_path, "scope_ablation", "scope=all,response", "pooler=mean,max")
    configs = [manifest_of(cell)["config"] for cell in cells]
    assert sorted((config["scope"], config["pooler"]["name"]) for config in configs) == [
        ("all", "max"), ("all", "mean"), ("response", "max"), ("response", "mean"),
    ]  # fmt: skip


def test_one_cell_of_a_recipe_can_run_alone(run: Run, recipe_files: Path, tmp_path: Path) -> None:
    alone = ["hydra.mode=RUN", "scope=prompt", f"paths.output_dir={tmp_path}/alone", f"hydra.run.dir={tmp_path}/run"]
    outcome = run("experiment=scope_ablation", *inputs_of(recipe_files), *alone)
    assert outcome.code == 0, outcome.err
    assert manifest_of(tmp_path / "alone")["config"]["scope"] == "prompt"


def test_a_recipe_of_training_is_refused_by_selection(run: Run) -> None:
    outcome = run("experiment=transfer")
    assert outcome.code == 2
    assert outcome.last == "error: train.model: a key of trim-train, which trim-select does not have"


# hparams_search


def test_optuna_searches_and_shares_passes(run: Run, recipe_files: Path, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    outcome = run(
        "hparams_search=optuna", "hydra.sweeper.n_trials=4", *inputs_of(recipe_files, "responses"), "warmup=none",
        f"paths.store_dir={tmp_path}/store", f"hydra.sweep.dir={tmp_path}/sweep", "train.epochs=1",
        f"evaluation.path={recipe_files}/held_out.jsonl", "evaluation.exact_match=never", main=train_main,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    losses = [json.loads((tmp_path / "sweep" / str(job) / "metrics.json").read_text())["eval/nll"] for job in range(4)]
    assert found["best_value"] == min(losses)
    best = manifest_of(tmp_path / "sweep" / str(losses.index(min(losses))))["config"]["saliency"]
    assert best["row_weight"] == pytest.approx(found["best_params"]["saliency.row_weight"])
    assert best["row_weight"] + best["column_weight"] == pytest.approx(1)
    assert (outcome.out + outcome.err).count("one pass over the pool for 4 jobs") == 1


def test_a_search_needs_something_to_evaluate(run: Run, recipe_files: Path) -> None:
    outcome = run("evaluation.objective=eval/exact_match", f"paths.store_dir={recipe_files}/store", main=train_main)
    assert outcome.code == 2
    assert outcome.last.startswith("error: evaluation.objective=eval/exact_match needs something to evaluate")


# debug=profile


def test_a_profile_traces_the_pass_and_the_memory(run: Run, recipe_files: Path, inputs: Inputs, tmp_path: Path) -> None:
    plain, profiled = f"paths.output_dir={tmp_path}/plain", f"paths.output_dir={tmp_path}/out"
    words = [word for word in inputs_of(recipe_files) if word != "debug=fast"] + [
        "warmup=none",
        f"hydra.run.dir={tmp_path}/r",
    ]
    words += ["scoring.tokens_per_batch=256", f"model.path={inputs.root / 'tiny'}", "saliency.num_layers=2"]
    assert run(*words, plain).code == 0
    outcome = run("debug=profile", *words, profiled)
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "out" / "profile"
    assert manifest_of(tmp_path / "out")["stages"]["score"]["cached"], "the stored result stays as it is"
    assert (tmp_path / "plain" / "scores.parquet").read_bytes() == (tmp_path / "out" / "scores.parquet").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["memory.csv", "operators.txt", "trace.json.gz"]
    text = gzip.decompress((folder / "trace.json.gz").read_bytes()).decode()
    assert str(tmp_path.parent) not in text
    assert str(Path.home()) not in text
    events = json.loads(text)["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert names.count("aten::embedding") == 8, "one for each batch: the model ran under the profiler"
    lines = list(csv.DictReader((folder / "memory.csv").open()))
    assert {line["device"] for line in lines} == {"cpu"}
    seconds = [float(line["seconds"]) for line in lines]
    assert seconds == sorted(seconds)
    assert seconds[0] == 0
    held_bytes, changes = ([int(line[name]) for line in lines] for name in ("allocated_bytes", "bytes"))
    assert max(held_bytes) > 256 * 32 * 4, "at least one hidden state of a batch"
    assert min(changes) < 0 < max(changes)
    assert "aten::" in (folder / "operators.txt").read_text()


def test_a_profile_of_a_method_without_the_pass_says_so(run: Run, recipe_files: Path, tmp_path: Path) -> None:
    words = [*inputs_of(recipe_files), f"paths.output_dir={tmp_path}/out", f"hydra.run.dir={tmp_path}/r"]
    outcome = run("method=longest", "scoring.profile=true", *words)
    assert outcome.code == 0, outcome.err
    assert any("scoring.profile" in warning for warning in manifest_of(tmp_path / "out")["warnings"])
    assert not (tmp_path / "out" / "profile").exists()
