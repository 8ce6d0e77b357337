"""What Python shows of records that a program holds: the report, the scores as a table, both in a notebook."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow
import pytest

import trim_lightning
from running import run_select
from tiny_models import build_tiny_model, write_records
from trim_lightning.errors import UserError
from trim_lightning.settings.schema import SaliencySettings

HOSTILE = "</script><script>alert(1)</script> <img src=x onerror=alert(2)> \" ' &quot; \u202e"


class Tags(HTMLParser):
    """The elements of a piece of HTML."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def names(text: str) -> set[str]:
    return {tag for tag, _ in Tags(text).found}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("python_report")
    build_tiny_model("llama", folder / "model")
    write_records(folder / "pool.jsonl", 40, seed=1, groups=("maths", "travel"))
    write_records(folder / "targets.jsonl", 5, seed=2, edge_cases=False)
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def scorer(folder: Path) -> trim_lightning.TrimScorer:
    return trim_lightning.load(str(folder / "model"), dtype="float32", store_dir=folder / "store", max_length=96)


@pytest.fixture(scope="module")
def scores(folder: Path, scorer: trim_lightning.TrimScorer) -> trim_lightning.Scores:
    return scorer.score(lines(folder / "pool.jsonl"), scorer.fingerprint(lines(folder / "targets.jsonl")))


def data_of(page: str) -> dict[str, Any]:
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert block is not None
    return dict(json.loads(block[1]))


def test_the_report_is_that_of_the_command_line(folder: Path, scorer: trim_lightning.TrimScorer) -> None:
    run = run_select(
        "model=hf", f"model.path={folder / 'model'}", "model.dtype=float32", "pool=jsonl", "target=jsonl",
        f"pool.path={folder / 'pool.jsonl'}", f"target.path={folder / 'targets.jsonl'}", "warmup=none", "logger=none",
        "trainer=cpu", "max_length=96", "selection.count=6", "saliency.num_layers=3", "report.examples=4",
        output_dir=folder / "run", store_dir=folder / "store",
    )  # fmt: skip
    report = scorer.report(
        iter(lines(folder / "pool.jsonl")), lines(folder / "targets.jsonl"), count=6, examples=4,
        saliency=SaliencySettings(num_layers=3),
    )  # fmt: skip
    expected, found = data_of((run / "report.html").read_text()), data_of(report.html)
    assert found.keys() == expected.keys()
    for part in ("targets", "classes", "lengths", "kept"):
        assert found[part] == expected[part], part
    for part in ("top", "borderline", "bottom"):
        assert [item["id"] for item in found["candidates"][part]] == [
            item["id"] for item in expected["candidates"][part]
        ]
        for own, other in zip(found["candidates"][part], expected["candidates"][part], strict=True):
            assert own["view"]["t"] == other["view"]["t"]
            assert own["view"]["m"] == other["view"]["m"]
            values = [[value or 0 for value in item["view"]["s"]] for item in (own, other)]
            np.testing.assert_allclose(*values, atol=2e-4)
    assert [item["turns"] for item in found["coreset"]] == [item["turns"] for item in expected["coreset"]]
    manifest = json.loads((run / "manifest.json").read_text())
    tokens = sum(manifest["stages"][name]["tokens"] for name in ("fingerprint", "score"))
    assert f"<dt>Cost</dt><dd><bdi>{tokens:,}</bdi>" in report.html
    assert "6 of 40 records, picked by TRIM" in report.html
    assert "6 records" in report.html
    assert "6 of 40" in repr(report)
    assert len(repr(report)) < 200
    saved = report.save(folder / "saved.html")
    assert saved.read_text() == report.html
    assert str(folder) not in report.html


