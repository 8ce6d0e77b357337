"""The index over a JSON-lines file: what it finds, what it refuses, and what it costs."""

import hashlib
import json
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trim_lightning.errors import UserError
from trim_lightning.records.indexing import index
from trim_lightning.records.record import Record, Turn
from trim_lightning.records.record_file import LineSource, ReadOptions, RecordFile


def open_file(path: Path, what: str = "pool", **options: Any) -> RecordFile:
    source = LineSource(path, label=f"{what}.path={path.name}", name=path.name, what=what)
    return index(source, ReadOptions(**options))


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def pair(prompt: Any = "p", response: Any = "r", **more: Any) -> bytes:
    return json.dumps({"prompt": prompt, "response": response, **more}).encode()


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_file(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_lines_and_records_of_a_plain_file(tmp_path: Path) -> None:
    lines = [pair("a", "b", id="x"), pair("c", "d", id=7), pair("é\n", "", id=True), pair("", "")]
    data = b"\n".join(lines) + b"\n"
    file = open_file(write(tmp_path / "pool.jsonl", data))
    assert len(file) == 4
    assert [file.line(row) for row in range(4)] == lines
    assert [file.id(row) for row in range(4)] == ["x", "7", "true", "3"]
    assert file.record(2) == Record("true", (Turn("user", "é\n"), Turn("assistant", "")))
    assert file.record(3).turns == (Turn("user", ""), Turn("assistant", ""))
    assert file.object(1) == {"prompt": "c", "response": "d", "id": 7}
    assert (file.source_rows, file.name, file.layout.name) == (4, "pool.jsonl", "prompt/response")
    assert file.sha256 == hashlib.sha256(data).hexdigest()


def test_rows_outside_the_file_are_index_errors(tmp_path: Path) -> None:
    file = open_file(write(tmp_path / "pool.jsonl", pair()))
    for row in (-1, 1):
        with pytest.raises(IndexError):
            file.line(row)


def test_bom_blank_lines_crlf_and_missing_last_newline(tmp_path: Path) -> None:
    data = b"\xef\xbb\xbf" + pair("a") + b"\r\n\r\n  \n\n" + pair("b") + b"\n" + pair("c") + b"  "
    file = open_file(write(tmp_path / "pool.jsonl", data))
    assert [file.line(row) for row in range(len(file))] == [pair("a"), pair("b"), pair("c") + b"  "]
    assert [file.id(row) for row in range(3)] == ["0", "4", "5"]
    assert file.place(1) == "pool.path=pool.jsonl line 5"
    assert file.sha256 == hashlib.sha256(data).hexdigest()


def test_odd_ids_fall_back_to_the_line_number(tmp_path: Path) -> None:
    data = b"\n".join([pair(id=None), pair(id=[1]), pair(id="\ud800z"), pair(id=1.5)])
    file = open_file(write(tmp_path / "pool.jsonl", data))
    assert [file.id(row) for row in range(4)] == ["0", "1", "\ufffdz", "1.5"]


def test_id_field_may_be_nested_and_must_be_there(tmp_path: Path) -> None:
    path = write(tmp_path / "pool.jsonl", pair(meta={"key": 3}) + b"\n" + pair(meta={"kee": 4}))
    message = refusal(path, id_field="meta.key")
    assert "pool.id_field=meta.key" in message
    assert "line 2" in message
    assert "meta.kee" in message
    path.write_bytes(pair(meta={"key": 3}))
    assert open_file(path, id_field="meta.key").id(0) == "3"
    path.write_bytes(pair(key=None))
    assert "null" in refusal(path, id_field="key")


def test_lone_surrogates_are_replaced_in_the_record_only(tmp_path: Path) -> None:
    line = rb'{"prompt": "a\ud83d\ude00\ud800b", "response": "\udc00"}'
    file = open_file(write(tmp_path / "pool.jsonl", line))
    assert [turn.content for turn in file.record(0).turns] == ["a😀\ufffdb", "\ufffd"]
    assert file.line(0) == line


@given(
    texts=st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=8),
    ending=st.sampled_from([b"\n", b"\r\n", b"\n\n"]),
    escape=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_text_survives(
    tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str]], ending: bytes, escape: bool
) -> None:
    lines = [json.dumps({"prompt": p, "response": r}, ensure_ascii=escape).encode() for p, r in texts]
    file = open_file(write(tmp_path_factory.mktemp("any") / "pool.jsonl", ending.join(lines)))
    assert [file.line(row) for row in range(len(file))] == lines
    assert [tuple(turn.content for turn in file.record(row).turns) for row in range(len(file))] == texts


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (b'{"prompt": "a"', "line 3 is not valid JSON (Expecting ',' delimiter at column 15)"),
        (b'"text"', "line 3 is text, not a JSON object"),
        (b"[1]", "line 3 is a list, not a JSON object"),
        (b"3", "line 3 is a number, not a JSON object"),
        (b"null", "line 3 is null, not a JSON object"),
        (b'{"prompt": "\xff\xfe", "response": ""}', "line 3 is not UTF-8 text"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "line 3 is not valid JSON (nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 3 is not valid JSON (Exceeds the limit"),
        (b'{"prompt": "a"}', "line 3: field response is missing"),
        (b'{"prompt": "a", "response": 5}', "line 3: field response is a number, not text"),
        (b'{"prompt": ["a"], "response": ""}', "line 3: field prompt is a list, not text"),
        (b'{"prompt": "a", "response": null}', "line 3: field response is null, not text"),
        (b'{"prompt": true, "response": ""}', "line 3: field prompt is true or false, not text"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, bad: bytes, expected: str) -> None:
    path = write(tmp_path / "pool.jsonl", pair() + b"\n\n" + bad + b"\n" + pair())
    message = refusal(path)
    assert message.startswith("pool.path=pool.jsonl ")
    assert expected in message


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "is empty"),
        (b"\n \r\n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (
            b'[{"prompt": "a", "response": "b"}]',
            "is a JSON array; convert to one object per line, e.g. with jq",
        ),
        (b'\n[\n{"prompt": "a"}]', "is a JSON array"),
        (b'{\n"prompt": "a"\n}', "jq -c ."),
        (b"PAR1\x00\x00", "is a Parquet file: read it with pool=parquet"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"PK\x03\x04", "zip archive"),
        ('{"prompt": "a"}'.encode("utf-16"), "UTF-16"),
        (b"ab\x00\x01", "binary"),
        (b"\x89\xff\x81", "not UTF-8"),
    ],
)
def test_a_file_that_is_not_json_lines_is_refused(tmp_path: Path, data: bytes, expected: str) -> None:
    assert expected in refusal(write(tmp_path / "pool.jsonl", data))


