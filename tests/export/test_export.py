"""What is exported is the coreset, and can be read again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from running import run_select
from tiny_models import build_tiny_model, write_records
from trim_lightning.cli.export import NAMES, main
from trim_lightning.records.indexing import index
from trim_lightning.records.record import Turn
from trim_lightning.records.record_file import LineSource, ReadOptions, RecordFile
from trim_lightning.runs import formats
from trim_lightning.runs.formats import survey

Select = Any
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


@pytest.fixture(scope="module")
def select(tmp_path_factory: pytest.TempPathFactory) -> Select:
    """Runs a selection from a pool file, with a tiny model's tokenizer."""
    root = tmp_path_factory.mktemp("export")
    build_tiny_model("llama", root / "model")

    def run(pool: Path, *overrides: str) -> Path:
        name = f"run_{len(list(root.iterdir()))}"
        return run_select(
            "model=hf", f"model.path={root / 'model'}", "pool=jsonl", f"pool.path={pool}", "method=random",
            "warmup=none", "logger=none", "trainer=cpu", "selection.fraction=1.0", *overrides,
            output_dir=root / name, store_dir=root / "store",
        )  # fmt: skip

    return run


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """A pool of plain pairs with the hard cases among them."""
    write_records(tmp_path / "pool.jsonl", 20, seed=3)
    return tmp_path / "pool.jsonl"


