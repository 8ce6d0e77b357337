"""The same records in every usual container give the same conversations."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_sources import CountingSpool, open_pool, refusal

from trim_lightning.records.record_file import RecordFile
from trim_lightning.records.sources import open_records
from trim_lightning.settings.schema import PoolSettings

ROWS = [{"instruction": f"Name tree {n}.", "input": 'a, "b"\nc' if n else "", "output": f"Oak {n}"} for n in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture
def spool(tmp_path: Path) -> CountingSpool:
    return CountingSpool(tmp_path / "spool")


def as_csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def zstd(data: bytes) -> bytes:
    packed: bytes = pa.compress(data, codec="zstd", asbytes=True)
    return packed


def as_arrow_file(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


FILES: dict[str, Callable[[Path], Any]] = {
    "pool.jsonl": lambda path: path.write_bytes(LINES),
    "pool.txt": lambda path: path.write_bytes(b"\xef\xbb\xbf" + LINES),
    "pool.json": lambda path: path.write_text(json.dumps(ROWS)),
    "pretty.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "pretty.jsonl": lambda path: path.write_text("\n".join(json.dumps(row, indent=1) for row in ROWS)),
    "wrapped.json": lambda path: path.write_text(json.dumps({"version": 1, "data": ROWS})),
    "columns.json": lambda path: path.write_text(json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]})),
    "frame.json": lambda path: path.write_text(
        json.dumps({name: {str(n): row[name] for n, row in enumerate(ROWS)} for name in ROWS[0]})
    ),
    "pool.csv": as_csv,
    "pool.tsv": lambda path: as_csv(path, "\t"),
    "semicolons.csv": lambda path: as_csv(path, ";"),
    "pool.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "pool.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(LINES)),
    "pool.jsonl.xz": lambda path: path.write_bytes(lzma.compress(LINES)),
    "pool.jsonl.zst": lambda path: path.write_bytes(zstd(LINES) + zstd(b"")),
    "pool.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "pool.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "pool.arrow": as_arrow_file,
    "folder/part.json": lambda path: path.write_text(json.dumps(ROWS)),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
}


def said(file: RecordFile) -> list[list[str]]:
    return [[turn.content for turn in file.record(row).turns] for row in range(len(file))]


@pytest.mark.parametrize("name", FILES)
def test_the_format_is_told_by_the_content(tmp_path: Path, spool: CountingSpool, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    FILES[name](path)
    expected = [[f"{row['instruction']}\n{row['input']}".strip(), row["output"]] for row in ROWS]
    assert said(open_pool(spool, "file", path if name != "folder/part.json" else path.parent)) == expected
    assert said(open_pool(spool, "file", path)) == expected


def test_folders_globs_and_lists(tmp_path: Path, spool: CountingSpool) -> None:
    folder = tmp_path / "data"
    (folder / ".cache").mkdir(parents=True)
    (folder / ".cache" / "old.jsonl").write_bytes(LINES)
    (folder / "notes.txt").write_text("notes")
    for n, row in enumerate(ROWS[:3]):
        (folder / f"part-{n}.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "part-3.jsonl.xz").write_bytes(lzma.compress(json.dumps(ROWS[3]).encode()))
    whole = open_pool(spool, "file", folder)
    assert [whole.object(row) for row in range(4)] == ROWS
    assert whole.files == ("part-0.jsonl", "part-1.jsonl", "part-2.jsonl", "part-3.jsonl.xz")
    told = "1 files of the folder are not read: notes.txt; a glob reads files whatever their names"
    assert whole.remarks == (told,)
    assert whole.place(2) == f"pool.path={folder} part-2.jsonl record 1"
    assert len(open_pool(spool, "jsonl", folder / "part-[01].jsonl")) == 2
    settings = PoolSettings(source="jsonl", path=[str(folder / "part-2.jsonl"), str(folder / "part-0.jsonl")])
    listed = open_records(settings, what="pool", seed=0, spool=spool)
    assert [listed.object(row) for row in range(2)] == [ROWS[2], ROWS[0]]


def test_a_bad_line_in_one_of_several_files_is_named(tmp_path: Path, spool: CountingSpool) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_bytes(LINES)
    (tmp_path / "data" / "b.jsonl").write_bytes(LINES + b"{]\n")
    assert "b.jsonl record 5 is not valid JSON" in refusal(spool, "file", tmp_path / "data")
    assert len(open_pool(spool, "file", tmp_path / "data", bad_records="skip")) == 8


@pytest.mark.parametrize("kind", ["file", "parquet"])
def test_several_splits_are_asked_for(tmp_path: Path, spool: CountingSpool, kind: str) -> None:
    for name in ("train-00000-of-00001", "test-00000-of-00001", "validation-00000-of-00001"):
        (tmp_path / "set").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist([{"prompt": name, "response": "x"}]), tmp_path / "set" / f"{name}.parquet")
    message = refusal(spool, kind, tmp_path / "set")
    assert "several splits: test, train, validation; name one with pool.split=train" in message
    assert said(open_pool(spool, kind, tmp_path / "set", split="train")) == [["train-00000-of-00001", "x"]]
    assert "has the splits test, train, validation" in refusal(spool, kind, tmp_path / "set", split="trian")


@pytest.mark.parametrize("kind", ["file", "jsonl"])
def test_a_split_that_no_file_names_and_files_of_none(tmp_path: Path, spool: CountingSpool, kind: str) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "part.jsonl").write_bytes(LINES)
    for path in (folder, folder / "part.jsonl"):
        message = refusal(spool, kind, path, split="train")
        assert f"pool.split=train: no file name of pool.path={path} says of which split it is (part.jsonl)" in message
    (folder / "train.jsonl").write_bytes(LINES)
    file = open_pool(spool, kind, folder, split="train")
    assert len(file) == 4
    assert file.remarks == ("1 files whose names say no split are not read: part.jsonl",)


def test_files_of_a_folder_that_are_not_read_are_named_once(tmp_path: Path, spool: CountingSpool) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("README.md", "LICENSE", "_SUCCESS", ".hidden", "part-00000", "more.dat", "b.parquet"):
        (folder / name).write_bytes(LINES)
    message = refusal(spool, "jsonl", folder)
    assert "holds no JSON lines" in message
    assert "(it holds b.parquet, more.dat, part-00000; pool=file reads more formats)" in message
    (folder / "a.jsonl").write_bytes(LINES)
    (folder / "b.parquet").unlink()
    (remark,) = open_pool(spool, "file", folder).remarks
    assert remark == "2 files of the folder are not read: more.dat, part-00000; a glob reads files whatever their names"
    assert len(open_pool(spool, "file", folder / "[amp]*")) == 12


@pytest.mark.parametrize(("suffix", "sign"), [(".csv", ";"), (".tsv", "\t")])
def test_a_packed_table_keeps_the_suffix_of_its_format(
    tmp_path: Path, spool: CountingSpool, suffix: str, sign: str
) -> None:
    table = f"q{sign} a\nA, or B, or C, or D?{sign}A\n"  # names that are not known, and signs of another delimiter
    named = {"prompt_field": "q", "response_field": "a"}
    folder = tmp_path / "data"
    folder.mkdir()
    for path in (tmp_path / f"pool{suffix}.gz", folder / f"part{suffix}.gz"):
        path.write_bytes(gzip.compress(table.encode()))
    (folder / "more.jsonl").write_text(json.dumps({"q": "x", "a": "y"}))
    assert said(open_pool(spool, "file", tmp_path / f"pool{suffix}.gz", **named)) == [["A, or B, or C, or D?", "A"]]
    assert said(open_pool(spool, "file", folder, **named)) == [["x", "y"], ["A, or B, or C, or D?", "A"]]


def test_tables_with_odd_rows_or_names_are_one_clear_line(tmp_path: Path, spool: CountingSpool) -> None:
    path = tmp_path / "pool.csv"
    path.write_text("prompt,response\na,b,c\nd,e\n")
    message = refusal(spool, "file", path)
    assert "record 1 is a list of 3 values, not an object; so is a row of CSV" in message
    assert said(open_pool(spool, "file", path, bad_records="skip")) == [["d", "e"]]
    path.write_text("prompt,response,response\na,b,c\n")
    assert "pool.csv has several columns named response: rename or delete all but one" in refusal(spool, "file", path)
    path.write_text("prompt,response,,\na,b,,\n")
    assert said(open_pool(spool, "file", path)) == [["a", "b"]]


def test_a_saved_dictionary_of_splits(tmp_path: Path, spool: CountingSpool) -> None:
    one = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"sft": one, "gen": one.select([0])}).save_to_disk(tmp_path / "saved")
    assert "several splits: gen, sft" in refusal(spool, "file", tmp_path / "saved")
    assert len(open_pool(spool, "file", tmp_path / "saved", split="gen")) == 1


def test_columns_of_json_are_read_as_they_were(tmp_path: Path, spool: CountingSpool) -> None:
    calls = [
        {"function": {"name": "look", "arguments": {"at": 1}}},
        {"function": {"name": "go", "arguments": {"to": "x"}}},
    ]
    rows = [{"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]} for call in calls]
    path = tmp_path / "json.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    features = datasets.Features({"messages": datasets.Json()})
    made = datasets.Dataset.from_list(rows, features=features)
    made.to_parquet(tmp_path / "json.parquet")
    made.save_to_disk(tmp_path / "saved")
    turns = [open_pool(spool, "file", path).record(row).turns for row in range(2)]
    for other in ("json.parquet", "saved"):
        file = open_pool(spool, "file", tmp_path / other)
        assert [file.record(row).turns for row in range(2)] == turns


def test_broken_containers_are_one_line(tmp_path: Path, spool: CountingSpool) -> None:
    for name, data in {
        "a.json": b'[{"prompt": "a"}',
        "b.csv": b'a,b\n"x',
        "c.xz": b"\xfd7zXZ\0cut",
        "d.json": b"[{}, 3",
    }.items():
        (tmp_path / name).write_bytes(data)
        assert "pool.path=" in refusal(spool, "file", tmp_path / name)
