"""The notebooks run, cell by cell, and show what they say they show."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from tiny_models import build_tiny_model, write_records

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def cells_of(name: str) -> list[dict[str, Any]]:
    return list(json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"])


def run(name: str) -> tuple[dict[str, Any], list[str]]:
    """Run the code of a notebook in this process; give back its names and what its cells show as HTML."""
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    for place, cell in enumerate(cells_of(name)):
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{name}, cell {place}", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), f"{name}, cell {place}", "eval"), names)
            if hasattr(value, "_repr_html_"):
                shown.append(value._repr_html_())
    return names, shown


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a notebook is opened, with a tiny model in place of the bundled one."""
    build_tiny_model("llama", tmp_path / "model", layers=6)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIM_NOTEBOOK_MODEL", str(tmp_path / "model"))
    monkeypatch.setenv("TRIM_STORE_DIR", str(tmp_path / "store"))
    return tmp_path


@pytest.mark.parametrize("name", sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
def test_notebooks_are_kept_without_outputs_and_their_links_resolve(name: str) -> None:
    for cell in cells_of(name):
        assert not cell.get("outputs")
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            for part in text.split("](")[1:]:
                assert (NOTEBOOKS / part.partition(")")[0]).exists()


@pytest.mark.slow
def test_the_tour_runs(desk: Path) -> None:
    names, shown = run("tour")
    assert isinstance(names["coreset"], datasets.Dataset)
    assert len(names["coreset"]) == 12
    assert "token classes of 10 targets" in shown[1]
    assert "96 of 96 records have a score" in shown[2]
    assert shown[-1].startswith("<iframe")
    assert (desk / "report.html").read_text() == names["report"].html
    assert len((desk / "coreset.jsonl").read_text().splitlines()) == 12


def test_the_tour_takes_ones_own_data(desk: Path) -> None:
    write_records(desk / "pool.jsonl", 30, seed=1)
    own = write_records(desk / "targets.jsonl", 4, seed=2, edge_cases=False)
    names, shown = run("tour")
    assert names["pool"].num_rows == 30
    assert f"of {len(own)} targets" in shown[1]


@pytest.mark.slow
def test_methods_are_compared(desk: Path) -> None:
    names, _ = run("methods")
    methods = {"trim", "rds", "bm25", "longest", "random"}
    assert set(names["picked"]) == methods
    assert all(names["shared"].loc[method, method] == 12 for method in methods)
    assert set(names["table"].method) == methods
    assert (desk / "methods" / "compare.html").is_file()
