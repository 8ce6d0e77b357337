"""Thoughts, calls, tools and masks in the exports."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from trim_lightning.errors import UserError
from trim_lightning.records.indexing import index
from trim_lightning.records.record_file import LineSource, ReadOptions, RecordFile
from trim_lightning.runs.formats import write_alpaca, write_messages, write_parquet

CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "oak"}}}
RICH = {
    "tools": [{"name": "look"}],
    "messages": [
        {"role": "user", "content": "Which tree?"},
        {"role": "assistant", "content": "", "reasoning_content": "Look.", "tool_calls": [CALL]},
        {"role": "tool", "content": "acorns", "name": "look"},
        {"role": "assistant", "content": "A stone.", "train": False},
        {"role": "assistant", "content": "An oak."},
    ],
}
PLAIN = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def records(path: Path, *given: object) -> RecordFile:
    file = path / "coreset.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in given))
    return index(LineSource(file, label="coreset", name="coreset", what="pool"), ReadOptions())


def test_messages_keep_all_parts(tmp_path: Path) -> None:
    write_messages(records(tmp_path, RICH, PLAIN), tmp_path / "coreset.jsonl", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "messages.jsonl").read_text().splitlines()]
    assert rows[1] == PLAIN
    again = records(tmp_path, *rows)
    assert again.record(0).turns == records(tmp_path, RICH).record(0).turns


def test_parquet_keeps_all_parts(tmp_path: Path) -> None:
    write_parquet(records(tmp_path, RICH, PLAIN), tmp_path / "coreset.jsonl", tmp_path)
    rows = pq.read_table(tmp_path / "messages.parquet").to_pylist()
    again = records(tmp_path, *rows)
    expected = [records(tmp_path, record).record(0).turns for record in (RICH, PLAIN)]
    again = records(tmp_path, *rows)
    assert [again.record(row).turns for row in range(2)] == expected
    write_parquet(records(tmp_path, PLAIN), tmp_path / "coreset.jsonl", tmp_path)
    assert pq.read_table(tmp_path / "messages.parquet").to_pylist() == [PLAIN]


def test_alpaca_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Alpaca cannot hold tools and thoughts, calls or masks; use --format messages"):
        write_alpaca(records(tmp_path, RICH), tmp_path / "coreset.jsonl", tmp_path)