def write_pool(path: Path, records: list[dict[str, Any]]) -> Path:
    """Write records as JSON lines."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def chat(row: int, *turns: tuple[str, str]) -> dict[str, Any]:
    """A record in the ``messages`` layout."""
    return {"id": f"c{row}", "messages": [{"role": role, "content": content} for role, content in turns]}


CHATS = [
    chat(0, (USER, "two\n lines"), (ASSISTANT, "answer 漢字\u2028end")),
    chat(1, (SYSTEM, "Be brief."), (USER, "q"), (ASSISTANT, "a")),
    chat(2, (USER, "q1"), (ASSISTANT, "a1"), (USER, "q2"), (ASSISTANT, "a2")),
]


def export(run: Path, name: str, output: Path | None = None) -> Path:
    """Export a run, which must go well, and return the folder."""
    arguments = [str(run), "--format", name, *(["--output", str(output)] if output else [])]
    assert main(arguments) == 0
    return output or run / "export" / name


def records_of(path: Path) -> RecordFile:
    """Read a JSON-lines file as the product does."""
    return index(LineSource(path, label=str(path), name=path.name, what="pool"), ReadOptions())


def turns_of(path: Path) -> list[tuple[Turn, ...]]:
    """The turns of every record of a file."""
    file = records_of(path)
    return [file.record(row).turns for row in range(len(file))]


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_jsonl_is_the_coreset_byte_for_byte(select: Select, pool: Path) -> None:
    run = select(pool, "selection.count=7", "selection.fraction=null")
    folder = export(run, "jsonl")
    assert (folder / "coreset.jsonl").read_bytes() == (run / "coreset.jsonl").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["coreset.jsonl", "export.json", "scores.jsonl"]


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_aligned_by_line(select: Select, pool: Path, name: str) -> None:
    run = select(pool, "selection.count=7", "selection.fraction=null", "pool.exclude={id: [r1, r5, r2, r3]}")
    folder = export(run, name)
    scores = pq.read_table(folder / "scores.parquet").to_pylist() if name == "parquet" else lines_of(
        folder / "scores.jsonl"
    )  # fmt: skip
    given = {record["id"]: record for record in lines_of(pool)}
    table = {row["id"]: row for row in pq.read_table(run / "scores.parquet").to_pylist()}
    if name == "parquet":
        texts = [row["messages"][-1]["content"] for row in pq.read_table(folder / "messages.parquet").to_pylist()]
    else:
        file = records_of(folder / {"jsonl": "coreset.jsonl"}.get(name, f"{name}.jsonl"))
        texts = [file.record(row).turns[-1].content for row in range(len(file))]
    assert len(texts) == len(scores) == 7
    for text, score in zip(texts, scores, strict=True):
        assert given[score["id"]]["response"] == text
        assert {**score, "selected": True} == table[score["id"]]
    assert [score["rank"] for score in scores] == list(range(1, 8))


@pytest.mark.parametrize("name", ["messages", "alpaca", "sharegpt", "parquet"])
def test_the_turns_come_back(select: Select, pool: Path, tmp_path: Path, name: str) -> None:
    for place, file in enumerate((pool, write_pool(tmp_path / "chats.jsonl", CHATS))):
        run = select(file)
        folder = export(run, name, tmp_path / f"{name}{place}")
        expected = turns_of(run / "coreset.jsonl")
        assert len(expected) == (19 if file == pool else 3)  # one record of the pool has no tokens at all
        if name == "parquet":
            rows = pq.read_table(folder / "messages.parquet")["messages"].to_pylist()
            assert [tuple(Turn(turn["role"], turn["content"]) for turn in row) for row in rows] == expected
        else:
            assert turns_of(folder / f"{name}.jsonl") == expected


turns = st.lists(
    st.tuples(st.sampled_from([SYSTEM, USER, ASSISTANT, "tool"]), st.text(max_size=20)), min_size=1, max_size=5
)


@given(st.lists(turns, min_size=1, max_size=4))
def test_any_conversation_survives_messages(tmp_path_factory: pytest.TempPathFactory, conversations: Any) -> None:
    folder = tmp_path_factory.mktemp("any")
    records = [chat(row, *turns) for row, turns in enumerate(conversations)]
    path = folder / "pool.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    file = records_of(path)
    formats.write_messages(file, path, folder)
    formats.write_parquet(file, path, folder)
    expected = [tuple(Turn(role, content) for role, content in turns) for turns in conversations]
    assert turns_of(folder / "messages.jsonl") == expected
    rows = pq.read_table(folder / "messages.parquet")["messages"].to_pylist()
    assert [tuple(Turn(turn["role"], turn["content"]) for turn in row) for row in rows] == expected


def test_alpaca_has_only_the_columns_it_needs(select: Select, pool: Path, tmp_path: Path) -> None:
    plain = export(select(pool), "alpaca")
    assert {tuple(line) for line in lines_of(plain / "alpaca.jsonl")} == {("instruction", "input", "output")}
    info = json.loads((plain / "dataset_info.json").read_text())
    assert info == {
        "trim_coreset": {
            "file_name": "alpaca.jsonl",
            "formatting": "alpaca",
            "columns": {"prompt": "instruction", "query": "input", "response": "output"},
        }
    }
    folder = export(select(write_pool(tmp_path / "chats.jsonl", CHATS)), "alpaca")
    lines = {line["output"]: line for line in lines_of(folder / "alpaca.jsonl")}
    assert lines["a"] == {"instruction": "q", "input": "", "output": "a", "system": "Be brief.", "history": []}
    assert lines["a2"] == {
        "instruction": "q2", "input": "", "output": "a2", "system": "", "history": [["q1", "a1"]]
    }  # fmt: skip
    columns = json.loads((folder / "dataset_info.json").read_text())["trim_coreset"]["columns"]
    assert columns == {
        "prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"
    }  # fmt: skip


def test_an_alpaca_record_keeps_its_input(select: Select, tmp_path: Path) -> None:
    records = [
        {"instruction": "Add.", "input": "1\n2", "output": "3"},
        {"instruction": "Say hello.", "input": "", "output": "hello"},
        {"instruction": "Go on.\nx", "input": "x", "output": "y", "history": [["a", "b"]], "system": "S"},
    ]
    run = select(write_pool(tmp_path / "alpaca.jsonl", records))
    folder = export(run, "alpaca")
    found = {line["output"]: line for line in lines_of(folder / "alpaca.jsonl")}
    for record in records:
        full = {"system": "", "history": [], **record}
        assert found[record["output"]] == full
    assert turns_of(folder / "alpaca.jsonl") == turns_of(run / "coreset.jsonl")


@pytest.mark.parametrize(
    ("turns", "roles"),
    [
        ([(USER, "q")], "user"),
        ([(USER, "q"), (USER, "q"), (ASSISTANT, "a")], "user, user, assistant"),
        ([(USER, "q"), (ASSISTANT, "a"), ("tool", "t"), (ASSISTANT, "a")], "user, assistant, tool, assistant"),
        ([(SYSTEM, "s"), (SYSTEM, "s"), (USER, "q"), (ASSISTANT, "a")], "system, system, user, assistant"),
    ],
)
def test_what_alpaca_cannot_hold_is_refused(select: Select, tmp_path: Path, capsys, turns, roles) -> None:
    run = select(write_pool(tmp_path / "pool.jsonl", [chat(0, *turns)]))
    capsys.readouterr()
    assert main([str(run), "--format", "alpaca"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert "coreset.jsonl line 1: Alpaca holds" in line
    assert f"not the turns {roles}; use --format messages" in line
    assert not (run / "export" / "alpaca" / "alpaca.jsonl").exists()
    assert main([str(run), "--format", "messages"]) == 0


def test_a_record_without_response_is_told_of(select: Select, tmp_path: Path, capsys) -> None:
    run = select(write_pool(tmp_path / "pool.jsonl", [*CHATS, chat(3, (USER, "q"))]))
    capsys.readouterr()
    export(run, "messages")
    assert "warning: 1 of the records end without an assistant turn" in capsys.readouterr().out


def row(size: int, *, history: bool) -> dict[str, Any]:
    """An Alpaca row of a certain size."""
    return {"instruction": "x" * size, "input": "", "output": "", "system": "", "history": [["a", "b"]] * history}


def test_a_late_history_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers take a column's type from the first megabytes; an untyped empty history there would fail them."""
    monkeypatch.setattr(formats, "EARLY", 100)
    early = [row(40, history=False), row(40, history=False), row(40, history=True)]
    assert survey(early) == (["history"], [0, 1, 2])
    late = [*early[:2], row(40, history=False), row(40, history=True), row(40, history=True)]
    assert survey(late) == (["history"], [3, 0, 1, 2, 4])
    assert survey(early[:2]) == ([], [0, 1])


