"""What all baselines share: their options compose, their files are the contract's, their runs repeat."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from composing import compose_select
from trim_lightning.errors import UserError
from trim_lightning.methods.base import load_selector, method_names, whole_method
from trim_lightning.runs.run import whole_config
from trim_lightning.settings.compose import config_directory
from trim_lightning.settings.schema import SelectSettings

MODEL_FREE = ("bm25", "dsir", "full", "longest")
ALONG_WARM_UP = ("cld", "less", "s2l", "tagcos")
BASELINES = (*MODEL_FREE, *ALONG_WARM_UP, "ifd", "perplexity", "rds")
WITH_TARGETS = ("bm25", "cld", "dsir", "less", "rds")


@pytest.mark.parametrize("name", method_names())
def test_every_method_has_an_option_that_composes(name: str) -> None:
    assert (config_directory() / "method" / f"{name}.yaml").is_file()
    needs = ["method.path=somewhere"] if name == "embedding" else []
    settings = compose_select([f"method={name}", "paths.output_dir=unused", *needs])
    assert settings.method["name"] == name
    load_selector(settings.method)


def test_a_method_is_noted_with_all_its_keys() -> None:
    assert whole_method({"name": "rds", "tokens": "scoped"}) == {
        "name": "rds", "use_warmup": False, "tokens": "scoped", "aggregate": "round_robin",
    }  # fmt: skip
    older = {"method": {"name": "perplexity"}, "seed": 3}
    assert whole_config(older, SelectSettings)["method.mode"] == "middle"
    assert whole_config({"method": {"name": "gone", "key": 1}}, SelectSettings)["method.key"] == 1
    with pytest.raises(UserError, match=r"method\.use_warmup: Value 'maybe' is not a valid bool"):
        load_selector({"name": "rds", "use_warmup": "maybe"})


def test_methods_that_score_responses_give_no_score_without_one(method_runs, tmp_path: Path) -> None:
    known = [name for name in method_names() if name != "embedding"]
    named = {name for name in known if load_selector({"name": name}).scores_responses()}
    assert named == {"cld", "ifd", "less", "perplexity", "s2l", "tagcos", "trim_plus"}
    assert not load_selector({"name": "perplexity", "tokens": "all"}).scores_responses()
    empty = [row for row, tokens in enumerate(method_runs.tokens(method_runs.pool)) if "response" not in tokens.kinds]
    for name in ("perplexity", "ifd", "tagcos"):
        along = ["method.num_checkpoints=2", "warmup.fraction=0.2"] if name in ALONG_WARM_UP else ["warmup=none"]
        result = method_runs.run(f"method={name}", *along, store=tmp_path)
        assert np.isnan(result.scores.score[empty]).all()


def test_helpers_are_no_methods() -> None:
    assert {*BASELINES, "embedding", "random", "trim"} <= set(method_names())
    assert not [name for name in method_names() if name.startswith("_")]


@pytest.mark.parametrize("name", BASELINES)
def test_files_follow_the_contract_and_repeat(method_runs, name: str, tmp_path: Path) -> None:
    along = ["method.num_checkpoints=2", "warmup.fraction=0.2"]
    overrides = along if name in ALONG_WARM_UP else ["warmup=none"]
    first, second = (method_runs.run(f"method={name}", *overrides, store=tmp_path / place) for place in "ab")
    table = pq.read_table(first.directory / "scores.parquet")
    assert table.num_rows == len(method_runs.pool)
    for part in ("mean", "max", "coverage"):
        assert table[part].null_count == len(method_runs.pool)
    assert table["num_tokens"].to_pylist() == method_runs.scoped().tolist()
    assert table["num_scored"].to_pylist() == method_runs.scoped().tolist()
    assert table["score"][2].as_py() is None, "row 2 has no text"
    assert table["rank"].null_count == table["score"].null_count
    for file in ("scores.parquet", "coreset.jsonl"):
        assert (first.directory / file).read_bytes() == (second.directory / file).read_bytes()
    manifest = json.loads((first.directory / "manifest.json").read_text())
    wanted = {"tokenize", "select"}
    wanted |= set() if name in ("full", "longest") else {"score"}
    wanted |= {"fingerprint"} if name in WITH_TARGETS else set()
    wanted |= {"warmup"} if name in ALONG_WARM_UP else set()
    assert set(manifest["stages"]) == wanted
    for stage, record in manifest["stages"].items():
        reads_model = name not in MODEL_FREE and stage in ("score", "fingerprint", "warmup")
        assert (record["tokens"] > 0) == (reads_model or stage == "tokenize")
        assert record["seconds"] >= 0
    assert ("target" in manifest["inputs"]) == (name in WITH_TARGETS)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("name", MODEL_FREE)
def test_methods_without_a_model_load_none(method_runs, name: str, tmp_path: Path) -> None:
    result = method_runs.run(f"method={name}", store=tmp_path)
    assert np.isnan(result.scores.score).sum() == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.aggregate=median", r"method\.aggregate=median: must be one of max, mean"),
        ("method.b=1.5", r"method\.b=1\.5: must be at most 1"),
        ("method.k2=1", r"method\.k2: method=bm25 has no such key; it has aggregate, b, k1"),
    ],
)
def test_wrong_keys_are_user_errors(method_runs, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        method_runs.run("method=bm25", override)
