"""The files of a selection, to the column, the type and the byte."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from cli.conftest import FINAL_NAMES, Inputs, Run
from running import run_select, selection
from tiny_models import HIDDEN, write_records
from trim_lightning.selection.ranking import budget_count

SCORES = [
    ("row", "int64"), ("id", "string"), ("score", "float"), ("mean", "float"), ("max", "float"), ("coverage", "float"),
    ("num_tokens", "int32"), ("num_scored", "int32"), ("rank", "int64"), ("selected", "bool"),
]  # fmt: skip


def columns(path: Path) -> list[tuple[str, str]]:
    """Names and types of a Parquet file's columns, in order."""
    return [(field.name, str(field.type).replace("element: ", "")) for field in pq.read_schema(path)]


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a Parquet file."""
    return pq.read_table(path).to_pylist()


@pytest.fixture
def arguments(inputs: Inputs) -> list[str]:
    """Overrides of a small selection, without its place and its store."""
    return [argument for argument in inputs.arguments if not argument.startswith("paths.")]


@pytest.fixture
def store(inputs: Inputs) -> Path:
    """The session's stage store."""
    return inputs.root / "store"


@pytest.fixture(scope="module")
def finished(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a selection with everything switched on, over a pool with hard cases."""
    given = [argument for argument in inputs.arguments if not argument.startswith("paths.")]
    return run_select(
        *given,
        "selection.fraction=0.2",
        "scoring.save_token_scores=true",
        output_dir=tmp_path_factory.mktemp("finished"),
        store_dir=inputs.root / "store",
    )


def test_every_file_is_there_and_nothing_else(finished: Path) -> None:
    written = {path.name for path in finished.iterdir()}
    assert {
        "scores.parquet", "coreset.jsonl", "token_scores.parquet", "target_tokens.parquet", "fingerprints.safetensors",
        "manifest.json", "metrics.csv",
    } <= written <= set(FINAL_NAMES)  # fmt: skip


def test_scores_columns(finished: Path) -> None:
    assert columns(finished / "scores.parquet") == SCORES


def test_scores_rows(finished: Path, inputs: Inputs) -> None:
    rows = read(finished / "scores.parquet")
    assert [row["row"] for row in rows] == list(range(40))
    assert [row["id"] for row in rows] == [f"r{row}" for row in range(40)]
    scored = [row for row in rows if row["score"] is not None]
    best_first = sorted(scored, key=lambda row: (-row["score"], row["row"]))
    assert [row["rank"] for row in best_first] == list(range(1, len(scored) + 1))
    assert [row["row"] for row in best_first[:8]] == [row["row"] for row in sorted(rows, key=rank) if row["selected"]]
    assert sum(row["selected"] for row in rows) == budget_count(40, 0.2) == 8
    for row in scored:
        assert row["score"] == pytest.approx(0.5 * row["mean"] + 0.5 * row["max"] + 0.05 * row["coverage"], abs=1e-6)
        assert row["num_scored"] == row["num_tokens"] > 0
        assert 0 <= row["coverage"] <= 1
        assert row["mean"] <= row["max"]


def rank(row: dict[str, Any]) -> int:
    """The rank of a row, unscored rows last."""
    return row["rank"] or 1_000_000


def test_records_that_cannot_be_scored(finished: Path, arguments: list[str], store: Path, tmp_path: Path) -> None:
    rows = read(finished / "scores.parquet")
    unscored = [row for row in rows if row["score"] is None]
    assert [row["id"] for row in unscored] == ["r2"]  # neither prompt nor response
    for row in unscored:
        assert {row[name] for name in ("mean", "max", "coverage", "rank")} == {None}
        assert (row["selected"], row["num_scored"]) == (False, 0)
    # even when everything is asked for, they stay out, and are spoken of
    result = selection(*arguments, "selection.fraction=1", output_dir=tmp_path, store_dir=store)
    assert len(result.chosen) == 39
    assert b'"r2"' not in (tmp_path / "coreset.jsonl").read_bytes()
    counts = result.manifest["counts"]
    assert (counts["pool"], counts["scored"], counts["unscored"], counts["selected"]) == (40, 39, 1, 39)
    warnings = result.manifest["warnings"]
    assert "1 of the pool's records could not be scored and are left out: r2" in warnings
    assert "only 39 of the 40 records of the budget could be selected" in warnings
    assert "39, 1 not (r2)" in result.summary


def test_scope_decides_what_cannot_be_scored(arguments: list[str], store: Path, tmp_path: Path) -> None:
    result = selection(*arguments, "scope=response", "max_length=64", output_dir=tmp_path, store_dir=store)
    rows = read(tmp_path / "scores.parquet")
    unscored = {row["id"] for row in rows if row["score"] is None}
    # no response, nothing at all, and a prompt so long that the cut leaves no response
    assert {"r1", "r2", "r5"} <= unscored
    assert result.manifest["counts"]["unscored"] == len(unscored)
    assert result.manifest["counts"]["truncated"] >= 2
    assert not any(row["selected"] for row in rows if row["id"] in unscored)
    assert f"truncated    {result.manifest['counts']['truncated']} records at 64 tokens" in result.summary


def test_coreset_is_the_input_byte_for_byte(arguments: list[str], store: Path, tmp_path: Path) -> None:
    lines = [
        b'{"prompt":"one two","response":"three \\u00e9 four"}',
        b'  { "response" : "a b c" ,\t"prompt" : "d e f" , "extra": [1, 2.50, {"k": null}] }  ',
        '{"prompt": "naïve 漢字 🙂", "response": "“yes”"}'.encode(),
        b'{"id": 7, "prompt": "5 plus 7", "response": "12", "id2": 1e3}',
        b'{"prompt": "same", "prompt": "later wins", "response": "x y"}',
    ]
    # a byte order mark, an empty line, both kinds of line ending, none at the end
    content = b"\xef\xbb\xbf" + lines[0] + b"\n\n" + lines[1] + b"\r\n" + lines[2] + b"\n" + lines[3] + b"\n" + lines[4]
    (tmp_path / "odd.jsonl").write_bytes(content)
    output = run_select(
        *arguments, f"pool.path={tmp_path / 'odd.jsonl'}", "selection.fraction=1", "warmup=none",
        output_dir=tmp_path / "out", store_dir=store,
    )  # fmt: skip
    rows = sorted(read(output / "scores.parquet"), key=rank)
    assert [row["id"] for row in sorted(rows, key=lambda row: row["row"])] == ["0", "2", "3", "7", "5"]
    expected = b"".join(lines[row["row"]] + b"\n" for row in rows)
    assert (output / "coreset.jsonl").read_bytes() == expected


def test_coreset_of_a_parquet_pool_is_its_json(arguments: list[str], store: Path, tmp_path: Path) -> None:
    records = [{"prompt": f"question {row}", "response": "é" * (row + 1), "n": row, "none": None} for row in range(6)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "pool.parquet")
    output = run_select(
        *arguments, "pool=parquet", f"pool.path={tmp_path / 'pool.parquet'}", "selection.count=3", "warmup=none",
        output_dir=tmp_path / "out", store_dir=store,
    )  # fmt: skip
    best = sorted((row for row in read(output / "scores.parquet") if row["selected"]), key=rank)
    lines = (output / "coreset.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [records[row["row"]] for row in best]
    assert len(lines) == 3


def test_token_scores(finished: Path) -> None:
    path = finished / "token_scores.parquet"
    assert columns(path) == [
        ("row", "int64"), ("id", "string"), ("token_ids", "list<int32>"), ("scope", "list<bool>"),
        ("similarity", "list<float>"), ("direct", "list<bool>"),
    ]  # fmt: skip
    tokens, scores = read(path), read(finished / "scores.parquet")
    assert [line["row"] for line in tokens] == list(range(40))
    for line, score in zip(tokens, scores, strict=True):
        assert line["id"] == score["id"]
        lists = [line[name] for name in ("token_ids", "scope", "similarity", "direct")]
        assert len({len(values) for values in lists}) == 1
        assert [value is not None for value in line["similarity"]] == line["scope"]
        assert not any(direct and not scope for direct, scope in zip(line["direct"], line["scope"], strict=True))
        similarity = [value for value in line["similarity"] if value is not None]
        assert len(similarity) == score["num_scored"]
        if score["score"] is not None:
            assert len(lists[0]) > len(similarity)  # scaffolding is there, and out of scope
            assert np.mean(similarity) == pytest.approx(score["mean"], abs=1e-5)
            assert max(similarity) == pytest.approx(score["max"], abs=1e-6)
            assert sum(line["direct"]) / len(similarity) == pytest.approx(score["coverage"], abs=1e-6)


def test_target_tokens(finished: Path, inputs: Inputs) -> None:
    path = finished / "target_tokens.parquet"
    assert columns(path) == [
        ("id", "string"), ("token_ids", "list<int32>"), ("scope", "list<bool>"), ("row_saliency", "list<float>"),
        ("column_saliency", "list<float>"), ("saliency", "list<float>"),
    ]  # fmt: skip
    lines = read(path)
    assert [line["id"] for line in lines] == [f"r{row}" for row in range(8)]
    for line in lines:
        for name in ("row_saliency", "column_saliency", "saliency"):
            assert [value is not None for value in line[name]] == line["scope"]
            assert all(0 <= value <= 1 for value in line[name] if value is not None)
        for row, column, saliency in zip(line["row_saliency"], line["column_saliency"], line["saliency"], strict=True):
            if saliency is not None:
                assert saliency == pytest.approx(max(0.5 * row + 0.5 * column, 1e-6), abs=1e-6)


def test_fingerprints(finished: Path) -> None:
    path = finished / "fingerprints.safetensors"
    tensors = load_file(path)
    classes = len(tensors["token_ids"])
    shapes = {name: values.shape for name, values in tensors.items()}
    assert shapes.pop("vectors") == (classes, HIDDEN)
    assert shapes == dict.fromkeys(("token_ids", "idf", "mass", "count"), (classes,))
    assert tensors["vectors"].dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(tensors["vectors"], axis=1), 1, atol=1e-5)
    assert len(set(tensors["token_ids"].tolist())) == classes
    # the classes are those of the targets' scoped tokens, as often as they occur
    seen = Counter(
        token
        for line in read(finished / "target_tokens.parquet")
        for token, scope in zip(line["token_ids"], line["scope"], strict=True)
        if scope
    )
    assert dict(zip(tensors["token_ids"].tolist(), tensors["count"].tolist(), strict=True)) == dict(seen)
    with safe_open(path, "np") as file:
        assert file.metadata()


def test_manifest(finished: Path, inputs: Inputs) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    assert list(manifest)[:7] == ["config", "versions", "git", "inputs", "stages", "counts", "warnings"]
    assert manifest["config"]["selection"]["fraction"] == 0.2
    assert manifest["config"]["model"]["dtype"] == "float32"
    assert {"python", "torch", "transformers", "trim-lightning"} <= set(manifest["versions"])
    for role, rows in (("pool", 40), ("target", 8)):
        assert manifest["inputs"][role]["rows"] == rows
        assert len(manifest["inputs"][role]["sha256"]) == 64
    assert manifest["inputs"]["model"]["name"] == "tiny"
    assert {"warmup", "fingerprint", "score", "select"} <= set(manifest["stages"])
    for name, stage in manifest["stages"].items():
        trained = ["lora"] if name == "warmup" else []
        assert list(stage) == ["key", "seconds", "tokens", "tokens_per_second", "cached", "versions", *trained]
        assert (stage["key"] is None) == (name == "select")
        assert isinstance(stage["cached"], bool)
        if stage["tokens"]:
            assert stage["tokens_per_second"] == pytest.approx(stage["tokens"] / stage["seconds"], rel=0.01)
    assert {"pool", "unscored", "truncated", "selected", "fallback_share"} <= set(manifest["counts"])
    tokens = read(finished / "token_scores.parquet")
    assert manifest["stages"]["score"]["tokens"] == sum(len(line["token_ids"]) for line in tokens)
    targets = read(finished / "target_tokens.parquet")
    assert manifest["stages"]["fingerprint"]["tokens"] == sum(len(line["token_ids"]) for line in targets)
    scoped = [direct for line in tokens for direct, scope in zip(line["direct"], line["scope"], strict=True) if scope]
    assert manifest["counts"]["fallback_share"] == pytest.approx(1 - np.mean(scoped))


@pytest.mark.parametrize("aggregate", ["max", "mean", "round_robin"])
def test_target_groups(aggregate: str, arguments: list[str], store: Path, tmp_path: Path) -> None:
    output = run_select(
        *arguments, "target.group_field=subtask", f"target.aggregate={aggregate}", "target.num_examples=3",
        "selection.count=6", "scoring.save_token_scores=true", output_dir=tmp_path, store_dir=store,
    )  # fmt: skip
    groups = ["alpha", "beta"]
    assert columns(output / "scores.parquet") == [*SCORES, *((f"score/{group}", "float") for group in groups)]
    rows = read(output / "scores.parquet")
    scored = [row for row in rows if row["score"] is not None]
    assert len(scored) == 39
    combine = np.mean if aggregate == "mean" else max
    for row in scored:
        parts = [row[f"score/{group}"] for group in groups]
        assert None not in parts
        assert row["score"] == pytest.approx(combine(parts), abs=1e-6)
    assert any(row["score/alpha"] != row["score/beta"] for row in scored)
    chosen = [row["row"] for row in sorted(rows, key=rank) if row["selected"]]
    if aggregate == "round_robin":
        free, expected = {row["row"]: row for row in scored}, []
        while len(expected) < 6:
            group = groups[len(expected) % 2]
            best = max(free.values(), key=lambda row: (row[f"score/{group}"], -row["row"]))
            expected.append(best["row"])
            del free[best["row"]]
    else:
        expected = [row["row"] for row in sorted(scored, key=lambda row: (-row["score"], row["row"]))[:6]]
    assert chosen == expected
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["inputs"]["target"]["groups"] == {"alpha": 3, "beta": 3}
    names = [name for name, _ in columns(output / "token_scores.parquet")]
    assert names[4:] == ["similarity/alpha", "direct/alpha", "similarity/beta", "direct/beta"]
    tensors = load_file(output / "fingerprints.safetensors")
    assert {name.rpartition("/")[0] for name in tensors} == set(groups)


def test_target_from_pool(arguments: list[str], store: Path, tmp_path: Path) -> None:
    given = [argument for argument in arguments if not argument.startswith("target")]
    drawn = []
    for seed in (1, 1, 2):
        output = run_select(
            *given, "target=from_pool", "target.num_examples=4", f"seed={seed}", "warmup=none",
            output_dir=tmp_path / f"out{len(drawn)}", store_dir=store,
        )  # fmt: skip
        ids = [line["id"] for line in read(output / "target_tokens.parquet")]
        assert set(ids) <= {f"r{row}" for row in range(40)}
        assert json.loads((output / "manifest.json").read_text())["inputs"]["target"]["rows"] == 4
        drawn.append(ids)
    assert drawn[0] == drawn[1] != drawn[2]


def test_random_has_no_parts(arguments: list[str], store: Path, tmp_path: Path) -> None:
    output = run_select(*arguments, "method=random", output_dir=tmp_path, store_dir=store)
    assert columns(output / "scores.parquet") == SCORES
    rows = read(output / "scores.parquet")
    assert {row[name] for row in rows for name in ("mean", "max", "coverage")} == {None}
    assert [row["id"] for row in rows if row["score"] is None] == ["r2"]
    assert len({row["score"] for row in rows if row["score"] is not None}) == 39
    assert sum(row["selected"] for row in rows) == 2
    manifest = json.loads((output / "manifest.json").read_text())
    assert "target" not in manifest["inputs"]
    assert manifest["counts"]["fallback_share"] is None


def test_a_run_into_the_same_directory_leaves_nothing_of_the_first(
    arguments: list[str], store: Path, tmp_path: Path
) -> None:
    run_select(*arguments, "scoring.save_token_scores=true", output_dir=tmp_path, store_dir=store)
    assert (tmp_path / "token_scores.parquet").exists()
    run_select(*arguments, "method=random", output_dir=tmp_path, store_dir=store)
    left = {path.name for path in tmp_path.iterdir()}
    assert not left & {"token_scores.parquet", "target_tokens.parquet", "fingerprints.safetensors"}
    assert {"scores.parquet", "coreset.jsonl", "manifest.json"} <= left


def test_no_home_path_and_no_secret_in_any_file(
    run: Run, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home" / "jane"
    home.mkdir(parents=True)
    write_records(home / "pool.jsonl", 12, seed=4)
    canaries = {"HF_TOKEN": "hf_canary0123456789", "WANDB_API_KEY": "c" * 40, "AWS_SECRET_ACCESS_KEY": "aws-canary"}
    for name, value in {**canaries, "HOME": str(home)}.items():
        monkeypatch.setenv(name, value)
    for number, path in enumerate(["~/pool.jsonl", str(home / "pool.jsonl")]):
        outcome = run(
            *inputs.arguments, f"pool.path={path}", "target=from_pool", "target.path=null", "target.num_examples=3",
            "warmup=none",
            "scoring.save_token_scores=true", f"paths.output_dir=out{number}",
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        manifest = json.loads((tmp_path / f"out{number}" / "manifest.json").read_text())
        assert manifest["config"]["pool"]["path"] == ".../pool.jsonl"
        results = list((tmp_path / f"out{number}").rglob("*"))
        assert len(results) >= 7
        for file in results:
            assert file.name == "local.json" or str(home).encode() not in file.read_bytes(), file
        for file in [*results, *(path for path in (tmp_path / "outputs").rglob("*") if path.is_file())]:
            for canary in canaries.values():
                assert canary.encode() not in file.read_bytes(), file
        assert not any(canary in outcome.out + outcome.err for canary in canaries.values())


def test_a_coreset_of_answers_of_a_word_is_told(arguments: list[str], store: Path, tmp_path: Path) -> None:
    def records(name: str, prompts: list[tuple[str, str]]) -> str:
        lines = [json.dumps({"id": str(n), "prompt": one, "response": two}) for n, (one, two) in enumerate(prompts)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return str(tmp_path / name)

    short = [(f"is {number} even", "no") for number in range(12)]
    long = [(f"tell of the sea {number}", "far away there was a ship and it sailed on " * 2) for number in range(30)]
    pool, targets = records("pool.jsonl", [*short, *long]), records("targets.jsonl", short[:3])
    common = [*arguments, "method=bm25", f"pool.path={pool}", f"target.path={targets}"]
    for count, told in ((12, True), (42, False), (9, False)):
        result = selection(*common, f"selection.count={count}", output_dir=tmp_path / str(count), store_dir=store)
        found = [line for line in result.manifest["warnings"] if "little to learn from" in line]
        assert bool(found) == told
    budget = ["selection.tokens=100", "selection.token_scope=response", "selection.count=null"]
    result = selection(*common, *budget, output_dir=tmp_path / "tokens", store_dir=store)
    assert not [line for line in result.manifest["warnings"] if "little to learn from" in line]
