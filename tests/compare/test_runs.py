"""Which directories are runs, what is read from them, and which of them belong together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from made_runs import edit

from trim_lightning.compare.groups import Axis, axes, group_runs, letters, marginal_means, varying_keys
from trim_lightning.compare.measures import best, lower_is_better
from trim_lightning.compare.report import correlation
from trim_lightning.compare.statistics import overlap
from trim_lightning.errors import UserError
from trim_lightning.runs.find import find_runs
from trim_lightning.runs.run import Measurement, Run, read_runs


def read(*paths: Path) -> list[Run]:
    """Read runs that must all be finished."""
    runs, broken = read_runs(find_runs(paths)[0])
    assert not broken
    return runs


def reason(path: Path) -> str:
    """Why a single run is left out."""
    runs, broken = read_runs(find_runs([path])[0])
    assert not runs
    return broken[0][1]


def test_job_folders_come_by_number_and_once(tmp_path: Path) -> None:
    for job in (10, 9, 0, 2):
        (tmp_path / "sweep" / str(job)).mkdir(parents=True)
    (tmp_path / "sweep" / "multirun.yaml").touch()
    (tmp_path / "sweep" / ".submitit").mkdir()
    found, sweep = find_runs([tmp_path / "sweep"])
    assert [place.label for place in found] == ["0", "2", "9", "10"]
    assert sweep == tmp_path / "sweep"
    again, sweep = find_runs([tmp_path / "sweep", tmp_path / "sweep"])
    assert again == found
    assert sweep is None


def test_a_folder_of_runs_is_accepted(selections: dict[str, Path]) -> None:
    runs = read(selections["trim"].parent)
    assert [run.label for run in runs] == ["random_0", "random_1", "random_2", "trim"]


@pytest.mark.parametrize("kind", ["missing", "file", "empty"])
def test_a_path_without_runs_is_a_mistake(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "file":
        path.touch()
    elif kind == "empty":
        path.mkdir()
    with pytest.raises(UserError, match=str(path)):
        find_runs([path])


def test_a_selection_is_read(selections: dict[str, Path]) -> None:
    (run,) = read(selections["trim"])
    manifest = json.loads((selections["trim"] / "manifest.json").read_text())
    table = pq.read_table(selections["trim"] / "scores.parquet")
    chosen = [row for row, selected in enumerate(table["selected"].to_pylist()) if selected]
    assert (run.kind, run.method, run.budget, run.seed_text) == ("select", "trim", "6 records", "0")
    assert (run.scorer, run.trainee) == ("model", None)
    assert run.coreset.rows.tolist() == chosen
    assert run.coreset.records == 6
    assert run.coreset.tokens == sum(table["num_tokens"][row].as_py() for row in chosen)
    assert run.coreset.mean_tokens == pytest.approx(manifest["counts"]["mean_tokens_selected"], abs=0.01)
    assert run.select_seconds == pytest.approx(sum(stage["seconds"] for stage in manifest["stages"].values()))
    assert read(selections["random_0"])[0].scorer is None  # no model took part


def test_a_training_is_read(trained: dict[str, Path]) -> None:
    (run,) = read(trained["random_1"])
    numbers = json.loads((trained["random_1"] / "metrics.json").read_text())
    assert (run.kind, run.method, run.trainee, run.seed, run.train_seed) == ("train", "random", "model", 1, 1)
    assert run.measurements["nll"] == Measurement(
        numbers["eval/nll"], numbers["eval/nll_low"], numbers["eval/nll_high"], numbers["eval/nll_before"]
    )
    assert set(run.measurements) == {"nll", "nll_drop", "exact_match", "option_accuracy"}
    assert run.trained_tokens == numbers["train/tokens"]
    assert run.coreset.tokens == numbers["selection/tokens"]


def test_a_methods_own_keys_are_varied_only_where_someone_changed_them(selections: dict[str, Path], variant) -> None:
    def run(folder: str, **method: object) -> Path:
        return variant(selections["trim"], folder, lambda manifest: manifest["config"].update(method=method))

    plain, older, dense = (
        run("plain", name="trim_plus", trim_weight=1.0, density_weight=0.0), run("older", name="trim_plus"),
        run("dense", name="trim_plus", density_weight=1.0),
    )  # fmt: skip
    assert varying_keys(read(selections["trim"], plain)) == ["method.name"]
    assert varying_keys(read(plain, older)) == [], "a key that was not given has its default"
    assert varying_keys(read(selections["trim"], dense)) == ["method.name", "method.density_weight"]
    assert varying_keys(read(plain, dense)) == ["method.density_weight"]
    gone = run("gone", name="gone", key=3)
    assert "method.key" in varying_keys(read(selections["trim"], gone))


def test_broken_runs_say_why(selections: dict[str, Path], trained: dict[str, Path], variant) -> None:
    def copy(name: str) -> Path:
        return variant(selections["trim"], name)

    unfinished = copy("unfinished")
    (unfinished / "manifest.json").unlink()
    assert reason(unfinished) == "manifest.json is missing: the run did not finish"
    cut = copy("cut")
    (cut / "manifest.json").write_text((cut / "manifest.json").read_text()[:200])
    assert "cannot be read" in reason(cut)
    without = copy("without")
    (without / "coreset.jsonl").unlink()
    assert reason(without) == "coreset.jsonl is missing"
    short = copy("short")
    (short / "coreset.jsonl").write_bytes((short / "coreset.jsonl").read_bytes().partition(b"\n")[0])
    assert reason(short) == "coreset.jsonl has 1 records, the manifest says 6"
    scrambled = copy("scrambled")
    (scrambled / "scores.parquet").write_bytes(b"PAR1 no more")
    assert reason(scrambled).startswith("scores.parquet cannot be read")
    poor = variant(selections["trim"], "poor", lambda manifest: manifest.pop("counts"))
    assert reason(poor) == "manifest.json has no counts"
    untrained = variant(trained["longest"], "untrained")
    (untrained / "metrics.json").unlink()
    assert "metrics.json is missing" in reason(untrained)
    (untrained / "manifest.json").unlink()
    assert "manifest.json is missing" in reason(untrained)  # and not the selection inside it


def test_overlap_by_row_and_by_line(selections: dict[str, Path], made_runs, tmp_path: Path) -> None:
    random = read(*(selections[f"random_{seed}"] for seed in range(3)))
    lines = [(run.directory / "coreset.jsonl").read_text().splitlines() for run in random]
    for one in range(3):
        for two in range(3):
            shared = len(set(lines[one]) & set(lines[two]))
            found = overlap(random[one].coreset, random[two].coreset)
            assert found == pytest.approx(shared / (12 - shared))

    # the same records under other row numbers: rows no longer mean the same, so the lines decide
    shifted = made_runs.root / "shifted.jsonl"
    pool = (made_runs.root / "pool.jsonl").read_text().splitlines(keepends=True)
    shifted.write_text("".join(pool[20:] + pool[:20]))
    (moved,) = read(made_runs.select(tmp_path / "moved", "method=longest", f"pool.path={shifted}", "selection.count=6"))
    (plain,) = read(made_runs.select(tmp_path / "plain", "method=longest", "selection.count=6"))
    assert moved.coreset.rows.tolist() != plain.coreset.rows.tolist()
    kept = [set((tmp_path / name / "coreset.jsonl").read_text().splitlines()) for name in ("moved", "plain")]
    assert overlap(moved.coreset, plain.coreset) == len(kept[0] & kept[1]) / len(kept[0] | kept[1]) > 0.5
    assert correlation(moved.coreset, plain.coreset) is None


def test_rows_of_another_part_of_the_pool_are_other_rows(made_runs, tmp_path: Path) -> None:
    common = ("method=longest", "selection.count=5")
    first = made_runs.select(tmp_path / "first", *common, "pool.limit=30")
    second = made_runs.select(tmp_path / "second", *common, "pool.sample=30", "seed=3")
    one, two = (run.coreset for run in read(first, second))
    assert json.loads((first / "manifest.json").read_text())["inputs"]["pool"]["sha256"] in one.pool
    assert one.pool != two.pool
    lines = [set((run / "coreset.jsonl").read_text().splitlines()) for run in (first, second)]
    assert overlap(one, two) == len(lines[0] & lines[1]) / len(lines[0] | lines[1])


def test_rank_correlation_of_two_runs(selections: dict[str, Path]) -> None:
    trim, random = (run.coreset for run in read(selections["trim"], selections["random_0"]))
    assert correlation(trim, trim) == pytest.approx(1)
    columns = [pq.read_table(coreset.directory / "scores.parquet")["score"].to_pylist() for coreset in (trim, random)]
    both = [pair for pair in zip(*columns, strict=True) if None not in pair]
    ranks = np.argsort(np.argsort(np.array(both), axis=0), axis=0)
    assert correlation(trim, random) == pytest.approx(float(np.corrcoef(ranks.T)[0, 1]), abs=0.02)


def test_seeds_make_a_group_and_nothing_else_does(trained: dict[str, Path], variant) -> None:
    moved = variant(trained["random_1"], "moved", lambda manifest: manifest["config"]["logger"].update(tags=["x"]))
    other = variant(trained["random_1"], "other", lambda manifest: manifest["config"]["train"].update(epochs=3))
    longer = variant(
        trained["random_1"], "longer", lambda manifest: manifest["inputs"]["evaluation"].update(sha256="0")
    )
    runs = read(trained["random_0"], trained["random_1"], trained["random_2"], moved, other, longer)
    groups = group_runs(runs)
    assert [[run.directory.name for run in group.runs] for group in groups] == [
        ["random_0", "random_1", "random_2", "moved"], ["other"], ["longer"]
    ]  # fmt: skip
    assert [group.name for group in groups] == ["A", "B", "C"]
    assert groups[0].draws == 3
    values = [run.measurements["nll"].value for run in groups[0].runs]
    assert groups[0].metric("nll").mean == pytest.approx(sum(values) / 4)


def test_a_selection_and_a_training_are_never_one_group(selections, trained) -> None:
    assert len(group_runs(read(selections["random_0"], trained["random_0"]))) == 2


def test_a_given_coreset_brings_its_own_selection(selections, made_runs, variant, tmp_path: Path) -> None:
    given = made_runs.train(tmp_path / "given", f"coreset.path={selections['random_2']}/coreset.jsonl", "seed=7")
    (run,) = read(given)
    assert (run.method, run.seed, run.train_seed, run.seed_text) == ("random", 2, 7, "2/7")
    assert run.coreset.records == 6
    assert run.settings["method.name"] == "random"
    assert overlap(run.coreset, read(selections["random_2"])[0].coreset) == 1

    # a copy elsewhere is a file of unknown origin, whose lines are known
    foreign = tmp_path / "mine.jsonl"
    shutil.copy(selections["random_2"] / "coreset.jsonl", foreign)
    (unknown,) = read(made_runs.train(tmp_path / "foreign", f"coreset.path={foreign}"))
    assert (unknown.method, unknown.seed, unknown.budget) == ("file mine.jsonl", None, "6 records")
    assert overlap(unknown.coreset, run.coreset) == 1
    elsewhere = variant(tmp_path / "foreign", "x", lambda manifest: manifest["inputs"]["coreset"].update(sha256="0"))
    assert len(group_runs([unknown, *read(elsewhere)])) == 2  # the same name, other bytes
    foreign.write_text("{}")  # no longer what the run was trained on
    (changed,) = read(tmp_path / "foreign")
    assert overlap(changed.coreset, run.coreset) is None


def test_axes_are_the_keys_that_vary(trained: dict[str, Path], variant) -> None:
    def cell(name: str, layers: int, pooler: str) -> Path:
        def change(manifest: dict) -> None:
            config = manifest["config"]
            config["saliency"]["num_layers"] = layers
            config["pooler"].update(name=pooler, k=9 if pooler == "mean" else 8)

        return variant(trained["longest"], name, change)

    runs = read(*(cell(f"{layers}-{pooler}", layers, pooler) for pooler in ("mean", "max") for layers in (6, 3)))
    found = axes(runs)
    assert [axis.name for axis in found] == ["saliency.num_layers", "pooler.name + pooler.k"]
    assert found[0].levels == [(3,), (6,)]
    assert found[1].levels == [("mean", 9), ("max", 8)]
    means = marginal_means(found[0], runs, "nll")
    assert means == pytest.approx([runs[0].measurements["nll"].value] * 2)


def test_marginal_means(trained: dict[str, Path], variant) -> None:
    runs = []
    for place, (key, value) in enumerate([("a", 1.0), ("b", 2.0), ("a", 3.0)]):
        run = variant(trained["longest"], str(place), lambda manifest, key=key: manifest["config"].update(scope=key))
        edit(run, lambda numbers, value=value: numbers.update({"eval/nll": value}), "metrics.json")
        runs += read(run)
    (axis,) = axes(runs)
    assert axis == Axis(("scope",), (("a",), ("b",), ("a",)))
    assert marginal_means(axis, runs, "nll") == [2.0, 2.0]
    assert marginal_means(axis, runs, "nothing") == [None, None]


def test_which_value_is_better() -> None:
    assert [lower_is_better(name) for name in ("nll", "nll_drop", "exact_match", "wiki/word_perplexity,none")] == [
        True, False, False, True
    ]  # fmt: skip
    assert best("nll", [3.0, float("nan"), 1.0, 1.0]) == [2, 3]
    assert best("gsm8k/exact_match", [0.1, 0.3, 0.2]) == [1]
    assert best("nll", [float("nan")]) == []


def test_letters() -> None:
    assert [letters(place) for place in (0, 25, 26, 27, 52, 701, 702)] == ["A", "Z", "AA", "AB", "BA", "ZZ", "AAA"]
