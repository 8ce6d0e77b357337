"""Every kind of input through `open_records`, with a small spool in place of the stage store."""

import datetime
import decimal
import gzip
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trim_lightning.errors import UserError
from trim_lightning.pipeline.outputs import describe
from trim_lightning.records.record import Turn
from trim_lightning.records.record_file import RecordFile
from trim_lightning.records.sources import open_records
from trim_lightning.settings.schema import PoolSettings, TargetSettings

ROWS = [{"id": f"r{n}", "prompt": f"question {n}", "response": f"answer {n}"} for n in range(5)]


class CountingSpool:
    """Builds each key once, under a root, and counts the builds."""

    def __init__(self, root: Path) -> None:
        self.root, self.builds = root, 0

    def __call__(self, kind: str, key: Mapping[str, object], build: Callable[[Path], None]) -> Path:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        directory = self.root / kind / digest
        if not directory.exists():
            self.builds += 1
            partial = directory.with_suffix(".partial")
            partial.mkdir(parents=True, exist_ok=True)
            build(partial)
            partial.rename(directory)
        return directory


@pytest.fixture
def spool(tmp_path: Path) -> CountingSpool:
    return CountingSpool(tmp_path / "spool")


def open_pool(spool: CountingSpool, source: str, path: Path | str | None = None, **keys: Any) -> RecordFile:
    settings = PoolSettings(source=source, path=None if path is None else str(path), **keys)
    return open_records(settings, what="pool", seed=0, spool=spool)