def test_missing_files_and_directories_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none.jsonl")
    assert "does not exist" in refusal(tmp_path / ("x" * 5000))
    assert "is a directory" in refusal(tmp_path)
    assert "not a regular file" in refusal(Path("/dev/null"))


def test_the_layout_is_asked_of_kept_records_only(tmp_path: Path) -> None:
    rows = [b'{"note": "x", "kind": "raw"}', pair(kind="pair"), b'{"note": "y", "kind": "raw"}']
    path = write(tmp_path / "pool.jsonl", b"\n".join(rows))
    assert "line 1: fits no known layout" in refusal(path)
    file = open_file(path, where={"kind": "pair"})
    assert (len(file), file.source_rows, file.id(0)) == (1, 3, "1")


def test_nothing_left_names_the_filter(tmp_path: Path) -> None:
    path = write(tmp_path / "pool.jsonl", pair(kind="a") + b"\n" + pair(kind="a"))
    message = refusal(path, what="target", where={"kind": "b"}, exclude={"kind": "a"})
    assert message.startswith("target is empty: ")
    assert 'target.where={"kind": ["b"]}' in message
    assert 'target.exclude={"kind": ["a"]}' in message
    assert "none of the 2 records" in message


def test_limit_counts_after_the_filters_and_sample_comes_last(tmp_path: Path) -> None:
    path = write(tmp_path / "pool.jsonl", b"\n".join(pair(str(n), even=n % 2 == 0) for n in range(40)))
    file = open_file(path, where={"even": True}, limit=10)
    assert [file.object(row)["prompt"] for row in range(len(file))] == [str(n) for n in range(0, 20, 2)]
    drawn = open_file(path, where={"even": True}, limit=10, sample=4, seed=3)
    prompts = [int(drawn.object(row)["prompt"]) for row in range(len(drawn))]
    assert len(prompts) == 4
    assert prompts == sorted(prompts)
    assert set(prompts) <= set(range(0, 20, 2))
    assert [drawn.id(row) for row in range(4)] == [str(n) for n in prompts]


def test_identity_follows_everything_that_decides_the_records(tmp_path: Path) -> None:
    path = write(tmp_path / "pool.jsonl", b"\n".join(pair(a="x", b="y", kind=n % 2) for n in range(6)))
    base = open_file(path).identity()
    assert json.loads(json.dumps(base)) == base
    variants: list[dict[str, Any]] = [
        {"prompt_field": "a", "response_field": "b"},
        {"id_field": "a"},
        {"where": {"kind": 0}},
        {"exclude": {"kind": 0}},
        {"limit": 3},
        {"sample": 3},
        {"sample": 3, "seed": 1},
        {"sample": 2},
    ]
    seen = [json.dumps(open_file(path, **options).identity(), sort_keys=True) for options in variants]
    assert len({json.dumps(base, sort_keys=True), *seen}) == len(variants) + 1
    # What decides nothing is not in it: the seed without a sample, the file's name, a scalar for a list.
    assert open_file(path, seed=5).identity() == base
    assert open_file(write(tmp_path / "copy.jsonl", path.read_bytes())).identity() == base
    assert open_file(path, where={"kind": [0]}).identity() == open_file(path, where={"kind": 0}).identity()
    changed = write(tmp_path / "changed.jsonl", path.read_bytes() + b"\n")
    assert open_file(changed).identity() != base


def test_pickled_copies_read_the_same_lines(tmp_path: Path) -> None:
    file = open_file(write(tmp_path / "pool.jsonl", b"\n".join(pair(str(n)) for n in range(9))))
    before = [file.line(row) for row in range(9)]
    copy = pickle.loads(pickle.dumps(file))
    assert [copy.line(row) for row in range(9)] == before
    assert copy.identity() == file.identity()
    (tmp_path / "file.pickle").write_bytes(pickle.dumps(file))
    code = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')).record(8).turns[0].content)"
    command = [sys.executable, "-c", code, str(tmp_path / "file.pickle")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "8\n"


def test_a_file_that_changed_since_it_was_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "pool.jsonl", pair("old"))
    file = open_file(path)
    path.write_bytes(pair("newer"))
    with pytest.raises(UserError, match="has changed since it was read"):
        file.line(0)


def test_the_index_holds_no_records(tmp_path: Path) -> None:
    # 8,000 records of 4 kB: 32 MB on disk, a few bytes per record in memory.
    line = pair("x" * 4000) + b"\n"
    path = write(tmp_path / "pool.jsonl", line * 8000)
    tracemalloc.start()
    try:
        file = open_file(path)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(file) == 8000
    assert held < 1_000_000
    assert peak < 4_000_000
