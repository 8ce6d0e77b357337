"""Ids and kinds of records, kept while the file is read: the records need not be parsed again for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from running import run_select
from trim_lightning.records import indexing
from trim_lightning.records.flat import FlatTexts, spans, sums_of
from trim_lightning.records.indexing import index
from trim_lightning.records.record_file import LineSource, ReadOptions, RecordFile

IDS = ["a", "", "ünïcödé", 7, None, "\ud800x", ["list"], "last"]
EXPECTED = ["a", "", "ünïcödé", "7", "4", "\ufffdx", "6", "last"]


def records(tmp_path: Path, **options: Any) -> RecordFile:
    lines = [
        {"id": name, "prompt": "p", "response": "r", "source": "even" if row % 2 == 0 else "odd"}
        for row, name in enumerate(IDS)
    ]
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return index(LineSource(path, path.name, path.name, "pool"), ReadOptions(**options))


def test_ids_are_kept(tmp_path: Path) -> None:
    found = records(tmp_path)
    assert [found.id(row) for row in range(len(found))] == EXPECTED
    assert [found.record(row).id for row in range(len(found))] == EXPECTED
    assert found.ids.column(0, len(IDS)).to_pylist() == EXPECTED
    assert found.ids.column(2, 4).to_pylist() == EXPECTED[2:4]
    assert found.ids.column(3, 3).to_pylist() == []
    some = found.take([5, 0, 5])
    assert [some.id(row) for row in range(3)] == ["\ufffdx", "a", "\ufffdx"]
    with pytest.raises(IndexError):
        found.id(len(IDS))


def test_ids_follow_limit_and_sample(tmp_path: Path) -> None:
    assert records(tmp_path, limit=3).ids.column(0, 3).to_pylist() == EXPECTED[:3]
    drawn = records(tmp_path, sample=4, seed=1)
    assert [drawn.id(row) for row in range(4)] == [drawn.record(row).id for row in range(4)]
    assert [EXPECTED.index(drawn.id(row)) for row in range(4)] == [int(line) for line in drawn._lines]


def test_kinds_are_counted_of_a_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert records(tmp_path).kinds["source"] == {"even": 4, "odd": 4}
    assert records(tmp_path, where={"source": ["odd"]}).kinds["source"] == {"odd": 4}
    assert not records(tmp_path, limit=3).kinds
    assert not records(tmp_path).take([1]).kinds
    monkeypatch.setattr(indexing, "MOST_KINDS", 1)
    assert "source" not in records(tmp_path).kinds


def test_spans_and_sums() -> None:
    starts, lengths = np.array([4, 0, 9]), np.array([2, 0, 3])
    assert spans(starts, lengths).tolist() == [4, 5, 9, 10, 11]
    assert sums_of(np.array([1, 0, 1, 1, 1]), lengths).tolist() == [1, 0, 3]
    assert len(FlatTexts(np.empty(0, np.uint8), np.zeros(1, np.int64))) == 0


def test_a_run_from_the_store_parses_each_record_once_but_for_those_that_it_shows(
    tiny_folder: Callable[[str], Path], pool_file: Path, target_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    words = [
        "model=hf", f"model.path={tiny_folder('llama')}", "model.dtype=float32", "pool=jsonl", "target=jsonl",
        f"pool.path={pool_file}", f"target.path={target_file}", "warmup=none", "saliency.num_layers=2",
        "trainer=cpu", "logger=none", "report.enabled=false", "selection.count=3",
    ]  # fmt: skip
    run_select(*words, output_dir=tmp_path / "cold", store_dir=tmp_path / "store")
    read: list[int] = []
    real = RecordFile.object
    monkeypatch.setattr(
        RecordFile, "object", lambda self, row: (self.what == "pool" and read.append(row)) or real(self, row)
    )
    run_select(*words, output_dir=tmp_path / "warm", store_dir=tmp_path / "store")
    assert len(read) <= 2 * 3, "only picked records are read again"
    scores = [(tmp_path / name / "scores.parquet").read_bytes() for name in ("cold", "warm")]
    assert scores[0] == scores[1]