def test_nothing_of_the_records_is_markup_in_a_notebook(folder: Path, scorer: trim_lightning.TrimScorer) -> None:
    pool = [{"id": HOSTILE, "prompt": f"{HOSTILE} {place}", "response": "yes", "kind": HOSTILE} for place in range(12)]
    report = scorer.report(pool, pool[:3], count=4)
    ((tag, attributes),) = Tags(report._repr_html_()).found
    assert tag == "iframe"
    assert attributes["srcdoc"] == report.html
    assert attributes["sandbox"] == "allow-scripts"
    assert "<script>alert" not in report.html
    assert "<img src=x" not in report.html
    bank = scorer.fingerprint(pool[:3])
    assert names(bank._repr_html_()) == {"p", "table", "thead", "tbody", "tr", "th", "td", "code"}
    assert "\u202e" not in bank._repr_html_()


def test_a_bank_shows_its_heaviest_classes_by_their_texts(folder: Path, scorer: trim_lightning.TrimScorer) -> None:
    bank = scorer.fingerprint(lines(folder / "targets.jsonl"))
    shown = bank._repr_html_()
    heaviest = int(bank.token_ids[bank.mass.argmax()])
    assert re.search(r"<code>(.*?)</code>", shown)[1] == bank.names[heaviest].replace("&", "&amp;")  # type: ignore[index]
    assert f"{len(bank):,} token classes of 5 targets" in shown


def test_scores_are_a_table(folder: Path, scores: trim_lightning.Scores) -> None:
    table = scores.to_pandas()
    assert list(table.columns) == ["row", "score", "mean", "max", "coverage", "num_tokens", "num_scored", "rank"]
    assert table.sort_values("rank").row.head(5).tolist() == scores.top(count=5)
    unscored = table[table.score.isna()]
    assert len(unscored) == 1
    assert unscored["rank"].isna().all()
    assert unscored.num_scored.tolist() == [0]
    assert (table.num_scored <= table.num_tokens).all()
    shown = scores._repr_html_()
    assert "39 of 40 records" in shown
    assert shown.count("<tr") == 12  # two heads


def test_a_pick_comes_in_what_held_the_records(
    folder: Path, scorer: trim_lightning.TrimScorer, scores: trim_lightning.Scores
) -> None:
    pool = [
        {name: record.get(name) for name in ("id", "prompt", "response")} for record in lines(folder / "pool.jsonl")
    ]
    wanted = [pool[row]["id"] for row in scores.top(count=5)]
    held = datasets.Dataset.from_list(pool)
    bank = scorer.fingerprint(lines(folder / "targets.jsonl"))
    np.testing.assert_allclose(scorer.score(held, bank).score, scores.score, atol=1e-6)
    picked = scores.pick(held, count=5)
    assert isinstance(picked, datasets.Dataset)
    assert picked["id"][:] == wanted
    assert scores.pick(pandas.DataFrame(pool), count=5).id.tolist() == wanted
    assert [record["id"] for record in scores.pick(pool, count=5)] == wanted
    assert len(scores.pick(pool)) == 2
    with pytest.raises(UserError, match="generator"):
        scores.pick(iter(pool))
    with pytest.raises(UserError, match="39 records, scored were 40"):
        scores.pick(pool[:39])


def test_rows_of_an_arrow_table_are_picked(folder: Path, scores: trim_lightning.Scores) -> None:
    records = [{"prompt": str(record), "response": "b"} for record in lines(folder / "pool.jsonl")]
    table = pyarrow.Table.from_pylist(records)
    assert scores.pick(table, count=3).to_pylist() == [records[row] for row in scores.top(count=3)]


def test_records_marked_as_bad_keep_their_rows(folder: Path, scorer: trim_lightning.TrimScorer) -> None:
    pool = [{"prompt": f"Say {number}.", "response": str(number), "label": number % 3 > 0} for number in range(12)]
    report = scorer.report(pool, lines(folder / "targets.jsonl"), count=12)
    assert "Say 11." in report.html


def test_what_is_no_bank_and_no_target_is_said(scorer: trim_lightning.TrimScorer) -> None:
    with pytest.raises(UserError, match="score: the bank is a NoneType"):
        scorer.score([], None)
    with pytest.raises(UserError, match="targets: there are no records"):
        scorer.fingerprint([])
