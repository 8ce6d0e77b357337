"""Batches that do not fit into memory: halves, with the same results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaModel

from running import run_select, run_train
from tiny_models import write_records
from trim_lightning.cli.exits import mistake
from trim_lightning.engine.memory import in_halves, is_out_of_memory
from trim_lightning.errors import UserError

TOO_MUCH = 1 << 60  # bytes


def narrow(monkeypatch: pytest.MonkeyPatch, records: int) -> list[int]:
    """Let memory hold forward passes of so many records; the list gets the sizes that did not fit."""
    refused: list[int] = []
    forward = LlamaModel.forward

    def guarded(self: Any, *arguments: Any, **keywords: Any) -> Any:
        size = len(keywords["input_ids"] if "input_ids" in keywords else arguments[0])
        if size > records:
            refused.append(size)
            torch.empty(TOO_MUCH, dtype=torch.uint8)  # the allocator's own error
        return forward(self, *arguments, **keywords)

    monkeypatch.setattr(LlamaModel, "forward", guarded)
    return refused


def overrides(folder: Path, model: Path, *more: str) -> list[str]:
    write_records(folder / "pool.jsonl", 40, seed=1)
    write_records(folder / "targets.jsonl", 8, seed=2, edge_cases=False)
    return [
        "model=hf", f"model.path={model}", "model.dtype=float32", "pool=jsonl", "target=jsonl", "logger=none",
        f"pool.path={folder / 'pool.jsonl'}", f"target.path={folder / 'targets.jsonl'}", "selection.count=10",
        "saliency.num_layers=2", "warmup=none", "trainer=cpu", *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "method", ["trim", "trim_plus", "rds", "perplexity", pytest.param("less", marks=pytest.mark.slow)]
)
def test_a_pass_goes_on_in_halves_with_the_same_results(
    method: str, tmp_path: Path, tiny_folder: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    more = ["warmup=lora", "warmup.tokens_per_micro_batch=64"] if method == "less" else []
    words = overrides(tmp_path, tiny_folder("llama"), f"method={method}", *more)
    whole = run_select(*words, output_dir=tmp_path / "whole", store_dir=tmp_path / "store")
    refused = narrow(monkeypatch, 2)
    parts = run_select(*words, output_dir=tmp_path / "parts", store_dir=tmp_path / "other")
    assert len(refused) > 5 or method == "less"
    assert (parts / "coreset.jsonl").read_bytes() == (whole / "coreset.jsonl").read_bytes()
    if method != "less":
        scores = [pd.read_parquet(folder / "scores.parquet").score for folder in (parts, whole)]
        np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-4 if method == "trim_plus" else 0)
        assert "is run in halves" in caplog.text


def test_the_held_out_loss_goes_on_in_halves(tmp_path: Path, tiny_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = overrides(
        tmp_path, tiny_folder("llama"), "method=random", "train.tokens_per_micro_batch=1",
        "train.epochs=1", f"evaluation.path={tmp_path / 'targets.jsonl'}", "evaluation.exact_match=never",
    )  # fmt: skip
    whole = run_train(*words, output_dir=tmp_path / "whole", store_dir=tmp_path / "store")
    refused = narrow(monkeypatch, 1)
    parts = run_train(*words, output_dir=tmp_path / "parts", store_dir=tmp_path / "other")
    assert refused
    assert parts.metrics.keys() == whole.metrics.keys()
    before, after = (
        [json.loads(line) for line in (tmp_path / name / "predictions.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    )
    losses = [[line["nll"] for line in lines] for lines in (before, after)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_single_record_that_does_not_fit_is_one_clear_line(
    tmp_path: Path, tiny_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = overrides(tmp_path, tiny_folder("llama"))
    narrow(monkeypatch, 0)
    with pytest.raises(UserError, match=r"does not suffice for a single record of .* lower max_length"):
        run_select(*words, output_dir=tmp_path / "out", store_dir=tmp_path / "store")


def test_other_failures_are_not_taken_for_lack_of_memory() -> None:
    def step(batch: Mapping[str, Any]) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        in_halves(step, {"rows": torch.arange(4)})


def test_parts_come_back_in_order_whatever_the_size() -> None:
    for size in range(1, 9):
        batch = {"rows": torch.arange(size), "input_ids": torch.arange(2 * size).reshape(size, 2), "shard": 3}

        def step(part: Mapping[str, Any]) -> torch.Tensor:
            if len(part["rows"]) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            assert part["shard"] == 3
            rows = part["input_ids"]
            assert isinstance(rows, torch.Tensor)
            return rows

        torch.testing.assert_close(in_halves(step, batch), batch["input_ids"])


def test_lack_of_memory_elsewhere_is_one_clear_line() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(TOO_MUCH, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    line = mistake(caught.value)
    assert line is not None
    assert "tokens_per_micro_batch" in line
