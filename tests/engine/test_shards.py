"""Shard files: written whole or not at all, damage found, values kept."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trim_lightning.engine import shards
from trim_lightning.engine.shards import finished_shards, ragged, shard_path, write_shard
from trim_lightning.errors import UserError


def table(rows: int = 4, seed: int = 0) -> pa.Table:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 7, rows)
    size = int(lengths.sum())
    return pa.table(
        {
            "row": np.arange(rows) * 3,
            "token_ids": ragged(generator.integers(0, 400, size).astype(np.int32), lengths),
            "scope": ragged(generator.random(size) < 0.5, lengths),
            "similarity/a": ragged(generator.random(size).astype(np.float32), lengths),
        }
    )


@given(st.lists(st.lists(st.integers(-5, 5), max_size=5), max_size=8))
def test_ragged_cuts_flat_values_into_lists(rows: list[list[int]]) -> None:
    flat = np.array([value for row in rows for value in row], dtype=np.int32)
    assert ragged(flat, np.array([len(row) for row in rows], dtype=np.int64)).to_pylist() == rows


def test_a_shard_lies_under_its_index(tmp_path: Path) -> None:
    for index in (2, 0, 1):
        write_shard(table(rows=index + 1, seed=index), tmp_path, index)
    parts = [pq.read_table(shard_path(tmp_path, index)) for index in range(3)]
    assert [part.num_rows for part in parts] == [1, 2, 3]
    assert [part.to_pylist() for part in parts] == [table(rows=index + 1, seed=index).to_pylist() for index in range(3)]


def test_the_same_table_gives_the_same_bytes(tmp_path: Path) -> None:
    for index in (0, 1):
        write_shard(table(), tmp_path, index)
    assert shard_path(tmp_path, 0).read_bytes() == shard_path(tmp_path, 1).read_bytes()


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_shard(table(), tmp_path, 0)
    assert list(tmp_path.iterdir()) == []


def test_finished_shards_are_those_that_can_be_read_whole(tmp_path: Path) -> None:
    for index in (0, 2, 3, 4):
        write_shard(table(rows=4), tmp_path, index)
    os.truncate(shard_path(tmp_path, 2), 700)
    pq.write_table(table(rows=4), shard_path(tmp_path, 4))  # readable, but nobody vouches for it
    leftover = tmp_path / ".shard-000001.parquet.0123"
    leftover.write_text("half")
    assert finished_shards(tmp_path, dict(enumerate([4, 4, 4, 5, 4, 4]))) == {0}
    assert [path.name for path in tmp_path.iterdir()] == [shard_path(tmp_path, 0).name]


def test_every_flipped_bit_is_found_or_harmless(tmp_path: Path) -> None:
    write_shard(table(), tmp_path, 0)
    path = shard_path(tmp_path, 0)
    intact, expected = path.read_bytes(), pq.read_table(path)
    found = 0
    for place in range(0, len(intact), 3):
        data = bytearray(intact)
        data[place] ^= 1 << (place % 8)
        path.write_bytes(bytes(data))
        if finished_shards(tmp_path, {0: 4}):
            assert pq.read_table(path).equals(expected), f"damage at byte {place} goes unseen"
        else:
            found += 1
    assert found > len(intact) / 6


def test_the_checksum_covers_names_lengths_and_values() -> None:
    whole = table()
    changed = [
        whole.rename_columns(["row", "token_ids", "scope", "similarity/b"]),
        whole.set_column(0, "row", pa.array(np.arange(4) * 3 + 1)),
        whole.set_column(0, "row", pa.array((np.arange(4) * 3).astype(np.int32))),
        whole.select(["row", "scope", "token_ids", "similarity/a"]),
        whole.slice(0, 3),
    ]
    flat, lengths = whole["scope"].combine_chunks().flatten(), whole["scope"].combine_chunks().value_lengths()
    moved = ragged(flat.to_numpy(zero_copy_only=False), lengths.to_numpy()[::-1])
    changed.append(whole.set_column(2, "scope", moved))
    checksums = {shards.content_checksum(part) for part in [whole, *changed]}
    assert len(checksums) == 1 + len(changed)


def test_damaged_values_of_an_entry_are_one_clear_line(tmp_path: Path) -> None:
    folder = tmp_path / "gradients" / "0123456789abcdef"
    folder.mkdir(parents=True)
    shards.write_tensors(shards.values_path(folder, 0), {"rows": np.arange(3), "values": np.ones((3, 50))})
    shards.write_facts(folder, {"shards": 1})
    ((rows, values),) = shards.read_values(folder)
    assert (rows.tolist(), values.shape) == ([0, 1, 2], (3, 50))
    content = bytearray(shards.values_path(folder, 0).read_bytes())
    content[-5] ^= 1
    shards.values_path(folder, 0).write_bytes(content)
    with pytest.raises(UserError, match=r"store entry gradients/0123456789ab: .* another checksum.*verify --whole"):
        list(shards.read_values(folder))
