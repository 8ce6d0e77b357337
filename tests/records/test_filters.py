"""Filters, samples and the draw of targets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trim_lightning.errors import UserError
from trim_lightning.records.filters import RecordFilter, conditions, limit_and_sample, matches
from trim_lightning.records.indexing import index
from trim_lightning.records.record_file import LineSource, ReadOptions, RecordFile
from trim_lightning.records.targets import draw_targets, group_of


def open_rows(tmp_path: Path, rows: list[dict[str, Any]], **options: Any) -> RecordFile:
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(json.dumps({"prompt": "p", "response": "r", **row}) + "\n" for row in rows))
    return index(LineSource(path, "target.path=pool.jsonl", "pool.jsonl", "target"), ReadOptions(**options))


def places(file: RecordFile) -> list[int]:
    return [int(file.id(row)) for row in range(len(file))]


@pytest.mark.parametrize(
    ("value", "accepted", "expected"),
    [
        ("a", "a", True),
        ("a", "b", False),
        (3, 3, True),
        (3, "3", True),
        ("3", 3, True),
        (3.0, 3, True),
        (1, True, False),
        (True, 1, False),
        (True, True, True),
        (True, "true", True),
        ("true", True, True),
        (None, None, True),
        (None, "null", False),
        ("null", None, False),
        ("", None, False),
        (0, False, False),
        ([1, "a"], '[1, "a"]', True),
    ],
)
def test_values_match_as_json_or_as_text(value: Any, accepted: Any, expected: bool) -> None:
    assert matches(value, accepted) is expected


def test_where_keeps_and_exclude_drops(tmp_path: Path) -> None:
    rows = [{"s": "a", "n": 1}, {"s": "b", "n": 1}, {"s": "a", "n": 2}, {"n": 3}, {"s": None, "n": 1}]
    assert places(open_rows(tmp_path, rows, where={"s": "a"})) == [0, 2]
    assert places(open_rows(tmp_path, rows, where={"s": ["a", "b"], "n": 1})) == [0, 1]
    assert places(open_rows(tmp_path, rows, where={"s": None})) == [4]
    assert places(open_rows(tmp_path, rows, exclude={"s": "a"})) == [1, 3, 4]
    assert places(open_rows(tmp_path, rows, exclude={"s": ["b"], "n": "2"})) == [0, 3, 4]
    assert places(open_rows(tmp_path, rows, where={"n": [1, 2]}, exclude={"s": "b"})) == [0, 2, 4]


def test_nested_fields_by_dots_or_by_nesting(tmp_path: Path) -> None:
    rows = [{"m": {"lang": "en"}}, {"m": {"lang": "de"}}, {"m": 3}]
    assert places(open_rows(tmp_path, rows, where={"m.lang": "en"})) == [0]
    assert places(open_rows(tmp_path, rows, where={"m": {"lang": "en"}})) == [0]
    assert conditions({"m": {"lang": "en"}, "a": [1, 2]}) == {"a": [1, 2], "m.lang": ["en"]}


@pytest.mark.parametrize("part", ["where", "exclude"])
def test_a_field_that_no_record_has_is_refused(tmp_path: Path, part: str) -> None:
    rows = [{"source": "a", "meta": {"lang": "en"}}] * 3
    with pytest.raises(UserError, match=rf"target\.{part} names the field sourse.*did you mean source\?"):
        open_rows(tmp_path, rows, **{part: {"sourse": "a"}})
    with pytest.raises(UserError, match=r"did you mean meta\.lang\?"):
        open_rows(tmp_path, rows, **{part: {"meta.lag": "en"}})


def test_an_unknown_field_is_noticed_beside_one_that_drops_everything() -> None:
    record_filter = RecordFilter({"a": 1, "zz": 1}, {}, "pool")
    assert not record_filter.keep({"a": 2})
    with pytest.raises(UserError, match="names the field zz"):
        record_filter.check("pool.jsonl")
    assert not record_filter.keep({"a": 2, "zz": 2})
    record_filter.check("pool.jsonl")


@given(size=st.integers(0, 60), limit=st.none() | st.integers(1, 80), seed=st.integers(0, 99), data=st.data())
def test_limit_then_sample(size: int, limit: int | None, seed: int, data: st.DataObject) -> None:
    left = size if limit is None else min(size, limit)
    sample = data.draw(st.none() | st.integers(1, left)) if left else None
    kept = limit_and_sample(size, limit, sample, seed, "pool").tolist()
    assert kept == sorted(set(kept))
    assert set(kept) <= set(range(left))
    assert len(kept) == (left if sample is None else sample)
    assert kept == limit_and_sample(size, limit, sample, seed, "pool").tolist()


def test_the_sample_is_the_seeds_own() -> None:
    expected = np.sort(np.random.default_rng(4).choice(1000, 5, replace=False)).tolist()
    assert limit_and_sample(1000, None, 5, 4, "pool").tolist() == expected
    assert limit_and_sample(1000, None, 5, 5, "pool").tolist() != expected


def test_too_large_a_sample_names_the_size(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"target\.sample=4: only 3 records"):
        open_rows(tmp_path, [{}] * 5, limit=3, sample=4)


def test_targets_without_groups(tmp_path: Path) -> None:
    file = open_rows(tmp_path, [{}] * 50)
    rows = draw_targets(file, 10, 0)
    assert len(set(rows)) == 10
    assert rows == sorted(rows)
    assert draw_targets(file, 10, 0) == rows
    assert len({tuple(draw_targets(file, 10, seed)) for seed in range(5)}) == 5
    assert draw_targets(file, None, 0) == draw_targets(file, 50, 1) == draw_targets(file, 99, 2) == list(range(50))


def test_every_row_is_drawn_by_some_seed(tmp_path: Path) -> None:
    file = open_rows(tmp_path, [{}] * 8)
    assert {row for seed in range(60) for row in draw_targets(file, 1, seed)} == set(range(8))


def test_targets_per_group(tmp_path: Path) -> None:
    rows = [{"g": "abc"[place % 3], "n": place} for place in range(30)] + [{"g": 7}, {"g": 7}]
    file = open_rows(tmp_path, rows)
    drawn = draw_targets(file, 4, 0, "g")
    assert drawn == sorted(drawn)
    groups = [group_of(file, row, "g") for row in drawn]
    assert {name: groups.count(name) for name in set(groups)} == {"a": 4, "b": 4, "c": 4, "7": 2}
    assert draw_targets(file, None, 0, "g") == list(range(32))
    # Another group changes nothing in the others.
    fewer = open_rows(tmp_path, rows[:30])
    assert draw_targets(fewer, 4, 0, "g") == [row for row in drawn if row < 30]
    ahead = open_rows(tmp_path, [{"g": "first"}] * 9 + rows)
    assert [row - 9 for row in draw_targets(ahead, 4, 0, "g") if row >= 9] == drawn


def test_nested_groups_and_records_without_one(tmp_path: Path) -> None:
    file = open_rows(tmp_path, [{"m": {"task": True}}, {"m": {"tsk": "x"}}, {"m": {"task": None}}])
    assert group_of(file, 0, "m.task") == "true"
    with pytest.raises(UserError, match=r"target\.group_field=m\.task: .* line 2 .*did you mean m\.tsk\?"):
        draw_targets(file, 1, 0, "m.task")
    with pytest.raises(UserError, match="line 3 has null there"):
        group_of(file, 2, "m.task")
