"""Warm-up and fine-tuning of LoRA beside weights in 4 and 8 bits, from the command line's keys to the adapter."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from running import run_train
from training.conftest import TrainingFiles
from trim_lightning.errors import UserError
from trim_lightning.pipeline import checks
from trim_lightning.pipeline.train import Training

needs_library = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
Trained = Callable[..., Training]
EACH = pytest.mark.parametrize("bits", ["4bit", "8bit"])
NEAR = {"4bit": 0.15, "8bit": 0.02}  # nats a token; measured 0.07 and 0.006 on this tiny random model


@needs_library
@EACH
def test_losses_fall_as_those_of_whole_weights_do(bits: str, training_files: TrainingFiles, trained: Trained) -> None:
    given = ("train.epochs=3", training_files.held_out("plain"))
    whole = trained(*given, name="whole").metrics
    kept = trained(*given, f"model.quantize={bits}", name=bits).metrics
    for name in ("eval/nll_before", "eval/nll", "train/loss"):
        assert kept[name] == pytest.approx(whole[name], abs=NEAR[bits])
        assert kept[name] != whole[name]
    assert kept["eval/nll_drop"] > 0.3


@needs_library
@EACH
def test_the_adapter_is_plain_pefts_and_fits_the_whole_model(
    bits: str, training_files: TrainingFiles, trained: Trained
) -> None:
    run = trained(f"model.quantize={bits}", "train.epochs=3", training_files.held_out("plain"), name=bits)
    base = AutoModelForCausalLM.from_pretrained(training_files.root / "model", dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        after = PeftModel.from_pretrained(base, str(run.directory / "adapter"))(input_ids=ids).logits
    assert (after - before).abs().max() > 0.1


@needs_library
@EACH
def test_a_cut_training_goes_on_as_if_it_had_not_been_cut(
    bits: str,
    training_files: TrainingFiles,
    tmp_path: Path,
    power_cut: Callable[[int], AbstractContextManager[None]],
) -> None:
    given = (
        *training_files.train,
        f"model.quantize={bits}",
        "train.checkpoint_seconds=0.00001",
        "train.lora_dropout=0.2",
    )
    with power_cut(2):
        run_train(*given, output_dir=tmp_path / "resumed", store_dir=tmp_path / "broken")
    runs: list[Any] = [
        run_train(*given, output_dir=tmp_path / name, store_dir=tmp_path / store)
        for name, store in (("resumed", "broken"), ("unbroken", "whole"))
    ]
    files = [(run.directory / "adapter/adapter_model.safetensors").read_bytes() for run in runs]
    assert files[0] == files[1]


@needs_library
@pytest.mark.slow
def test_selection_and_training_with_one_quantised_model(training_files: TrainingFiles, tmp_path: Path) -> None:
    given = [value for value in training_files.select if value != "warmup=none"]
    line = (*given, "warmup.fraction=0.5", training_files.held_out("numbers"))
    runs = [
        run_train(*line, *more, output_dir=tmp_path / name, store_dir=tmp_path / "store")
        for name, more in (("whole", ()), ("kept", ("model.quantize=4bit",)))
    ]
    scores = [run.selection.scores.score for run in runs if run.selection is not None]
    assert 0 < np.nanmax(abs(scores[0] - scores[1])) < 0.2
    assert runs[1].metrics["eval/exact_match"] is not None


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["train=full"], "quantised weights are not trained, and train=full trains all"),
        (["trainer=fsdp", "trainer.devices=2"], "trainer=fsdp divides whole weights only; use trainer=ddp"),
        (["model.quantize=2bit"], "must be one of 4bit, 8bit"),
        ([], "needs the library bitsandbytes; run pip install 'trim-lightning[quantize]'"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    given: list[str], told: str, training_files: TrainingFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not given:
        monkeypatch.setattr(checks, "find_spec", lambda name: None)
    elif "train=full" in given:
        monkeypatch.setattr(checks, "find_spec", lambda name: name)
    with pytest.raises(UserError) as refusal:
        run_train(
            *training_files.train,
            "model.quantize=4bit",
            *given,
            output_dir=tmp_path / "run",
            store_dir=tmp_path / "store",
        )
    assert str(refusal.value).startswith("model.quantize=")
    assert told in str(refusal.value)
