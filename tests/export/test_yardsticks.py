"""Scores of the pool as other people's benchmarks read them: shapes, order, and what their code makes of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.lib.recfunctions import structured_to_unstructured

from running import run_select
from tiny_models import build_tiny_model, write_records
from trim_lightning.cli.export import main

POOL, TARGETS = 25, 12  # more than ten, so that names must keep the order
STEP = 2e-5  # by as much a score moves where more than three banks keep 16 bits of a similarity


class Runs:
    """Selections over one pool, without warm-up, in one store."""

    def __init__(self, root: Path) -> None:
        self.root = root
        build_tiny_model("llama", root / "model")
        write_records(root / "pool.jsonl", POOL, seed=3)  # with records that have no score
        self.targets = write_records(root / "bbh.test.jsonl", TARGETS, seed=4, edge_cases=False, groups=("a", "b"))

    def run(self, *overrides: str, targets: str = "bbh.test.jsonl") -> Path:
        return run_select(
            "model=hf", f"model.path={self.root / 'model'}", "model.dtype=float32", "pool=jsonl",
            f"pool.path={self.root / 'pool.jsonl'}", "target=jsonl", f"target.path={self.root / targets}",
            "target.num_examples=null", "warmup=none", "saliency.num_layers=2", "logger=none", "trainer=cpu",
            "report.enabled=false", *overrides,
            output_dir=self.root / f"run_{len(list(self.root.iterdir()))}", store_dir=self.root / "store",
        )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("yardsticks"))


@pytest.fixture(scope="module")
def single(runs: Runs) -> Path:
    """A run with a score for each target."""
    return runs.run("target.single_groups=true", "target.aggregate=round_robin", "selection.count=20")


def export(run: Path, name: str, *more: str) -> Path:
    """Export a run, which must go well, and return the folder."""
    assert main([str(run), "--format", name, *more]) == 0
    return run / "export" / name


def line_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


def scores_of(run: Path, column: str = "score") -> np.ndarray:
    """A column of scores.parquet, NaN where it is null."""
    return pq.read_table(run / "scores.parquet")[column].to_numpy()


def take_turns(matrix: np.ndarray, number: int) -> list[int]:
    """What the code of "A Critical Look" picks: each query in turn takes the highest of those that are left."""
    picked: list[int] = []
    for line in itertools.cycle(matrix):
        if len(picked) == number:
            return picked
        left = np.where(np.isin(np.arange(len(line)), picked), -np.inf, line)
        picked.append(int(np.argmax(left)))
    raise AssertionError


def bergson_scores(folder: Path) -> np.ndarray:
    """``[rows, queries]`` as Bergson maps them: all that it knows of the file is in ``info.json``."""
    info = json.loads((folder / "info.json").read_text())
    assert set(info) == {"attribute_tokens", "num_items", "num_rows", "num_scores", "dtype"}
    assert info["attribute_tokens"] is False
    assert info["num_items"] == info["num_rows"]
    mapped = np.memmap(folder / "scores.bin", dtype=info["dtype"], mode="r", shape=(info["num_rows"],))
    assert (folder / "scores.bin").stat().st_size == mapped.nbytes
    assert all(mapped[f"written_{query}"].all() for query in range(info["num_scores"]))
    assert {mapped.dtype.fields[f"score_{query}"][0] for query in range(info["num_scores"])} == {np.dtype(np.float32)}
    return structured_to_unstructured(mapped[[f"score_{query}" for query in range(info["num_scores"])]])


def test_a_line_for_each_target_in_their_order(runs: Runs, single: Path) -> None:
    folder = export(single, "critical_look")
    assert sorted(path.name for path in folder.iterdir()) == ["bbh_cossim.npy", "export.json"]
    matrix = np.load(folder / "bbh_cossim.npy")
    assert matrix.shape == (TARGETS, POOL)
    assert matrix.dtype == np.float32
    assert np.isfinite(matrix).all()
    for place in (0, 2, 10, 11):
        (runs.root / "one.jsonl").write_text(json.dumps(runs.targets[place]) + "\n")
        alone = runs.run(targets="one.jsonl")
        known = ~np.isnan(scores_of(alone))
        np.testing.assert_allclose(matrix[place][known], scores_of(alone)[known], rtol=0, atol=STEP)
        assert (matrix[place][~known] < matrix[place][known].min()).all()
        (same,) = np.load(export(alone, "critical_look") / "one_cossim.npy")
        np.testing.assert_allclose(same, matrix[place], rtol=0, atol=STEP)


def test_their_round_robin_picks_what_ours_picks(single: Path) -> None:
    export(single, "critical_look", "--task", "gsm8k", "--output", str(single / "own"))
    matrix = np.load(single / "own" / "gsm8k_cossim.npy")
    table = pq.read_table(single / "scores.parquet")
    ranked = sorted(
        (rank, row) for rank, row in zip(table["rank"].to_pylist(), table["row"].to_pylist(), strict=True) if rank
    )
    assert take_turns(matrix, len(ranked)) == [row for _, row in ranked]


@pytest.mark.parametrize(
    "overrides", [[], ["target.group_field=subtask"], ["method=bm25", "target.single_groups=true"]]
)
def test_bergson_maps_a_column_for_each_query(overrides: list[str], runs: Runs) -> None:
    run = runs.run(*overrides)
    groups = [name for name in pq.read_schema(run / "scores.parquet").names if name.startswith("score/")]
    found = bergson_scores(export(run, "bergson"))
    assert found.shape == (POOL, len(groups) or 1)
    for query, column in enumerate(groups or ["score"]):
        expected, ours = scores_of(run, column), found[:, query]
        known = ~np.isnan(expected)
        np.testing.assert_array_equal(ours[known], expected[known])
        assert (ours[~known] < ours[known].min()).all()
    receipt = json.loads((run / "export" / "bergson" / "export.json").read_text())
    assert receipt["queries"] == ([name.removeprefix("score/") for name in groups] or [""])
    assert receipt["records"] == POOL
    assert receipt["unscored"] == int(np.isnan(scores_of(run)).sum()) > 0


def test_date_lm_takes_the_best_and_no_record_without_a_score(runs: Runs) -> None:
    run = runs.run("method=rds")
    metrics = np.load(export(run, "date_lm") / "metrics.npy")
    scores = scores_of(run)
    assert metrics.shape == (POOL,)
    assert metrics.dtype == np.float32
    unscored = int(np.isnan(scores).sum())
    assert unscored
    best = np.argpartition(metrics, unscored)[unscored:]  # it takes the highest
    assert not np.isnan(scores[best]).any()
    np.testing.assert_array_equal(metrics[best], scores[best])


def test_what_a_run_cannot_give_is_one_line(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    for overrides, had in (
        ([], "one for all of them together"),
        (["target.group_field=subtask"], "one for each group of them"),
        (["method=random"], "none, as method=random uses no targets"),
    ):
        run = runs.run(*overrides)
        capsys.readouterr()
        assert main([str(run), "--format", "critical_look"]) == 2
        line = line_of(capsys)
        assert f"critical_look wants a score for each target, and this run has {had}" in line
        assert line.endswith("select again with target.single_groups=true")
        assert main([str(run), "--format", "bergson", "--task", "gsm8k"]) == 2
        assert "--task=gsm8k" in line_of(capsys)


def test_noise_takes_its_share_of_all_single_targets(runs: Runs) -> None:
    run = runs.run("target.single_groups=true", "target.noise=0.25", "method=bm25")
    target: dict[str, Any] = json.loads((run / "manifest.json").read_text())["inputs"]["target"]
    assert target["replaced"] == TARGETS // 4
    assert list(target["groups"]) == [f"{place:02d}" for place in range(TARGETS)]
