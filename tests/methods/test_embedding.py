"""Embeddings through an encoder that counts letters, and through the real library where it is installed."""

from __future__ import annotations

import dataclasses
import json
import string
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from trim_lightning.errors import UserError
from trim_lightning.methods import embedding

LIBRARY = '''
import string
import numpy as np

CALLS = []

class SentenceTransformer:
    """Counts letters: a vector of 26."""

    def __init__(self, path, **options):
        CALLS.append("load")

    def encode(self, texts, batch_size, show_progress_bar, convert_to_numpy):
        CALLS.append(len(texts))
        return np.array([[text.lower().count(c) for c in string.ascii_lowercase] for text in texts], dtype=np.float32)
'''


@pytest.fixture
def encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A model folder, and a stand-in for the library that turns any folder into the letter counter."""
    package = tmp_path / "library" / "sentence_transformers"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(package.parent)
    for name in loaded_modules():
        monkeypatch.delitem(sys.modules, name)
    folder = tmp_path / "letters"
    folder.mkdir()
    (folder / "modules.json").write_text("[]")
    save_file({"weights": np.ones(1)}, folder / "model.safetensors")
    yield folder
    for name in loaded_modules():
        del sys.modules[name]


def loaded_modules() -> list[str]:
    """What is loaded of the library, real or not."""
    return [name for name in sys.modules if name.partition(".")[0] == "sentence_transformers"]


def text_of(record: dict[str, str], scope: str) -> str:
    return record["prompt"] + "\n" + record["response"] if scope == "all" else record[scope]


def cosines(method_runs, scope: str) -> np.ndarray:
    """``[targets, records]`` cosines of letter counts; 0 for a text without a letter."""

    def vector(record: dict[str, str]) -> np.ndarray:
        text = text_of(record, scope).lower()
        return np.array([text.count(letter) for letter in string.ascii_lowercase], dtype=float)

    table = np.zeros((len(method_runs.targets), len(method_runs.pool)))
    for i, target in enumerate(map(vector, method_runs.targets)):
        for j, record in enumerate(map(vector, method_runs.pool)):
            norm = np.linalg.norm(target) * np.linalg.norm(record)
            table[i, j] = target @ record / norm if norm else 0.0
    table[:, method_runs.scoped(scope) == 0] = np.nan
    return table


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(("scope", "aggregate"), [("all", "max"), ("prompt", "mean"), ("response", "max")])
def test_scores(method_runs, best_first, encoder: Path, scope: str, aggregate: str) -> None:
    result = method_runs.run(
        "method=embedding", f"method.path={encoder}", f"scope={scope}", f"method.aggregate={aggregate}",
        "selection.count=6",
    )  # fmt: skip
    table = cosines(method_runs, scope)
    expected = table.max(0) if aggregate == "max" else table.mean(0)
    np.testing.assert_allclose(result.scores.score, expected, atol=1e-6)
    assert result.chosen.tolist() == best_first(result.scores.score)[:6]


def test_single_targets_take_turns_and_may_have_a_prompt(method_runs, best_first, encoder: Path) -> None:
    path = f"method.path={encoder}"
    result = method_runs.run("method=embedding", path)
    by_id = method_runs.run("method=embedding", path, "method.aggregate=max", "target.group_field=id").scores
    queues = [best_first(scores) for scores in by_id.groups.values()]
    named = list(dict.fromkeys(row for turn in zip(*queues, strict=True) for row in turn))
    assert result.order.tolist() == named != best_first(by_id.score)
    np.testing.assert_array_equal(result.scores.score, by_id.score)
    prompted = method_runs.run("method=embedding", path, "method.target_prompt='query: '")
    assert not np.array_equal(prompted.scores.score, result.scores.score, equal_nan=True)
    shown = [{**target, "prompt": "query: " + target["prompt"]} for target in method_runs.targets]
    expected = cosines(dataclasses.replace(method_runs, targets=shown), "all").max(0)
    np.testing.assert_allclose(prompted.scores.score, expected, atol=1e-6)


def test_groups(method_runs, encoder: Path) -> None:
    result = method_runs.run("method=embedding", f"method.path={encoder}", "target.group_field=subtask")
    for place, group in enumerate(("first", "second")):
        np.testing.assert_allclose(result.scores.groups[group], cosines(method_runs, "all")[place::2].max(0), atol=1e-6)


def test_shards_that_are_there_are_kept(
    method_runs, encoder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(embedding, "SHARD", 10)
    run = ("method=embedding", f"method.path={encoder}")
    write, indexes = embedding.write_values, []

    def die_in_the_pool(directory: Path, index: int, rows: np.ndarray, values: np.ndarray) -> None:
        if index == 3:
            raise KeyboardInterrupt
        write(directory, index, rows, values)

    with monkeypatch.context() as patch:
        patch.setattr(embedding, "write_values", die_in_the_pool)
        with pytest.raises(KeyboardInterrupt):
            method_runs.run(*run, store=tmp_path / "store")

    def note(directory: Path, index: int, rows: np.ndarray, values: np.ndarray) -> None:
        indexes.append(index)
        write(directory, index, rows, values)

    monkeypatch.setattr(embedding, "write_values", note)
    result = method_runs.run(*run, store=tmp_path / "store")
    assert indexes == [3, 4]
    np.testing.assert_allclose(result.scores.score, cosines(method_runs, "all").max(0), atol=1e-6)
    # all is stored now: the library is not even asked for the model
    calls = sys.modules["sentence_transformers"].CALLS
    before = list(calls)
    method_runs.run(*run, store=tmp_path / "store")
    assert calls == before


def test_a_missing_path_library_or_model_is_a_user_error(
    method_runs, encoder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"method\.path: a value is needed"):
        method_runs.run("method=embedding")
    with pytest.raises(UserError, match=r"method\.path=.*nowhere: is no sentence-transformers model directory"):
        method_runs.run("method=embedding", f"method.path={tmp_path}/nowhere")
    (encoder / "model.safetensors").rename(encoder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no \*\.safetensors weights"):
        method_runs.run("method=embedding", f"method.path={encoder}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'trim-lightning\[embedding\]'"):
        method_runs.run("method=embedding", f"method.path={encoder}")


def test_the_real_library(method_runs, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    parts = pytest.importorskip("sentence_transformers.sentence_transformer.modules")  # 6.0 and later
    from transformers import AutoTokenizer, BertConfig, BertModel

    AutoTokenizer.from_pretrained(method_runs.root / "chat").save_pretrained(tmp_path / "bert")
    config = BertConfig(
        vocab_size=400, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    body = parts.Transformer(str(tmp_path / "bert"), max_seq_length=64)
    whole = library.SentenceTransformer(modules=[body, parts.Pooling(16)], device="cpu")
    whole.save(str(tmp_path / "sentences"))
    assert json.loads((tmp_path / "sentences" / "modules.json").read_text())

    result = method_runs.run("method=embedding", f"method.path={tmp_path}/sentences")
    pool, targets = (
        whole.encode([text_of(record, "all") for record in records], normalize_embeddings=True)
        for records in (method_runs.pool, method_runs.targets)
    )
    expected = (targets @ pool.T).max(0)
    expected[method_runs.scoped() == 0] = np.nan
    np.testing.assert_allclose(result.scores.score, expected, atol=1e-5)