def test_scores_follow_a_late_history(select: Select, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(formats, "EARLY", 1)
    records = [chat(row, (USER, f"q{row}"), (ASSISTANT, f"a{row}")) for row in range(6)]
    records[2]["messages"] += [{"role": USER, "content": "again"}, {"role": ASSISTANT, "content": "last"}]
    run = select(write_pool(tmp_path / "pool.jsonl", records))
    assert json.loads((run / "coreset.jsonl").read_text().splitlines()[0])["id"] != "c2"
    folder = export(run, "alpaca")
    outputs = [line["output"] for line in lines_of(folder / "alpaca.jsonl")]
    ids = [line["id"] for line in lines_of(folder / "scores.jsonl")]
    assert ids[0] == "c2"
    assert outputs == ["last" if name == "c2" else f"a{name[1:]}" for name in ids]


def test_the_receipt_names_every_file(select: Select, pool: Path) -> None:
    import hashlib

    run = select(pool)
    folder = export(run, "alpaca")
    receipt = json.loads((folder / "export.json").read_text())
    assert set(receipt["files"]) == {"alpaca.jsonl", "dataset_info.json", "scores.jsonl"}
    for name, digest in receipt["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert receipt["records"] == 19
    assert receipt["coreset_sha256"] == hashlib.sha256((run / "coreset.jsonl").read_bytes()).hexdigest()
    assert receipt["method"]["name"] == "random"


def test_named_fields_are_read_as_the_run_read_them(select: Select, tmp_path: Path) -> None:
    records = [
        {"id": str(row), "prompt": "no", "response": "no", "x": {"q": f"q{row}"}, "y": f"a{row}"} for row in range(3)
    ]
    run = select(write_pool(tmp_path / "pool.jsonl", records), "pool.prompt_field=x.q", "pool.response_field=y")
    lines = lines_of(export(run, "messages") / "messages.jsonl")
    assert sorted(line["messages"][1]["content"] for line in lines) == ["a0", "a1", "a2"]


def test_a_training_run_exports_its_selection(select: Select, pool: Path, tmp_path: Path, capsys) -> None:
    run = select(pool)
    training = tmp_path / "training"
    training.mkdir()
    run.rename(training / "selection")
    export(training, "jsonl")
    assert (training / "export" / "jsonl" / "coreset.jsonl").exists()
    # one that was given its coreset has none of its own
    given = tmp_path / "given"
    given.mkdir()
    (given / "manifest.json").write_text(json.dumps({"config": {"coreset": {"path": "there/coreset.jsonl"}}}))
    capsys.readouterr()
    assert main([str(given), "--format", "jsonl"]) == 2
    assert "coreset.path=there/coreset.jsonl; name the selection that wrote that file" in capsys.readouterr().err


def test_mistakes_end_with_one_line_and_2(select: Select, pool: Path, tmp_path: Path, capsys) -> None:
    run = select(pool)
    export(run, "messages", tmp_path / "out")
    cases = [
        ([str(tmp_path / "nowhere"), "--format", "jsonl"], "is not a directory"),
        ([str(tmp_path), "--format", "jsonl"], "holds no coreset.jsonl"),
        ([str(run)], "--format"),
        ([str(run), "--format", "csv"], "invalid choice: 'csv'"),
        ([str(run), "--format", "alpaca", "--output", str(tmp_path / "out")], "holds an export in the format messages"),
    ]
    for arguments, message in cases:
        capsys.readouterr()
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ")
        assert message in line
    (run / "manifest.json").rename(run / "away.json")
    assert main([str(run), "--format", "jsonl"]) == 2
    assert "the run did not finish" in capsys.readouterr().err
    (run / "away.json").rename(run / "manifest.json")
    (run / "coreset.jsonl").write_bytes((run / "coreset.jsonl").read_bytes().partition(b"\n")[0])
    assert main([str(run), "--format", "jsonl"]) == 2
    assert "has 1 records, but scores.parquet marks 19" in capsys.readouterr().err


def test_exporting_again_replaces(select: Select, pool: Path, tmp_path: Path) -> None:
    first, second = select(pool), select(pool, "selection.fraction=0.2")
    export(first, "messages", tmp_path / "out")
    before = export(first, "messages", tmp_path / "out") / "messages.jsonl"
    assert len(lines_of(before)) == 19
    export(second, "messages", tmp_path / "out")
    assert len(lines_of(before)) == len(lines_of(tmp_path / "out" / "scores.jsonl")) == 4
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_it_needs_no_torch(select: Select, pool: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from trim_lightning.cli.export import main; code = main(sys.argv[1:]); "
        "sys.exit(99 if 'torch' in sys.modules else code)"
    )
    command = [sys.executable, "-c", code, str(select(pool)), "--format", "parquet", "--output", str(tmp_path / "out")]
    assert subprocess.run(command, capture_output=True, timeout=600).returncode == 0
