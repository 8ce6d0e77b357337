"""Inputs that no method can use end with one clear line before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from running import run_select
from tiny_models import build_tiny_model
from trim_lightning.errors import UserError

GOOD = {"prompt": "Add 2 and 3.", "response": "5"}


def start(tmp_path: Path, *overrides: str, target: object = GOOD) -> Path:
    for name, record in (("pool", GOOD), ("targets", target)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    if not (tmp_path / "model").exists():
        build_tiny_model("llama", tmp_path / "model")
    keys = (f"model.path={tmp_path}/model", f"pool.path={tmp_path}/pool.jsonl", f"target.path={tmp_path}/targets.jsonl")
    fixed = ("model=hf", "pool=file", "target=file", "warmup=none", "logger=none", "report.enabled=false")
    fixed += ("selection.count=1", "saliency.num_layers=2")
    return run_select(*fixed, *keys, *overrides, output_dir=tmp_path / "out", store_dir=tmp_path / "store")


def test_tokens_beyond_the_embedding(tmp_path: Path) -> None:
    build_tiny_model("llama", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model.resize_token_embeddings(40)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"its tokenizer gives the token \d+, and the model has .* 0 to 39"):
        start(tmp_path)


def test_weights_of_other_shapes_than_the_config_says(tmp_path: Path) -> None:
    build_tiny_model("llama", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 40}))
    with pytest.raises(UserError, match=r"not the shapes that its config\.json says: look at vocab_size"):
        start(tmp_path)


@pytest.mark.parametrize("method", ["trim", "bm25", "rds"])
def test_targets_that_cannot_be_rendered_or_have_no_response(method: str, tmp_path: Path) -> None:
    template = "{% for m in messages %}{% if 'hush' in m.content %}{{ raise_exception('no such talk') }}{% endif %}"
    (tmp_path / "t.jinja").write_text(template + "<{{ m.role }}>{{ m.content }}{% endfor %}")
    refused = {"prompt": "hush", "response": "b"}
    with pytest.raises(UserError, match=r"none of the 1 targets can be rendered; .*no such talk"):
        start(tmp_path, f"method={method}", f"model.chat_template={tmp_path}/t.jinja", target=refused)
    mute = {"messages": [{"role": "user", "content": "Add."}]}
    with pytest.raises(UserError, match=r"the target set has no response; .*scope=prompt"):
        start(tmp_path, f"method={method}", target=mute)
    assert (start(tmp_path, f"method={method}", "scope=prompt", target=mute) / "coreset.jsonl").is_file()


def test_bad_records_are_listed_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps(GOOD) + "\n{]\n")
    out = start(tmp_path, "method=longest", f"pool.path={tmp_path}/bad.jsonl", "pool.bad_records=skip")
    (line,) = (out / "bad_records.jsonl").read_text().splitlines()
    assert json.loads(line)["place"] == "line 2"
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["inputs"]["pool"]["bad_records"] == 1
    assert any("1 lines cannot be read and are left out" in line for line in manifest["warnings"])