def refusal(spool: CountingSpool, source: str, path: Path | str | None = None, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_pool(spool, source, path, **keys)
    message = str(caught.value)
    assert "\n" not in message
    return message


def objects(file: RecordFile) -> list[dict[str, Any]]:
    return [file.object(row) for row in range(len(file))]


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# JSON lines


def test_plain_json_lines_are_read_in_place(tmp_path: Path, spool: CountingSpool) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_bytes(json_lines(ROWS))
    file = open_pool(spool, "jsonl", path)
    assert objects(file) == ROWS
    assert (file.name, file.sha256, spool.builds) == ("pool.jsonl", sha256(path), 0)


def test_relative_paths_and_home(tmp_path: Path, spool: CountingSpool, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pool.jsonl").write_bytes(json_lines(ROWS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    relative = open_pool(spool, "jsonl", "pool.jsonl")
    monkeypatch.chdir("/")
    assert objects(relative) == ROWS
    assert objects(open_pool(spool, "jsonl", "~/pool.jsonl")) == ROWS


@pytest.mark.parametrize("name", ["pool.jsonl.gz", "pool.GZ", "pool.jsonl"])
def test_gzip_is_unpacked_once(tmp_path: Path, spool: CountingSpool, name: str) -> None:
    path = tmp_path / name
    data = json_lines(ROWS)
    # Two members, as parallel compressors write them.
    path.write_bytes(gzip.compress(data[:40]) + gzip.compress(data[40:]))
    for _ in range(2):
        file = open_pool(spool, "jsonl", path)
    assert objects(file) == ROWS
    assert (file.name, file.sha256, spool.builds) == (name, sha256(path), 1)
    assert file.line(4) == data.splitlines()[4]


def test_broken_gzip_is_refused(tmp_path: Path, spool: CountingSpool) -> None:
    path = tmp_path / "pool.jsonl.gz"
    whole = gzip.compress(json_lines(ROWS))
    path.write_bytes(whole[:-12])
    assert "is cut short" in refusal(spool, "jsonl", path)
    path.write_bytes(json_lines(ROWS))
    assert "is not a sound gzip file" in refusal(spool, "jsonl", path)
    path.write_bytes(whole[:20] + b"\xff" * 10 + whole[30:])
    assert "is not a sound gzip file" in refusal(spool, "jsonl", path)
    path.write_bytes(gzip.compress(b""))
    assert "is empty" in refusal(spool, "jsonl", path)
    path.write_bytes(gzip.compress(json_lines(ROWS) + b"{"))
    assert "pool.jsonl.gz line 6 is not valid JSON" in refusal(spool, "jsonl", path)


@pytest.mark.parametrize("source", ["jsonl", "parquet", "hub"])
def test_a_missing_path_is_named(spool: CountingSpool, source: str) -> None:
    assert refusal(spool, source).startswith(f"pool={source} needs pool.path=")


def test_missing_files_and_directories(tmp_path: Path, spool: CountingSpool) -> None:
    for source in ("jsonl", "parquet"):
        assert "does not exist" in refusal(spool, source, tmp_path / "none")
    assert "is a directory" in refusal(spool, "jsonl", tmp_path)
    assert "holds no Parquet files" in refusal(spool, "parquet", tmp_path)
    assert "holds no Parquet files" in refusal(spool, "parquet", tmp_path / "*.parquet")


def test_half_a_layout_is_refused_before_anything_is_read(tmp_path: Path, spool: CountingSpool) -> None:
    message = refusal(spool, "jsonl", tmp_path / "none", prompt_field="q")
    assert "pool.response_field is not" in message


def test_keys_reach_the_index(tmp_path: Path, spool: CountingSpool) -> None:
    path = tmp_path / "pool.jsonl"
    rows = [{"key": n, "q": str(n), "a": "x", "odd": n % 2} for n in range(20)]
    path.write_bytes(json_lines(rows))
    settings = TargetSettings(
        source="jsonl",
        path=str(path),
        prompt_field="q",
        response_field="a",
        id_field="key",
        where={"odd": 1},
        exclude={"key": 3},
    )
    file = open_records(settings, what="target", seed=1, spool=spool, limit=6, sample=3)
    kept = [1, 5, 7, 9, 11, 13]
    assert len(file) == 3
    assert {int(file.id(row)) for row in range(3)} <= set(kept)
    assert file.record(0).turns[1] == Turn("assistant", "x")
    assert (file.identity()["limit"], file.identity()["sample"], file.identity()["seed"]) == (6, 3, 1)


def test_from_pool_is_the_callers_business(spool: CountingSpool) -> None:
    assert refusal(spool, "from_pool").startswith("pool=from_pool")
    with pytest.raises(ValueError, match="no input of its own"):
        open_records(TargetSettings(source="from_pool"), what="target", seed=0, spool=spool)


# Parquet


def test_parquet_is_converted_once(tmp_path: Path, spool: CountingSpool) -> None:
    path = write_parquet(tmp_path / "pool.parquet", ROWS)
    for _ in range(2):
        file = open_pool(spool, "parquet", path)
    assert objects(file) == ROWS
    assert (file.name, file.sha256, spool.builds) == ("pool.parquet", sha256(path), 1)
    moved = path.rename(tmp_path / "moved.parquet")
    assert open_pool(spool, "parquet", moved).identity() == file.identity()
    assert spool.builds == 1


def test_parquet_values_without_a_json_type(tmp_path: Path, spool: CountingSpool) -> None:
    row = {
        "prompt": "é\n",
        "response": "b",
        "when": datetime.datetime(2024, 5, 6, 7, 8),
        "day": datetime.date(2024, 5, 6),
        "text_bytes": "naïve".encode(),
        "raw_bytes": b"\xff\x00",
        "price": decimal.Decimal("1.50"),
        "nan": float("nan"),
        "deep": {"list": [1.0, float("inf")], "when": [datetime.date(2024, 1, 2)]},
        "nothing": None,
    }
    file = open_pool(spool, "parquet", write_parquet(tmp_path / "pool.parquet", [row]))
    line = json.loads(file.line(0), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line == {
        "prompt": "é\n",
        "response": "b",
        "when": "2024-05-06 07:08:00",
        "day": "2024-05-06",
        "text_bytes": "naïve",
        "raw_bytes": str(b"\xff\x00"),
        "price": "1.50",
        "nan": None,
        "deep": {"list": [1.0, None], "when": ["2024-01-02"]},
        "nothing": None,
    }


def test_parquet_messages_become_turns(tmp_path: Path, spool: CountingSpool) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = open_pool(spool, "parquet", write_parquet(tmp_path / "pool.parquet", [{"messages": messages}]))
    assert file.record(0).turns == (Turn("user", "a"), Turn("assistant", "b"))


def test_many_parquet_files_are_read_in_name_order(tmp_path: Path, spool: CountingSpool) -> None:
    for place in (2, 0, 1):
        write_parquet(tmp_path / "set" / f"part-{place}.parquet", [ROWS[place]])
    (tmp_path / "set" / "README.md").write_text("notes")
    whole = open_pool(spool, "parquet", tmp_path / "set")
    assert objects(whole) == ROWS[:3]
    assert whole.name == "set"
    two = open_pool(spool, "parquet", tmp_path / "set" / "part-[12].parquet")
    assert objects(two) == ROWS[1:3]
    assert two.sha256 != whole.sha256


def test_corrupt_parquet_is_refused(tmp_path: Path, spool: CountingSpool) -> None:
    path = tmp_path / "pool.parquet"
    path.write_bytes(json_lines(ROWS))
    assert "pool.parquet is not a Parquet file; for JSON lines use pool=jsonl" in refusal(spool, "parquet", path)
    whole = write_parquet(path, ROWS).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "is not a readable Parquet file" in refusal(spool, "parquet", path)
    path.write_bytes(b"")
    assert "is not a Parquet file" in refusal(spool, "parquet", path)
    assert "is empty" in refusal(spool, "parquet", write_parquet_empty(tmp_path / "none.parquet"))


def write_parquet_empty(path: Path) -> Path:
    pq.write_table(pa.table({"prompt": pa.array([], pa.string()), "response": pa.array([], pa.string())}), path)
    return path


def test_a_parquet_row_that_does_not_fit_is_named(tmp_path: Path, spool: CountingSpool) -> None:
    rows = [*ROWS[:2], {"id": "x", "prompt": "a", "response": None}]
    message = refusal(spool, "parquet", write_parquet(tmp_path / "pool.parquet", rows))
    assert "pool.parquet record 3: field response is null" in message


# The generated pool


def test_generated_records(spool: CountingSpool) -> None:
    for _ in range(2):
        file = open_pool(spool, "generated", families=["gcd", "family_relationships"], per_family=3)
    assert [file.id(row) for row in range(3)] == ["gcd-0", "family_relationships-0", "gcd-1"]
    assert (len(file), file.name, spool.builds) == (6, "generated", 1)
    other = open_pool(spool, "generated", families=["gcd"], per_family=3, generator_seed=1)
    assert spool.builds == 2
    assert {file.record(row).turns for row in range(6)}.isdisjoint(other.record(row).turns for row in range(3))
    assert "did you mean gcd?" in refusal(spool, "generated", families=["gdc"])


# The Hub


def test_a_data_set_through_the_datasets_library(
    tmp_path: Path, spool: CountingSpool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The library loads a local folder by the code that it uses for a downloaded one.
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_bytes(json_lines(ROWS))
    (folder / "test.jsonl").write_bytes(json_lines(ROWS[:2]))
    for _ in range(2):
        file = open_pool(spool, "hub", folder)
    assert objects(file) == ROWS
    assert (file.name, spool.builds) == ("name", 1)
    assert "hub" not in describe(file)  # a folder, whose name may be that of another's data set
    assert len(open_pool(spool, "hub", folder, split="test")) == 2
    message = refusal(spool, "hub", folder, split="validation")
    assert "pool.split" in message


def test_dates_from_the_hub_become_text(spool: CountingSpool, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []
    day = datetime.date(2024, 1, 2)

    def load_dataset(*args: Any, **kwargs: Any) -> datasets.Dataset:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{**row, "day": day} for row in ROWS])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    file = open_pool(spool, "hub", "owner/name", subset="main", split="test", revision="v1")
    assert asked == [(("owner/name", "main"), {"split": "test", "revision": "v1"})]
    assert describe(file)["hub"] == "owner/name"
    assert objects(file) == [{**row, "day": "2024-01-02"} for row in ROWS]


@pytest.mark.parametrize("error", [ConnectionError("no\nroute"), FileNotFoundError("x"), ValueError(""), KeyError(3)])
def test_what_the_hub_refuses_is_one_clear_error(
    spool: CountingSpool, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    import datasets

    def load_dataset(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = refusal(spool, "hub", "owner/name")
    assert message.startswith(
        f"pool.path=owner/name: the data set cannot be loaded from the Hub ({type(error).__name__}"
    )
    assert all(part in message for part in ("HF_TOKEN", "HF_HUB_OFFLINE", "pool=jsonl"))


# The package itself


def test_reading_records_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "pool.jsonl").write_bytes(json_lines(ROWS))
    code = (
        "import sys\n"
        "from trim_lightning.records import filters, generated_pool, layouts, record_file, sources\n"
        "from trim_lightning.settings.schema import PoolSettings\n"
        "settings = PoolSettings(source='jsonl', path=sys.argv[1])\n"
        "assert len(sources.open_records(settings, what='pool', seed=0, spool=None)) == 5\n"
        "print(sorted({'torch', 'datasets', 'pyarrow', 'reasoning_gym', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "pool.jsonl")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "[]\n"
